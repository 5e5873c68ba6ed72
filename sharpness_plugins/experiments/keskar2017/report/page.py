"""The report as one HTML page that needs nothing else: no scripts, no fonts, no requests."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from ..record import Problem
from .datasets import Dataset
from .drawing import Rendered
from .guide import CAUTIONS, HOW_TO_READ
from .published import PAPER_URL
from .reading import Reading, words_of_study
from .remarks import answer, checks, count_of_agreement, missing
from .style import CSS
from .tables import Table
from .verdicts import Agreement, Claim

__all__ = ["Contents", "page"]

UNBREAKABLE = "\N{NON-BREAKING HYPHEN}"
MARKS = {
    Agreement.YES: ("yes", "✓"),
    Agreement.PARTLY: ("partly", "≈"),
    Agreement.NO: ("no", "✗"),
    Agreement.UNKNOWN: ("unknown", "–"),
}


@dataclass(frozen=True)
class Contents:
    """All that a page is made of; tables and figures by name."""

    reading: Reading
    claims: Sequence[Claim]
    tables: Mapping[str, Table]
    figures: Sequence[Rendered]
    datasets: Sequence[Dataset]


@dataclass(frozen=True)
class _Section:
    """``tables`` and ``figures`` by name, or by the beginning of a name; ``absent`` is said where there is neither."""

    key: str
    title: str
    tables: tuple[str, ...]
    figures: tuple[str, ...]
    absent: str
    about: str = ""


SECTIONS = (
    _Section(
        "tables",
        "The paper's tables",
        ("table2", "table3", "table4"),
        ("table3",),
        "Tables 2 to 4 need the studies protocol or matched loss.",
    ),
    _Section(
        "line",
        "Figure 3: between the two minima",
        (),
        ("figure3",),
        "No line between two minima is in the record.",
        "Both axes of the paper's figure; the ends are the two trained networks.",
    ),
    _Section("sizes", "Figure 4: batch sizes", (), ("figure4",), "Figure 4 needs the study batch sizes."),
    _Section("warm", "Figure 5: the warm start", ("figure5",), ("figure5",), "Figure 5 needs the study warm start."),
    _Section("loss", "Figure 6: sharpness against loss", (), ("figure6",), "Figure 6 needs trainings that were watched."),
    _Section(
        "spectrum",
        "Eigenvalues: large against near zero",
        ("counts",),
        ("density",),
        "The Hessian was measured on no network at equal loss.",
        "The paper defines a sharp minimum by many large positive eigenvalues of the Hessian and a flat one by many "
        "small ones, and "
        "measures neither. Here are both.",
    ),
    _Section("cone", "Not a cone", ("cone",), ("cone",), "No directions were tried."),
    _Section("distances", "Distances from the start", ("distances",), ("distances",), "No distances are in the record."),
    _Section("remedies", "Remedies", ("remedies",), ("remedies",), "The study remedies was not run."),
    _Section(
        "controls",
        "Controls that the paper lacks",
        ("controls",),
        ("controls",),
        "No control was run beside the protocol.",
        "The paper holds the recipe equal, and with it neither the loss nor the number of steps. Sharpness depends on both.",
    ),
)


def page(contents: Contents) -> str:
    """The whole document."""
    reading = contents.reading
    title = "Keskar et al. (2017), reproduced"
    main = reading.record.problems.get("main")
    if main is not None:
        title += f": {main.network} on {reading.record.settings.get('data', main.data)}"
    anchors = [
        ("agreement", "Paper · here · agrees?"),
        ("run", "What was run"),
        *((section.key, section.title) for section in SECTIONS),
        ("sentences", "What the numbers say"),
        ("reading", "How to read"),
        ("cautions", "What must not be concluded"),
        ("files", "Files"),
    ]
    links = "".join(f'<li><a href="#{key}">{escape(name)}</a></li>' for key, name in anchors)
    parts = [
        f'<header><h1>{escape(title)}</h1><p class="answer">{escape(" ".join(answer(reading, contents.claims)))}</p>',
        f"<p>{escape(count_of_agreement(contents.claims))}</p>",
        "<p>The paper: N. S. Keskar, D. Mudigere, J. Nocedal, M. Smelyanskiy, P. T. P. Tang, “On Large-Batch "
        "Training for "
        "Deep Learning: Generalization Gap and Sharp Minima”, ICLR 2017, "
        f'<a href="{PAPER_URL}">arXiv 1609.04836</a>.</p></header>',
        f'<nav aria-label="Contents"><ul>{links}</ul></nav><main>',
        _agreement(contents.claims, reading),
        _run(reading),
        *(_section(section, contents) for section in SECTIONS),
        _sentences(reading),
        _listing("reading", "How to read each number", HOW_TO_READ),
        _listing("cautions", "What must not be concluded", CAUTIONS),
        _files(contents),
        "</main>",
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{CSS}</style>\n</head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


# --- sections


def _agreement(found: Sequence[Claim], reading: Reading) -> str:
    rows = []
    for claim in found:
        css, mark = MARKS[claim.agrees]
        verdict = f'<span class="verdict {css}"><span aria-hidden="true">{mark}</span> {escape(str(claim.agrees))}</span>'
        reason = f'<span class="reason">{escape(claim.reason)}</span>' if claim.reason else ""
        rule = f'<span class="rule">Rule: {escape(claim.rule)}.</span>'
        rows.append(
            f'<tr id="claim-{escape(claim.key)}"><th scope="row"><span class="where">{escape(claim.where)}</span>'
            f"{escape(_capital(claim.short))}</th>"
            f'<td data-label="Paper">{escape(claim.paper)}</td><td data-label="Here">{escape(claim.here)}</td>'
            f'<td data-label="Verdict">{verdict}{reason}{rule}</td></tr>'
        )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("Claim", "Paper", "Here", "Agrees?"))
    table = (
        '<div class="scroll"><table class="agreement"><caption><span>What the paper says, what was found, and whether it '
        f"agrees by the rule given</span></caption><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        "</div>"
    )
    lacking = missing(reading)
    said = f"<h3>What is missing</h3>{_bullets(lacking)}" if lacking else ""
    return _wrapped("agreement", "Paper · here · agrees?", table + said)


def _run(reading: Reading) -> str:
    record = reading.record
    lines: list[tuple[str, str]] = []
    for key, problem in record.problems.items():
        lines.append(("Network and data" if key == "main" else f"For {key.replace('_', ' ')}", _problem(problem)))
    lines.append(("Seeds", ", ".join(map(str, record.seeds)) or "none"))
    for study, roles in record.studies.items():
        lines.append((study.replace("_", " ").capitalize(), words_of_study(roles)))
    lines.append(("Versions", ", ".join(f"{name} {number}" for name, number in record.versions.items()) or "not recorded"))
    described = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in lines)
    settings = escape(json.dumps(record.settings, indent=1, ensure_ascii=False, sort_keys=True, default=str))
    inside = (
        "<p>This command gives the same numbers on the same machine with the same "
        f"versions:</p><pre><code>{escape(record.command)}"
        f"</code></pre><dl>{described}</dl><details><summary>All "
        f"settings</summary><pre><code>{settings}</code></pre></details>"
    )
    consistent = checks(reading)
    if consistent:
        inside += f"<h3>Checks</h3>{_bullets(consistent)}"
    return _wrapped("run", "What was run", inside)


def _problem(problem: Problem) -> str:
    norm = {
        "none": "no BatchNorm",
        "batch": "BatchNorm with batch statistics",
        "running": "BatchNorm with running statistics",
    }
    return (
        f"{problem.network}: {problem.description}, {problem.dim:,} weights, "
        f"{norm.get(problem.batch_norm, problem.batch_norm)}; "
        f"{problem.data}, {problem.num_train:,} training and {problem.num_test:,} test samples, "
        f"{problem.num_classes} classes "
        f"(SHA-256 of the first seed's tensors: {problem.checksum[:16]}…)"
    )


def _section(section: _Section, contents: Contents) -> str:
    tables = [contents.tables[name] for name in section.tables if name in contents.tables]
    figures = [f for f in contents.figures if any(f.drawing.name.startswith(name) for name in section.figures)]
    inside = f"<p>{escape(section.about)}</p>" if section.about else ""
    if not tables and not figures:
        inside += f'<p class="missing">Nothing to show: {escape(section.absent)}</p>'
    inside += "".join(map(_table, tables)) + "".join(map(_figure, figures))
    return _wrapped(section.key, section.title, inside)


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(cell.replace("-", UNBREAKABLE))}</th>' for cell in table.head)
    rows = "".join(
        f'<tr class="{"paper" if row[0].startswith("paper") else "here"}"><th scope="row">{escape(row[0])}</th>'
        + "".join(f'<td class="number">{escape(cell)}</td>' for cell in row[1:])
        + "</tr>"
        for row in table.rows
    )
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    return (
        f'<div class="scroll"><table class="number-table" id="table-{escape(table.name)}">'
        f"<caption><span>{escape(table.caption)}</span></caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        f"</div>{notes}"
    )


def _figure(rendered: Rendered) -> str:
    drawing = rendered.drawing
    links = ", ".join(f'<a href="figures/{drawing.name}.{kind}">{kind.upper()}</a>' for kind in ("pdf", "png"))
    return (
        f'<figure id="figure-{escape(drawing.name)}"><h3>{escape(drawing.title)}</h3>'
        f'<div class="scroll">{rendered.svg}</div>'
        f'<figcaption>{escape(drawing.caption)} <span class="downloads">({links})</span></figcaption></figure>'
    )


def _sentences(reading: Reading) -> str:
    said = list(reading.record.sentences)
    inside = _bullets(said) if said else '<p class="missing">The record has no sentences.</p>'
    return _wrapped("sentences", "What the numbers say", inside)


def _listing(key: str, title: str, entries: Iterable[tuple[str, str]]) -> str:
    inside = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in entries)
    return _wrapped(key, title, f'<dl class="guide">{inside}</dl>')


def _files(contents: Contents) -> str:
    rows = [("report.html", "this page"), ("record.json", "everything that was measured, as one JSON file")]
    rows += [(f"data/{dataset.name}.csv", f"{dataset.title}; {len(dataset.rows)} rows") for dataset in contents.datasets]
    for rendered in contents.figures:
        rows += [
            (f"figures/{rendered.drawing.name}.{kind}", f"{rendered.drawing.title} ({kind.upper()})")
            for kind in ("pdf", "png")
        ]
    body = "".join(
        f'<tr><th scope="row"><a href="{escape(name)}">{escape(name)}</a></th><td>{escape(text)}</td></tr>'
        for name, text in rows
    )
    head = '<th scope="col">File</th><th scope="col">What is in it</th>'
    return _wrapped(
        "files",
        "Files",
        "<p>Beside this page, in its folder:</p>"
        f'<div class="scroll"><table class="files"><caption>Index of files</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>",
    )


# --- parts


def _wrapped(key: str, title: str, inside: str) -> str:
    return f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{escape(title)}</h2>{inside}</section>'


def _bullets(said: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in said) + "</ul>"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
