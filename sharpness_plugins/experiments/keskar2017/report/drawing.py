"""One style for every figure, and its bytes as PDF, PNG and as SVG within a page: the same ones on every run."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from ....errors import missing_dependency
from ....plots import BLUE, GREEN, GREY, ORANGE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Drawing", "Rendered", "render"]

STYLE = {
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "figure.titlesize": 9.0,
    "legend.fontsize": 8.0,
    "axes.spines.top": False,
    "figure.constrained_layout.wspace": 0.06,
    "pdf.fonttype": 42,  # text stays text, to be searched and edited
    "svg.fonttype": "none",
    "svg.hashsalt": "keskar2017",  # else the names inside are drawn at random
}
FONTS = "'DejaVu Sans', Verdana, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"
COLOURS = {  # of matplotlib's output -> of the page, which has a light and a dark set
    "#000000": "var(--ink)",
    "#262626": "var(--ink)",
    "#b0b0b0": "var(--rule)",
    "#ffffff": "var(--paper)",
    BLUE.lower(): "var(--blue)",
    ORANGE.lower(): "var(--orange)",
    GREEN.lower(): "var(--green)",
    GREY.lower(): "var(--grey)",
}


@dataclass(frozen=True)
class Drawing:
    """A figure still to be drawn.

    Attributes:
        name: of its files, and of its CSV file.
        caption: what is shown, how many seeds, what the bars are.
        alt: what one sees, for who does not see it.
    """

    name: str
    title: str
    caption: str
    alt: str
    draw: Callable[[], Figure]


@dataclass(frozen=True)
class Rendered:
    """``svg`` is an element for a page, in the page's own colours."""

    drawing: Drawing
    pdf: bytes
    png: bytes
    svg: str


def render(drawing: Drawing) -> Rendered:
    """Raises an ImportError that says what to install, without matplotlib."""
    with _style():
        figure = drawing.draw()
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # the same places in every format, found once
        return Rendered(
            drawing,
            pdf=_saved(figure, "pdf", {"CreationDate": None, "Producer": None, "Creator": None}),
            png=_saved(figure, "png", {"Software": None}),
            svg=_for_a_page(_saved(figure, "svg", {"Date": None, "Creator": None}, transparent=True).decode(), drawing),
        )


@contextlib.contextmanager
def _style() -> Iterator[None]:
    """Whatever the user's own matplotlibrc says, which comes back."""
    matplotlib = missing_dependency("matplotlib", extra="plots", purpose="the report's figures")
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def _saved(figure: Figure, kind: str, metadata: dict[str, None], *, transparent: bool = False) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format=kind, dpi=150, metadata=metadata, transparent=transparent)
    return content.getvalue()


def _for_a_page(svg: str, drawing: Drawing) -> str:
    """Without a prolog, with names of its own, scalable, and in colours that follow the page."""
    body = svg[svg.index("<svg") :].strip()
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    name = escape(f"svg-{drawing.name}", quote=True)
    body = re.sub(r'( id="|url\(#|xlink:href="#)', rf"\1{name}-", body)
    body = re.sub(r"#[0-9a-f]{6}\b", lambda found: COLOURS.get(found[0], found[0]), body)
    body = re.sub(r"(font: [\d.]+px|font-family:) [^;\"]*", rf"\1 {FONTS}", body)
    box = re.search(r'viewBox="[^"]*"', body)
    opening = (
        f'<svg {box[0] if box else ""} xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'role="img" aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{escape(drawing.title)}</title><desc id="{name}-desc">{escape(drawing.alt)}</desc>'
    )
    return re.sub(r"^<svg[^>]*>", lambda _: opening, body, count=1, flags=re.DOTALL)
