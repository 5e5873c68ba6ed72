"""A metric measured by several processes, each of which has its own part of the data."""

from __future__ import annotations

import pickle
import tempfile
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from ..measure import measure_sharpness
from ..report import SharpnessReport
from . import problems
from .core import Violation

__all__ = ["measured_on_ranks"]

_TIMEOUT = timedelta(seconds=120)
_FIRST = 5  # samples of the first rank, of 24: shares are unequal


def measured_on_ranks(metric: Any, num_ranks: int) -> list[SharpnessReport]:
    """The reports of all ranks (gloo, on this machine), under the key "it"; each rank has a part of the classifier's data.

    Raises:
        Violation: the metric cannot be sent to another process, or a process fails.
    """
    try:
        sent = pickle.dumps(metric)
    except Exception as error:
        raise Violation(f"it cannot be sent to another process: {type(error).__name__}: {error}") from error
    with tempfile.TemporaryDirectory() as folder:
        try:
            torch.multiprocessing.spawn(_measure, args=(num_ranks, folder, sent), nprocs=num_ranks)  # type: ignore[no-untyped-call, attr-defined]
        except Exception as error:
            raise Violation(f"a process failed: {str(error).strip().splitlines()[-1]}") from error
        texts = [(Path(folder) / f"{rank}.json").read_text() for rank in range(num_ranks)]
    return [SharpnessReport.from_json(text) for text in texts]


def _measure(rank: int, num_ranks: int, folder: str, sent: bytes) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks, timeout=_TIMEOUT
    )
    try:
        metric, problem = pickle.loads(sent), problems.classifier()
        inputs, targets = problem.loader[0]
        others = torch.tensor_split(torch.arange(_FIRST, len(targets)), num_ranks - 1)
        rows = (torch.arange(_FIRST), *others)[rank]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = measure_sharpness(
                problem.model, [(inputs[rows], targets[rows])], {"it": metric}, progress=False, ranks="own data"
            )
        (Path(folder) / f"{rank}.json").write_text(report.to_json())
    finally:
        torch.distributed.destroy_process_group()
