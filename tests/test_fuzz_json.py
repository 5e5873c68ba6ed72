"""Reports and states from elsewhere, mutated at random: they are refused in words, or they work; nothing else happens."""

from __future__ import annotations

import json
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fuzzing
from fuzzing import QUICK
from sharpness_plugins import BatchController, Kind, MetricResult, NoiseScaleMeter, SharpnessReport, Status
from sharpness_plugins.monitor import Measurement, SharpnessMonitor
from sharpness_plugins.report import Cost
from sharpness_plugins.samplers import ResizableBatchSampler
from sharpness_plugins.schedules import Progress
from sharpness_plugins.schema import check, read_json

NUMBERS = st.floats(allow_subnormal=True)
NAMES = st.text(min_size=1, max_size=12)
COSTS = st.builds(Cost, *[st.floats(0, 1e9)] * 5)
RESULTS = st.builds(
    MetricResult,
    value=NUMBERS,
    standard_error=st.none() | st.floats(0, 1e300),
    status=st.builds(Status, st.sampled_from(Kind), st.text(max_size=30)),
    details=st.dictionaries(NAMES, fuzzing.VALUES, max_size=3),
    cost=st.none() | COSTS,
)
PROVENANCE = st.fixed_dictionaries(
    {},
    optional={
        "model": st.text(max_size=9),
        "dim": st.integers(0, 10**12),
        "num_samples": st.integers(0, 10**12),
        "notes": st.lists(st.text(max_size=9), max_size=2),
        "other": fuzzing.VALUES,
    },
)
REPORTS = st.builds(SharpnessReport, st.dictionaries(NAMES, RESULTS, max_size=3), NUMBERS, PROVENANCE, COSTS)


def use(report: SharpnessReport) -> None:
    """All that people do with a report."""
    assert str(report)
    assert repr(report)
    assert report._repr_html_()
    assert isinstance(report.notes, list)
    for key in report:
        assert isinstance(report[key].value, float)
        assert report[key].standard_error is None or isinstance(report[key].standard_error, float)
    assert len(report.to_frame()) == len(report)
    text = report.to_json()
    assert SharpnessReport.from_json(text).to_json() == text


@QUICK
@given(REPORTS)
def test_every_report_comes_back_from_json(report):
    again = SharpnessReport.from_json(report.to_json())
    assert again.to_dict() == report.to_dict()
    assert list(again) == list(report)
    for key, result in report.items():
        assert again[key].status == result.status
        assert again[key].cost == result.cost
        assert again[key].value == result.value or not math.isfinite(result.value)
    use(again)


@QUICK
@given(REPORTS)
def test_a_printed_report_moves_no_cursor(report):
    assert all(character.isprintable() or character == "\n" for character in str(report))


ONE = SharpnessReport(
    {
        "epsilon_box": MetricResult(
            12.5,
            0.25,
            Status(Kind.LOWER_BOUND, "best of 2"),
            {"values": [1.0, 2.0], "solver": {"steps": 3}},
            Cost(1, 2, 3, 4, 5),
        ),
        "broken": MetricResult.failed("no luck"),
    },
    0.5,
    {"model": "Net", "dim": 10, "num_samples": 20, "loss_rule": "cross-entropy", "notes": ["half"], "seed": 0},
    Cost(1, 2, 3, 4, 5),
)


@QUICK
@given(fuzzing.mutated(ONE.to_dict()))
def test_a_mutated_report_is_refused_in_words_or_works(data):
    try:
        report = SharpnessReport.from_json(json.dumps(data))
    except ValueError as error:
        assert "report" in str(error)
    else:
        use(report)


@QUICK
@given(fuzzing.VALUES)
def test_a_mutated_report_that_is_no_text_is_refused_the_same(data):
    for given_as in (data, {**ONE.to_dict(), "results": data}, {**ONE.to_dict(), "provenance": data}):
        try:
            report = SharpnessReport.from_dict(given_as)
        except ValueError:
            continue
        use(report)


@QUICK
@given(st.text() | st.binary() | st.builds(lambda cut: ONE.to_json()[:cut], st.integers(0, len(ONE.to_json()) - 2)))
def test_other_and_truncated_text_is_refused(text):
    with pytest.raises(ValueError, match="this is not a sharpness report"):
        SharpnessReport.from_json(text)


class _Trap:
    def __reduce__(self):
        return eval, ("__import__('pathlib').Path('/nowhere/trap').touch()",)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 100_000, "nested too deep|not JSON"),
        ('{"a":' * 200 + "1" + "}" * 200, "nested more than 100 deep"),
        ('{"schema_version": 1, "loss": NaN}', "NaN is no JSON"),
        ('{"schema_version": 1, "loss": ' + "9" * 5000 + "}", "not JSON"),
        (pickle.dumps(_Trap()), "it is not JSON"),
        (pickle.dumps(_Trap(), protocol=0), "it is not JSON"),
        (None, "it is a NoneType, and not JSON text"),
    ],
    ids=["brackets", "mappings", "NaN", "digits", "a pickle", "a pickle of text", "None"],
)
def test_hostile_text_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        SharpnessReport.from_json(text)


def test_what_is_larger_than_any_report_is_not_even_parsed(monkeypatch):
    monkeypatch.setattr("sharpness_plugins.schema.MOST_BYTES", 100)
    monkeypatch.setattr("json.loads", lambda *_, **__: pytest.fail("parsed"))
    with pytest.raises(ValueError, match="it has 101 bytes, and at most 100 are read"):
        read_json(" " * 101, "a sharpness report")


