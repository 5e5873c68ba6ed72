"""The front door: names to metrics, an objective, one seeded run of each, a report."""

from __future__ import annotations

import math
import os
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
from .distributed import RanksLike, resolve_ranks
from .errors import LostRankError, MeasurementStopped, MeasurementWarning, PluginWarning
from .krylov_pass import KrylovSharing
from .losses import LossFn, unwrap
from .objective import Objective
from .progress import ProgressEvent, ProgressListener, resolve_listener
from .registry import Metric
from .report import Kind, MetricResult, SharpnessReport, Status
from .resuming import Keeper, kept_in
from .space import Select
from .specs import works_on_shards
from .stopping import Overdue, StopSwitch

__all__ = ["DEFAULT_METRICS", "Metrics", "ask_plugins", "measure_sharpness", "resolve_metrics", "trained_part"]

# by their qualified names: a plugin that offers one of these names makes the bare name ambiguous, but not this call
DEFAULT_METRICS = ("builtin:epsilon_box", "builtin:random_subspace", "builtin:hessian_topk")

_PLAIN = (int, float, str, bool, type(None))

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
    memory: int | str | None = None,
    cache_bytes: int | None = None,
    ranks: RanksLike = "auto",
    on_interrupt: str = "return",
    time_limit: float | None = None,
    metric_time_limit: float | None = None,
    state_file: str | os.PathLike[str] | None = None,
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
        memory: bytes on the device, or a text such as "4GB", that may be kept from one evaluation to the next: a copy of the
            weights and seven vectors, the batches, the Krylov basis, the graphs of Hessian-vector products. None for half of
            what is free. What does not fit is read or computed anew, slower; where not even the least fits, the metric fails
            and says what it takes. The report's provenance tells who kept how much. Weights of ``fully_shard`` are gathered
            where they and the vectors fit; otherwise both stay in shards, and metrics that need whole ones fail.
        cache_bytes: of it, for the batches, which are kept on the device if they take at most this; None for half of what
            the vectors leave, at most 4 GiB unless ``memory`` is given.
        ranks: what the processes of a ``torch.distributed`` group do, all of which must call this: "same data", they share
            out what each one's loader gives; "own data", each one's loader has a part of the data; "auto", what the loaders
            turn out to hold, repeats of a ``DistributedSampler`` left out. All of them return the same report, which is that
            of one process. "alone" for one process without the others. A process group, or a ``DeviceMesh`` of one
            dimension, is "auto" in it instead of the default group: its processes call this and the others do not, so that
            several groups can measure several models at the same time; ``RanksOf(group, "own data")`` says both. Errors name
            ranks by those of the default group.
        on_interrupt: what Ctrl-C does once measuring has begun. "return": the report is what there is by then. Metrics that
            are done are in it as ever; the one in hand has the status "interrupted" where it had something (the best point
            so far; Ritz values with their residuals; the mean over the probes so far), and the others are "not measured".
            ``report.stopped`` says so, and a warning does. A second Ctrl-C is ``KeyboardInterrupt`` at once, also in the
            next measurement, two seconds long. Only in the main thread, and only where nobody else handles the signal.
            "raise": ``KeyboardInterrupt`` at once. On several ranks the first Ctrl-C on any of them, or on torchrun, stops
            all of them after the same evaluation, at most one later; a rank that raises takes the others with it, by
            LostRankError.
        time_limit, metric_time_limit: seconds for all and for each metric. They are kept at evaluations and batches, as
            Ctrl-C is, so a long batch is waited for. A metric that hangs between evaluations is interrupted by an alarm a
            second later, if this is the main thread of a POSIX system; in C code it cannot be. On several ranks the clock of
            the first one counts, at evaluations only.
        state_file: keep the state of the measurement in this file, and go on from it if it is there: after a kill, to the
            same numbers bit for bit. Finished metrics are not measured again, and evaluations of the metric in hand only as
            far as they were not kept, which they are while keeping them takes about 5 % of their time and the file no
            more than about 32 vectors of ``dim`` (twice that on the disk). Nothing in it is unpickled. After the
            measurement it holds the results. On several ranks the first one alone reads and writes it, which must name it,
            and the number of ranks must stay the same.
    Returns:
        a report: ``report["epsilon_box"].value``, ``print(report)``, ``report.to_json()``. A metric that raises is in it
        with status "failed" and a PluginWarning; the others are measured.
    Cost: about 35 gradients, 80 gradients and 20 Hessian-vector products for the three default metrics.
    Raises:
        LoaderError, LossRuleError, NonFiniteLossError, UnknownNameError, ValueError: bad input, before anything is measured.
        StateFileError: the state file is that of other weights, data, metrics or versions, or damaged, or in use.
        RanksApartError, RemoteFailureError: the ranks differ in what they measure, or another one has bad input.
        LostRankError: a rank is gone, or does not come within the group's timeout.
    """
    group = resolve_ranks(ranks)
    with group.together():
        with group.sharing("choosing metrics"):
            chosen = resolve_metrics(metrics)
            listener = resolve_listener(progress if group.rank == 0 or callable(progress) else False)
            model = trained_part(model)
            switch = StopSwitch(
                time_limit=time_limit,
                metric_time_limit=metric_time_limit,
                on_interrupt=on_interrupt,
                shared=not group.is_alone,
            )
        asked = {
            key: {k: v for k, v in registry.metric_settings(metric).items() if isinstance(v, _PLAIN)}
            for key, metric in chosen.items()
        }
        group.agree("metrics and settings", [asked, seed, batch_norm, max_samples])
    with group.attended_by(switch), switch:
        with group.together():
            objective = Objective(
                model,
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
                listener=listener,
                ranks=group,
            )
        try:
            with kept_in(state_file, objective, chosen, seed) as keeper, objective.session():
                run = _Run(objective, chosen, seed, switch, keeper)
                run.all()
        finally:
            if listener is not None:
                listener(ProgressEvent(None, 0.0, None, 0.0))
        said = group.of(objective.first_rank, (run.provenance(), objective.cost))
    report = SharpnessReport(run.results, objective.loss, *said)
    if switch.interrupted:
        when = report.stopped or "by Ctrl-C"  # pressed when all was done
        warnings.warn(f"the measurement was stopped {when}: {run.told()}", MeasurementWarning, stacklevel=2)
    for _ in registry.call_hook("sharpness_measure_end", report=report):
        pass
    return report


class _Run:
    """The metrics of one measurement, one by one."""

    def __init__(
        self, objective: Objective, chosen: Mapping[str, Metric], seed: int, switch: StopSwitch, keeper: Keeper
    ) -> None:
        self._objective, self.chosen, self._seed, self._switch, self._keeper = objective, chosen, seed, switch, keeper
        is_whole = objective.layout.is_whole
        self._refused = frozenset(key for key, metric in chosen.items() if not (is_whole or works_on_shards(metric)))
        self._sharing = KrylovSharing({key: m for key, m in chosen.items() if key not in self._refused}, seed)
        self._stopped = ""
        self.results: dict[str, MetricResult] = {}

    def all(self) -> None:
        for key, metric in self.chosen.items():
            if (before := self._keeper.result_of(key)) is not None:
                self._sharing.resume(key, before)
                self.results[key] = before
            elif reason := self._switch.reason:
                self._stopped = reason
                self.results[key] = MetricResult.not_measured(f"the measurement was stopped {reason} before")
            else:
                self.results[key] = self._one(key, metric)

    def _one(self, key: str, metric: Metric) -> MetricResult:
        objective, switch, sharing, ranks = self._objective, self._switch, self._sharing, self._objective.ranks
        before = objective.cost
        result: MetricResult
        failed: Exception | None = None
        rng = sampling.generator_for(self._seed, registry.metric_name(metric))
        try:
            if key in self._refused:
                raise TypeError(
                    f"{registry.metric_name(metric)} needs whole vectors of weights, and those of this model lie in shards "
                    "over the ranks, because gathered they do not fit on a device. Measure on devices with more memory, "
                    "where they are gathered, or perturb fewer parameters (select=...)."
                )
            expected = getattr(metric, "expected_passes", None)
            objective.announce(key, expected(objective) if expected is not None else None)
            with switch.metric(), self._keeper.steps_of(key):
                result = sharing.measure(key, objective, rng) if sharing.peers(key) else metric(objective, rng)
            result = _checked(result)
        except LostRankError:
            raise
        except (MeasurementStopped, Overdue) as stop:
            if not switch.raised:  # it is none of ours
                ranks.leave(stop)
                raise
            had = "what hung could not be asked for what it had" if isinstance(stop, Overdue) else "it had no number yet"
            result = MetricResult.not_measured(f"stopped {switch.raised}, when {had}")
        except KeyboardInterrupt as error:
            ranks.leave(error)
            raise
        except Exception as error:
            failed, result = error, MetricResult.failed("")
        except SystemExit as stop:  # of a script that was made a metric; it must not end the training around it
            failed, result = RuntimeError(f"it called sys.exit({stop.code!r})"), MetricResult.failed("")
        else:
            if switch.raised:
                result = result.interrupted(switch.raised)
        if failure := ranks.close(key, failed, result.value):
            cause, message = failure
            if registry.is_strict():
                raise cause
            result = MetricResult.failed(message)
        self._stopped = self._stopped or switch.raised
        result = ranks.of(objective.first_rank, result.with_cost(objective.cost - before))
        if result.status.kind is Kind.FAILED:
            origin = registry.metric_provenance(metric)
            where = f" (plugin {origin[0]!r} from {origin[1]} {origin[2]})" if origin and origin[1] else ""
            warnings.warn(f"metric {key!r}{where} failed: {result.status.message}", PluginWarning, stacklevel=4)
        self._keeper.done(key, result, drop=sharing.done_with(key))
        return result

    def told(self) -> str:
        """What became of each metric, as a clause."""
        kinds = {Kind.INTERRUPTED: "is what it was then", Kind.NOT_MEASURED: "was not measured"}
        return ", ".join(f"{key} {kinds.get(result.status.kind, 'is done')}" for key, result in self.results.items())

    def provenance(self) -> dict[str, Any]:
        provenance = _provenance(self._objective, self.chosen, self._seed)
        if self._stopped:
            provenance["stopped"] = self._stopped
            provenance["notes"] = [*provenance["notes"], f"stopped {self._stopped}: {self.told()}"]
        return provenance


def _checked(result: Any) -> MetricResult:
    if not isinstance(result, MetricResult):
        raise TypeError(f"a metric must return a MetricResult, and this one returned a {type(result).__name__}")
    if not math.isfinite(result.value) and result.status.kind is not Kind.FAILED:
        return MetricResult(
            result.value,
            status=Status(Kind.FAILED, f"the value is {result.value}. {result.status.message}".strip()),
            details=result.details,
        )
    return result


def trained_part(model: nn.Module) -> nn.Module:
    """What a plugin that knows the kind says is trained of it."""
    found: nn.Module | None = registry.first_answer("sharpness_unwrap_model", model=unwrap(model)[0])
    return model if found is None else found


def ask_plugins(model: nn.Module, batch: Any, criterion: Any) -> LossFn | None:
    """A plugin's loss for the model, if one has it."""
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
            "settings": {k: v if isinstance(v, _PLAIN) else repr(v) for k, v in registry.metric_settings(metric).items()},
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
