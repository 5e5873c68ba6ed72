"""From a record to the files of its report."""

from __future__ import annotations

from pathlib import Path

from .... import files
from ..record import Record
from .agreement import claims
from .datasets import all_datasets
from .drawing import render
from .figures import all_drawings
from .page import Contents, page
from .reading import Reading
from .tables import agreement_table, all_tables

__all__ = ["markdown_tables", "write_report"]


def write_report(record: Record, folder: Path) -> list[Path]:
    """Write the page, its figures and their data into ``folder``; the same record gives the same bytes.

    ``report.html`` needs none of the other files to be read: ``record.json``, ``figures/*.pdf`` and ``.png``,
    ``data/*.csv``. Each file appears complete or not at all. What the record lacks is said in the page.

    Returns:
        what was written, the page first.
    Raises:
        ImportError: matplotlib is not installed; said before anything is written.
        OSError: the folder cannot be written to.
    """
    reading = Reading(record)
    found = claims(reading)
    rendered = [render(drawing) for drawing in all_drawings(reading)]
    datasets = all_datasets(reading, found)
    contents = {
        "report.html": page(Contents(reading, found, all_tables(reading), rendered, datasets)).encode(),
        "record.json": record.to_json().encode(),
    }
    contents |= {f"data/{dataset.name}.csv": dataset.csv.encode() for dataset in datasets}
    for figure in rendered:
        contents |= {f"figures/{figure.drawing.name}.pdf": figure.pdf, f"figures/{figure.drawing.name}.png": figure.png}
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, content)
    return [folder / name for name in contents]


def markdown_tables(record: Record) -> str:
    """Every table of the report, for a README."""
    reading = Reading(record)
    tables = [agreement_table(claims(reading)), *all_tables(reading).values()]
    return "\n\n".join(table.markdown() for table in tables)
