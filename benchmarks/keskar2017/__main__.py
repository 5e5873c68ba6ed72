"""The README's tables and the report from the records beside it: ``python -m benchmarks.keskar2017 --write`` after a run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from sharpness_plugins.experiments.keskar2017.record import Record
from sharpness_plugins.experiments.keskar2017.report import markdown_tables, write_report

from . import rescaling

__all__ = ["FOLDER", "main", "updated"]

FOLDER = Path(__file__).parent


def results(folder: Path) -> str:
    """Tables and sentences of ``folder/record.json``; nothing where there is none."""
    if not (folder / "record.json").exists():
        return ""
    record = Record.read(folder)
    told = "\n".join(f"- {sentence}" for sentence in record.sentences)
    return f"`{record.command}`, seeds {', '.join(map(str, record.seeds))}:\n\n{told}\n\n{markdown_tables(record)}"


def updated(readme: str, folder: Path = FOLDER) -> str:
    """The README with what the records say between each pair of markers."""
    rows = json.loads((folder / "rescaling.json").read_text(encoding="utf-8"))
    for name, content in (("rescaling", rescaling.table(rows)), ("results", results(folder))):
        before, found, rest = readme.partition(f"<!-- {name} -->\n")
        _, ended, after = rest.partition(f"<!-- end of {name} -->\n")
        if not found or not ended:
            raise ValueError(f"the README has no markers <!-- {name} --> and <!-- end of {name} --> on lines of their own")
        readme = f"{before}{found}\n{content}\n\n{ended}{after}" if content else f"{before}{found}{ended}{after}"
    return readme


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.keskar2017", description=__doc__)
    parser.add_argument(
        "--write", action="store_true", help="into the README, and the report beside it, instead of printing the README"
    )
    chosen = parser.parse_args(arguments)
    readme = updated((FOLDER / "README.md").read_text(encoding="utf-8"))
    if chosen.write:
        (FOLDER / "README.md").write_text(readme, encoding="utf-8")
        write_report(Record.read(FOLDER), FOLDER)
    else:
        print(readme)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
