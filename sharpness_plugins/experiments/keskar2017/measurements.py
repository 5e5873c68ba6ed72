"""What is measured on a network, by name, and read back into the record's types."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ... import measure_sharpness
from ...metrics import EpsilonBox, HessianTopK, RandomSubspace, SpectralDensity
from ...report import Kind, MetricResult, SharpnessReport
from ..training import Evaluation, evaluate
from .cone import ConeTest
from .grounds import Ground
from .record import EPSILONS, SPACES, BoxValue, Cone, Curvature
from .settings import Settings

__all__ = [
    "box_key",
    "boxes",
    "cone",
    "curvature",
    "evaluation",
    "evaluations",
    "failed",
    "finite",
    "loaded",
    "measure",
    "metrics_for",
]

_NAMED = {"published": "lbfgsb_published", "lbfgsb": "lbfgsb"}  # ours is each metric's own default


def box_key(space: str, epsilon: float, solver: str) -> str:
    return f"{space}/{epsilon:g}/{solver}"


def metrics_for(name: str, settings: Settings) -> dict[str, Any]:
    """The metrics of ``plan.MEASUREMENTS`` by the keys of the report."""
    if name == "glance":
        return {}
    if name == "watch":
        return {box_key("full", EPSILONS[0], "ours"): EpsilonBox(EPSILONS[0])}
    if name == "brief":
        found: dict[str, Any] = {box_key("full", epsilon, "ours"): EpsilonBox(epsilon) for epsilon in EPSILONS}
        return {**found, "hessian_topk": HessianTopK(k=min(5, settings.eigenvalues))}
    found = {}
    for space in SPACES:
        for epsilon in EPSILONS:
            found |= {
                box_key(space, epsilon, solver): _box(space, epsilon, solver, settings)
                for solver in ("published", "lbfgsb", "ours")
            }
    found["hessian_topk"] = HessianTopK(k=settings.eigenvalues)
    found["spectral_density"] = SpectralDensity(num_nodes=settings.density_nodes)
    found["cone"] = ConeTest(directions=settings.directions, dims=settings.eigenvalues, steep=settings.steep)
    return found


def _box(space: str, epsilon: float, solver: str, settings: Settings) -> EpsilonBox | RandomSubspace:
    metric = EpsilonBox(epsilon) if space == "full" else RandomSubspace(epsilon, settings.dim, settings.draws)
    return dataclasses.replace(metric, maximizer=_NAMED[solver]) if solver in _NAMED else metric


def measure(ground: Ground, model: nn.Module, name: str, *, tell: Callable[[str], None]) -> dict[str, Any]:
    """Evaluated on both halves, how far from the initial weights, and the metrics of ``name``; JSON types.

    Where the loss is not finite, as after a training that diverged, there is nothing to measure and no report.
    """
    settings = ground.settings
    size = settings.evaluation_batch
    train, test = (evaluate(model, half, batch_size=size) for half in (ground.split.train, ground.split.test))
    metrics = metrics_for(name, settings)
    report = None
    if metrics and math.isfinite(train.loss):
        report = measure_sharpness(
            model,
            ground.split.train.batches(size),
            metrics,
            max_samples=settings.measure_samples,
            seed=ground.seed,
            progress=lambda event: tell(str(event)),
        ).to_dict()
    return {
        "train": finite(train),
        "test": finite(test),
        "distance": _distance(model, ground.model()),
        "report": report,
    }


def finite(evaluation: Evaluation) -> dict[str, float | None]:
    """JSON types; what is not finite is None."""
    return {key: value if math.isfinite(value) else None for key, value in evaluation._asdict().items()}


def evaluations(found: Mapping[str, Any]) -> tuple[Evaluation, Evaluation]:
    """Training and test, as ``measure`` wrote them."""
    return evaluation(found["train"]), evaluation(found["test"])


def evaluation(found: Mapping[str, float | None]) -> Evaluation:
    """The inverse of ``finite``; what was not finite is NaN."""
    return Evaluation(**{key: math.nan if value is None else value for key, value in found.items()})


def failed(found: Mapping[str, Any]) -> bool:
    """Whether a metric failed: then it is worth another try, with more memory, say."""
    return any(result.status.kind is Kind.FAILED for result in _results(found).values())


def _distance(model: nn.Module, initial: nn.Module) -> float:
    pairs = zip(_weights(model), _weights(initial), strict=True)
    return math.sqrt(sum((after.double() - before.double()).square().sum().item() for after, before in pairs))


def _weights(model: nn.Module) -> list[Tensor]:
    return [weight.detach() for weight in model.parameters()]


def _results(found: Mapping[str, Any]) -> Mapping[str, MetricResult]:
    return {} if found.get("report") is None else SharpnessReport.from_dict(found["report"]).results


def boxes(found: Mapping[str, Any]) -> tuple[BoxValue, ...]:
    """Every value of Metric 2.1 that ``measure`` wrote."""
    values = []
    for key, result in _results(found).items():
        space, _, rest = key.partition("/")
        if space not in SPACES:
            continue
        epsilon, _, solver = rest.partition("/")
        message = result.status.message
        kind = result.status.kind
        draws = result.details.get("solver", [])
        if space == "subspace" and draws and all(draw["steps"] == 0 for draw in draws):
            kind, message = Kind.NOT_CONVERGED, f"the solver stopped where it started in every draw; {message}"
        gradients = math.nan if result.cost is None else result.cost.gradients
        values.append(
            BoxValue(space, float(epsilon), solver, result.value, result.standard_error, str(kind), message, gradients)
        )
    return tuple(values)


def curvature(found: Mapping[str, Any]) -> Curvature | None:
    """None where the Hessian was not asked for, or failed."""
    results = _results(found)
    top = results.get("hessian_topk")
    if top is None or top.status.kind is Kind.FAILED:
        return None
    density = results.get("spectral_density")
    spectrum: Mapping[str, Any] = {} if density is None else density.details

    def numbers(name: str) -> tuple[float, ...]:
        return tuple(spectrum.get(name, ()))

    return Curvature(
        eigenvalues=tuple(top.details["eigenvalues"]),
        residuals=tuple(top.details["residuals"]),
        converged=top.status.kind in (Kind.CONVERGED, Kind.EXACT),
        nodes=numbers("nodes"),
        weights=numbers("weights"),
        grid=numbers("grid"),
        density=numbers("density"),
        density_error=numbers("density_error"),
        width=spectrum.get("width", math.nan),
        dim=int(found["report"]["provenance"]["dim"]),
    )


def cone(found: Mapping[str, Any]) -> Cone | None:
    """None where it was not asked for, or failed."""
    result = _results(found).get("cone")
    if result is None or result.status.kind is Kind.FAILED:
        return None
    details = result.details
    return Cone(details["radius"], tuple(details["random_rises"]), tuple(details["top_rises"]), details["steep"])


def loaded(ground: Ground, weights: Mapping[str, Tensor]) -> nn.Module:
    """A network with these weights, in eval mode."""
    model = ground.model()
    model.load_state_dict(dict(weights))
    return model.eval()
