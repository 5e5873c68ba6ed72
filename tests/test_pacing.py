"""When measuring is due and what it may cost, by hand and on a clock of the test's own."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharpness_plugins.pacing import Budget, Pace
from sharpness_plugins.schedules import Duration, Progress


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def at(step: int, *, batch_size: int = 10, per_epoch: int = 40, tokens: int | None = None) -> Progress:
    samples = step * batch_size
    return Progress(step, samples, samples / per_epoch, batch_size, batch_size, tokens)


def due_steps(pace: Pace, steps: range, **size: int) -> list[int]:
    found = []
    for step in steps:
        if pace.is_due(at(step, **size)):
            found.append(step)
            pace.took_place(at(step, **size))
    return found


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        ("4 steps", [1, 4, 8, 12, 16, 20]),
        ("1ep", [1, 4, 8, 12, 16, 20]),
        ("0.5ep", [1, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20]),
        ("50 samples", [1, 5, 10, 15, 20]),
        ("25", [1, 3, 5, 8, 10, 13, 15, 18, 20]),  # a bare number counts samples; at the first batch that gets there
        (Duration(7, "steps"), [1, 7, 14]),
        ("1 step", list(range(1, 21))),
        (None, list(range(1, 21))),
        ("1000 steps", [1]),
    ],
    ids=str,
)
def test_due_at_once_and_then_at_the_multiples(every, expected):
    assert due_steps(Pace(every), range(1, 21)) == expected


def test_the_ends_of_epochs_are_met_although_their_fractions_do_not_add_up():
    pace = Pace("1ep")
    epoch, found = 0.0, []
    for step in range(1, 401):
        epoch += 1 / 10  # 3.9999999999999996 and its like
        progress = Progress(step, step, epoch, 1, 1)
        if pace.is_due(progress):
            pace.took_place(progress)
            found.append(step)
    assert found == [1, *range(10, 401, 10)]


def test_what_waited_is_measured_once_and_the_next_multiple_is_met():
    pace = Pace("10 steps")
    pace.took_place(at(0))
    assert pace.is_due(at(35))  # 10, 20 and 30 have passed
    pace.took_place(at(35))
    assert [step for step in range(36, 45) if pace.is_due(at(step))] == [40, 41, 42, 43, 44]


@pytest.mark.parametrize(
    ("every", "seconds"),
    [("10 s", 10), ("2 min", 120), ("1.5h", 5400), (" 3 HOURS ", 10800), (".5 mins", 30), ("20 secs", 20)],
)
def test_a_pace_in_time_counts_from_the_last_measurement(every, seconds):
    clock = Clock()
    pace = Pace(every, clock)
    assert pace.is_timed
    assert pace.unit == "seconds"
    assert pace.is_due(at(1))
    pace.took_place(at(1))
    clock.now += 0.999 * seconds
    assert not pace.is_due(at(999))
    clock.now += 0.001 * seconds + 1e-6
    assert pace.is_due(at(999))


@pytest.mark.parametrize("every", ["0 steps", "0ep", "0", "0 s", "0.0 min"])
def test_nothing_is_no_pace(every):
    with pytest.raises(ValueError, match="has no end"):
        Pace(every)


@pytest.mark.parametrize("every", ["hourly", "", "-3 steps", "5 parsecs", "1.5 steps", "10 m m"])
def test_a_misspelt_pace_says_what_there_is(every):
    with pytest.raises(ValueError, match=r"is not a duration.*write '10 min'|whole number"):
        Pace(every)


def test_a_pace_in_what_nobody_counts_says_so_before_anything_is_measured():
    with pytest.raises(ValueError, match="nobody knows how many samples one has"):
        Pace("1ep").is_due(Progress(1, 10, None, 10, 10))
    with pytest.raises(ValueError, match="nobody counts them"):
        Pace("1K tokens").is_due(at(1))
    assert due_steps_in_tokens() == [1, 4, 7, 10]


def due_steps_in_tokens() -> list[int]:
    pace, found = Pace("100 tokens"), []
    for step in range(1, 11):
        progress = at(step, tokens=30 * step)
        if pace.is_due(progress):
            pace.took_place(progress)
            found.append(step)
    return found


@given(every=st.sampled_from(["3 steps", "1ep", "70 samples", "2 s"]), stop=st.integers(1, 59), size=st.integers(1, 30))
def test_resumed_anywhere_it_is_due_at_the_same_steps(every, stop, size):
    clock = Clock()

    def run(pace, steps):
        found = []
        for step in steps:
            clock.now = 1000.0 + 0.3 * step
            found += due_steps(pace, range(step, step + 1), batch_size=size)
        return found

    whole, first, rest = Pace(every, clock), Pace(every, clock), Pace(every, clock)
    expected = run(whole, range(1, 60))
    found = run(first, range(1, stop + 1))
    rest.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert found + run(rest, range(stop + 1, 60)) == expected


def test_a_pause_between_runs_is_no_training_time():
    clock = Clock()
    pace = Pace("10 s", clock)
    pace.took_place(at(1))
    clock.now += 4
    saved = pace.state_dict()
    other = Clock()  # another machine, another origin
    other.now = 5.0
    rest = Pace("10 s", other)
    rest.load_state_dict(saved)
    other.now += 5.9
    assert not rest.is_due(at(2))
    other.now += 0.2
    assert rest.is_due(at(2))


def test_another_pace_than_was_saved_begins_anew():
    pace = Pace("2 steps")
    pace.took_place(at(100))
    other = Pace("1ep")
    other.load_state_dict(pace.state_dict())
    assert other.is_due(at(100))


# --- budget


@pytest.mark.parametrize("share", [0.02, 0.1, 1.0])
@pytest.mark.parametrize("price", [0.3, 5.0])
def test_measuring_that_asks_first_never_passes_the_share(share, price):
    clock = Clock()
    budget = Budget(share, clock=clock)
    spent = trained = 0.0
    for step in range(1, 3000):
        clock.now += 0.5
        trained += 0.5
        budget.train(at(step))
        if budget.affords(price):
            clock.now += price
            assert budget.pay(work=1.0) == pytest.approx(price)
            spent += price
        assert spent <= share * trained * (1 + 1e-9)
    assert spent >= min(share * trained, 2999 * price) - 2 * price  # and it is used
    assert budget.share_spent == pytest.approx(spent / trained)


def test_a_budget_in_samples_depends_on_nothing_but_the_run():
    clock = Clock()
    budget = Budget(0.25, "samples", clock)
    assert not budget.is_timed
    for step in range(1, 11):
        clock.now += step**3
        budget.train(at(step))
    assert budget.trained == 100
    assert budget.price_of(25.0, at(10)) == 25.0
    assert budget.affords(25.0)
    assert not budget.affords(25.1)
    assert budget.pay(25.0) == 25.0
    assert not budget.affords(0.1)


def test_the_price_of_work_is_guessed_at_the_rate_of_training():
    clock = Clock()
    budget = Budget(0.1, clock=clock)
    clock.now += 8.0
    budget.train(at(4))  # 40 samples in 8 seconds
    assert budget.price_of(100, at(4)) == pytest.approx(20.0)
    assert budget.price_of(0, at(0)) == 0.0


def test_no_limit_affords_everything():
    budget = Budget(None)
    assert budget.affords(1e30)
    assert not budget.is_timed
    assert budget.share_spent == 0.0


def test_a_resumed_budget_goes_on_and_another_unit_begins_anew():
    clock = Clock()
    budget = Budget(0.5, clock=clock)
    clock.now += 10
    budget.train(at(1))
    clock.now += 4
    budget.pay(1.0)
    saved = json.loads(json.dumps(budget.state_dict()))
    clock.now += 1e6  # the pause between the runs
    rest = Budget(0.5, clock=clock)
    clock.now += 1e6  # and setting up
    rest.load_state_dict(saved)
    rest.train(at(1))
    assert (rest.trained, rest.spent) == (10.0, 4.0)
    other = Budget(0.5, "samples", clock)
    other.load_state_dict(saved)
    assert (other.trained, other.spent) == (0.0, 0.0)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5, float("nan")])
def test_a_share_is_a_share(share):
    with pytest.raises(ValueError, match="share of training above 0 and at most 1"):
        Budget(share)


def test_a_unit_is_known():
    with pytest.raises(ValueError, match="'seconds' or 'samples', got 'steps'"):
        Budget(0.1, "steps")
