"""Batch-size schedules: each against its formula, on progress and memory alone; and what all of them promise."""

from __future__ import annotations

import ast
import copy
import json
import math
import pickle
import statistics
import sys
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sharpness_plugins
from sharpness_plugins.schedules import (
    SCHEDULES,
    Cap,
    Decision,
    Double,
    Duration,
    Fixed,
    FromLearningRate,
    Hold,
    InnerProductTest,
    Max,
    Min,
    Monotone,
    NoiseScale,
    NormTest,
    Progress,
    SharpnessSwitch,
    Signal,
    Steps,
    Then,
    WarmStart,
    parse_schedule,
    plan,
    sizes,
    smallest,
)

NUM_SAMPLES = 1000  # in the training data: an epoch is 100 steps of 10


def progress_at(step=0, *, samples=None, epoch=None, batch_size=10, **more):
    samples = 10 * step if samples is None else samples
    epoch = samples / NUM_SAMPLES if epoch is None else epoch
    return Progress(step, samples, epoch, batch_size, base_batch_size=10, **more)


def ask(schedule, progress, memory):
    """One decision, asked for twice, with the memory as it comes back from a checkpoint."""
    saved = json.dumps(memory, allow_nan=False)
    decision = schedule(progress, json.loads(saved))
    assert schedule(progress, memory) == decision
    assert json.dumps(memory) == saved, "the schedule wrote into the memory it was given"
    assert json.loads(json.dumps(decision.memory, allow_nan=False)) == decision.memory
    assert type(decision.batch_size) is int
    assert decision.batch_size >= 1
    assert decision.reason
    return decision


def train(schedule, num_steps, *, signals=lambda step: {}, learning_rate=lambda step: None, every=1, world_size=1):
    """The decisions of a training run, ``{step: decision}``: what a controller does, without the training.

    Args:
        signals: what was measured last, by step.
        every: asks only at multiples of it.
    """
    first = schedule.initial()
    decisions, memory, samples, peak = {}, first.memory, 0, 0.0
    batch_size = base = plan(first.batch_size, world_size=world_size).batch_size
    for step in range(num_steps):
        rate = learning_rate(step)
        if rate is not None:
            peak = max(peak, rate)
            rate = rate / peak if peak else None
        if step % every == 0:
            progress = Progress(
                step, samples, samples / NUM_SAMPLES, batch_size, base, learning_rate=rate, signals=signals(step)
            )
            decisions[step] = ask(schedule, progress, memory)
            memory = decisions[step].memory
            batch_size = plan(decisions[step].batch_size, world_size=world_size).batch_size
        samples += batch_size
    return decisions


def changes(schedule, decisions):
    """``(step, batch size)`` where it changed."""
    found, before = [], schedule.initial().batch_size
    for step, decision in decisions.items():
        if decision.batch_size != before:
            before = decision.batch_size
            found.append((step, before))
    return found


def measured(values, standard_errors=None, *, name="hessian_topk", every=1):
    """A trace of signals: ``values[i]`` is measured at step ``i * every`` and stays the newest until the next."""

    def signals(step):
        index = min(step // every, len(values) - 1)
        error = standard_errors[index] if isinstance(standard_errors, (list, tuple)) else standard_errors
        return {name: Signal(values[index], error, step=index * every)}

    return signals


# --- durations


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("40ep", 40, "epochs"),
        ("40 epochs", 40, "epochs"),
        ("1 epoch", 1, "epochs"),
        (".5ep", 0.5, "epochs"),
        ("1000 steps", 1000, "steps"),
        ("1k steps", 1000, "steps"),
        ("1step", 1, "steps"),
        ("250M samples", 250_000_000, "samples"),
        ("250m", 250_000_000, "samples"),
        ("1.1M", 1_100_000, "samples"),  # 1.1 * 1e6 is not whole in floating point
        ("2B tokens", 2_000_000_000, "tokens"),
        ("3Ttokens", 3_000_000_000_000, "tokens"),
        ("5tokens", 5, "tokens"),
        ("1e6", 1_000_000, "samples"),
        (" 7 ", 7, "samples"),
        (7, 7, "samples"),
        (2e3, 2000, "samples"),
        ("0", 0, "samples"),
    ],
)
def test_durations_are_read(text, amount, unit):
    assert Duration.parse(text) == Duration(amount, unit)
    assert type(Duration.parse(text).amount) is type(amount)


@settings(deadline=None)
@given(
    st.one_of(
        st.builds(Duration, st.integers(0, 10**15), st.sampled_from(["samples", "tokens", "steps", "epochs"])),
        st.builds(Duration, st.floats(0, 1e6), st.just("epochs")),
    )
)
def test_a_duration_reads_what_it_writes(duration):
    assert Duration.parse(str(duration)) == duration


