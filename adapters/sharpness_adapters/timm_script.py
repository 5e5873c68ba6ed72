"""``sharpness-timm path/to/train.py ...``: timm's own training script, with batch-size schedules and measuring.

On several processes: ``torchrun --nproc-per-node 2 -m sharpness_adapters.timm_script train.py ...``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sharpness_plugins.errors import SharpnessError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run it and return the exit code; 1 with one line on standard error for what the user can mend."""
    arguments = _parser().parse_args(argv)
    try:
        from .timm.script import ScriptError, ScriptOptions, run_script
    except ImportError as error:
        return _refused(error)
    try:
        options = ScriptOptions.read(arguments, os.environ)
        run_script(arguments.script, arguments.arguments, options)
    except (ScriptError, SharpnessError) as error:
        return _refused(error)
    return 0


def _refused(error: Exception) -> int:
    print(f"sharpness-timm: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sharpness-timm",
        description="Runs timm's train.py as it is, and changes batch sizes between its epochs, measures sharpness, and "
        "adds columns to its summary.csv. What is not given comes from SHARPNESS_METRICS, SHARPNESS_EVERY and so on.",
    )
    parser.add_argument(
        "--schedule", metavar="TEXT", help="global batch sizes by training progress: '0:256 30ep:2048', or a schedule's name"
    )
    parser.add_argument(
        "--coupling",
        default="auto",
        metavar="RULE",
        help="how the learning rate follows: none, linear, sqrt (default: auto)",
    )
    parser.add_argument(
        "--max-micro-batch",
        type=int,
        metavar="N",
        help="the most samples per device and backward pass; more are accumulated (default: no limit)",
    )
    parser.add_argument("--metric", action="append", metavar="NAME[:KEY=VALUE,...]", help="to measure; repeatable")
    parser.add_argument("--every", metavar="DURATION", help="how often: 1ep, '500 steps', '10 min' (default: 1ep)")
    parser.add_argument("--samples", type=int, metavar="N", help="to measure on, without augmentation (default: 512)")
    parser.add_argument("--budget", metavar="SHARE", help="of training's time, at most; none for no limit (default: .02)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="each measurement, as CSV or .jsonl")
    parser.add_argument("script", metavar="train.py", help="the script, of timm 1.0.27 or later")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its arguments")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
