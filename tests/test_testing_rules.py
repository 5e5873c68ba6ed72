"""The conformance suite of rules: our own pass it, and each kind of wrong rule is caught by the check made for it."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from sharpness_plugins import optimizers
from sharpness_plugins.optimizers import (
    ASAM,
    FSAM,
    GSAM,
    SAM,
    WSAM,
    Descent,
    KStepSAM,
    LookSAM,
    MomentumSAM,
    RandomSAM,
    Rule,
)
from sharpness_plugins.schema import check_types
from sharpness_plugins.testing import ConformanceError, Verdict, check_rule

OWN = (
    *(SAM(), ASAM(), ASAM(eta=0.0), GSAM(), WSAM(), WSAM(gamma=0.3, decoupled=False), FSAM()),
    *(LookSAM(k=3), LookSAM(k=1), MomentumSAM(), RandomSAM(), KStepSAM(), KStepSAM(k=3, step=0.5)),
)


@pytest.mark.parametrize("own", OWN, ids=repr)
def test_our_own_rules_conform(own):
    report = check_rule(own)
    settings = Verdict.HELD if vars(own) else Verdict.NOT_APPLICABLE
    assert {finding.property: finding.verdict for finding in report.findings}.pop("bad_settings") is settings
    assert all(one.verdict is Verdict.HELD for one in report.findings if one.property != "bad_settings")


def test_every_rule_of_ours_is_among_them():
    known = {one for one in vars(optimizers).values() if isinstance(one, type) and issubclass(one, Rule)} - {Rule}
    assert known == {type(one) for one in OWN}


# --- the zoo


@dataclass(frozen=True)
class Mixed(Rule):
    """A mean of both gradients: nothing is wrong with it."""

    share: float = 0.5

    def __post_init__(self):
        check_types(self)

    def mix(self, step):
        return [self.share * one + (1 - self.share) * two for one, two in zip(step.gradients, step.second, strict=True)]

    def combine(self, step):
        return self.mix(step)


def saying(**attributes):
    return type("Saying", (Mixed,), attributes)


def combining(make, **more):
    return type("Combining", (Mixed,), {"combine": lambda self, step: make(self.mix(step), step), **more})


def heading(make, **more):
    return type("Heading", (Mixed,), {"direction": lambda self, step: make(step), **more})


class ScalesInPlace(Mixed):
    def combine(self, step):
        made = self.mix(step)
        step.gradients[0].mul_(2)
        return made


class KeepsInPlace(Mixed):
    state: ClassVar[tuple[str, ...]] = ("mean",)

    def combine(self, step):
        if "mean" in step.state:
            for mean, gradient in zip(step.state["mean"], step.second, strict=True):
                mean.add_(gradient / step.scale)
        else:
            step.state["mean"] = [gradient / step.scale for gradient in step.second]
        return self.mix(step)

    is_linear = False


COUNTER = itertools.count()


class RemembersByItself(Mixed):
    def combine(self, step):
        before = getattr(self, "before", None)
        object.__setattr__(self, "before", [two.clone() for two in step.second])
        made = self.mix(step)
        return made if before is None else [one + 0.1 * old for one, old in zip(made, before, strict=True)]


class DividesByItsNorm(Mixed):
    def direction(self, step):
        return [gradient / step.norm(step.gradients) for gradient in step.gradients]


class NormalizesEachTensor(Mixed):
    def direction(self, step):
        return [gradient / gradient.norm().clamp_min(1e-300) for gradient in step.gradients]


class Decays(Mixed):
    is_linear = False

    def combine(self, step):
        much = 1e-3 * (step.norm(step.gradients) > 0)
        return [made + much * weight for made, weight in zip(self.mix(step), step.weights, strict=True)]


class DecaysByTheScale(Mixed):
    def combine(self, step):
        size = step.norm(step.weights) * step.scale * (step.norm(step.gradients) > 0)
        return [made + 1e-3 * size * made.sign() for made in self.mix(step)]


class TakesAnything(Mixed):
    def __post_init__(self):
        pass

    def mix(self, step):
        return list(step.second)


class RefusesWithoutSaying(Mixed):
    def __post_init__(self):
        if self.share != 0.5:
            raise ValueError("bad setting")


class CannotBePickled(Mixed):
    def __reduce__(self):
        raise TypeError("cannot pickle 'Engine' object")

    def __deepcopy__(self, memo):
        return self


class HasNoRecord(Mixed):
    def __repr__(self):
        return "<a rule>"


def undeclared(made, step):
    step.state["mean"] = made
    return made


ZOO = {
    "no radius": (saying(default_rho=0.0), "settings", "its default_rho is 0.0"),
    "half an ascent": (saying(ascents=0.5), "settings", "its ascents are 0.5"),
    "never": (saying(every=0), "settings", "its every are 0"),
    "a long stride": (saying(stride=1.5), "settings", "its stride is 1.5"),
    "state in a list": (saying(state=["mean"]), "settings", "its state is ['mean']"),
    "linear perhaps": (saying(is_linear="yes"), "settings", "its is_linear is 'yes'"),
    "too few": (combining(lambda made, step: made[:1]), "shapes", "combine gives 1 tensors for 3 weights"),
    "one tensor": (heading(lambda step: torch.cat(list(step.gradients))), "shapes", "direction gives a Tensor for 3"),
    "another dtype": (
        combining(lambda made, step: [x.float() for x in made]),
        "shapes",
        "combine gives torch.float32",
    ),
    "not finite": (combining(lambda made, step: [x / 0 for x in made]), "shapes", "combine is not finite"),
    "a negative ball": (saying(metric=lambda self, step: [-x.abs() for x in step.weights]), "shapes", "metric is negative"),
    "a ball of NaN": (saying(metric=lambda self, step: math.nan), "shapes", "metric is nan"),
    "one decoupled": (
        combining(lambda made, step: Descent(made, made[:2])),
        "shapes",
        "decoupled part of combine gives 2",
    ),
    "state undeclared": (combining(undeclared), "shapes", "keeps 'mean', which is not in its state = ()"),
    "in place": (ScalesInPlace, "pure", "changed the gradients in place"),
    "state in place": (KeepsInPlace, "pure", "changed state 'mean' in place"),
    "random numbers": (heading(lambda step: [torch.rand_like(x) for x in step.gradients]), "pure", "global random state"),
    "a clock": (combining(lambda made, step: [x * (1 + next(COUNTER)) for x in made]), "pure", "combine was another"),
    "a memory of its own": (RemembersByItself, "resume", "resumed before each of"),
    "a division by zero": (DividesByItsNorm, "zero_gradient", "direction is not finite where every gradient is zero"),
    "the scale forgotten": (Decays, "gradient_scale", "make combine differ by"),
    "linear claimed": (DecaysByTheScale, "is_linear", "it is claimed, and does not hold"),
    "linear not claimed": (saying(is_linear=False), "is_linear", "it is not claimed, and holds"),
    "norms of tensors": (NormalizesEachTensor, "sharding", "direction depends on how the weights are cut into tensors"),
    "uphill": (combining(lambda made, step: [-x for x in made]), "trains", "in 40 steps the loss went from"),
    "a wrong price": (saying(gradients_per_step=5.0), "cost", "3 steps took 6 gradients, and gradients_per_step says 15"),
    "any setting": (TakesAnything, "bad_settings", "share='nonsense' is accepted"),
    "an unclear refusal": (RefusesWithoutSaying, "bad_settings", "share='nonsense' is refused without saying so"),
    "no pickle": (CannotBePickled, "pickle", "pickle fails with TypeError"),
    "no record": (HasNoRecord, "repr", "cannot be read back"),
}
for _number, (_cls, _, _) in enumerate(ZOO.values()):  # pickle looks for them here
    if _cls.__name__ not in globals():
        _cls.__qualname__ = _cls.__name__ = f"Zoo{_number}"
    globals()[_cls.__name__] = _cls


@pytest.mark.parametrize("what", ZOO)
def test_what_is_wrong_is_found_by_the_check_that_is_made_for_it(what):
    wrong, check, says = ZOO[what]
    with pytest.raises(ConformanceError) as raised:
        check_rule(wrong)
    assert [finding.property for finding in raised.value.report.violated] == [check], str(raised.value)
    assert says in raised.value.report[check].detail


def test_the_zoo_reaches_every_check():
    assert {check for _, check, _ in ZOO.values()} == {finding.property for finding in check_rule(Mixed()).findings}


def test_what_is_no_rule_is_refused():
    with pytest.raises(TypeError, match="a rule is derived from"):
        check_rule(torch.optim.SGD)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: GSAM(alpha="0.4"), "alpha must be a number, got '0.4'"),
        (lambda: LookSAM(k=2.5), "k must be a whole number, got 2.5"),
        (lambda: WSAM(gamma=math.nan), "gamma must be a number, got nan"),
    ],
)
def test_settings_of_another_type_are_refused_by_name(make, says):
    with pytest.raises((TypeError, ValueError), match=says):
        make()