@pytest.mark.parametrize(
    "text",
    ["", "ep", "40 parsecs", "-1ep", "1_000", "40ep 2", "nan", "inf", "1e400", "1e30", "1.5 steps", "0.0001K", "٣ep", "e3"],
)
def test_what_is_no_duration_is_quoted(text):
    with pytest.raises(ValueError) as error:
        Duration.parse(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize("value", [None, True, ["40ep"]])
def test_a_duration_is_text_or_a_number(value):
    with pytest.raises(TypeError, match="a duration is text such as '40ep'"):
        Duration.parse(value)


@pytest.mark.parametrize("value", [-1, 1.5, math.nan, math.inf, 1e19])
def test_a_number_of_samples_is_whole_and_not_negative(value):
    with pytest.raises(ValueError):
        Duration.parse(value)


def test_an_epoch_that_rounding_left_short_is_over():
    epoch = 39.99999999999999  # 400 times 0.1, added up one by one
    assert Duration.parse("40ep").reached(progress_at(epoch=epoch))
    assert Duration.parse("10ep").elapsed(progress_at(epoch=epoch)) == 4
    assert not Duration.parse("40ep").reached(progress_at(epoch=39.9999))


def test_tokens_that_nobody_counts_are_an_error():
    schedule = Steps("0:256 2B tokens:512")
    assert schedule(progress_at(tokens=2 * 10**9), {}).batch_size == 512
    with pytest.raises(ValueError, match="'2B tokens' counts tokens, but nobody counts them here"):
        schedule(progress_at(), {})


# --- schedules that only look at the progress


@pytest.mark.parametrize(
    ("text", "unit", "table"),
    [
        ("0:256 40ep:5000", "epoch", {0: 256, 39.99: 256, 40: 5000, 400: 5000}),
        ("0:768 250B tokens:1536", "tokens", {0: 768, 250 * 10**9 - 1: 768, 250 * 10**9: 1536}),
        ("0:16, 100 steps:32, 1k steps:8", "step", {0: 16, 99: 16, 100: 32, 999: 32, 1000: 8, 10**6: 8}),
        ("0ep:1 0.5ep:3", "epoch", {0: 1, 0.49: 1, 0.5: 3}),
        ("0:64 1M:128 1.5M samples:256", "samples", {0: 64, 999_999: 64, 10**6: 128, 1_499_999: 128, 1_500_000: 256}),
        ("0 : 64", "step", {0: 64, 10**9: 64}),
    ],
)
def test_steps_are_exact(text, unit, table):
    schedule = Steps(text)
    for position, batch_size in table.items():
        assert schedule(replace(progress_at(), **{unit: position}), {}).batch_size == batch_size
    assert schedule.initial().batch_size == table[0]
    assert sizes(schedule) == (min(table.values()), max(table.values()))


def test_steps_say_why():
    schedule = Steps("0:256 40ep:5000")
    assert schedule.initial().reason == "256 until 40 epochs"
    assert schedule(progress_at(epoch=41), {}).reason == "40 epochs reached: 256 -> 5000"
    assert Steps([("0", 256), ("40ep", 5000)]).table == schedule.table
    assert Steps([["0", 256], ["40ep", 5000]]) == Steps((("0", 256), ("40ep", 5000)))


def test_a_warm_start_switches_once_and_begins_anew():
    schedule = WarmStart(256, 5000, at="40ep")
    assert [schedule(progress_at(epoch=e), {}).batch_size for e in (0, 39.9, 40, 100)] == [256, 256, 5000, 5000]
    assert [schedule(progress_at(epoch=e), {}).restart_optimizer for e in (0, 39.9, 40, 100)] == [False, False, True, True]
    assert schedule.coupling == "none"
    going_on = WarmStart(256, 5000, at="40ep", restart_optimizer=False)
    assert not going_on(progress_at(epoch=40), {}).restart_optimizer
    assert going_on.coupling is None


def test_a_warm_start_of_no_length_is_large_batch_training():
    schedule, cold = WarmStart(256, 5000, at="0ep"), Fixed(5000)
    for step in (0, 1, 10**6):
        ours, theirs = schedule(progress_at(step), {}), cold(progress_at(step), {})
        assert (ours.batch_size, ours.restart_optimizer) == (theirs.batch_size, theirs.restart_optimizer)
    assert schedule.initial().batch_size == 5000
    assert sizes(schedule) == sizes(cold)


@settings(deadline=None)
@given(st.integers(1, 1000), st.integers(0, 10**9), st.integers(1, 10**6), st.integers(2, 5), st.integers(0, 10**6))
def test_doubling_is_a_power(batch_size, samples, every, factor, room):
    schedule = Double(batch_size, every=f"{every} samples", cap=batch_size + room, factor=factor)
    times = min(samples // every, 64)  # 2^64 is above every cap here
    assert schedule(progress_at(samples=samples), {}).batch_size == min(batch_size * factor**times, batch_size + room)


def test_doubling_keeps_the_ratio_that_a_decay_would_give():
    """AdaBatch: where the baseline multiplies η by .375, the adaptive run doubles B and multiplies η by .75."""
    schedule = Double(128, every="20ep", cap=2048)
    for epoch in range(0, 100, 5):
        batch_size = schedule(progress_at(epoch=epoch), {}).batch_size
        baseline = 0.1 * 0.375 ** (epoch // 20)
        adaptive = 0.1 * 0.75 ** (epoch // 20)
        assert adaptive / batch_size == pytest.approx(baseline / 128, rel=1e-12)


# --- from the learning rate


def step_decay(step):
    return 0.1 * 0.2 ** (step // 30)


def exponential(step):
    return 0.1 * 0.98**step


def warm_up_and_cosine(step):
    return 0.1 * (step + 1) / 20 if step < 20 else 0.05 * (1 + math.cos(math.pi * (step - 20) / 100))


@pytest.mark.parametrize("learning_rate", [step_decay, exponential, warm_up_and_cosine])
@pytest.mark.parametrize("smallest_change", [1.0, 2.0])
@pytest.mark.parametrize(("rule", "power"), [("smith", 1.0), ("seesaw", 0.5)])
def test_growing_instead_of_decaying_keeps_the_invariant_of_its_rule(rule, power, smallest_change, learning_rate):
    """η/B (Smith) or η/sqrt(B) (Seesaw) as in the run that decays, whose batch is fixed, at every step."""
    schedule = FromLearningRate(64, cap=10**6, rule=rule, smallest_change=smallest_change)
    multiplier = {"linear": lambda kappa: kappa, "sqrt": math.sqrt}[schedule.coupling]
    for world_size in (1, 24):  # 24 devices: the batch sizes are rounded by the planner
        base = plan(64, world_size=world_size).batch_size
        for step, decision in train(schedule, 110, learning_rate=learning_rate, world_size=world_size).items():
            used = plan(decision.batch_size, world_size=world_size).batch_size
            adaptive = learning_rate(step) * multiplier(used / base)
            assert adaptive / used**power == pytest.approx(learning_rate(step) / base**power, rel=1e-12)


def test_smith_holds_the_learning_rate_at_its_peak_until_the_cap():
    schedule = FromLearningRate(64, cap=8000, smallest_change=1.0)
    decisions = train(schedule, 120, learning_rate=step_decay)
    assert changes(schedule, decisions) == [(30, 320), (60, 1600), (90, 8000)]  # times 5 where η would be a fifth
    for step, decision in decisions.items():
        assert step_decay(step) * decision.batch_size / 64 == pytest.approx(0.1, rel=1e-12)
    capped = train(FromLearningRate(64, cap=1000), 120, learning_rate=step_decay)
    assert [capped[step].batch_size for step in (29, 30, 60, 119)] == [64, 320, 1000, 1000]


def test_seesaw_doubles_where_the_learning_rate_would_halve():
    schedule = FromLearningRate(64, cap=10**6, rule="seesaw")
    halving = lambda step: 0.1 * 0.5 ** (step // 10)  # noqa: E731
    decisions = train(schedule, 40, learning_rate=halving)
    assert changes(schedule, decisions) == [(10, 128), (20, 256), (30, 512)]
    rates = [halving(step) * math.sqrt(decisions[step].batch_size / 64) for step in (0, 10, 20, 30)]
    assert [b / a for a, b in pairwise(rates)] == pytest.approx([2**-0.5] * 3, rel=1e-12)


def test_a_learning_rate_that_rises_changes_nothing():
    rising = lambda step: step / 50  # from zero  # noqa: E731
    schedule = FromLearningRate(64, cap=4096, smallest_change=1.0)
    assert changes(schedule, train(schedule, 50, learning_rate=rising)) == []
    assert changes(schedule, train(schedule, 50)) == []
    assert schedule(progress_at(learning_rate=2.0), schedule.initial().memory).batch_size == 64  # above what was its peak
    # a cosine that ends at zero, where 1/η says nothing: the size stays where it was
    memory = schedule(progress_at(learning_rate=0.25), schedule.initial().memory).memory
    assert memory == {"batch_size": 256, "fallen": 4.0}
    assert schedule(progress_at(learning_rate=0.0), memory).batch_size == 256


def test_a_cosine_gives_steps_and_a_restart_goes_back():
    schedule = FromLearningRate(64, cap=600)
    falls = [1.0, 0.9, 0.51, 0.5, 0.3, 0.24, 0.12, 0.11, 0.1, 0.05, 1.0]  # 600 is reached by less than a factor 2
    memory, found = schedule.initial().memory, []
    for rate in falls:
        decision = ask(schedule, progress_at(learning_rate=rate), memory)
        memory = decision.memory
        found.append(decision.batch_size)
    assert found == [64, 64, 64, 128, 128, 267, 533, 533, 600, 600, 64]  # 64/.24 = 266.7, 64/.12 = 533.3


# --- from the noise of the gradient


def test_the_batch_grows_to_the_noise_scale_and_not_beyond():
    schedule = NoiseScale(256, 5000, min_wait="10 steps")
    decisions = train(schedule, 100, signals=lambda step: {"gradient_noise_scale": Signal(1200.0, 20.0, step=step)})
    assert changes(schedule, decisions) == [(10, 512), (20, 1024), (30, 1200)]
    assert decisions[10].reason == "gradient_noise_scale 1200 asks for 1200 ± 40: 256 -> 512"
    twice = NoiseScale(256, 5000, target=2.0, max_growth=None, min_wait="0 steps")
    assert changes(twice, train(twice, 9, signals=measured([1200.0], 20.0, name="gradient_noise_scale"))) == [(0, 2400)]
    bounded = NoiseScale(256, 600, min_wait="0 steps")
    decisions = train(bounded, 9, signals=lambda step: {"gradient_noise_scale": Signal(1e9, 0.0, step=step)})
    assert changes(bounded, decisions) == [(0, 512), (1, 600)]


@pytest.mark.parametrize("theta", [0.5, 0.9, 2.0])
def test_the_tests_grow_to_their_threshold(theta):
    """G along e₁ and Σ = s²I in d dimensions: S/|G|² = d s²/|G|², and Var(gᵢ·G)/|G|⁴ = s²/|G|², d times less."""
    dim, s, gradient = 50, 3.0, 0.5
    signals = {
        "gradient_noise_scale": Signal(dim * s**2 / gradient**2, step=1),
        "inner_product_noise": Signal(s**2 * gradient**2 / gradient**4, step=1),
    }
    threshold = s**2 / (theta**2 * gradient**2)
    progress = progress_at(1, batch_size=2, signals=signals)
    for schedule, expected in (
        (NormTest(2, 10**6, theta, min_wait="0"), dim * threshold),
        (InnerProductTest(2, 10**6, theta, min_wait="0"), threshold),
    ):
        decision = ask(schedule, progress, schedule.initial().memory)
        assert decision.batch_size == math.ceil(expected - 1e-6)
        used = decision.batch_size
        noise = signals[schedule.signal].value
        assert noise / used <= theta**2 * (1 + 1e-9) < noise / (used - 1)  # passes, and one sample less would not
        passing = ask(schedule, replace(progress, batch_size=used), schedule.initial().memory)
        assert passing.batch_size == 2, "where the test passes nothing is to be done"


@pytest.mark.parametrize(
    ("signal", "says"),
    [
        (None, "not measured yet"),
        (Signal(None, None, step=3, note="|G|² is not clearly positive"), "unknown (|G|² is not clearly positive)"),
        (Signal(1200.0, 500.0, step=3), "does not exclude 256"),  # 200 to 2200
        (Signal(256.0, 0.0, step=3), "does not exclude 256"),
        (Signal(270.0, 1.0, step=3), "less than a factor 1.1 away"),
        (Signal(100.0, 1.0, step=3), "never shrinks"),
        (Signal(-100.0, 1.0, step=3), "never shrinks"),
    ],
)
def test_what_is_not_known_changes_nothing(signal, says):
    schedule = NoiseScale(256, 5000, min_wait="0")
    signals = {} if signal is None else {"gradient_noise_scale": signal}
    decision = ask(schedule, progress_at(5, batch_size=256, signals=signals), schedule.initial().memory)
    assert decision.batch_size == 256
    assert says in decision.reason


def test_rounding_asks_for_no_sample_more():
    """9 / 0.3² is 100, and 100.00000000000001 in floating point."""
    signals = {"gradient_noise_scale": Signal(9.0, step=1)}
    schedule = NormTest(2, 10**6, 0.3, min_wait="0")
    assert 9 * schedule.scale > 100
    assert ask(schedule, progress_at(1, batch_size=2, signals=signals), schedule.initial().memory).batch_size == 100


def test_it_shrinks_only_when_allowed_and_to_its_bound():
    signals = lambda step: {"gradient_noise_scale": Signal(20.0, 1.0, step=step)}  # noqa: E731
    schedule = NoiseScale(256, 5000, min_batch_size=32, monotone=False, min_wait="5 steps")
    assert changes(schedule, train(schedule, 40, signals=signals)) == [(5, 128), (10, 64), (15, 32)]
    assert sizes(schedule) == (32, 5000)
    assert changes(NoiseScale(256, 5000), train(NoiseScale(256, 5000), 40, signals=signals)) == []


def test_a_measurement_is_judged_once():
    schedule = NoiseScale(256, 5000, min_wait="0")
    decisions = train(schedule, 40, signals=measured([2000.0] * 4, name="gradient_noise_scale", every=10))
    assert changes(schedule, decisions) == [(0, 512), (10, 1024), (20, 2000)]


def test_growth_is_bounded_by_the_size_in_use():
    """A cap outside lets the noise scale ask again and again, but never for more than twice what is used."""
    schedule = Cap(NoiseScale(100, 10**6, min_wait="0"), 150)
    decisions = train(schedule, 50, signals=lambda step: {"gradient_noise_scale": Signal(1e5, 1.0, step=step)})
    assert changes(schedule, decisions) == [(0, 150)]
    assert decisions[49].memory["batch_size"] == 300
    fallen = {"gradient_noise_scale": Signal(200.0, 1.0, step=50)}  # above the 150 in use, below the 300 asked for
    assert ask(schedule, progress_at(50, batch_size=150, signals=fallen), decisions[49].memory).memory["batch_size"] == 300
    one = NoiseScale(1, 10, max_growth=1.5, min_wait="0")  # 1 times 1.5 is still one sample
    decisions = train(one, 4, signals=lambda step: {"gradient_noise_scale": Signal(1e5, 1.0, step=step)})
    assert changes(one, decisions) == [(0, 2), (1, 3), (2, 4), (3, 6)]


# --- from sharpness


def switch(rule, **more):
    return SharpnessSwitch(
        8, 80, rule=rule, **{"deadline": "60 steps", "min_wait": "0 steps", "window": 1, "every": "1 step", **more}
    )


@pytest.mark.parametrize("rule", ["plateau", "halved", "below_peak"])
@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("value", [2.5, 0.0, -1.0, None])
@pytest.mark.parametrize("every", [1, 7])
def test_a_constant_trace_switches_at_the_deadline_only(rule, window, value, every):
    schedule = switch(rule, window=window)
    decisions = train(schedule, 100, signals=lambda step: {"hessian_topk": Signal(value, None, step=step)}, every=every)
    assert changes(schedule, decisions) == [(-(-60 // every) * every, 80)]
    assert "deadline of 60 steps reached" in decisions[max(decisions)].reason
    assert changes(schedule, train(schedule, 100)) == [(60, 80)], "also where nothing was ever measured"


@pytest.mark.parametrize(
    ("schedule", "trace", "expected"),
    [
        # moves at step 1 and 2, and not at 3
        (switch("plateau"), [8, 4, 2, 2, 2], [(3, 80)]),
        # less than a factor exp(0.1) = 1.105 from one to the next is no move: 1.3 to 1.42 settles
        (switch("plateau"), [1.0, 1.3, 1.42, 1.3], [(2, 80)]),
        # medians of two windows of two: (8,4)|(2,2) moves at 3, (4,2)|(2,2) at 4, (2,2)|(2,2) settles at 5
        (switch("plateau", window=2), [8, 4, 2, 2, 2, 2, 2], [(5, 80)]),
        # a spike of one is not seen by a median of three, neither as a move nor as a fall
        (switch("plateau", window=3), [4, 4, 4, 9, 4, 4, 4, 4, 4, 4], [(60, 80)]),
        (switch("below_peak", window=3), [4, 4, 4, 1, 4, 4, 4, 4], [(60, 80)]),
        # half of the peak of 10, exactly at 5
        (switch("below_peak"), [2, 10, 8, 5.01, 5.0, 9], [(4, 80)]),
        # the wait holds what fired until it is over, and forgets what is no longer so
        (switch("below_peak", min_wait="7 steps"), [10, 4], [(7, 80)]),
        (switch("below_peak", min_wait="7 steps"), [10, 4, 9], [(60, 80)]),
        (switch("below_peak", threshold=math.log(4)), [8, 4, 3, 2, 2], [(3, 80)]),
        # ABSA: twice the batch whenever it halved since the last change; a rise is ignored
        (switch("halved"), [8, 5, 4, 6, 2.1, 2, 2, 1], [(2, 16), (5, 32), (7, 64), (60, 80)]),
        (switch("halved", min_wait="5 steps"), [8, 4, 4, 4, 4, 4, 2], [(5, 16), (10, 32), (60, 80)]),  # a wait after each
        (switch("halved", factor=10), [8, 4, 2], [(1, 80)]),
        (switch("halved", patience="10 steps"), [8], [(10, 16), (20, 32), (30, 64), (40, 80)]),
        (switch("halved", patience="10 steps"), [8] * 15 + [3] * 100, [(10, 16), (15, 32), (25, 64), (35, 80)]),
        # unknown in between: passed over
        (switch("below_peak"), [8, None, 5, None, 3.9], [(4, 80)]),
    ],
    ids=lambda value: f"{value.rule}-{value.window}" if isinstance(value, SharpnessSwitch) else None,
)
def test_scripted_traces_switch_where_they_should(schedule, trace, expected):
    assert changes(schedule, train(schedule, 100, signals=measured(trace))) == expected


@pytest.mark.parametrize("rule", ["plateau", "halved", "below_peak"])
def test_an_interval_that_spans_the_threshold_does_nothing(rule):
    trace = [8, 8, 4, 3.9, 3.9, 3.9]
    sure = changes(switch(rule), train(switch(rule), 100, signals=measured(trace, 0.0)))
    unsure = changes(switch(rule), train(switch(rule), 100, signals=measured(trace, 1.0)))
    assert sure[0][0] in (2, 3)
    assert unsure == [(60, 80)]
    decisions = train(switch("below_peak"), 100, signals=measured(trace, 0.3))
    assert changes(switch("below_peak"), decisions) == [(60, 80)]
    assert "its error spans that" in decisions[10].reason
    bold = switch("below_peak", num_standard_errors=0)
    assert changes(bold, train(bold, 100, signals=measured(trace, 0.3))) == [(2, 80)]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(0.1, 10), min_size=5, max_size=40), st.integers(2, 12))
def test_halved_is_absa(trace, patience):
    """Against the loop of the paper: λ ≤ reference/2, or so long without a change, doubles the batch."""
    schedule = SharpnessSwitch(
        1, 2**20, rule="halved", deadline="1000 steps", min_wait="0", window=1, every="1 step", patience=f"{patience} steps"
    )
    decisions = train(schedule, len(trace), signals=measured(trace))
    batch_size, reference, since = 1, trace[0], 0
    for step, eigenvalue in enumerate(trace):
        if math.log(eigenvalue) - math.log(reference) <= 1e-12 - math.log(2):
            batch_size, reference, since = 2 * batch_size, eigenvalue, step
        elif step - since >= patience:
            batch_size, since = 2 * batch_size, step
        assert decisions[step].batch_size == batch_size


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(0.1, 10), min_size=3, max_size=40), st.sampled_from([1, 2, 3]))
def test_below_peak_is_half_of_the_highest_median(trace, window):
    schedule = switch("below_peak", window=window)
    medians = [sorted(trace[i - window + 1 : i + 1]) for i in range(window - 1, len(trace))]
    medians = [(m[(window - 1) // 2] + m[window // 2]) / 2 for m in medians]
    low = [i for i, m in enumerate(medians) if math.log(m) - math.log(max(medians[: i + 1])) <= 1e-12 - math.log(2)]
    expected = low[0] + window - 1 if low else 60
    assert changes(schedule, train(schedule, 61, signals=measured(trace))) == [(expected, 80)]


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.sampled_from([1.0, 1.05, 1.2, 1.5, 2.0, 4.0]), min_size=5, max_size=50),
    st.sampled_from([1, 2, 3]),
    st.floats(0.02, 0.5),
)
def test_a_plateau_is_a_window_like_the_one_before_it_after_two_that_differ(trace, window, threshold):
    schedule = switch("plateau", window=window, threshold=threshold)
    moved, expected = False, 60
    for end in range(2 * window, len(trace) + 1):
        now, before = statistics.median(trace[end - window : end]), statistics.median(trace[end - 2 * window : end - window])
        change = abs(math.log(now) - math.log(before))
        moved = moved or change > threshold
        if moved and change <= threshold:
            expected = end - 1
            break
    decisions = train(schedule, len(trace), signals=measured(trace))
    assert changes(schedule, decisions) == ([(expected, 80)] if expected < 60 else [])


def test_a_reference_that_may_be_zero_fires_nothing():
    """1 ± 2 against 0.01: a hundredth of it, or of nothing."""
    for rule in ("halved", "below_peak", "plateau"):
        decisions = train(switch(rule), 100, signals=measured([1.0, 0.01], [1.0, 0.0]))
        assert changes(switch(rule), decisions) == [(60, 80)]
    negative = train(switch("below_peak"), 100, signals=measured([1.0, -1.0], 0.1))
    assert changes(switch("below_peak"), negative) == [(1, 80)], "below zero is below a half"


def test_a_measurement_is_taken_once_however_often_it_is_seen():
    schedule = switch("below_peak", window=3)
    trace = [8.0, 8.0, 8.0, 1.0, 1.0]  # the median of three falls with the second low one, measured at step 40
    decisions = train(schedule, 60, signals=measured(trace, every=10))
    assert changes(schedule, decisions) == [(40, 80)]
    assert decisions[39].memory["values"] == [[8.0, 8.0, 8.0]] * 2 + [[1.0, 1.0, 1.0]]


def test_any_metric_may_be_looked_at_and_the_budget_is_carried():
    schedule = switch("below_peak", metric="epsilon_box:epsilon=5e-4", every="2 steps", budget=0.01)
    assert schedule.signals == {"epsilon_box:epsilon=5e-4": "2 steps"}
    assert Cap(Max(schedule, Fixed(9)), 60).budget == 0.01
    assert Then(Fixed(8), "1ep", schedule).budget == 0.01
    assert Then(Fixed(8), "1ep", Fixed(9)).budget is None
    signals = measured([10.0, 4.0], name="epsilon_box:epsilon=5e-4")
    assert changes(schedule, train(schedule, 10, signals=signals)) == [(1, 80)]
    assert changes(schedule, train(schedule, 10, signals=measured([10.0, 4.0]))) == [], "another metric is not looked at"


# --- combinators


@dataclass(frozen=True)
class Sequenced:
    """Given sizes, one per step, and a count of calls as memory: whoever mixes up memories gets it wrong."""

    given: tuple[int, ...]
    coupling: str | None = None
    every: str | None = None
    signal: str = ""

    @property
    def signals(self):
        return {self.signal: self.every} if self.signal else {}

    def initial(self):
        return Decision(self.given[0], "as given", {"calls": 0, "sum": sum(self.given)})

    def __call__(self, progress, memory):
        assert memory["sum"] == sum(self.given), "another schedule's memory"
        return Decision(self.given[progress.step], "as given", {**memory, "calls": memory["calls"] + 1})


LISTS = st.lists(st.integers(1, 50), min_size=12, max_size=12).map(tuple)


@settings(deadline=None, max_examples=60)
@given(LISTS, LISTS, LISTS, st.integers(1, 50), st.integers(1, 6), st.integers(1, 11))
def test_combinators_are_what_they_say(a, b, c, limit, min_steps, until):
    def run(schedule):
        return [decision.batch_size for decision in train(schedule, 12).values()]

    one, two, three = Sequenced(a), Sequenced(b), Sequenced(c)
    assert run(Max(one, two, three)) == list(map(max, a, b, c))
    assert run(Min(one, two, three)) == list(map(min, a, b, c))
    assert run(Cap(one, limit)) == [min(size, limit) for size in a]
    assert run(Monotone(one)) == [max(a[: i + 1]) for i in range(12)]
    assert run(Then(one, f"{until} steps", two)) == [*a[:until], *b[until:]]
    assert run(Max(Min(one, two), Cap(three, limit))) == [
        max(min(x, y), min(z, limit)) for x, y, z in zip(a, b, c, strict=True)
    ]
    held, since, expected = a[0], 0, []
    for step, size in enumerate(a):
        if size != held and step - since >= min_steps:
            held, since = size, step
        expected.append(held)
    assert run(Hold(one, min_steps)) == expected


def test_each_part_keeps_its_own_memory():
    slow = switch("below_peak", window=3)
    fast = SharpnessSwitch(4, 64, rule="halved", deadline="60 steps", min_wait="0 steps", window=1, every="1 step")
    trace = measured([10, 9, 4, 4, 4, 2, 2, 1])
    alone = [train(one, 30, signals=trace) for one in (slow, fast)]
    both = train(Max(slow, fast), 30, signals=trace)
    for step, decision in both.items():
        assert decision.batch_size == max(run[step].batch_size for run in alone)
        assert decision.memory == {"schedules": [run[step].memory for run in alone]}


def test_signals_are_merged_and_the_shorter_cadence_wins():
    often, seldom, free = (Sequenced((1,), every=every, signal="x") for every in ("5 steps", "1k steps", None))
    other = Sequenced((1,), every="1ep", signal="y")
    assert Max(seldom, often, other).signals == {"x": "5 steps", "y": "1ep"}
    assert Then(often, "1ep", seldom).signals == {"x": "5 steps"}
    assert Min(free, seldom).signals == Min(seldom, free).signals == {"x": "1k steps"}
    assert Min(free, free).signals == {"x": None}
    assert Cap(Hold(Monotone(often), 5), 5).signals == {"x": "5 steps"}
    with pytest.raises(ValueError, match="Max would measure 'x' every '5 steps' and every '1ep'"):
        Max(often, Sequenced((1,), every="1ep", signal="x"))


def test_learning_rate_rules_that_disagree_are_refused():
    linear, root = FromLearningRate(8, cap=80), FromLearningRate(8, cap=80, rule="seesaw")
    assert Max(linear, Fixed(8)).coupling == "linear"
    assert Cap(Hold(Monotone(root), 5), 50).coupling == "sqrt"
    assert Min(Fixed(8), Fixed(9)).coupling is None
    for combine in (lambda: Max(linear, root), lambda: Min(linear, root), lambda: Then(linear, "1ep", root)):
        with pytest.raises(ValueError, match="different learning-rate rules, 'linear' and 'sqrt'"):
            combine()


def test_a_fresh_optimizer_comes_with_the_switch_that_asked_for_it():
    warm = WarmStart(8, 80, at="20 steps")
    assert train(Hold(warm, 30), 50)[30] == replace(warm(progress_at(30), {}), memory=train(Hold(warm, 30), 50)[30].memory)
    assert train(Hold(warm, 30), 50)[30].restart_optimizer
    assert not train(Hold(warm, 30), 50)[29].restart_optimizer
    assert train(Max(warm, Fixed(20)), 50)[20].restart_optimizer
    assert not any(decision.restart_optimizer for decision in train(Max(warm, Fixed(100)), 50).values())


def test_a_schedule_that_begins_later_begins_then():
    """Hold counts from its own first call, so the second schedule's first size is held too."""
    schedule = Then(Fixed(1), "10 steps", Hold(Steps("0:2 11 steps:4"), 5))
    decisions = train(schedule, 30)
    assert changes(schedule, decisions) == [(10, 2), (15, 4)]
    assert schedule(progress_at(5), decisions[29].memory).batch_size == 4, "what was left is left"


# --- what all of them promise

CASES = (
    Fixed(16),
    Steps("0:8 1ep:24 1.5ep:16"),
    WarmStart(8, 80, at="1.5ep"),
    Double(8, every="1ep", cap=50),
    FromLearningRate(8, cap=64, rule="seesaw"),
    NoiseScale(8, 64, min_wait="20 steps", monotone=False, min_batch_size=4),
    NormTest(8, 640),
    InnerProductTest(8, 640, theta=0.5),
    switch("plateau", window=2),
    switch("halved", window=3, patience="40 steps", min_wait="5 steps"),
    switch("below_peak", metric="hessian_topk:k=1", deadline="3ep", every="10 steps"),
    Then(switch("halved"), "1ep", NoiseScale(16, 64, min_wait="0.25ep")),
    Max(NormTest(8, 640, every="10 steps"), Hold(switch("below_peak"), 12)),
    Min(FromLearningRate(8, cap=64), Double(8, every="30 steps", cap=500)),
    Cap(switch("halved"), 30),
    Hold(NoiseScale(8, 64, min_wait="0", monotone=False, min_batch_size=2), 9),
    Monotone(Steps("0:8 50 steps:32 100 steps:16")),
)


def rich_signals(step):
    """Signals that move, with errors, unknown now and then, and measured at rates of their own."""
    at = step // 4 * 4
    sharpness = Signal(None if at % 28 == 0 else 6 + 5 * math.cos(at / 17), 0.1, step=at)
    noise = Signal(None if step % 11 == 0 else 30 + 28 * math.sin(step / 25), 1.0, step=step)
    return {
        "hessian_topk": sharpness,
        "hessian_topk:k=1": sharpness,
        "gradient_noise_scale": noise,
        "inner_product_noise": replace(noise, value=noise.value and noise.value / 4),
    }


def rich_run(schedule, **more):
    return train(schedule, 200, signals=rich_signals, learning_rate=warm_up_and_cosine_long, **more)


def warm_up_and_cosine_long(step):
    return (step + 1) / 20 if step < 20 else 0.5 * (1 + math.cos(math.pi * (step - 20) / 190))


def test_every_schedule_is_among_the_cases():
    assert {type(case).name for case in CASES} == set(SCHEDULES)
    assert all(SCHEDULES[type(case).name] is type(case) for case in CASES)


@pytest.mark.parametrize("schedule", CASES, ids=repr)
def test_the_rich_run_exercises_it(schedule):
    decisions = rich_run(schedule)
    least, most = sizes(schedule)
    assert all(least <= decision.batch_size <= most for decision in decisions.values())
    assert smallest(schedule) == least
    if not isinstance(schedule, Fixed):
        assert changes(schedule, decisions), "a case that never changes shows nothing"
    assert len(json.dumps([decision.memory for decision in decisions.values()][-1])) < 1000
    assert set(schedule.signals) <= set(rich_signals(0))
    for every in schedule.signals.values():
        assert every is None or Duration.parse(every).amount > 0


@pytest.mark.parametrize("schedule", CASES, ids=repr)
def test_a_resumed_run_goes_on_as_the_other(schedule):
    """From the text of the schedule and the JSON of its memory, at any step."""
    decisions = rich_run(schedule)
    first = schedule.initial()
    for stop in range(0, 199, 13):
        resumed = parse_schedule(repr(schedule))
        assert resumed == schedule == pickle.loads(pickle.dumps(schedule)) == copy.deepcopy(schedule)
        memory = json.loads(json.dumps(decisions[stop].memory))
        samples = sum(decision.batch_size for step, decision in decisions.items() if step <= stop)
        for step in range(stop + 1, 200):
            rate, peak = warm_up_and_cosine_long(step), 1.0 if step >= 19 else warm_up_and_cosine_long(step)
            used = decisions[step - 1].batch_size
            now = Progress(
                step,
                samples,
                samples / NUM_SAMPLES,
                used,
                first.batch_size,
                learning_rate=rate / peak,
                signals=rich_signals(step),
            )
            decision = resumed(now, memory)
            assert decision == decisions[step]
            memory, samples = decision.memory, samples + decision.batch_size


@pytest.mark.parametrize("schedule", CASES[:4], ids=repr)
@pytest.mark.parametrize("every", [2, 7, 30])
def test_asked_seldom_a_schedule_without_signals_answers_for_now(schedule, every):
    """Whatever was asked before, on the same progress it says the same."""
    for step in range(0, 400, every):
        progress = progress_at(step)
        assert schedule(progress, {}) == schedule(progress, schedule.initial().memory)
    seldom = {step: schedule(progress_at(step), {}).batch_size for step in range(0, 400, every)}
    always = {step: schedule(progress_at(step), {}).batch_size for step in range(400)}
    assert seldom == {step: always[step] for step in seldom}


@pytest.mark.parametrize(
    "schedule",
    [
        FromLearningRate(64, cap=8000),
        Hold(Steps("0:8 30 steps:32 60 steps:16"), 50),
        Monotone(Max(Steps("0:8 30 steps:32 60 steps:16"), FromLearningRate(4, cap=64))),
        Then(Fixed(3), "50 steps", NoiseScale(8, 50, min_wait="10 steps")),
        Then(Fixed(3), "50 steps", Hold(Double(8, every="30 steps", cap=50), 20)),
    ],
    ids=repr,
)
def test_asked_seldom_but_when_something_happens_the_answer_is_the_same(schedule):
    signals = lambda step: {"gradient_noise_scale": Signal(30.0 + step // 10, 1.0, step=step // 10 * 10)}  # noqa: E731
    more = {"signals": signals, "learning_rate": step_decay}
    always, seldom = train(schedule, 120, **more), train(schedule, 120, every=10, **more)
    assert len(changes(schedule, always)) >= 2
    assert changes(schedule, always) == changes(schedule, seldom)


@pytest.mark.parametrize("rule", ["plateau", "halved", "below_peak"])
def test_asked_seldom_but_after_each_measurement_the_answer_is_the_same(rule):
    """Measured every 4 steps, asked at every step or at those only."""
    schedule = switch(rule, every="4 steps", window=2)
    signals = measured([9, 8, 8, 5, 4, 4, 3, 3, 3, 3, 2, 1], every=4)
    always, seldom = train(schedule, 100, signals=signals), train(schedule, 100, signals=signals, every=4)
    assert changes(schedule, always) == changes(schedule, seldom)
    assert len(changes(schedule, always)) >= 1
    assert all(seldom[step].memory == always[step].memory for step in seldom)


def test_the_room_has_no_clock_no_random_numbers_and_no_torch():
    room = Path(sharpness_plugins.__file__).parent / "schedules"
    allowed = set(sys.stdlib_module_names) - {"time", "datetime", "random", "secrets", "uuid", "os", "threading"}
    for file in room.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert all(alias.name.partition(".")[0] in allowed for alias in node.names)
            if isinstance(node, ast.ImportFrom):
                assert node.level or (node.module or "").partition(".")[0] in allowed
                assert node.level < 2 or node.module in {"errors", "texts"}


# --- bad schedules


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fixed(0), "batch_size must be at least 1, got 0"),
        (lambda: Steps(""), "steps '' are empty"),
        (lambda: Steps("40ep:256"), "steps '40ep:256' begin at 40 epochs"),
        (lambda: Steps("0:256 40ep:512 20ep:1024"), "rising thresholds, but 20 epochs follows 40 epochs"),
        (lambda: Steps("0:256 40ep:512 40ep:1024"), "rising thresholds, but 40 epochs follows 40 epochs"),
        (lambda: Steps("0:256 0ep:512"), "rising thresholds, but 0 epochs follows 0 samples"),
        (lambda: Steps("0:256 40ep:512 1M:1024"), r"mix units \(40 epochs, 1M samples\)"),
        (lambda: Steps("0:256 40ep"), "'40ep' is not 'threshold:size'"),
        (lambda: Steps("0:256 40ep:"), "the batch size '' is not a whole number"),
        (lambda: Steps("0:256 40ep:5e3"), "the batch size '5e3' is not a whole number"),
        (lambda: Steps("0:256 40ep:-5"), "the batch size '-5' is not a whole number"),
        (lambda: Steps("0:256 40ep:0"), "a batch size in steps must be at least 1, got 0"),
        (lambda: Steps("0:256 forty:512"), "'forty' is not a duration"),
        (lambda: Steps(":256"), "'' is not a duration"),
        (lambda: Steps("hello"), "'hello' is not 'threshold:size'"),
        (lambda: WarmStart(5000, 256, at="40ep"), "large_batch=256 is not above small_batch=5000"),
        (lambda: WarmStart(256, 256, at="40ep"), "large_batch=256 is not above small_batch=256"),
        (lambda: WarmStart(256, 5000, at="soon"), "'soon' is not a duration"),
        (lambda: Double(256, every="0ep", cap=512), "every='0ep' has no length"),
        (lambda: Double(256, every="1ep", cap=128), "cap=128 is below batch_size=256"),
        (lambda: Double(256, every="1ep", cap=512, factor=1), "factor must be at least 2, got 1"),
        (lambda: FromLearningRate(256, cap=128), "cap=128 is below batch_size=256"),
        (lambda: FromLearningRate(256, cap=512, rule="linear"), "rule must be one of 'smith', 'seesaw', got 'linear'"),
        (
            lambda: FromLearningRate(256, cap=512, smallest_change=0.5),
            "smallest_change must be a finite number above 1, got 0.5",
        ),
        (lambda: NoiseScale(256, 128), "max_batch_size=128 is below batch_size=256"),
        (lambda: NoiseScale(256, 512, min_batch_size=300), "batch_size=256 is below min_batch_size=300"),
        (lambda: NoiseScale(256, 512, target=0.0), "target must be a finite number above 0, got 0.0"),
        (lambda: NoiseScale(256, 512, max_growth=1.0), "max_growth must be a finite number above 1, got 1.0"),
        (lambda: NoiseScale(256, 512, smallest_change=3), "smallest_change=3 is above max_growth=2.0"),
        (
            lambda: NoiseScale(256, 512, num_standard_errors=-1),
            "num_standard_errors must be a finite number above 0, got -1",
        ),
        (lambda: NoiseScale(256, 512, every="0 steps"), "every='0 steps' has no length"),
        (lambda: NoiseScale(256, 512, min_wait="a while"), "'a while' is not a duration"),
        (lambda: NormTest(256, 512, theta=math.nan), "theta must be a finite number above 0, got nan"),
        (lambda: NormTest(256, 512, theta=1e-200), "theta=1e-200 is too small"),
        (lambda: InnerProductTest(256, 512, theta=-1), "theta must be a finite number above 0, got -1"),
        (lambda: SharpnessSwitch(80, 8, deadline="9ep"), "large_batch=8 is not above small_batch=80"),
        (lambda: SharpnessSwitch(8, 80, "", deadline="9ep"), "metric '' is not a name"),
        (lambda: SharpnessSwitch(8, 80, "hessian topk", deadline="9ep"), "metric 'hessian topk' is not a name"),
        (lambda: SharpnessSwitch(8, 80, "hessian_topk:k=1,2", deadline="9ep"), "'2' is not KEY=VALUE"),
        (lambda: SharpnessSwitch(8, 80, rule="flat", deadline="9ep"), "rule must be one of .*, got 'flat'"),
        (lambda: SharpnessSwitch(8, 80, deadline="0ep"), "deadline='0ep' has no length"),
        (lambda: SharpnessSwitch(8, 80, deadline="9ep", every="0"), "every='0' has no length"),
        (
            lambda: SharpnessSwitch(8, 80, deadline="9ep", min_wait="9ep"),
            "min_wait='9ep' is not shorter than deadline='9ep'",
        ),
        (lambda: SharpnessSwitch(8, 80, deadline="5ep"), "deadline='5ep' comes before the 7 measurements, one every '1ep'"),
        (lambda: SharpnessSwitch(8, 80, deadline="9ep", budget=0), "budget must be a finite number above 0, got 0"),
        (lambda: SharpnessSwitch(8, 80, deadline="9ep", budget=5), "budget=5 is a share of the training time"),
        (
            lambda: SharpnessSwitch(8, 80, deadline="9ep", threshold=-0.1),
            "threshold must be a finite number above 0, got -0.1",
        ),
        (lambda: SharpnessSwitch(8, 80, deadline="9ep", window=0), "window must be at least 1, got 0"),
        (lambda: SharpnessSwitch(8, 80, deadline="9ep", factor=4), "belong to the rule 'halved', but the rule is 'plateau'"),
        (
            lambda: SharpnessSwitch(8, 80, rule="halved", deadline="9ep", patience="9ep"),
            "patience='9ep' is not shorter than",
        ),
        (lambda: Then(Fixed(1), "0", Fixed(2)), "until='0' has no length"),
        (lambda: Max(Fixed(1)), r"Max chooses between two schedules or more, got Max\(Fixed\(batch_size=1\)\)"),
        (lambda: Cap(Fixed(1), 0), "limit must be at least 1, got 0"),
        (lambda: Hold(Fixed(1), 0), "min_steps must be at least 1, got 0"),
    ],
)
def test_bad_schedules_are_refused_with_the_text_at_fault(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fixed(256.0), "batch_size must be a whole number, got 256.0"),
        (lambda: WarmStart("256", 5000, at="1ep"), "small_batch must be a whole number, got '256'"),
        (lambda: Steps(256), "steps are text such as '0:256 40ep:5000', or .* got 256"),
        (lambda: Steps([("0", 256), "40ep"]), "steps are text"),
        (lambda: Steps([("0", "256")]), "a batch size in steps must be a whole number, got '256'"),
        (lambda: WarmStart(256, 5000, at=None), "a duration is text such as '40ep', or a number of samples; got None"),
        (lambda: NoiseScale(256, 512, target="1"), "target must be a number, got '1'"),
        (lambda: Max(Fixed(1), 2), "Max combines batch-size schedules, but 2 has no signals"),
        (lambda: Cap(Fixed, 2), "Cap combines batch-size schedules, but .* is a class: call it with its settings"),
        (lambda: Then(Fixed(1), "1ep", "0:2"), "Then combines batch-size schedules, but '0:2' has no"),
    ],
)
def test_wrong_types_are_said(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_integers_of_numpy_become_plain_ones():
    schedule = Cap(Max(Fixed(np.int64(8)), Steps([("0", np.int32(4)), (Duration(1, "epochs"), np.int64(9))])), np.int16(100))
    assert schedule == parse_schedule(repr(schedule))
    assert [type(decision.batch_size) for decision in train(schedule, 3).values()] == [int] * 3
    assert type(plan(np.int64(64), world_size=np.int64(4)).batch_size) is int


# --- from text


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        (256, Fixed(256)),
        (" 256 ", Fixed(256)),
        ("0:256 40ep:5000", Steps("0:256 40ep:5000")),
        ("fixed(256)", Fixed(256)),
        ("warm_start(256, 5000, at='40ep')", WarmStart(256, 5000, at="40ep")),
        ("Cap(double(256, every='10ep', cap=8192), 4096)", Cap(Double(256, every="10ep", cap=8192), 4096)),
        ("steps('0:256 40ep:5000')", Steps("0:256 40ep:5000")),
        ("steps([('0', 256), ('40ep', 5000)])", Steps([("0", 256), ("40ep", 5000)])),
        (
            "sharpness_switch(8, 80, 'hessian_topk:k=1', 'halved', deadline='9ep', patience=None)",
            SharpnessSwitch(8, 80, "hessian_topk:k=1", "halved", deadline="9ep"),
        ),
    ],
)
def test_schedules_are_read(text, schedule):
    assert parse_schedule(text) == schedule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("warm_strat(1, 2)", "'warm_strat' is unknown. Did you mean 'warm_start'"),
        ("fixed(0)", r"schedule 'fixed\(0\)': batch_size must be at least 1, got 0"),
        ("cap(fixed(8), exit())", "'exit' is unknown"),
        ("fixed(__import__('os').getpid())", "is unknown"),
        ("fixed(x)", "'x' is neither a value nor a schedule"),
        ("fixed(*[1])", "without asterisks"),
        ("fixed(**{'batch_size': 1})", "without asterisks"),
        ("fixed(", "cannot be read"),
        ("fixed(1) and fixed(2)", "neither a value nor a schedule"),
        ("0", "batch_size must be at least 1, got 0"),
        ("", "steps '' are empty"),
        ("fixed(" * 500 + ")" * 500, "cannot be read|missing|batch_size"),
    ],
)
def test_what_is_no_schedule_is_quoted(text, message):
    with pytest.raises((ValueError, TypeError), match=message):
        parse_schedule(text)


