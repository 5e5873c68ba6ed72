"""``python -m benchmarks.optimizers --out benchmarks/optimizers/record.json``: trains, steps, prints three tables.

On one thread. What the record has already is kept, unless its name is given.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import remedy, stepping

__all__ = ["main", "tables"]

PACKAGES = ("torch", "scikit-learn", "pytorch-optimizer", "timm")


def tables(record: dict[str, Any]) -> dict[str, str]:
    """Markdown, by what was measured."""
    return {
        name: module.table(record[name]) for name, module in (("remedy", remedy), ("stepping", stepping)) if name in record
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optimizers", description=__doc__)
    parser.add_argument("what", nargs="*", choices=["remedy", "stepping", []], help="one of them; default: both")
    parser.add_argument("--arms", nargs="+", choices=list(remedy.ARMS), default=list(remedy.ARMS))
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON record; what is measured anew replaces what it has")
    parser.add_argument("--table", action="store_true", help="print the tables of the record and run nothing")
    chosen = parser.parse_args(arguments)
    record: dict[str, Any] = {}
    if chosen.out is not None and chosen.out.exists():
        record = json.loads(chosen.out.read_text())

    def keep() -> None:
        record["versions"] = {"python": platform.python_version(), **_versions()}
        if chosen.out is not None:
            chosen.out.write_text(json.dumps(record, indent=1) + "\n")

    if not chosen.table:
        torch.set_num_threads(1)
        what = chosen.what or ["remedy", "stepping"]
        for name in chosen.arms if "remedy" in what else []:
            runs = []
            for seed in range(chosen.seeds):
                runs.append(remedy.train(remedy.ARMS[name], seed).to_dict())
                print(name, runs[-1], flush=True)
            record.setdefault("remedy", {})[name] = runs
            keep()
        if "stepping" in what:
            record["stepping"] = stepping.compare(chosen.rounds)
            keep()
    for text in tables(record).values():
        print(text, end="\n\n")
    return 0


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


if __name__ == "__main__":
    raise SystemExit(main())
