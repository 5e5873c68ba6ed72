"""A measurement that is kept in a file and goes on from it: whose state it is, and what of it is done."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from importlib import metadata
from typing import Any, cast

import torch

from . import registry, stopping
from .objective import Objective
from .registry import Metric
from .report import Cost, Kind, MetricResult, Status
from .state_file import StateFile
from .steps import Recorder

__all__ = ["Keeper", "kept_in"]


class Keeper:
    """What a measurement keeps of its metrics; nothing without a recorder."""

    def __init__(self, recorder: Recorder | None, keys: Sequence[str]) -> None:
        self._recorder, self._names = recorder, {key: f"metric {i}" for i, key in enumerate(keys)}

    def result_of(self, key: str) -> MetricResult | None:
        """Of a metric that was measured before."""
        if self._recorder is None:
            return None
        there, told = self._recorder.recall(self._names[key], "result")
        return _result_from(told) if there else None

    def steps_of(self, key: str) -> AbstractContextManager[object]:
        """Room for the steps of a metric."""
        return contextlib.nullcontext() if self._recorder is None else self._recorder.root(self._names[key]).entered()

    def done(self, key: str, result: MetricResult, *, drop: Sequence[str]) -> None:
        """Keep the result of a metric, and forget its steps and those that begin with ``drop``; not of one that failed."""
        if self._recorder is not None and result.status.kind is not Kind.FAILED and not stopping.is_stopped():
            name = self._names[key]
            self._recorder.keep(name, "result", _tree_of(result), must=True, drop=[f"{name}/", *drop])


@contextlib.contextmanager
def kept_in(
    path: str | os.PathLike[str] | None, objective: Objective, metrics: Mapping[str, Metric], seed: int
) -> Iterator[Keeper]:
    """Keep the measurement in this file, after what is there already; None keeps nothing.

    On several ranks the first one has the file, and the others need not even see the disk.

    Raises:
        StateFileError: it is another measurement's, damaged, or in use.
        ValueError: vectors lie in shards, whose rank-by-rank states no file holds; a rank names a file, and not the first.
        RemoteFailureError: the first rank cannot open it.
    """
    ranks = objective.ranks
    named = ranks.gather(path is not None)
    if not any(named):
        yield Keeper(None, list(metrics))
        return
    if not named[0]:
        raise ValueError(
            f"rank {ranks.members[named.index(True)]} names a state file, and the one that keeps it is rank "
            f"{ranks.members[0]}, which names none. Pass state_file on that rank, or on all of them."
        )
    if not objective.layout.is_whole:
        raise ValueError(
            "a state file holds whole vectors, and here each rank has a shard of them. Leave state_file out: a time limit "
            "still returns what there is."
        )
    with ranks.sharing("opening the state file"):
        identity = objective.identity()
    data = ranks.gather(identity["data"])
    identity |= {"data": " ".join(data), "number of ranks": str(ranks.size), **_identity_of(metrics, seed)}
    with ranks.sharing("opening the state file"):
        file = StateFile(cast("str", path), identity) if ranks.rank == 0 else None
    recorder = Recorder(file, work=objective.work, set_work=objective.set_work, like=objective.origin, ranks=ranks)
    try:
        with ranks.attended_by(recorder):
            yield Keeper(recorder, list(metrics))
    finally:
        recorder.close()


def _identity_of(metrics: Mapping[str, Metric], seed: int) -> dict[str, str]:
    told = [
        [
            key,
            f"{type(metric).__module__}.{type(metric).__qualname__}",
            registry.metric_name(metric),
            registry.metric_settings(metric),
            registry.metric_provenance(metric),
        ]
        for key, metric in metrics.items()
    ]
    text = re.sub(r" at 0x[0-9a-f]+", "", repr(told))  # addresses of objects are others in every process
    return {
        "metrics": hashlib.sha256(text.encode()).hexdigest(),
        "seed": str(seed),
        "version of sharpness_plugins": metadata.version("sharpness-plugins"),
        "version of torch": torch.__version__,
    }


def _tree_of(result: MetricResult) -> dict[str, Any]:
    cost = result.cost or Cost()
    return {
        "value": result.value,
        "standard_error": result.standard_error,
        "status": [result.status.kind.value, result.status.message],
        "details": dict(result.details),
        "cost": [getattr(cost, one.name) for one in fields(Cost)],
    }


def _result_from(told: Mapping[str, Any]) -> MetricResult:
    kind, message = told["status"]
    return MetricResult(
        told["value"], told["standard_error"], Status(Kind(kind), message), told["details"], Cost(*told["cost"])
    )
