"""What a measurement would take, before it is made: work, bytes, and time from one timed gradient and product."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from . import registry
from .distributed import RanksLike
from .errors import SecondDerivativeError
from .expected import NOTHING, ExpectedWork, Range
from .krylov_pass import KrylovSharing
from .losses import LossFn
from .measure import Metrics, ask_plugins, resolve_metrics, trained_part
from .memory import said_bytes
from .objective import Objective
from .registry import Metric
from .space import Select
from .specs import works_on_shards

__all__ = ["MeasurementPlan", "MetricPlan", "plan_measurement"]

_VALUE = 1 / 3  # of a gradient


@dataclass(frozen=True)
class MetricPlan:
    """What one metric is expected to take.

    Attributes:
        work: None where the metric does not say.
        passes: over the data; None where it does not say even that.
        seconds: None where ``passes`` is.
        shares_run_with: metrics that read the same Krylov run; the first of them, which makes it, has its products.
    """

    work: ExpectedWork | None
    passes: Range | None
    seconds: Range | None
    shares_run_with: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class MeasurementPlan:
    """What a measurement is expected to take; prints as a table.

    Attributes:
        metrics: by the keys that the report will have.
        seconds: of all metrics that say what they take; ``is_complete`` tells whether those are all.
        seconds_per_gradient, seconds_per_product: measured here, on the model and the data; the second is None where no
            metric multiplies, or NaN where the model has no products, and ``notes`` say why.
        seconds_once: that the first product takes beside: trying out the ways, and what torch sets up in a process.
        bytes: that would be kept at once from one evaluation to the next, by what they are: weights and vectors, batches,
            Krylov basis, graphs. What one evaluation takes itself comes on top.
        budget: that ``bytes`` are held to; None where there is no limit.
        passes_spent: over the data, for this plan.
        about: of model and data, as in a report's provenance.
    """

    metrics: Mapping[str, MetricPlan]
    seconds: Range
    seconds_per_gradient: float
    seconds_per_product: float | None
    seconds_once: float
    bytes: Mapping[str, int]
    budget: int | None
    passes_spent: float
    about: Mapping[str, Any]
    notes: list[str]

    @property
    def is_complete(self) -> bool:
        return all(plan.passes is not None for plan in self.metrics.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON; ranges are lists of low, typical and high, None for no bound."""
        return {
            "metrics": {
                key: {
                    "values": _listed(None if plan.work is None else plan.work.values),
                    "gradients": _listed(None if plan.work is None else plan.work.gradients),
                    "hvps": _listed(None if plan.work is None else plan.work.hvps),
                    "passes": _listed(plan.passes),
                    "seconds": _listed(plan.seconds),
                    "shares_run_with": plan.shares_run_with,
                }
                for key, plan in self.metrics.items()
            },
            "seconds": _listed(self.seconds),
            "is_complete": self.is_complete,
            "seconds_per_gradient": self.seconds_per_gradient,
            "seconds_per_product": _finite(self.seconds_per_product),
            "seconds_once": self.seconds_once,
            "bytes": dict(self.bytes),
            "budget": self.budget,
            "passes_spent": self.passes_spent,
            "about": dict(self.about),
            "notes": self.notes,
        }

    def to_json(self, *, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def __str__(self) -> str:
        about = self.about
        title = (
            f"Plan for {about['model']}: {about['dim']:,} parameters ({about['dtype']} on {about['device']}), "
            f"{about['num_samples']:,} samples in {about['num_batches']:,} batches, {about['batches']}"
        )
        rows = [["metric", "values", "gradients", "products", "passes", "seconds"]]
        for key, plan in self.metrics.items():
            counts = ["unknown"] * 3 if plan.work is None else [plan.work.values, plan.work.gradients, plan.work.hvps]
            rows.append([key, *map(str, counts), *(str(told or "unknown") for told in (plan.passes, plan.seconds))])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))) for r in rows
        ]
        lines.insert(1, "-" * max(map(len, lines)))
        at_least = "" if self.is_complete else "at least "
        timed = f"{self.seconds_per_gradient:.3g} s a gradient"
        if self.seconds_per_product is not None and not math.isnan(self.seconds_per_product):
            timed += f", {self.seconds_per_product:.3g} s a product and {self.seconds_once:.2g} s more for the first"
        kept = ", ".join(f"{what} {said_bytes(count)}" for what, count in self.bytes.items())
        of = "" if self.budget is None else f" of {said_bytes(self.budget)}"
        ends = [f"time: {at_least}{self.seconds} s ({timed}, measured)"]
        ends.append(f"kept between evaluations: {said_bytes(sum(self.bytes.values()))}{of} ({kept})")
        for key, plan in self.metrics.items():
            if plan.shares_run_with:
                ends.append(f"{key}: shares one Krylov run with {', '.join(plan.shares_run_with)}")
        ends += [f"note: {note}" for note in self.notes]
        return "\n".join([title, "", *lines, "", *ends])


