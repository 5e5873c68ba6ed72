"""The front door: names to metrics, an objective, one seeded run of each, a report."""

from __future__ import annotations

import math
import platform
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from importlib import metadata
from typing import Any, TypeAlias, cast

import numpy as np
import scipy
import torch
from torch import nn

from . import registry, sampling
from .distributed import resolve_ranks
from .errors import LostRankError, PluginWarning
from .krylov_pass import KrylovSharing
from .losses import LossFn
from .objective import Objective
from .progress import ProgressEvent, ProgressListener, resolve_listener
from .registry import Metric
from .report import Kind, MetricResult, SharpnessReport, Status
from .space import Select

__all__ = ["DEFAULT_METRICS", "Metrics", "measure_sharpness", "resolve_metrics"]

# by their qualified names: a plugin that offers one of these names makes the bare name ambiguous, but not this call
DEFAULT_METRICS = ("builtin:epsilon_box", "builtin:random_subspace", "builtin:hessian_topk")

Metrics: TypeAlias = "str | Metric | Iterable[str | Metric] | Mapping[str, str | Metric] | None"


def measure_sharpness(
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
    progress: bool | ProgressListener | None = None,
    cache_bytes: int | None = None,
    ranks: str = "auto",
) -> SharpnessReport:
    """How sharp is the loss around the model's weights, on the loader's data.

    The model is measured in eval mode on float32 (or float64) weights and left exactly as it was: parameters, buffers,
    gradients, training flags, random states. Same seed, same numbers, with any batching of the same samples.

    Args:
        model: any ``nn.Module``; wrappers of ``torch.compile`` and data parallelism are taken off.
        loader: what can be iterated again and again and gives batches: a DataLoader, a list of batches. Give it the data
            that the question is about (the training set, as a rule) without random augmentation.
        metrics: None for ε-box sharpness, random subspaces and the top eigenvalues of the Hessian; a name
            (``available_metrics()`` lists them); a metric such as ``EpsilonBox(epsilon=5e-4)``; several of these; or a
            mapping from the keys that the report should use. Metrics that share a name get keys that tell their settings.
        loss_fn: ``(model, batch) ->`` scalar mean loss of the batch, or ``(mean, weight)``.
        criterion: ``(output, targets) ->`` loss, for batches that are pairs.
            Without either: labels in a mapping (Hugging Face), then integer targets (cross-entropy).
        select: which trainable parameters to perturb: a glob such as ``"layer4.*"``, several, or a predicate
            ``(name, parameter) -> bool``. None for all.
        batch_norm: "eval" (running statistics) or "batch" (each batch's own).
        max_samples: use the first so many samples.
        seed: of random starts, columns and probes, each metric with a stream of its own.
        device: where to evaluate; None for where the model is.
        progress: None draws on a terminal and in a notebook; True, False; or a callable that receives ``ProgressEvent``s.
        cache_bytes: keep the batches on the device if they take at most this; None for a quarter of the free memory, at
            most 4 GiB.
        ranks: what the processes of a ``torch.distributed`` group do, all of which must call this: "same data", they share
            out what each one's loader gives; "own data", each one's loader has a part of the data; "auto", what the loaders
            turn out to hold, repeats of a ``DistributedSampler`` left out. All of them return the same report, which is that
            of one process. "alone" for one process without the others.
    Returns:
        a report: ``report["epsilon_box"].value``, ``print(report)``, ``report.to_json()``. A metric that raises is in it
        with status "failed" and a PluginWarning; the others are measured.
    Cost: about 35 gradients, 80 gradients and 20 Hessian-vector products for the three default metrics.
    Raises:
        LoaderError, LossRuleError, NonFiniteLossError, UnknownNameError, ValueError: bad input, before anything is measured.
        RanksApartError, RemoteFailureError: the ranks differ in what they measure, or another one has bad input.
        LostRankError: a rank is gone, or does not come within the group's timeout.
    """
    group = resolve_ranks(ranks)
    with group.sharing("choosing metrics"):
        chosen = resolve_metrics(metrics)
        listener = resolve_listener(progress if group.rank == 0 or callable(progress) else False)
    group.agree("metrics", list(chosen))
    objective = Objective(
        model,
        loader,
        loss_fn=loss_fn,
        criterion=criterion,
        select=select,
        batch_norm=batch_norm,
        max_samples=max_samples,
        device=device,
        cache_bytes=cache_bytes,
        seed=seed,
        plugin_rule=_ask_plugins,
        listener=listener,
        ranks=group,
    )
    results: dict[str, MetricResult] = {}
    sharing = KrylovSharing(chosen, seed)
    try:
        with objective.session():
            for key, metric in chosen.items():
                results[key] = _measure_one(key, metric, objective, seed, sharing)
    finally:
        if listener is not None:
            listener(ProgressEvent(None, 0.0, None, 0.0))
    said = group.of(objective.first_rank, (_provenance(objective, chosen, seed), objective.cost))
    report = SharpnessReport(results, objective.loss, *said)
    for _ in registry.call_hook("sharpness_measure_end", report=report):
        pass
    return report