def test_a_setting_that_is_missing_or_unknown_is_a_type_error():
    with pytest.raises(TypeError, match=r"schedule 'warm_start\(1, 2\)': .*'at'"):
        parse_schedule("warm_start(1, 2)")
    with pytest.raises(TypeError, match="'sise'"):
        parse_schedule("fixed(sise=3)")
    with pytest.raises(TypeError, match=r"batch_size must be a whole number, got 2\.5"):
        parse_schedule(2.5)


def test_other_schedules_may_be_called_by_name():
    def sequenced(*given):
        return Sequenced(given)

    assert parse_schedule("cap(mine(1, 2), 4)", {**SCHEDULES, "mine": sequenced}) == Cap(Sequenced((1, 2)), 4)
    with pytest.raises(ValueError, match="'mine' is unknown"):
        parse_schedule("mine(1, 2)")
    assert sizes(Cap(Sequenced((1, 2)), 4)) is None
    assert smallest(Max(Sequenced((1, 2)), Fixed(3))) is None


def test_a_signal_is_finite_or_unknown():
    with pytest.raises(ValueError, match="finite or None"):
        Signal(math.nan)
    assert Signal(None).interval(2) is None
    assert Signal(3.0, 0.5).interval(2) == (2.0, 4.0)
    assert Signal(3.0).interval(2) == (3.0, 3.0)
