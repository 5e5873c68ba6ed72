"""What an experiment writes: each file appears complete or not at all."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["csv_text", "versions", "write_atomically", "write_results"]


def versions() -> dict[str, str]:
    """Of what the numbers may depend on, as far as it is installed."""
    found = {"python": platform.python_version()}
    for name in ("sharpness-plugins", "torch", "numpy", "scipy", "scikit-learn", "matplotlib"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def csv_text(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return text.getvalue()


def write_results(
    folder: Path, *, data: Mapping[str, Any], table: str, rows: str, figures: Mapping[str, Figure]
) -> list[Path]:
    """``results.json``, ``results.csv``, ``table.txt`` and the pictures by their names; an old file stays if this fails."""
    folder.mkdir(parents=True, exist_ok=True)
    contents: dict[str, bytes] = {
        "results.json": json.dumps(data, indent=2, allow_nan=False).encode(),
        "results.csv": rows.encode(),
        "table.txt": f"{table}\n".encode(),
    }
    for name, figure in figures.items():
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=150)
        contents[name] = png.getvalue()
    for name, content in contents.items():
        write_atomically(folder / name, content)
    return [folder / name for name in contents]


def write_atomically(path: Path, content: bytes) -> None:
    """Complete or not at all, also when the process is killed meanwhile."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
