"""The conformance suite of metrics."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import sampling
from ..errors import SharpnessError
from ..measure import measure_sharpness, resolve_metrics
from ..objective import Objective
from ..registry import FunctionMetric, Metric, metric_name, metric_settings
from ..report import Kind, MetricResult, SharpnessReport, Status
from ..specs import INVARIANCES, metric_invariances
from . import problems
from .core import ConformanceReport, NotApplicable, Suite, Verdict, Violation, from_repr, listed, pickled, shortened, told
from .footprints import no_change
from .invariances import holds
from .problems import Problem
from .ranks import measured_on_ranks
from .records import bad_values, changed, check_json

__all__ = ["check_metric"]

_SEEDS = 6


def check_metric(
    metric: Metric | str | type | None = None,
    *,
    for_model: Callable[[nn.Module], Metric] | None = None,
    tolerance: float = 1e-6,
    ranks: int = 1,
    skip: Mapping[str, str] | None = None,
) -> ConformanceReport:
    """Check that a metric does what users of ``measure_sharpness`` rely on; one line in a test of its own::

        from sharpness_plugins.testing import check_metric

        def test_conformance():
            check_metric(Fisher(num_probes=10))

    It is measured some fifty times on networks of up to 147 parameters and 24 samples. Checked are, by these names:

    - ``result``: it returns a ``MetricResult`` with a float, and does not fail on an ordinary network; ``finite``.
    - ``status``: says what the number is, in a sentence; ``standard_error``: None or not negative, nothing where the number
      is exact, and covering its spread over seeds; ``details``: JSON.
    - ``no_trace``: parameters, buffers, gradients, training flags, the data and every random state are bit for bit what
      they were; ``interrupted``: also where Ctrl-C came in the middle.
    - ``deterministic``: same seed, same number; ``memoryless``: also after another measurement in between;
      ``global_random_state``, ``other_metrics``: whatever the global seeds are, and what was measured before.
    - ``batching``: ragged, reordered and streamed batches of the same samples change nothing beyond ``tolerance``.
    - ``ranks``: so many processes with a part of the data each report the same, and the number of one process; tried where
      ``ranks`` is above 1, which takes some seconds.
    - ``invariances``: declared; and each of ``specs.INVARIANCES`` by its name: holds where claimed, and nowhere else.
    - ``edge_cases``: a zero gradient, one parameter, one sample, frozen layers, float32, no curvature give a finite number,
      or a ``ValueError`` or failed result that says why there is none.
    - ``bad_settings``: what is no number or no choice is refused by name; ``pickle`` and ``repr`` make an equal metric;
      ``report``: it comes back from JSON.

    Args:
        metric: an instance, a class without required settings, or a registered name.
        for_model: makes the metric for a model, in place of ``metric``, where it holds something of that model.
        tolerance: largest relative difference between numbers that must be the same up to rounding.
        ranks: processes to try it on.
        skip: names of checks that shall not count, each with the reason.
    Returns:
        what was checked, what did not apply and why; ``print`` it.
    Raises:
        ConformanceError: an AssertionError that lists every violated property, with numbers.
    """
    if (metric is None) == (for_model is None):
        raise TypeError("give either a metric or for_model, a function that makes it for a model")
    return _MetricSuite(metric, for_model, tolerance, ranks, skip or {}).run()


Check = Callable[[], "str | None"]


class _MetricSuite:
    def __init__(
        self,
        metric: Any,
        for_model: Callable[[nn.Module], Metric] | None,
        tolerance: float,
        ranks: int,
        skip: Mapping[str, str],
    ) -> None:
        given = metric if for_model is None else for_model(problems.classifier().model)
        (self._metric,) = resolve_metrics(given).values()
        self._for_model, self._tolerance, self._num_ranks = for_model, tolerance, ranks
        self._name = metric_name(self._metric)
        if "result" in skip:
            raise ValueError("the result cannot be left out: all other checks are of it")
        self._suite = Suite(f"metric {shortened(repr(self._metric))}", skip)
        self._base: MetricResult | None = None
        self._has_sane_error = False
        self._incomparable = ""  # why two of its numbers cannot be compared

    def run(self) -> ConformanceReport:
        check = self._suite.check
        check("result", self._result)
        if self._base is None:
            return self._suite.finish()
        check("finite", self._finite)
        if self._suite["finite"] is not Verdict.HELD:
            self._incomparable = "its number is not finite"
        check("status", self._status)
        check("details", self._details)
        check("no_trace", self._no_trace)
        check("interrupted", self._interrupted)
        self._compare("deterministic", self._deterministic, "its number is another every time")
        check("standard_error", self._standard_error)
        self._has_sane_error = self._suite["standard_error"] is not Verdict.VIOLATED
        check("memoryless", self._unless_incomparable(self._memoryless))
        self._compare("global_random_state", self._global_random_state, "it depends on global random numbers")
        check("other_metrics", self._unless_incomparable(self._other_metrics))
        check("batching", self._unless_incomparable(self._batching))
        check("ranks", self._unless_incomparable(self._ranks))
        check("invariances", self._unless_incomparable(self._declared))
        claims = self._claims()
        for name in INVARIANCES:
            check(name, self._unless_incomparable(partial(self._invariance, name, claims)))
        check("edge_cases", self._unless_incomparable(self._edge_cases))
        check("bad_settings", self._bad_settings)
        check("pickle", self._pickle)
        check("repr", self._repr)
        check("report", self._report)
        return self._suite.finish()

    def _compare(self, name: str, run: Check, otherwise: str) -> None:
        """A check without which no later one can compare numbers."""
        self._suite.check(name, self._unless_incomparable(run))
        if self._suite[name] is Verdict.VIOLATED:
            self._incomparable = self._incomparable or otherwise

    def _unless_incomparable(self, run: Check) -> Check:
        def checked() -> str | None:
            if self._incomparable:
                raise NotApplicable(self._incomparable)
            return run()

        return checked

    # --- running it

    @property
    def _result_of_base(self) -> MetricResult:
        assert self._base is not None  # "result" is checked first
        return self._base

    def _measure(
        self,
        problem: Problem,
        *,
        seed: int = 0,
        global_seed: int = 0,
        metric: Metric | None = None,
        before: Callable[[Objective], object] | None = None,
        on_copies: bool = True,
    ) -> MetricResult:
        """As ``measure_sharpness`` does it, but what it raises is raised; with a copy of the metric unless one is given."""
        if on_copies:
            problem = replace(problem, model=copy.deepcopy(problem.model), loader=copy.deepcopy(problem.loader))
        if metric is None:
            metric = self._fresh(problem.model)
        restore = sampling.rng_states(torch.device("cpu"))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                objective = Objective(problem.model, problem.loader, seed=seed, **problem.settings)
                sampling.seed_global(global_seed)
                with objective.session():
                    if before is not None:
                        before(objective)
                    return metric(objective, sampling.generator_for(seed, self._name))
        finally:
            restore()

    def _fresh(self, model: nn.Module) -> Metric:
        if self._for_model is not None:
            return self._for_model(model)
        try:
            return copy.deepcopy(self._metric)
        except Exception:
            return self._metric

    # --- the checks

    def _result(self) -> str | None:
        try:
            result = self._measure(problems.classifier())
        except Exception as error:
            raise Violation(f"it raised {told(error)} on {problems.classifier().name}") from error
        if not isinstance(result, MetricResult):
            raise Violation(f"it returned a {type(result).__name__}, and not a MetricResult")
        if isinstance(result.value, bool) or not isinstance(result.value, float):
            raise Violation(f"its value is a {type(result.value).__name__}, and not a float")
        if not isinstance(result.status, Status) or not isinstance(result.status.kind, Kind):
            raise Violation(f"its status is {result.status!r}, and not a Status of a Kind")
        if result.status.kind is Kind.FAILED:
            raise Violation(f"it failed on {problems.classifier().name}: {result.status.message}")
        self._base = result
        return f"{result.value:.6g} on {problems.classifier().name}"

    def _finite(self) -> None:
        value = self._result_of_base.value
        if not math.isfinite(value):
            raise Violation(f"its value is {value} and its status is {self._result_of_base.status}")

    def _status(self) -> str:
        status = self._result_of_base.status
        if not isinstance(status.message, str) or not status.message.strip():
            raise Violation("its status has no message, so nobody knows how the number was obtained")
        return str(status.kind)

    def _details(self) -> None:
        details = self._result_of_base.details
        if not isinstance(details, Mapping):
            raise Violation(f"they are a {type(details).__name__}, and not a mapping")
        check_json(details, "details")

    def _standard_error(self) -> str:
        base = self._result_of_base
        error = base.standard_error
        if error is None:
            return "none is stated"
        if isinstance(error, bool) or not isinstance(error, float) or not 0 <= error < math.inf:
            raise Violation(f"it is {error!r}, and not a finite number from 0")
        if base.status.kind in (Kind.EXACT, Kind.CONVERGED) and error > 1e-6 * abs(base.value):
            raise Violation(f"it is {error:.3g} for a number that is said to be {base.status.kind}")
        if self._incomparable:
            raise NotApplicable(self._incomparable)
        results = [base, *(self._measure(problems.classifier(), seed=seed) for seed in range(1, _SEEDS))]
        values = np.array([result.value for result in results])
        stated = math.sqrt(np.mean([(result.standard_error or 0.0) ** 2 for result in results]))
        spread = float(values.std(ddof=1))
        if spread > 4 * stated + self._tolerance * abs(base.value):
            raise Violation(
                f"it is {stated:.3g}, and over {_SEEDS} seeds the value has a standard deviation of {spread:.3g}"
            )
        return f"{stated:.3g} for a spread of {spread:.3g} over {_SEEDS} seeds"

    def _no_trace(self) -> None:
        problem = problems.busy_classifier()
        kept: list[tuple[Objective, Tensor]] = []

        def note(objective: Objective) -> None:
            kept.append((objective, objective.origin.clone()))

        with no_change(problem):
            try:
                self._measure(problem, before=note, on_copies=False)
            except (ValueError, SharpnessError) as error:
                raise NotApplicable(f"it does not measure {problem.name}: {told(error)}") from error
        for objective, origin in kept:
            if not torch.equal(objective.origin, origin):
                raise Violation("it wrote to objective.origin, which the next metric reads")

    def _interrupted(self) -> str:
        if self._suite["no_trace"] is Verdict.VIOLATED:
            raise NotApplicable("it leaves a trace anyway")
        reached = 0
        for at in (4, 9):
            problem = problems.busy_classifier()
            forward = problem.model.forward
            calls = 0

            def interrupted(*args: Any, at: int = at, forward: Any = forward, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == at:
                    raise KeyboardInterrupt
                return forward(*args, **kwargs)

            problem.model.forward = interrupted
            with no_change(problem):
                try:
                    self._measure(problem, on_copies=False)
                except KeyboardInterrupt:
                    reached += 1
                except (ValueError, SharpnessError) as error:
                    raise NotApplicable(f"it does not measure {problem.name}: {told(error)}") from error
                else:
                    if calls >= at:
                        raise Violation("it swallows KeyboardInterrupt, so that Ctrl-C does not stop it")
        return f"{reached} of 2 times" if reached else _not_asked("it evaluates the model fewer than four times")

    def _deterministic(self) -> None:
        self._same(self._measure(problems.classifier()), "the second time")

    def _memoryless(self) -> None:
        if self._for_model is not None:
            raise NotApplicable("for_model makes a new one for every model")
        metric = self._fresh(problems.classifier().model)
        text = repr(metric)
        self._measure(problems.classifier(), metric=metric)
        first, *_ = problems.edge_cases()
        with contextlib.suppress(Exception):
            self._measure(first, metric=metric)
        self._same(self._measure(problems.classifier(), metric=metric), "after another measurement")
        if repr(metric) != text:
            raise Violation(f"measuring changed its settings to {shortened(repr(metric))}")

    def _global_random_state(self) -> None:
        for seed in (1, 2):
            self._same(self._measure(problems.classifier(), global_seed=seed), "under another global seed")

    def _other_metrics(self) -> None:
        def other(objective: Objective) -> None:
            objective.value()
            direction = objective.value_and_grad()[1]
            objective.hvp(direction)

        self._close(self._measure(problems.classifier(), before=other), "after another metric")

    def _batching(self) -> None:
        for problem in problems.rebatched(problems.classifier()):
            self._close(self._measure(problem), f"with {problem.name}")

    def _ranks(self) -> str:
        if self._num_ranks < 2:
            raise NotApplicable("ranks=2 tries it on two processes")
        if self._for_model is not None:
            raise NotApplicable("for_model makes it for a model, and every process has one of its own")
        results = [report["it"] for report in measured_on_ranks(self._metric, self._num_ranks)]
        for rank, result in enumerate(results):
            if result.status.kind is Kind.FAILED:
                raise Violation(f"it fails on {self._num_ranks} processes: {result.status.message}")
            if repr(result.value) != repr(results[0].value):
                raise Violation(f"it is {results[0].value!r} on rank 0 and {result.value!r} on rank {rank}")
        self._close(results[0], f"on {self._num_ranks} processes")
        return f"{results[0].value:.6g} on {self._num_ranks} processes"

    def _same(self, other: MetricResult, when: str) -> None:
        base = self._result_of_base
        mine, its = (base.value, base.standard_error), (other.value, other.standard_error)
        if repr(mine) != repr(its):  # NaN is itself here
            raise Violation(f"it is {_shown(base)}, and {when} {_shown(other)}")

    def _close(self, other: MetricResult, when: str) -> None:
        base = self._result_of_base
        scale = max(abs(base.value), abs(other.value))
        if not abs(other.value - base.value) <= self._tolerance * scale:
            raise Violation(
                f"it is {base.value:.12g}, and {when} {other.value:.12g}: relative difference "
                f"{abs(other.value - base.value) / scale:.2g}, allowed are {self._tolerance:g}"
            )

    # --- invariances

    def _claims(self) -> frozenset[str] | None:
        try:
            return metric_invariances(self._metric)
        except (TypeError, ValueError):
            return None

    def _declared(self) -> str:
        claims = metric_invariances(self._metric)
        if claims is not None:
            return listed(claims)
        found = [name for name in INVARIANCES if self._holds(name)[0]]
        said = "frozenset({" + ", ".join(map(repr, found)) + "})" if found else "frozenset()"
        raise Violation(f"it declares none. What was found here: invariances = {said}")

    def _holds(self, name: str) -> tuple[bool | None, str]:
        return holds(name, self._measure, self._result_of_base, has_error=self._has_sane_error)

    def _invariance(self, name: str, claims: frozenset[str] | None) -> str | None:
        if claims is None:
            raise NotApplicable("no invariances are declared")
        holds, told_numbers = self._holds(name)
        if holds is None:
            raise NotApplicable(told_numbers)
        if holds and name not in claims:
            raise Violation(f"it is not claimed, and holds: {told_numbers}")
        if not holds and name in claims:
            raise Violation(f"it is claimed, and does not hold: {told_numbers}")
        return f"{'claimed' if holds else 'not claimed'}: {told_numbers}"

    # --- edges and settings

    def _edge_cases(self) -> str:
        without = []
        for problem in problems.edge_cases():
            try:
                result = self._measure(problem)
            except (ValueError, SharpnessError) as error:
                if not str(error).strip():
                    raise Violation(f"on {problem.name} it raised {told(error)}") from error
                without.append(problem.name)
                continue
            except Exception as error:
                raise Violation(f"on {problem.name} it raised {told(error)}") from error
            if result.status.kind is Kind.FAILED and result.status.message.strip():
                without.append(problem.name)
            elif not math.isfinite(result.value):
                raise Violation(f"on {problem.name} it is {result.value}, and its status is {result.status}")
            elif self._has_sane_error and result.standard_error is not None and not 0 <= result.standard_error < math.inf:
                raise Violation(f"on {problem.name} its standard error is {result.standard_error}")
        return f"no number, with a reason, on {', '.join(without)}" if without else "a number on each"

    def _bad_settings(self) -> str:
        tried = 0
        for name, value in bad_values(self._metric):
            tried += 1
            given = f"{name}={value!r}"
            try:
                made = changed(self._metric, name, value)
                result = self._measure(problems.classifier(), metric=made)
            except (ValueError, TypeError, SharpnessError) as error:
                if name not in str(error) and repr(value) not in str(error):
                    raise Violation(f"{given} is refused without saying so: {told(error)}") from error
            except Exception as error:
                raise Violation(f"{given} raises {told(error)}, where a ValueError that names it was expected") from error
            else:
                raise Violation(f"{given} is accepted, and gives {result.value:.6g}")
        if not tried:
            raise NotApplicable("no setting is a number or a word")
        return f"{tried} were refused by name"

    def _pickle(self) -> None:
        again = pickled(self._metric)
        if self._for_model is not None:
            return
        if metric_settings(again) != metric_settings(self._metric):
            raise Violation(f"{shortened(repr(self._metric))} came back as {shortened(repr(again))}")
        if not self._incomparable:
            self._same(self._measure(problems.classifier(), metric=again), "after pickle")

    def _repr(self) -> None:
        if self._for_model is not None:
            raise NotApplicable("it holds something of a model, which no text makes again")
        metric: Any = self._metric
        if not is_dataclass(metric):
            raise NotApplicable("it is no dataclass, so its repr is not its record")
        again = from_repr(metric, {self._name: metric.with_settings} if isinstance(metric, FunctionMetric) else {})
        if again != metric:
            raise Violation(f"{shortened(repr(metric))} reads as {shortened(repr(again))}")

    def _report(self) -> None:
        if self._incomparable or not self._has_sane_error or self._suite["details"] is Verdict.VIOLATED:
            raise NotApplicable(self._incomparable or "its standard error or its details are none")
        problem = problems.classifier()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = measure_sharpness(
                problem.model, problem.loader, {"it": self._fresh(problem.model)}, progress=False, on_interrupt="raise"
            )
        if report["it"].cost is None:
            raise Violation("no cost is told of it")
        again = SharpnessReport.from_json(report.to_json())
        if json.loads(again.to_json()) != json.loads(report.to_json()) or str(again) != str(report):
            raise Violation("the report does not come back from JSON as it was")


def _not_asked(reason: str) -> str:
    raise NotApplicable(reason)


def _shown(result: MetricResult) -> str:
    error = "" if result.standard_error is None else f" ± {result.standard_error!r}"
    return f"{result.value!r}{error}"
