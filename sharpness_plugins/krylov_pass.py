"""One Krylov pass for many metrics: they say what they need of an operator, and read one run and the same probes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch

from . import sampling, steps
from .expected import NOTHING, ExpectedWork, Range
from .krylov import Ending, LanczosRequest, LanczosResult
from .lanczos import basis_of_use, lanczos
from .objective import Objective
from .operators import Curvature, Operator
from .report import MetricResult
from .traces import Probes

__all__ = [
    "KrylovMetric",
    "KrylovNeed",
    "KrylovPass",
    "KrylovSharing",
    "expected_products",
    "expected_trial",
    "measure_alone",
    "measure_operator",
    "merged",
    "probes_beside",
]

_FEWEST_PROBES = 4
_TRIED = 8  # samples
_WHOLE = 100  # parameters: so few have their whole matrix, and with it the multiplicities that one start does not see


@dataclass(frozen=True)
class KrylovNeed:
    """What a metric asks of a Krylov space.

    Args:
        operator: which matrix; needs of equal ones are met by one run.
        request: eigenvalues that must converge; None for none.
        num_steps: of the space of the starting vector itself, where nothing must converge; the run makes as many at least,
            and ends earlier only where the space is exhausted, or restarts earlier where memory holds no more vectors.
        num_products: that it takes in all, the rest of them with probes outside of the space; 0 for no probes.
    """

    operator: Curvature
    request: LanczosRequest | None = None
    num_steps: int = 0
    num_products: int = 0

    def __post_init__(self) -> None:
        if self.request is None and self.num_steps < 1:
            raise ValueError("a need without a request asks for at least one step, got num_steps = 0")

    @property
    def group(self) -> tuple[Any, ...]:
        """Needs with the same group can be met by one run; without a request, a need joins any run at the upper end."""
        which, storage = ("LA", "full") if self.request is None else (self.request.which, self.request.storage)
        return self.operator, which, storage


@runtime_checkable
class KrylovMetric(Protocol):
    """A metric that can share a run: ``metric(objective, rng)`` is ``measure_alone(metric, objective, rng)``."""

    def krylov_need(self) -> KrylovNeed | None:
        """What it needs; None where these settings need something else, and the metric is called on its own."""

    def from_krylov(self, shared: KrylovPass) -> MetricResult:
        """The result, from a run that meets the need, and perhaps others."""


class KrylovPass:
    """A Lanczos run on an operator, its basis, and random probes outside of it; made once, read by every metric.

    Attributes:
        run: with its basis.
        probes: made when a metric asks, and kept for the next one.
        how, check: of the products of the run, see ``Operator``.
    Cost: the products of the run, which are those of the most demanding need. Memory: its basis.
    """

    def __init__(self, operator: Operator, needs: Iterable[KrylovNeed], generator: torch.Generator) -> None:
        self.operator, self.generator = operator, generator
        layout = operator.layout
        start = layout.normal(generator, operator.like)
        request = merged(list(needs), operator.dim)
        with operator.session():
            self.run: LanczosResult = lanczos(
                operator.matvec, start, request, generator=generator, memory=operator.memory, layout=layout
            )
            self.how, self.check = operator.how(), operator.check()
        self.probes = self.probes_without_basis(self.run)

    def probes_without_basis(self, run: LanczosResult | None = None) -> Probes:
        """New probes; outside of the basis of a run, if one is given."""
        operator = self.operator
        # a stream of its own: what else a metric draws does not change the probes of the next one
        generator = sampling.generator_for(self.generator.initial_seed(), "probes")
        return Probes(operator.matvec, operator.like, generator, run=run, blocks=operator.blocks, layout=operator.layout)


def merged(needs: list[KrylovNeed], dim: int) -> LanczosRequest:
    """The request that meets all needs of one group on an operator of this size."""
    steps = min(max(need.num_steps for need in needs), dim)
    requests = [need.request for need in needs if need.request is not None]
    if not requests:
        # every Ritz pair is wanted, so that nothing but an exhausted space ends the run before its last step
        return LanczosRequest(k=steps, guard=0, num_matvecs=steps, max_basis=steps + 2, keep_basis=True)
    first, wanted = requests[0], max(request.wanted for request in requests)
    k = min(max(request.k for request in requests), dim)
    budget = max(steps, *(request.num_matvecs for request in requests))
    guard = max(request.guard for request in requests)
    basis = max([wanted + 2, steps, *(request.max_basis or 2 * request.k + 4 for request in requests)])
    if dim <= min(_WHOLE, budget):
        guard, basis = dim - k, dim + 2
    return replace(
        first,
        k=k,
        tolerance=min(request.tolerance for request in requests),
        num_matvecs=budget,
        min_matvecs=steps,
        guard=guard,
        check_multiplicity=any(request.check_multiplicity for request in requests),
        max_basis=max(basis, k + guard * len(first.ends) + 2),
        keep_basis=True,
    )


def measure_alone(metric: KrylovMetric, objective: Objective, rng: torch.Generator) -> MetricResult:
    """A metric with a run of its own."""
    need = metric.krylov_need()
    if need is None:
        raise TypeError(f"{metric!r} needs no Krylov run")
    with objective.session():
        operator = need.operator.on(objective)
        return metric.from_krylov(KrylovPass(operator, [need], rng))


def measure_operator(
    operator: Operator, metrics: Mapping[str, KrylovMetric] | Iterable[KrylovMetric], *, seed: int = 0
) -> dict[str, MetricResult]:
    """Metrics of an operator that is no objective's, from one run.

    >>> from sharpness_plugins.operators import from_linear_operator
    >>> measure_operator(from_linear_operator(HessianLinearOperator(...)), [HessianTrace()])     # doctest: +SKIP

    Args:
        metrics: their settings count, but not which matrix of an objective they would measure.
    Raises:
        ValueError: a metric has no need that a run meets, or the metrics want different ends of the spectrum.
    """
    named = dict(metrics) if isinstance(metrics, Mapping) else {getattr(m, "name", type(m).__name__): m for m in metrics}
    needs = {}
    for name, metric in named.items():
        need = metric.krylov_need()
        if need is None:
            raise ValueError(f"{name} with these settings does not read a Krylov run, so it cannot measure an operator")
        needs[name] = need
    if len({need.group[1:] for need in needs.values()}) > 1:
        raise ValueError("these metrics want different ends of the spectrum, or another storage: measure them one by one")
    shared = KrylovPass(operator, needs.values(), sampling.generator_for(seed, "krylov"))
    return {name: metric.from_krylov(shared) for name, metric in named.items()}


def probes_beside(used: int, num_products: int) -> int:
    """What a run has left of a metric's products; a tenth of the run where it has left nothing, so that all together cost
    1.1 times the dearest, and at least four for the sake of the standard error.
    """
    return max(num_products - used, used // 10, _FEWEST_PROBES)


def expected_products(needs: list[KrylovNeed], dim: int) -> Range:
    """Of one run that meets the needs."""
    request, steps = merged(needs, dim), min(max(need.num_steps for need in needs), dim)
    asked = [need.request for need in needs if need.request is not None]
    if not asked:
        return Range.exactly(steps)
    low = min(max(steps, request.wanted), dim, request.num_matvecs)
    high = request.num_matvecs if basis_of_use(request, dim) < dim else min(dim, request.num_matvecs)
    found = [(50 * one.k if one.which == "SA" else 3 * one.k + 7) * (1.6 if one.check_multiplicity else 1) for one in asked]
    whole = dim <= min(_WHOLE, request.num_matvecs)
    return Range(low, min(max(dim if whole else max(found), low), high), high)


def expected_trial(objective: Objective) -> Range:
    """Gradients that trying out the ways of Hessian products takes, once, on a few samples or one batch."""
    few = min(_TRIED, objective.num_samples or _TRIED) / max(objective.num_samples, _TRIED)
    return Range(0.0, 8 * few, 12 * (few + 1 / objective.num_batches))


class KrylovSharing:
    """Which metrics of a measurement share a run; makes it when the first of them is measured, frees it after the last.

    A group of one is not shared: that metric is called as it is.
    """

    def __init__(self, metrics: Mapping[str, object], seed: int) -> None:
        self._seed = seed
        asking: dict[str, tuple[KrylovMetric, KrylovNeed]] = {}
        for key, metric in metrics.items():
            if isinstance(metric, KrylovMetric) and (need := _need_of(metric)) is not None:
                asking[key] = metric, need
        self._needs = {key: need for key, (_, need) in asking.items()}
        groups = [need.group for _, need in asking.values()]
        self._members = {key: entry for key, entry in asking.items() if groups.count(entry[1].group) > 1}
        self._waiting = set(self._members)
        self._passes: dict[tuple[Any, ...], KrylovPass | str] = {}
        self._payers: dict[tuple[Any, ...], str] = {}

    def peers(self, key: str) -> list[str]:
        """The other metrics of the group; empty for a metric that shares nothing."""
        if key not in self._members:
            return []
        return [other for other in self._of(self._members[key][1].group) if other != key]

    def measure(self, key: str, objective: Objective, rng: torch.Generator) -> MetricResult:
        """The result of a metric that has peers; says who paid for the run. Where memory does not hold a basis for all of
        them, each has a run of its own.

        Raises:
            RuntimeError: the run failed already when another metric of the group was measured.
        """
        metric, need = self._members[key]
        self._waiting.discard(key)
        fits = True
        try:
            shared = self._pass(key, need.group, objective)
            with objective.session():
                result = metric.from_krylov(shared)
            if shared.run.ending is Ending.STOPPED:  # the next metric may have the time for a run of its own
                self._passes.pop(need.group)
        except MemoryError:
            fits = False
        finally:
            if not self._waiting & set(self._of(need.group)):
                self._passes.pop(need.group, None)
        if not fits:  # out of the handler, whose frames hold what was allocated
            self._passes.pop(need.group, None)
            self._members = {k: entry for k, entry in self._members.items() if entry[1].group != need.group}
            return measure_alone(metric, objective, rng)
        payer, others = self._payers[need.group], ", ".join(self.peers(key))
        run = f"{shared.run.num_matvecs} products of one Krylov run"
        said = f"paid for the {run}, which {others} read, too" if payer == key else f"read the {run} that {payer} paid for"
        details = {**result.details, "run_shared_with": self.peers(key), "run_paid_by": payer}
        status = replace(result.status, message=f"{result.status.message}; {said}".lstrip("; "))
        return replace(result, status=status, details=details)

    def expected_work(self, key: str, objective: Objective) -> ExpectedWork | None:
        """What a metric takes that reads a run, the products of the run with the first of its group; None for others."""
        need = self._needs.get(key)
        if need is None:
            return None
        group = [other for other in self._needs if other == key or other in self.peers(key)]
        dim = need.operator.on(objective).dim
        needs = [self._needs[other] for other in group]
        run = expected_products(needs, dim)
        before = max((self._probes(other, run, dim).typical for other in group[: group.index(key)]), default=0.0)
        probes = self._probes(key, run, dim)
        if group[0] != key:
            return ExpectedWork(hvps=Range(0.0, max(probes.typical - before, 0.0), probes.high))
        trial = expected_trial(objective) if need.operator.matrix == "hessian" else NOTHING
        vectors = basis_of_use(merged(needs, dim), dim)
        return ExpectedWork(gradients=trial, hvps=run.plus(probes), vectors=math.ceil(vectors * dim / objective.dim))

    def _probes(self, key: str, run: Range, dim: int) -> Range:
        """What a metric takes beside the run; nothing where that spans the whole space."""
        count = self._needs[key].num_products
        if not count or run.low >= dim:
            return NOTHING
        low, typical, high = (probes_beside(int(used), count) for used in (run.high, run.typical, run.low))
        may_be_whole = run.high >= dim
        return Range(0.0 if may_be_whole else min(low, high), typical, max(low, high))

    def resume(self, key: str, result: MetricResult) -> None:
        """A metric that was measured before: who paid for the run, if it read one, is known."""
        if key in self._members:
            self._waiting.discard(key)
            if (payer := result.details.get("run_paid_by")) is not None:
                self._payers[self._members[key][1].group] = payer

    def done_with(self, key: str) -> list[str]:
        """The steps, by their keys' beginnings, that nobody needs once this metric is measured."""
        if key not in self._members:
            return []
        group = self._members[key][1].group
        return [] if self._waiting & set(self._of(group)) else [f"{_scope_of(group)}/"]

    def _of(self, group: tuple[Any, ...]) -> list[str]:
        return [key for key, (_, need) in self._members.items() if need.group == group]

    def _pass(self, key: str, group: tuple[Any, ...], objective: Objective) -> KrylovPass:
        made = self._passes.get(group)
        if isinstance(made, KrylovPass):
            return made
        if made is not None:
            raise RuntimeError(f"the Krylov run shared with {self._payers[group]} failed: {made}")
        self._payers.setdefault(group, key)
        needs = [self._members[member][1] for member in self._of(group)]
        rng = sampling.generator_for(self._seed, "krylov", repr(group))  # by what is measured, not by who asks first
        try:
            # beside the metrics: what the first one has used the others still need
            with objective.session(), steps.root_child(_scope_of(group)).entered():
                made = KrylovPass(needs[0].operator.on(objective), needs, rng)
        except Exception as error:
            self._passes[group] = f"{type(error).__name__}: {error}"  # its frames would keep the basis
            raise
        self._passes[group] = made
        return made


def _scope_of(group: tuple[Any, ...]) -> str:
    return f"krylov {group!r}".replace("/", ":")


def _need_of(metric: KrylovMetric) -> KrylovNeed | None:
    """What a metric asks for; None where asking fails, since calling the metric will say why."""
    try:
        need = metric.krylov_need()
    except Exception:
        return None
    return need if isinstance(need, KrylovNeed) else None
