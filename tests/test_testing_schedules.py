"""The conformance suite of schedules: our own pass it, and each kind of wrong one is caught by the check made for it."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from sharpness_plugins import ScheduleSpec, available_schedules
from sharpness_plugins.registry import fresh_registry, schedule_factories
from sharpness_plugins.schedules import (
    SCHEDULES,
    Cap,
    Decision,
    Double,
    Fixed,
    FromLearningRate,
    Hold,
    InnerProductTest,
    Max,
    Min,
    Monotone,
    NoiseScale,
    NormTest,
    SharpnessSwitch,
    Steps,
    Then,
    WarmStart,
    parse_schedule,
)
from sharpness_plugins.testing import ConformanceError, Verdict, check_schedule

OWN = (
    Fixed(16),
    Steps("0:8 1ep:24 1.5ep:16"),
    WarmStart(8, 80, at="1.5ep"),
    Double(8, every="1ep", cap=50),
    FromLearningRate(8, cap=64, rule="seesaw"),
    FromLearningRate(8, cap=64, smallest_change=1),
    NoiseScale(8, 64, min_wait="20 steps"),
    NoiseScale(8, 64, min_wait="20 steps", monotone=False, min_batch_size=4),
    NormTest(8, 640),
    InnerProductTest(8, 640, theta=0.5),
    *(
        SharpnessSwitch(8, 80, rule=rule, window=2, every="4 steps", min_wait="5 steps", deadline="150 steps")
        for rule in ("plateau", "halved", "below_peak")
    ),
    Then(SharpnessSwitch(8, 80, rule="halved", deadline="2ep", every="0.1ep"), "1ep", NoiseScale(16, 64, min_wait="0.25ep")),
    Max(NormTest(8, 640, every="10 steps"), Hold(SharpnessSwitch(8, 80, deadline="60 steps", every="2 steps"), 12)),
    Min(FromLearningRate(8, cap=64), Double(8, every="30 steps", cap=500)),
    Cap(Double(8, every="4K tokens", cap=500), 30),
    Hold(NoiseScale(8, 64, min_wait="0", monotone=False, min_batch_size=2), 9),
    Monotone(Steps("0:8 50 steps:32 100 steps:16")),
)


@pytest.mark.parametrize("own", OWN, ids=lambda own: repr(own)[:60])
def test_our_own_schedules_conform(own):
    report = check_schedule(own)
    for name in ("initial", "pure", "batch_sizes", "memory", "resume", "text", "pickle"):
        assert report[name].verdict is Verdict.HELD
    assert report["unknown_signals"].verdict is (Verdict.HELD if own.signals else Verdict.NOT_APPLICABLE)
    if not isinstance(own, Fixed):
        assert " 1 different" not in report["batch_sizes"].detail, "scripts that change nothing show nothing"


def test_every_built_in_schedule_is_among_them():
    assert {type(one).name for one in OWN} == set(SCHEDULES) == set(available_schedules())


def test_schedules_that_never_go_back_are_held_to_it():
    assert check_schedule(Monotone(Steps("0:8 50 steps:4")))["monotone"].verdict is Verdict.HELD
    assert check_schedule(NoiseScale(8, 64, min_wait="0"))["monotone"].verdict is Verdict.HELD
    shrinking = NoiseScale(8, 64, min_wait="0", monotone=False)
    assert check_schedule(shrinking)["monotone"].detail == "it does not say so"


def test_a_schedule_may_be_given_as_text():
    assert check_schedule("cap(double(8, every='1ep', cap=50), 30)").passed


@pytest.mark.parametrize("own", OWN, ids=lambda own: repr(own)[:60])
def test_the_repr_of_a_schedule_is_text_that_a_controller_reads(own):
    assert parse_schedule(repr(own), schedule_factories()) == own


# --- the zoo


@dataclass(frozen=True)
class Ramp:
    """Doubles every 40 steps: nothing is wrong with it."""

    small: int = 8
    large: int = 64

    name: ClassVar[str] = "ramp"
    signals: ClassVar[Any] = {}
    coupling: ClassVar[Any] = None

    @property
    def sizes(self):
        return self.small, self.large

    def initial(self):
        return Decision(self.small, "to begin with", {"asked": 0})

    def size_at(self, progress):
        return min(self.small * 2 ** (progress.step // 40), self.large)

    def __call__(self, progress, memory):
        return Decision(self.size_at(progress), f"after {progress.step} steps", {"asked": memory["asked"] + 1})


def saying(**attributes):
    return type("Saying", (Ramp,), attributes)


def answering(**how):
    """A schedule whose answers have these fields; functions are given progress and memory."""

    class Answering(Ramp):
        def __call__(self, progress, memory):
            answer = super().__call__(progress, memory)
            given = {key: value(progress, answer.memory) if callable(value) else value for key, value in how.items()}
            return replace(answer, **given)

    return Answering


class AnswersANumber(Ramp):
    def __call__(self, progress, memory):
        return self.size_at(progress)


class BeginsWithANumber(Ramp):
    def initial(self):
        return self.small


class RaisesInTheMiddle(Ramp):
    def size_at(self, progress):
        return 8 // (100 - progress.step)


COUNTER = itertools.count()


class RemembersOutsideOfItsMemory(Ramp):
    def __call__(self, progress, memory):
        object.__setattr__(self, "calls", getattr(self, "calls", 0) + 1)
        return replace(super().__call__(progress, memory), reason=f"call {self.calls}")


class WritesToItsMemory(Ramp):
    def __call__(self, progress, memory):
        memory["asked"] += 1
        return Decision(8, "as ever", {"asked": 0})


class TakesUnknownForZero(Ramp):
    signals: ClassVar[Any] = {"hessian_topk": "1ep"}

    def size_at(self, progress):
        signal = progress.signals.get("hessian_topk")
        return self.large if signal is not None and (signal.value or 0.0) < 1.0 else self.small


class ComparesTuples(Ramp):
    def __call__(self, progress, memory):
        kept = memory.get("pair", (8, 64)) == (8, 64)
        return Decision(8, "kept" if kept else "lost", {"pair": (8, 64)})


class NumbersAsKeys(Ramp):
    def __call__(self, progress, memory):
        return Decision(8, f"asked {memory[1] if 'asked' not in memory else 0} times", {1: 5})


class HasNoText(Ramp):
    def __repr__(self):
        return "<a ramp>"


class LiesInItsText(Ramp):
    def __repr__(self):
        return "LiesInItsText(small=4, large=64)"


class CannotBePickled(Ramp):
    def __reduce__(self):
        raise TypeError("cannot pickle 'Engine' object")


class ForgetsItsSettings(Ramp):
    def __reduce__(self):
        return type(self), (4, 64)


ZOO = {
    "a number": (AnswersANumber, "initial", "at step 0 it answered a int"),
    "a number at first": (BeginsWithANumber, "initial", "it is a int, and not a Decision"),
    "an error": (RaisesInTheMiddle, "initial", "at step 100 it raised ZeroDivisionError"),
    "signals in a list": (saying(signals=["hessian_topk"]), "signals", "they are a list"),
    "a signal without a length": (saying(signals={"hessian_topk": "0ep"}), "signals", "every '0ep', which is no duration"),
    "an unreadable cadence": (saying(signals={"hessian_topk": "soon"}), "signals", "'soon' is not a duration"),
    "a budget of more than all": (saying(budget=5), "signals", "its budget is 5"),
    "an unknown coupling": (saying(coupling="cubic"), "coupling", "'cubic' is none of adam_sde"),
    "a clock": (answering(reason=lambda *_: f"call {next(COUNTER)}"), "pure", "asked again"),
    "random numbers": (answering(reason=lambda *_: f"{torch.rand(1).item()}"), "pure", "asked again"),
    "a memory of its own": (RemembersOutsideOfItsMemory, "pure", "asked again"),
    "a memory written to": (WritesToItsMemory, "pure", "it wrote to what it was given"),
    "no samples": (answering(batch_size=0), "batch_sizes", "asks for 0, and not for a whole number"),
    "a fraction": (answering(batch_size=8.0), "batch_sizes", "asks for 8.0"),
    "a truth value": (answering(batch_size=True), "batch_sizes", "asks for True"),
    "a number of NumPy": (answering(batch_size=np.int64(8)), "batch_sizes", "asks for np.int64(8)"),
    "more than it says": (answering(batch_size=65), "batch_sizes", "asks for 65, and its sizes are 8 to 64"),
    "no pair of sizes": (saying(sizes=8), "batch_sizes", "its sizes are 8, and not a pair"),
    "no reason": (answering(reason=""), "reasons", "its reason is ''"),
    "a long reason": (answering(reason="two\nlines"), "reasons", r"its reason is 'two\nlines'"),
    "NaN in its memory": (answering(memory={"asked": math.nan}), "memory", "its memory is no JSON"),
    "an object in its memory": (answering(memory={"asked": 0, "at": {1}}), "memory", "its memory is no JSON"),
    "a list as memory": (answering(memory=[]), "initial", "it raised TypeError"),
    "a memory that grows": (
        answering(memory=lambda p, m: {"asked": 0, "all": [0.5] * 30 * p.step}),
        "memory",
        "has room for",
    ),
    "a fall": (
        type("Falls", (Ramp,), {"monotone": True, "size_at": lambda self, p: 64 if p.step % 50 else 8}),
        "monotone",
        "it falls from 64 to 8",
    ),
    "unknown taken for zero": (TakesUnknownForZero, "unknown_signals", "asks for 64 where every signal is unknown"),
    "tuples in its memory": (
        ComparesTuples,
        "resume",
        "at step 1 it answered 8 (lost), and 8 (kept) in the run that went on",
    ),
    "numbers as keys": (NumbersAsKeys, "resume", "raised KeyError"),
    "no text": (HasNoText, "text", "cannot be read"),
    "another text": (LiesInItsText, "text", "reads as"),
    "no pickle": (CannotBePickled, "pickle", "pickle fails with TypeError: cannot pickle 'Engine' object"),
    "another pickle": (ForgetsItsSettings, "pickle", "came back as"),
}
for _number, (_cls, _, _) in enumerate(ZOO.values()):  # pickle looks for them here
    if _cls.__name__ not in globals():
        _cls.__qualname__ = _cls.__name__ = f"Zoo{_number}"
    globals()[_cls.__name__] = _cls


@pytest.mark.parametrize("what", ZOO)
def test_what_is_wrong_is_found_by_the_check_that_is_made_for_it(what):
    wrong, check, says = ZOO[what]
    with pytest.raises(ConformanceError) as raised:
        check_schedule(wrong())
    assert [finding.property for finding in raised.value.report.violated] == [check], str(raised.value)
    assert says in raised.value.report[check].detail


def test_the_zoo_reaches_every_check():
    assert {check for _, check, _ in ZOO.values()} == {finding.property for finding in check_schedule(Ramp()).findings}


def test_a_class_in_place_of_a_schedule_is_said():
    with pytest.raises(ConformanceError, match="initial: it is a class"):
        check_schedule(Ramp)


def test_a_schedule_of_a_plugin_is_read_back_by_its_class():
    with fresh_registry() as registry:
        registry.register(ScheduleSpec("acme_ramp", f"{Ramp.__module__}:Ramp"))
        registry.register(ScheduleSpec("acme_other", Ramp))
        assert {"acme_ramp", "acme_other", "Ramp"} <= set(schedule_factories())
        assert check_schedule(Cap(Ramp(), 32)).passed