def plan_measurement(
    model: nn.Module,
    loader: Iterable[Any],
    metrics: Metrics = None,
    *,
    loss_fn: LossFn | None = None,
    criterion: Callable[..., Any] | None = None,
    select: Select = None,
    batch_norm: str = "eval",
    max_samples: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    memory: int | str | None = None,
    cache_bytes: int | None = None,
    ranks: RanksLike = "auto",
) -> MeasurementPlan:
    """What ``measure_sharpness`` with these arguments is expected to take.

    Counts are ranges where they depend on the data: where a solver or Lanczos stops. Times are those of one gradient and one
    product, of a second one unless the first took long (ten seconds, and a minute); vector arithmetic between them is not in
    it.

    Args: as of ``measure_sharpness``.
    Cost: reading the data, a loss, one gradient or two, and with metrics that multiply one product or two.
    Raises: as ``measure_sharpness``, before anything is measured.
    """
    chosen = resolve_metrics(metrics)
    objective = Objective(
        trained_part(model),
        loader,
        loss_fn=loss_fn,
        criterion=criterion,
        select=select,
        batch_norm=batch_norm,
        max_samples=max_samples,
        device=device,
        memory=memory,
        cache_bytes=cache_bytes,
        seed=seed,
        plugin_rule=ask_plugins,
        ranks=ranks,
    )
    refused = [key for key, metric in chosen.items() if not (objective.layout.is_whole or works_on_shards(metric))]
    sharing = KrylovSharing({key: metric for key, metric in chosen.items() if key not in refused}, seed)
    notes = [f"{key} needs whole vectors of weights, and will fail" for key in refused]
    works: dict[str, ExpectedWork | None] = {key: ExpectedWork() for key in refused}
    for key, metric in chosen.items():
        if key not in refused:
            works[key] = _declared(key, metric, objective, sharing, notes)
    gradient = _timed(objective, objective.value_and_grad)
    product, first, kept = _product(objective, works.values(), notes)
    rate = 0.0 if product is None or math.isnan(product) else product
    plans = {}
    for key, metric in chosen.items():
        work, passes = works[key], _passes(works[key], metric, objective)
        if work is not None:
            each = [work.values.times(_VALUE * gradient), work.gradients.times(gradient), work.hvps.times(rate)]
            seconds: Range | None = each[0].plus(each[1]).plus(each[2])
        else:
            seconds = None if passes is None else passes.times(gradient)
        plans[key] = MetricPlan(work, passes, seconds, sharing.peers(key))
    total = Range.exactly(first)
    for plan in plans.values():
        total = total.plus(plan.seconds or NOTHING)
    about = objective.describe()
    return MeasurementPlan(
        plans,
        total,
        gradient,
        product,
        first,
        kept,
        objective.memory.total,
        objective.cost.passes,
        about,
        [*about["notes"], *notes],
    )


def _declared(
    key: str, metric: Metric, objective: Objective, sharing: KrylovSharing, notes: list[str]
) -> ExpectedWork | None:
    declares = getattr(metric, "expected_work", None)
    try:
        told = sharing.expected_work(key, objective)
        if told is None and declares is not None:
            told = declares(objective)
    except Exception as error:
        notes.append(f"{key} could not say what it takes ({type(error).__name__}: {error})")
        return None
    if isinstance(told, ExpectedWork):
        return told
    where = registry.metric_provenance(metric)
    of = f" of {where[1]}" if where and where[1] else ""
    notes.append(f"{key}{of} does not declare what it takes (expected_work)")
    return None


def _passes(work: ExpectedWork | None, metric: Metric, objective: Objective) -> Range | None:
    if work is not None:
        return work.passes
    expected = getattr(metric, "expected_passes", None)
    try:
        told = None if expected is None else float(expected(objective))
    except Exception:
        return None
    return None if told is None else Range(0.0, told, math.inf)


def _product(
    objective: Objective, works: Iterable[ExpectedWork | None], notes: list[str]
) -> tuple[float | None, float, dict[str, int]]:
    """Seconds of a product, those that only the first one takes, and what would be kept."""
    told = [work for work in works if work is not None]
    vectors = max((work.vectors for work in told), default=0)
    kept = {**objective.memory.held, "Krylov basis": vectors * objective.origin.nbytes, "graphs": 0}
    if not any(work.hvps.high for work in told):
        return None, 0.0, kept
    with objective.session():
        # room is left for the basis, as in the measurement
        objective.memory.hold("Krylov basis", kept["Krylov basis"])
        try:
            began = time.perf_counter()
            objective.hvp(objective.origin)
            first = time.perf_counter() - began
            again = objective.ranks.of(0, first <= _LONG_FIRST)
            product = _timed(objective, lambda: objective.hvp(objective.origin)) if again else first
            kept["graphs"] = objective.memory.held.get("graphs", 0)
        except SecondDerivativeError as error:
            notes.append(f"there is no product with the Hessian: {error}")
            return math.nan, 0.0, kept
        finally:
            objective.memory.release("Krylov basis", kept["Krylov basis"])
    return product, max(first - product, 0.0), kept


_LONG = 10.0  # seconds: what takes longer is not made twice,
_LONG_FIRST = 60.0  # or, of a first product, in which torch sets up more than it computes


def _timed(objective: Objective, evaluate: Callable[[], object]) -> float:
    """Seconds; of a second evaluation, without what is set up once, where the first was quick."""
    seconds = math.inf
    for _ in range(2):
        began = time.perf_counter()
        evaluate()
        seconds = min(seconds, time.perf_counter() - began)
        if objective.ranks.of(0, seconds > _LONG):
            break
    return seconds


def _listed(told: Range | None) -> list[float | None] | None:
    return None if told is None else [_finite(count) for count in told]


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None
