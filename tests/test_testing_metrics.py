"""The conformance suite of metrics: our own pass it, and each kind of wrong metric is caught by the check made for it."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
import torch

from sharpness_plugins import Kind, MetricResult, Status, available_metrics, metric
from sharpness_plugins import metrics as built_in
from sharpness_plugins.registry import fresh_registry
from sharpness_plugins.schema import check_types
from sharpness_plugins.specs import INVARIANCES, metric_invariances
from sharpness_plugins.testing import ConformanceError, Verdict, check_metric

OWN = (
    built_in.EpsilonBox(),
    built_in.RandomSubspace(draws=3),
    built_in.HessianTopK(),
    built_in.HessianBottom(),
    built_in.HessianTrace(),
    built_in.HessianTrace(num_matvecs=40, method="hutchinson", adaptive=True),
    built_in.HessianFrobenius(),
    built_in.SpectralDensity(),
    built_in.GaussNewtonTopK(),
    built_in.GaussNewtonTrace(num_matvecs=20),
    built_in.FisherTrace(num_matvecs=20),
    built_in.FisherTrace(num_matvecs=20, labels="empirical"),
    built_in.AdaptiveTopK(),
    built_in.GradientNoiseScale(),
)


@pytest.mark.parametrize("own", OWN, ids=lambda own: repr(own)[:60])
def test_our_own_metrics_conform(own):
    report = check_metric(own)
    checked = {finding.property for finding in report.findings if finding.verdict is Verdict.HELD}
    assert {"result", "no_trace", "deterministic", "batching", "invariances", "edge_cases", "pickle", "report"} <= checked
    decided = {name for name in INVARIANCES if report[name].verdict is Verdict.HELD}
    assert len(decided) >= 3, "a suite that cannot tell says nothing"


def test_a_metric_that_holds_an_optimizer_conforms():
    def of(model):
        return built_in.PreconditionedTopK(torch.optim.SGD(model.parameters(), lr=0.1))

    assert check_metric(for_model=of)["loss_scaling"].verdict is Verdict.HELD


def test_every_built_in_metric_is_among_them():
    names = {one.name for one in OWN} | {built_in.PreconditionedTopK.name}
    assert names == {name for name, offer in available_metrics().items() if offer.plugin == "builtin"}


def test_what_adaptive_metrics_claim_others_do_not():
    for make in (built_in.HessianTrace, built_in.HessianFrobenius, built_in.SpectralDensity, built_in.GaussNewtonTopK):
        assert metric_invariances(make(adaptive=True)) - metric_invariances(make()) == {
            "layer_rescaling",
            "batch_norm_scaling",
        }
    assert "layer_rescaling" not in metric_invariances(built_in.EpsilonBox())
    assert metric_invariances(built_in.AdaptiveTopK()) == set(INVARIANCES) - {"loss_invariance"}


# --- the zoo: each of these is wrong in one way


@dataclass(frozen=True)
class Norm:
    """The norm of the gradient: nothing is wrong with it."""

    order: float = 2.0

    name: ClassVar[str] = "norm"
    invariances: ClassVar[Any] = frozenset({"neuron_permutation", "loss_scaling"})

    def __post_init__(self):
        check_types(self)

    def number(self, objective):
        return objective.value_and_grad()[1].double().norm(self.order).item()

    def __call__(self, objective, rng):
        return MetricResult(self.number(objective), status=Status(Kind.EXACT, "norm of the gradient"))


def changed(**how):
    """A metric whose result has these fields; functions are given what the field would be."""

    class Changed(Norm):
        def __call__(self, objective, rng):
            result = super().__call__(objective, rng)
            given = {key: value(getattr(result, key)) if callable(value) else value for key, value in how.items()}
            return replace(result, **given)

    return Changed


def times(factor):
    """A metric that is multiplied by ``factor(objective, rng)``."""

    class Times(Norm):
        def number(self, objective):
            return super().number(objective)

        def __call__(self, objective, rng):
            by = factor(objective, rng)
            return replace(super().__call__(objective, rng), value=by * self.number(objective))

    return Times


def claiming(*names):
    return type("Claiming", (Norm,), {"invariances": frozenset(names)})


class ReturnsANumber(Norm):
    def __call__(self, objective, rng):
        return self.number(objective)


class ReturnsATensor(Norm):
    def number(self, objective):
        return objective.value_and_grad()[1].norm()


class Raises(Norm):
    def number(self, objective):
        raise IndexError("list index out of range")


class GivesUp(Norm):
    def __call__(self, objective, rng):
        return MetricResult.failed("the licence server is away")


class OptimisticError(Norm):
    def __call__(self, objective, rng):
        value = self.number(objective) * (1 + 0.01 * torch.randn(1, generator=rng).item())
        return MetricResult(value, 1e-6 * value, Status(Kind.ESTIMATE, "one draw"))


class WritesWeights(Norm):
    def number(self, objective):
        next(objective.module.parameters()).data.mul_(1.0001)
        return super().number(objective)


class WritesTheOrigin(Norm):
    def number(self, objective):
        found = super().number(objective)
        objective.origin.mul_(1.0001)
        return found


class WritesTheData(Norm):
    def number(self, objective):
        for batch in objective._source:
            batch.data[0].mul_(1.0)
            batch.data[0][0, 0] += 1e-9
        return super().number(objective)


class LeavesAHook(Norm):
    def number(self, objective):
        objective.module.register_forward_hook(lambda *_: None)
        return super().number(objective)


class SwallowsCtrlC(Norm):
    def number(self, objective):
        found = super().number(objective)
        for _ in range(9):
            with contextlib.suppress(BaseException):
                objective.value()
        return found


class RestoresUnlessInterrupted(Norm):
    def number(self, objective):
        weights = next(objective.module.parameters()).data
        weights.mul_(2)
        found = [super(RestoresUnlessInterrupted, self).number(objective) for _ in range(10)][-1]
        weights.div_(2)
        return found


COUNTER = itertools.count(1)


@dataclass(frozen=True)
class Remembers(Norm):
    seen: list = field(default_factory=list, init=False, repr=False, compare=False)

    def number(self, objective):
        self.seen.append(1)
        return super().number(objective) * len(self.seen)


class Squared(Norm):
    def number(self, objective):
        return super().number(objective) ** 2


class DividesByNothing(Norm):
    def number(self, objective):
        return super().number(objective) * (1 + 0 / (objective.dim - 1))


class NotANumberOnOneSample(Norm):
    def number(self, objective):
        return super().number(objective) if objective.num_samples > 1 else math.nan


class InfiniteErrorAtAMinimum(Norm):
    def __call__(self, objective, rng):
        value = self.number(objective)
        return MetricResult(value, 0.0 if value else math.inf, Status(Kind.EXACT, "norm of the gradient"))


class TakesAnything(Norm):
    def __post_init__(self):
        pass

    def number(self, objective):
        return replace(self, order=2.0).number(objective) if self.order != 2.0 else super().number(objective)


class RefusesWithoutSaying(Norm):
    def __post_init__(self):
        if self.order != 2.0:
            raise ValueError("bad setting")


class CannotBePickled(Norm):
    def __reduce__(self):
        raise TypeError("cannot pickle 'Engine' object")


class ForgetsItsSettings(Norm):
    def __reduce__(self):
        return type(self), (3.0,)

    def __deepcopy__(self, memo):
        return self


class HasNoRecord(Norm):
    def __repr__(self):
        return "<norm>"


class LiesInItsRecord(Norm):
    def __repr__(self):
        return "LiesInItsRecord(order=3.0)"


ZOO = {
    "a number": (ReturnsANumber, "result", "returned a float, and not a MetricResult"),
    "a tensor": (ReturnsATensor, "result", "its value is a Tensor"),
    "an error": (Raises, "result", "raised IndexError: list index out of range on a ReLU network"),
    "a failure": (GivesUp, "result", "failed on a ReLU network: the licence server is away"),
    "NaN": (changed(value=math.nan), "finite", "its value is nan and its status is exact"),
    "infinity": (changed(value=math.inf), "finite", "its value is inf"),
    "no message": (changed(status=Status(Kind.EXACT)), "status", "no message"),
    "text as status": (changed(status="fine"), "result", "'fine', and not a Status"),
    "a negative error": (changed(standard_error=-1.0), "standard_error", "-1.0, and not a finite number from 0"),
    "an error of nothing": (changed(standard_error=math.nan), "standard_error", "it is nan"),
    "an error of an exact number": (
        changed(standard_error=0.5),
        "standard_error",
        "0.5 for a number that is said to be exact",
    ),
    "an optimistic error": (OptimisticError, "standard_error", "over 6 seeds the value has a standard deviation of"),
    "an object in the details": (changed(details={"a": [object()]}), "details", "details['a'][0] is a object"),
    "a number as key": (changed(details={3: 1}), "details", "the key 3"),
    "a list of details": (changed(details=[1]), "details", "they are a list"),
    "weights written": (WritesWeights, "no_trace", "it changed parameter 0.weight"),
    "origin written": (WritesTheOrigin, "no_trace", "objective.origin"),
    "data written": (WritesTheData, "no_trace", "it changed batch 0 of the data"),
    "a hook left": (LeavesAHook, "no_trace", "hooks of the model"),
    "Ctrl-C swallowed": (SwallowsCtrlC, "interrupted", "swallows KeyboardInterrupt"),
    "weights written when interrupted": (RestoresUnlessInterrupted, "interrupted", "it changed parameter 0.weight"),
    "another number every time": (times(lambda objective, rng: next(COUNTER)), "deterministic", "the second time"),
    "a memory": (Remembers, "memoryless", "after another measurement"),
    "global random numbers": (
        times(lambda objective, rng: torch.rand(1).item()),
        "global_random_state",
        "another global seed",
    ),
    "other metrics": (times(lambda objective, rng: 1 + objective.cost.passes), "other_metrics", "after another metric"),
    "the batching": (times(lambda objective, rng: objective.num_batches), "batching", "with ragged batches"),
    "the first batch": (
        times(lambda objective, rng: 1 + next(iter(objective._source)).data[0][0, 0].item() ** 2),
        "batching",
        "samples in the opposite order",
    ),
    "no claims": (type("Silent", (Norm,), {"invariances": None}), "invariances", "'neuron_permutation', 'loss_scaling'})"),
    "a claim unheard of": (claiming("loss_scaling", "rotation"), "invariances", "'rotation' is no invariance"),
    "a claim of rescaling": (
        claiming("neuron_permutation", "loss_scaling", "layer_rescaling"),
        "layer_rescaling",
        "it is claimed, and does not hold",
    ),
    "a claim of BatchNorm": (
        claiming("neuron_permutation", "loss_scaling", "batch_norm_scaling"),
        "batch_norm_scaling",
        "it is claimed, and does not hold",
    ),
    "a claim of invariance": (
        claiming("neuron_permutation", "loss_scaling", "loss_invariance"),
        "loss_invariance",
        "it is claimed, and does not hold",
    ),
    "a claim of scaling": (Squared, "loss_scaling", "it is claimed, and does not hold"),
    "a claim of permutation": (
        times(lambda objective, rng: 1 + objective.origin[0].item() ** 2),
        "neuron_permutation",
        "it is claimed, and does not hold",
    ),
    "permutation not claimed": (claiming("loss_scaling"), "neuron_permutation", "it is not claimed, and holds"),
    "scaling not claimed": (claiming("neuron_permutation"), "loss_scaling", "it is not claimed, and holds"),
    "a division by zero": (DividesByNothing, "edge_cases", "on one parameter it raised ZeroDivisionError"),
    "NaN on one sample": (NotANumberOnOneSample, "edge_cases", "on one sample it is nan, and its status is exact"),
    "an infinite error": (InfiniteErrorAtAMinimum, "edge_cases", "on a gradient of zero its standard error is inf"),
    "any setting": (TakesAnything, "bad_settings", "order='nonsense' is accepted, and gives"),
    "an unclear refusal": (RefusesWithoutSaying, "bad_settings", "order='nonsense' is refused without saying so"),
    "no pickle": (CannotBePickled, "pickle", "pickle fails with TypeError: cannot pickle 'Engine' object"),
    "another pickle": (ForgetsItsSettings, "pickle", "came back as"),
    "no record": (HasNoRecord, "repr", "cannot be read back"),
    "a wrong record": (LiesInItsRecord, "repr", "reads as"),
    "a report that JSON refuses": (changed(details={"digits": 10**5000}), "report", "raised ValueError"),
}
for name, (cls, _, _) in ZOO.items():  # pickle looks for them here
    cls.__qualname__ = cls.__name__ = cls.__name__ if cls.__name__ in globals() else f"Zoo{abs(hash(name))}"
    globals()[cls.__name__] = cls


@pytest.mark.parametrize("what", ZOO)
def test_what_is_wrong_is_found_by_the_check_that_is_made_for_it(what):
    wrong, check, says = ZOO[what]
    with pytest.raises(ConformanceError) as raised:
        check_metric(wrong())
    assert [finding.property for finding in raised.value.report.violated] == [check], str(raised.value)
    assert says in raised.value.report[check].detail
    assert f"VIOLATED: {check}" in str(raised.value)


def test_the_zoo_reaches_every_check():
    checks = {finding.property for finding in check_metric(Norm()).findings}
    assert {check for _, check, _ in ZOO.values()} | {"ranks"} == checks


RANKS_MODULE = """
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.distributed

