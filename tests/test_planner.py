"""The planner against a twin that tries everything, on more than 14 000 cases; and the promises that follow."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharpness_plugins.schedules import Cap, Fixed, Plan, Steps, check_world_size, plan

WORLDS = (1, 2, 3, 4, 7, 8, 24, 64)
CAPS = (None, 1, 2, 3, 5, 8, 16, 100)
TARGETS = (
    *range(1, 130),
    131,
    192,
    200,
    255,
    256,
    257,
    264,
    500,
    512,
    513,
    768,
    1000,
    1023,
    1024,
    1025,
    2047,
    2304,
    4999,
    9216,
)


def by_trying_everything(batch_size, world_size, cap, multiple, rounding):
    """All micro-batches that fit, times all accumulations up to the rule's bound; the least where nothing is allowed."""
    largest = (batch_size // world_size // multiple + 1) * multiple if cap is None else cap // multiple * multiple
    bound = 2 * (1 if cap is None else -(-batch_size // (world_size * largest))) + 3
    accumulation, micro_batch = np.mgrid[1 : bound + 1, multiple : largest + 1 : multiple]  # fewest passes first
    errors = (world_size * accumulation * micro_batch - batch_size).ravel()
    allowed = np.flatnonzero({"nearest": errors == errors, "down": errors <= 0, "up": errors >= 0}[rounding])
    if not allowed.size:
        return multiple, 1
    best = allowed[
        np.argmin(np.abs(errors[allowed]))
    ]  # of equals the first: the fewest passes, then the smallest micro-batch
    return micro_batch.ravel()[best], accumulation.ravel()[best]


def test_every_plan_is_the_best_one():
    cases, worst = 0, 0.0
    for batch_size, world_size, cap in itertools.product(TARGETS, WORLDS, CAPS):
        for multiple, rounding in ((1, "nearest"), (1, "down"), (1, "up"), (8, "nearest")):
            if cap is not None and cap < multiple:
                continue
            found = plan(batch_size, world_size=world_size, max_micro_batch=cap, multiple=multiple, rounding=rounding)
            expected = by_trying_everything(batch_size, world_size, cap, multiple, rounding)
            assert (found.micro_batch, found.accumulation) == expected, (batch_size, world_size, cap, multiple, rounding)
            assert found.batch_size == found.micro_batch * found.accumulation * found.world_size
            assert found.world_size == world_size
            assert found.accumulation >= 1
            assert found.micro_batch % multiple == 0
            assert 1 <= found.micro_batch <= (cap or found.batch_size)
            if rounding == "down":
                assert found.batch_size <= max(batch_size, world_size)
            if rounding == "up":
                assert found.batch_size >= batch_size
            if multiple == 1 and rounding == "nearest" and batch_size >= 8 * world_size:
                worst = max(worst, abs(found.batch_size - batch_size) / batch_size)
            cases += 1
    assert cases >= 14_000
    assert worst == 1 / 11  # 264 samples on 24 devices with room for 8 or 10: 11 each are 2 x 5 or 2 x 6


@pytest.mark.parametrize(
    ("batch_size", "world_size", "cap", "expected"),
    [
        (2304, 64, 4, (4, 9, 2304)),
        (9216, 64, 4, (4, 36, 9216)),
        (100, 8, 16, (12, 1, 96)),
        (5, 8, 4, (1, 1, 8)),  # no device goes without
        (256, 1, None, (256, 1, 256)),
        (5000, 1, 512, (500, 10, 5000)),
        (13, 1, 4, (4, 3, 12)),  # a prime: three full micro-batches, not four of 3
    ],
)
def test_known_answers(batch_size, world_size, cap, expected):
    found = plan(batch_size, world_size=world_size, max_micro_batch=cap)
    assert (found.micro_batch, found.accumulation, found.batch_size) == expected


@settings(deadline=None, max_examples=300)
@given(
    st.integers(1, 64), st.integers(1, 50), st.integers(1, 40), st.integers(1, 4), st.sampled_from(["nearest", "down", "up"])
)
def test_what_can_be_had_exactly_is(world_size, micro_batch, accumulation, multiple, rounding):
    """A batch of full micro-batches is never changed, nor what a plan gave: planning twice is planning once."""
    cap = micro_batch * multiple
    batch_size = cap * accumulation * world_size
    found = plan(batch_size, world_size=world_size, max_micro_batch=cap, multiple=multiple, rounding=rounding)
    assert found == Plan(cap, accumulation, world_size)
    near = plan(batch_size + 1, world_size=world_size, max_micro_batch=cap, rounding=rounding)
    again = plan(near.batch_size, world_size=world_size, max_micro_batch=cap, rounding=rounding)
    assert again.batch_size == near.batch_size


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 8, "world_size": 0}, "world_size must be at least 1, got 0"),
        ({"batch_size": 8, "multiple": -1}, "multiple must be at least 1, got -1"),
        ({"batch_size": 8, "max_micro_batch": 0}, "max_micro_batch must be at least 1, got 0"),
        ({"batch_size": 64, "max_micro_batch": 7, "multiple": 8}, "max_micro_batch=7 has no room for a multiple of 8"),
        ({"batch_size": 8, "rounding": "floor"}, "rounding must be one of 'nearest', 'down', 'up', got 'floor'"),
    ],
)
def test_refusals_quote_the_value(settings, message):
    with pytest.raises(ValueError, match=message):
        plan(settings.pop("batch_size"), **settings)


@pytest.mark.parametrize("wrong", [8.0, "8", True, None])
def test_a_batch_size_is_a_whole_number(wrong):
    with pytest.raises(TypeError, match="batch_size must be a whole number"):
        plan(wrong)


def test_a_schedule_below_the_world_size_is_refused():
    check_world_size(Steps("0:8 40ep:5000"), world_size=8)
    with pytest.raises(ValueError, match=r"Steps\(steps='0:4 40ep:5000'\) may ask for a batch of 4, but 8 devices"):
        check_world_size(Steps("0:4 40ep:5000"), world_size=8)
    with pytest.raises(ValueError, match="may ask for a batch of 3"):
        check_world_size(Cap(Fixed(16), 3), world_size=4)
