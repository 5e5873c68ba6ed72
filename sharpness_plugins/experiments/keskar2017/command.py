"""``sharpness reproduce keskar2017``: its arguments, and what it prints. Imports no torch before it is run."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import SharpnessError, missing_dependency

if TYPE_CHECKING:
    from .record import Record
    from .run import ReproductionEvent
    from .settings import Settings

__all__ = ["add_arguments", "reproduce_command"]

TEXT_WIDTH = 112
DEFAULT_FOLDER = Path("sharpness-keskar2017")
OVERRIDES = {  # argument -> setting
    "width": "width",
    "batch_norm": "batch_norm",
    "small_batch": "small_batch",
    "large_batch": "large_batch",
    "learning_rate": "learning_rate",
    "epochs": "epochs",
    "max_epochs": "max_epochs",
    "max_train": "max_train",
    "max_test": "max_test",
    "measure_samples": "measure_samples",
    "evaluation_batch": "evaluation_batch",
    "studies": "studies",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paper", choices=["keskar2017"], help="which paper")
    what = parser.add_argument_group("what")
    what.add_argument("--network", metavar="NAME", help="R, A, small-conv, F1, F2, C1, C2, C3, C4 (default: by data)")
    what.add_argument(
        "--data", metavar="NAME", help="digits, digits-noisy, mnist, cifar10, cifar100, timit (default: by network, digits)"
    )
    what.add_argument("--folder", type=Path, metavar="DIR", help="where the original files are; for timit the .npz")
    what.add_argument("--no-checksum", action="store_true", help="take files that are not the original ones")
    what.add_argument("--seeds", type=int, metavar="N", help="number of trials (default: 5)")
    what.add_argument("--studies", nargs="+", metavar="STUDY", help="only these (default: all; a wrong name lists them)")
    what.add_argument("--quick", action="store_true", help="a look at every part in half a minute, not at its numbers")
    what.add_argument("--config", type=Path, metavar="FILE", help="JSON with any of the settings, before the options here")
    how = parser.add_argument_group("how")
    how.add_argument("--batch-norm", choices=["batch", "running"], help="its statistics: batch, as the paper, or running")
    how.add_argument("--width", type=float, metavar="X", help="factor on the networks' channels (default: 1)")
    how.add_argument("--small-batch", type=int, metavar="B", help="default: 256; 16 on digits; less of few samples")
    how.add_argument("--large-batch", type=int, metavar="B", help="default: a tenth of the samples; 500 on digits")
    how.add_argument("--learning-rate", type=float, metavar="X", help="of Adam, for both batches (default: 0.001)")
    how.add_argument("--epochs", type=int, metavar="N", help="of Figures 4 and 6 (default: 100)")
    how.add_argument("--max-epochs", type=int, metavar="N", help="where a loss that is not reached is given up")
    how.add_argument("--max-train", type=int, metavar="N", help="use the first so many training samples")
    how.add_argument("--max-test", type=int, metavar="N", help="use the first so many test samples")
    how.add_argument("--measure-samples", type=int, metavar="N", help="measure sharpness on the first so many")
    how.add_argument("--evaluation-batch", type=int, metavar="N", help="samples at once in evaluations (default: 5000)")
    how.add_argument("--device", help="default: cpu for digits, otherwise a GPU where there is one")
    how.add_argument(
        "--out", type=Path, default=DEFAULT_FOLDER, metavar="DIR", help=f"folder to write and to go on in ({DEFAULT_FOLDER})"
    )
    how.add_argument("--no-report", action="store_true", help="record.json alone: no page, figures and CSV files")
    how.add_argument("--quiet", action="store_true", help="no progress")


def reproduce_command(arguments: argparse.Namespace, listener: Callable[[ReproductionEvent], None] | None) -> int:
    """Run it and print what was found; 0 where it is complete.

    Raises:
        SharpnessError: what the user can mend.
    """
    from .run import Ranks, reproduce

    settings = _settings(arguments)
    if not arguments.no_report:
        missing_dependency("matplotlib.figure", extra="demo", purpose="the report (without one: --no-report)")
    ranks = Ranks.from_environment()
    began = time.monotonic()
    try:
        record = reproduce(
            settings,
            arguments.out,
            data_folder=arguments.folder,
            verify=not arguments.no_checksum,
            device=_device(arguments.device, settings, ranks.local_rank),
            ranks=ranks,
            command=_command(arguments),
            listener=listener if ranks.rank == 0 else None,
        )
    except KeyboardInterrupt:
        print("\nsharpness: what is done is kept; the same command goes on from there", file=sys.stderr)
        raise
    except ValueError as error:
        raise SharpnessError(str(error)) from None
    if record is not None:
        print(told(record))
        print(f"\nWrote {_written(record, arguments)} to {arguments.out} ({time.monotonic() - began:.0f} s)")
    return 0


def _written(record: Record, arguments: argparse.Namespace) -> str:
    if arguments.no_report:
        return "record.json"
    from .report import write_report

    page, *others = write_report(record, arguments.out)
    return f"{page.name} and {len(others)} files beside it"


def _settings(arguments: argparse.Namespace) -> Settings:
    from .settings import Settings, preset

    try:
        if arguments.config is not None:
            given = _read(arguments.config)
            named = {name: getattr(arguments, name) for name in ("data", "network") if getattr(arguments, name)}
            settings = Settings.from_dict({**given, **named}, quick=arguments.quick)
        else:
            settings = preset(arguments.data, arguments.network, quick=arguments.quick)
        changes: dict[str, Any] = {
            setting: getattr(arguments, name) for name, setting in OVERRIDES.items() if getattr(arguments, name) is not None
        }
        if arguments.seeds is not None:
            changes["seeds"] = tuple(range(arguments.seeds))
        if "studies" in changes:
            changes["studies"] = tuple(changes["studies"])
        return dataclasses.replace(settings, **changes)
    except ValueError as error:
        raise SharpnessError(str(error)) from None


def _read(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SharpnessError(f"{file} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise SharpnessError(f"{file} should hold a mapping of settings, and holds a {type(data).__name__}")
    return data


def _device(asked: str | None, settings: Settings, local_rank: int) -> str:
    """With several ranks each takes a GPU of its own, as far as there are enough."""
    import torch

    if asked not in (None, "cuda"):
        return str(asked)
    if not torch.cuda.is_available() or (asked is None and settings.data.startswith("digits")):
        return "cpu"
    return f"cuda:{local_rank % torch.cuda.device_count()}"


def _command(arguments: argparse.Namespace) -> str:
    """The command that gives the same record, without folders, devices and progress."""
    words = ["sharpness", "reproduce", "keskar2017"]
    for name in ("network", "data", "seeds", *OVERRIDES):
        value = getattr(arguments, name)
        if value is not None:
            words += [f"--{name.replace('_', '-')}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    words += ["--config", arguments.config.name] if arguments.config is not None else []
    words += ["--folder", "DIR"] if arguments.folder is not None else []
    words += ["--no-checksum"] * arguments.no_checksum + ["--quick"] * arguments.quick
    return " ".join(words)


def told(record: Record) -> str:
    """Title, tables and sentences."""
    from .tables import tables

    main = next(iter(record.problems.values()))
    norm = {"none": "", "batch": ", BatchNorm with the batch's statistics", "running": ", BatchNorm with running statistics"}
    title = (
        f"Keskar et al. (2017): {main.network}, {main.description} ({main.dim:,} weights{norm[main.batch_norm]}); "
        f"{main.data}, {main.num_train:,} to train on; {len(record.seeds)} seed{'s' * (len(record.seeds) > 1)}"
    )
    said = [
        textwrap.fill(sentence, TEXT_WIDTH, initial_indent="- ", subsequent_indent="  ") for sentence in record.sentences
    ]
    return "\n".join([textwrap.fill(title, TEXT_WIDTH), "", *(f"{table}\n" for table in tables(record)), *said])