def _measure_one(key: str, metric: Metric, objective: Objective, seed: int, sharing: KrylovSharing) -> MetricResult:
    before, failed, ranks = objective.cost, None, objective.ranks
    rng = sampling.generator_for(seed, registry.metric_name(metric))
    try:
        expected = getattr(metric, "expected_passes", None)
        objective.announce(key, expected(objective) if expected is not None else None)
        result = sharing.measure(key, objective) if sharing.peers(key) else metric(objective, rng)
        if not isinstance(result, MetricResult):
            raise TypeError(f"a metric must return a MetricResult, and this one returned a {type(result).__name__}")
        if not math.isfinite(result.value) and result.status.kind is not Kind.FAILED:
            result = MetricResult(
                result.value,
                status=Status(Kind.FAILED, f"the value is {result.value}. {result.status.message}".strip()),
                details=result.details,
            )
    except LostRankError:
        raise
    except Exception as error:
        failed, result = error, MetricResult.failed("")
    if failure := ranks.close(key, failed, result.value):
        error, message = failure
        if registry.is_strict():
            raise error
        result = MetricResult.failed(message)
    result = ranks.of(objective.first_rank, result.with_cost(objective.cost - before))
    if result.status.kind is Kind.FAILED:
        origin = registry.metric_provenance(metric)
        where = f" (plugin {origin[0]!r} from {origin[1]} {origin[2]})" if origin and origin[1] else ""
        warnings.warn(f"metric {key!r}{where} failed: {result.status.message}", PluginWarning, stacklevel=3)
    return result


def _ask_plugins(model: nn.Module, batch: Any, criterion: Any) -> LossFn | None:
    answer: LossFn | None = registry.first_answer("sharpness_resolve_loss", model=model, batch=batch, criterion=criterion)
    return answer


def resolve_metrics(metrics: Metrics) -> dict[str, Metric]:
    """Metrics under the keys of the report, in the order asked for."""
    if metrics is None:
        metrics = DEFAULT_METRICS
    if isinstance(metrics, Mapping):
        return {str(key): _one(metric) for key, metric in metrics.items()}
    if isinstance(metrics, str) or callable(metrics):
        metrics = [metrics]
    found = [_one(metric) for metric in metrics]
    if not found:
        raise ValueError("metrics is empty, so there is nothing to measure. Pass None for the three built-in metrics.")
    return dict(zip(_keys(found), found, strict=True))


def _one(metric: str | Metric) -> Metric:
    if isinstance(metric, str):
        return registry.get_metric(metric)
    if isinstance(metric, type):
        return cast("Callable[[], Metric]", metric)()  # EpsilonBox for EpsilonBox()
    if not callable(metric):
        raise TypeError(f"a metric must be a name or callable as metric(objective, rng), got {metric!r}")
    return metric


def _keys(metrics: list[Metric]) -> list[str]:
    """The metric's name; where several share it, with the settings that tell them apart, or else a number."""
    names = [registry.metric_name(metric) for metric in metrics]
    keys: list[str] = []
    for metric, name in zip(metrics, names, strict=True):
        if names.count(name) > 1:
            peers = [registry.metric_settings(m) for m, n in zip(metrics, names, strict=True) if n == name]
            own = registry.metric_settings(metric)
            telling = {k: v for k, v in own.items() if any(peer.get(k) != v for peer in peers)}
            if telling:
                name = f"{name}({', '.join(f'{k}={_short(v)}' for k, v in telling.items())})"
        taken = sum(key == name or re.fullmatch(re.escape(name) + r"#\d+", key) is not None for key in keys)
        keys.append(name if not taken else f"{name}#{taken + 1}")
    return keys


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _provenance(objective: Objective, chosen: Mapping[str, Metric], seed: int) -> dict[str, Any]:
    measured: dict[str, Any] = {}
    for key, metric in chosen.items():
        plugin, distribution, version = registry.metric_provenance(metric) or ("this session", "", "")
        measured[key] = {
            "metric": registry.metric_name(metric),
            "settings": {
                k: v if isinstance(v, (int, float, str, bool, type(None))) else repr(v)
                for k, v in registry.metric_settings(metric).items()
            },
            "plugin": plugin,
            "distribution": distribution,
            "version": version,
        }
    return {
        **objective.describe(),
        "seed": seed,
        "metrics": measured,
        "measured_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "sharpness_plugins": metadata.version("sharpness-plugins"),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "scipy": scipy.__version__,
            "python": platform.python_version(),
        },
    }