def test_a_shape_says_where_something_does_not_fit():
    shape = {"a": [{"b": (float, None)}], "c": {str: int}}
    check({"a": [{"b": 1}, {"b": None}], "c": {"x": 1}}, shape, "it")
    for value, says in [
        (3, "it must be a mapping, got 3"),
        ({"a": []}, "it lacks 'c'"),
        ({"a": [], "c": {}, "d": 1}, "it has 'd', which does not belong there"),
        ({"a": [{"b": "1"}], "c": {}}, r"it.a\[0\].b must be a number or null, got '1'"),
        ({"a": [{"b": math.nan}], "c": {}}, r"it.a\[0\].b must be a number or null, got nan"),
        ({"a": [{"b": 10**400}], "c": {}}, r"it.a\[0\].b must be a number or null, got 1000"),
        ({"a": [{"b": 10**9999}], "c": {}}, r"it.a\[0\].b must be a number or null, got a int of many digits"),
        ({"a": "text", "c": {}}, "it.a must be a list, got 'text'"),
        ({"a": [], "c": {"x": True}}, "it.c.x must be a whole number, got True"),
        ({"a": [], "c": {3: 1}}, "it.c has 3 among its names"),
    ]:
        with pytest.raises(ValueError, match=says):
            check(value, shape, "it")


# --- states of a training run


def monitor() -> SharpnessMonitor:
    made = SharpnessMonitor(nn.Linear(1, 1), [], (), every="2 steps", budget=0.5, clock=lambda: 0.0)
    for step in (0, 2, 4):
        made.measure(Progress(step, 8 * step, step / 4, 8, 8))
    made.history.append(Measurement(5, 40, None, None, {"a": math.nan, "b": 1.0}, {"b": 0.1}, {"a": "failed"}, 0.5))
    return made


MONITOR_STATE = json.loads(json.dumps(monitor().state_dict()))


@QUICK
@given(fuzzing.mutated(MONITOR_STATE))
def test_a_mutated_state_of_a_monitor_is_refused_and_changes_nothing_or_works(state):
    made = SharpnessMonitor(nn.Linear(1, 1), [], (), every="2 steps", budget=0.5, clock=lambda: 0.0)
    before = made.state_dict()
    try:
        made.load_state_dict(state)
    except ValueError as error:
        assert "the state of the monitor" in str(error)
        assert made.state_dict() == before
    else:
        made.measure_if_due(Progress(6, 48, 1.5, 8, 8))
        json.dumps(made.state_dict(), allow_nan=False)


@QUICK
@given(fuzzing.mutated(monitor().history[-1].to_dict()))
def test_a_mutated_line_of_a_history_is_refused_or_read(line):
    try:
        made = Measurement.from_dict(line)
    except ValueError as error:
        assert "the measurement" in str(error)
    else:
        json.dumps(made.to_dict(), allow_nan=False)


def controller() -> tuple[BatchController, list[tuple[torch.Tensor, torch.Tensor]]]:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = "max(noise_scale(4, 16, min_wait='0'), steps('0:4 3 steps:8'))"
    data = [(torch.ones(2), torch.zeros(1))] * 24
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    meter = NoiseScaleMeter(model.parameters())
    made = BatchController(schedule, optimizer, max_micro_batch=2, meter=meter, clock=lambda: 0.0)
    made._test = model, loader
    return made, loader


def trained(made: BatchController, num_steps: int) -> None:
    model, loader = made._test
    for x, y in made.batches(loader):
        made.backward(nn.functional.mse_loss(model(x), y))
        if made.at_step:
            made.optimizer.step()
            made.optimizer.zero_grad()
            if made.step >= num_steps:
                return


def controller_state() -> dict:
    made, _ = controller()
    trained(made, 4)
    return json.loads(json.dumps(made.state_dict()))


CONTROLLER_STATE = controller_state()


@pytest.mark.filterwarnings("ignore::sharpness_plugins.PluginWarning")  # a signal made of damaged numbers is unknown
@QUICK
@given(fuzzing.mutated(CONTROLLER_STATE))
def test_a_mutated_state_of_a_controller_is_refused_and_changes_nothing_or_is_taken(state):
    made, _ = controller()
    before = json.dumps(made.state_dict())
    try:
        made.load_state_dict(state)
    except ValueError as error:
        assert str(error)
        assert json.dumps(made.state_dict()) == before
    else:
        json.dumps(made.state_dict())
        made.decide()


def test_a_controller_that_refused_a_damaged_state_trains_as_if_it_had_never_seen_it():
    runs = []
    for spoils in (False, True):
        torch.manual_seed(0)
        made, _ = controller()
        trained(made, 2)
        if spoils:
            for part in ("meter", "coupling", "signals", "history", "plan", "loader"):
                with pytest.raises(ValueError, match="the state"):
                    made.load_state_dict({**CONTROLLER_STATE, part: {"surprise": 1}})
        trained(made, 6)
        runs.append((json.dumps(made.state_dict()), [p.tolist() for p in made._test[0].parameters()]))
    assert runs[0] == runs[1]


SAMPLER = ResizableBatchSampler(50, 8, seed=3)
for _ in zip(range(3), SAMPLER, strict=False):
    pass
SAMPLER_STATE = json.loads(json.dumps(SAMPLER.state_dict()))


@QUICK
@given(fuzzing.mutated(SAMPLER_STATE))
def test_a_mutated_state_of_a_sampler_is_refused_and_changes_nothing_or_is_taken(state):
    made = ResizableBatchSampler(50, 8, seed=3)
    before = made.state_dict()
    try:
        made.load_state_dict(state)
    except ValueError:
        assert made.state_dict() == before
    else:
        seen = [index for batch in made for index in batch]
        assert len(set(seen)) == len(seen)
        assert set(seen) <= set(range(50))