from sharpness_plugins import Kind, MetricResult, Status


@dataclass(frozen=True)
class OfOneRank:
    name: ClassVar[str] = "of_one_rank"
    invariances: ClassVar[Any] = frozenset({"neuron_permutation", "loss_scaling"})

    def __call__(self, objective, rng):
        value = objective.value_and_grad()[1].norm().item()
        if torch.distributed.is_initialized():
            value *= 1 + torch.distributed.get_rank()
        return MetricResult(value, status=Status(Kind.EXACT, "norm of the gradient"))
"""


def test_ranks_are_tried_where_asked_for(tmp_path, monkeypatch):
    (tmp_path / "conformance_zoo_of_ranks.py").write_text(RANKS_MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("conformance_zoo_of_ranks")
    assert check_metric(built_in.HessianTopK(k=2), ranks=2)["ranks"].detail.endswith("on 2 processes")
    assert check_metric(Norm)["ranks"].detail == "ranks=2 tries it on two processes"
    with pytest.raises(ConformanceError) as raised:
        check_metric(module.OfOneRank(), ranks=2)
    assert [finding.property for finding in raised.value.report.violated] == ["ranks"]


class TwoFaults(HasNoRecord):
    def __call__(self, objective, rng):
        return replace(super().__call__(objective, rng), standard_error=-1.0)


def test_several_violations_are_listed_together():
    with pytest.raises(AssertionError, match=r"violates 2 of \d+ properties:\n.*standard_error.*\n.*repr"):
        check_metric(TwoFaults())


def norm_of_order(objective, *, order=2.0):
    if not isinstance(order, float) or not order > 0:
        raise ValueError(f"order must be a positive number, got {order!r}")
    return objective.value_and_grad()[1].norm(order)


def test_a_function_is_checked_as_a_class_is():
    with fresh_registry():
        made = metric("norm_of_order", invariances=["neuron_permutation", "loss_scaling"])(norm_of_order)
        report = check_metric(made.with_settings(order=1.0))
        assert report["repr"].verdict is report["bad_settings"].verdict is Verdict.HELD
        assert report["invariances"].detail == "'loss_scaling', 'neuron_permutation'"
        assert check_metric("norm_of_order").passed
    with pytest.raises(TypeError, match="a class says its invariances by an attribute"):
        metric("norm", invariances=["loss_scaling"])(Norm)


def test_what_is_left_out_is_said_with_its_reason():
    report = check_metric(HasNoRecord(), skip={"repr": "it is made by a factory"})
    assert str(report["repr"]) == "not applicable: repr: left out: it is made by a factory"
    assert report.passed
    assert "conforms" in str(report)
    with pytest.raises(ValueError, match="skip names 'beauty', which this suite does not check"):
        check_metric(Norm, skip={"beauty": "it has none"})
    with pytest.raises(KeyError, match="no property 'beauty' was checked"):
        report["beauty"]
    with pytest.raises(TypeError, match="either a metric or for_model"):
        check_metric()


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"k": "5"}, TypeError, "k must be a whole number, got '5'"),
        ({"k": 2.5}, TypeError, "k must be a whole number, got 2.5"),
        ({"k": True}, TypeError, "k must be a whole number, got True"),
        ({"tolerance": math.nan}, ValueError, "tolerance must be a number, got nan"),
        ({"num_matvecs": "many"}, TypeError, "num_matvecs must be a whole number or None, got 'many'"),
        ({"check_multiplicity": 1}, TypeError, "check_multiplicity must be True or False, got 1"),
        ({"storage": 3}, TypeError, "storage must be text, got 3"),
    ],
)
def test_settings_of_another_type_are_refused_by_name(settings, error, says):
    with pytest.raises(error, match=says):
        built_in.HessianTopK(**settings)
