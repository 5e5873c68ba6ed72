"""Measuring during training: it leaves no trace, keeps its budget and its cadence, and nothing that fails stops the run."""

from __future__ import annotations

import csv
import io
import json
import math
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from sharpness_plugins import measure_sharpness
from sharpness_plugins.errors import LoaderError, PluginWarning, UnknownNameError
from sharpness_plugins.metrics import EpsilonBox
from sharpness_plugins.monitor import CSVSink, JSONLSink, Measurement, SharpnessMonitor, gradient_norm
from sharpness_plugins.noise_scale import NoiseScaleMeter
from sharpness_plugins.report import MetricResult
from sharpness_plugins.schedules import Progress, Signal

PROBE = [(torch.linspace(-1, 1, 12).view(4, 3), torch.tensor([0, 1, 1, 0]))]


def tiny() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Linear(3, 2)


def at(step: int, batch_size: int = 10) -> Progress:
    return Progress(step, step * batch_size, step * batch_size / 40, batch_size, batch_size)


def constant(objective, rng):
    return MetricResult(2.5, standard_error=0.5)


def bend(objective, rng):
    """How much the gradient changes along itself: first and second derivatives, in the least time."""
    _, gradient = objective.value_and_grad()
    return MetricResult(float(objective.hvp(gradient).norm()))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Toll:
    """A metric that takes so many seconds."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.clock, self.seconds, self.paid = clock, seconds, 0.0

    def __call__(self, objective, rng):
        self.clock.now += self.seconds
        self.paid += self.seconds
        return MetricResult(1.0)


def monitor_of(metrics=None, **settings) -> SharpnessMonitor:
    return SharpnessMonitor(
        tiny(), PROBE, {"constant": constant} if metrics is None else metrics, **{"budget": None, **settings}
    )


# --- when


@pytest.mark.parametrize(
    ("every", "expected"),
    [("1ep", [1, 4, 8, 12]), ("3 steps", [1, 3, 6, 9, 12]), ("50 samples", [1, 5, 10]), ("2 s", [1, 3, 5, 7, 9, 11])],
)
def test_it_measures_at_its_cadence_and_keeps_the_history(every, expected):
    clock = Clock()
    monitor = monitor_of(every=every, clock=clock)
    for step in range(1, 13):
        clock.now += 1.0
        made = monitor.measure_if_due(at(step))
        assert (made is not None) == (step in expected)
        assert made is None or made is monitor.last
    assert [made.step for made in monitor.history] == expected
    assert [(made.samples, made.epoch) for made in monitor.history] == [(10 * step, step / 4) for step in expected]
    assert all(made.values == {"constant": 2.5} and made.standard_errors == {"constant": 0.5} for made in monitor.history)
    assert monitor.last.loss == pytest.approx(functional.cross_entropy(tiny()(PROBE[0][0]), PROBE[0][1]).item())
    assert monitor.last.loss_rule == "cross-entropy on integer targets"
    again = monitor_of(every=every)
    again.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
    assert again.history == monitor.history


@pytest.mark.parametrize(("budget", "toll"), [(0.02, 0.5), (0.1, 3.0), (0.5, 10.0)])
@pytest.mark.parametrize("guess", ["fair", "far too low"])
def test_measuring_keeps_to_its_share_of_time(budget, toll, guess):
    clock = Clock()
    metric = Toll(clock, toll)
    # 50 gradients on 4 samples are the guess: at 200 samples a second, one second
    seconds = 0.05 if guess == "fair" else 0.0005
    monitor = monitor_of({"toll": metric}, every="1 step", budget=budget, clock=clock)
    steps = int(30 * toll / budget / 0.05) if guess == "fair" else 4000
    trained = 0.0
    shares = []
    for step in range(1, steps + 1):
        clock.now += seconds
        trained += seconds
        monitor.measure_if_due(at(step))
        shares.append(metric.paid / trained)
    if guess == "fair":
        assert shares[-1] >= 0.8 * budget  # the budget is there to be used
        assert max(shares[steps // 2 :]) <= 1.2 * budget
    assert len(monitor.history) <= 1 + 1.2 * budget * trained / toll  # one at a price that nobody knew, which is then repaid
    assert monitor.budget.spent == pytest.approx(metric.paid)
    assert [made.seconds for made in monitor.history] == pytest.approx([toll] * len(monitor.history))


def test_what_the_sinks_take_is_paid_for_too():
    clock = Clock()

    def slow(made):
        clock.now += 7.0

    monitor = monitor_of(every="1 step", sinks=slow, clock=clock)
    clock.now += 1.0
    monitor.measure_if_due(at(1))
    clock.now += 1.0
    monitor.measure_if_due(at(2))
    assert (monitor.budget.trained, monitor.budget.spent) == (2.0, 14.0)
    assert monitor.last.seconds == 0.0


def test_what_waits_says_why():
    clock = Clock()
    monitor = monitor_of(budget=0.02, clock=clock)
    assert monitor.why_waiting == ""
    for step in range(1, 6):
        clock.now += 1.0
        assert monitor.measure_if_due(at(step)) is None  # 200 gradients of samples are guessed to take 20 s
    assert monitor.why_waiting.startswith(
        "a measurement is due since step 1 and waits: it would take about 20s, and a budget of 2 % has 0.1s to spend"
    )
    monitor.measure(at(6))  # asked for all the same
    assert monitor.why_waiting == ""


def test_a_failed_measurement_does_not_make_the_next_one_look_cheap():
    clock = Clock()
    monitor = monitor_of(every="1 step", budget=0.1, clock=clock)
    monitor.probe = [(torch.zeros(4, 99), PROBE[0][1])]
    with pytest.warns(PluginWarning, match="nothing was measured at step 1"):
        monitor.measure(at(1))
    clock.now += 1.0
    assert not monitor.is_due(at(2))  # the guess still holds: 10 s


def test_a_budget_in_samples_is_the_same_on_every_machine():
    def steps(pause):
        clock = Clock()
        monitor = SharpnessMonitor(
            tiny(), PROBE, {"bend": bend}, every="1 step", budget=0.2, budget_in="samples", clock=clock
        )
        for step in range(1, 200):
            clock.now += pause * step
            monitor.measure_if_due(at(step))
        assert monitor.budget.share_spent <= 0.2
        return [made.step for made in monitor.history]

    assert steps(1.0) == steps(0.001)
    assert 3 < len(steps(1.0)) < 150


@pytest.mark.parametrize("stop", [1, 7, 23, 40])
@pytest.mark.parametrize(("every", "budget_in"), [("7 steps", "seconds"), ("1 step", "samples"), ("3 s", "seconds")])
def test_resumed_it_measures_at_the_same_steps_and_has_the_same_history(stop, every, budget_in):
    clock = Clock()

    def new():
        budget = 0.3 if budget_in == "samples" else None
        return SharpnessMonitor(tiny(), PROBE, {"bend": bend}, every=every, budget=budget, budget_in=budget_in, clock=clock)

    def train(monitor, steps):
        for step in steps:
            clock.now = float(step)
            monitor.measure_if_due(at(step, batch_size=50))
        return monitor

    whole = train(new(), range(1, 60))
    first = train(new(), range(1, stop + 1))
    text = json.dumps(first.state_dict(), allow_nan=False)
    clock.now = 0.0
    rest = new()
    clock.now = float(stop)
    rest.load_state_dict(json.loads(text))
    train(rest, range(stop + 1, 60))
    assert [replace(made, seconds=0.0) for made in rest.history] == [replace(made, seconds=0.0) for made in whole.history]


def test_the_state_is_small_however_long_the_run_was():
    monitor = monitor_of(every="1 step")
    for step in range(1, 400):
        monitor.history.append(Measurement(step, step, None, 0.1, {"a": 1.0, "b": math.nan}))
    buffer = io.BytesIO()
    torch.save(monitor.state_dict(), buffer)
    assert buffer.tell() < 100_000
    buffer.seek(0)
    rest = monitor_of(every="1 step")
    rest.load_state_dict(torch.load(buffer, weights_only=True))
    assert [made.step for made in rest.history] == list(range(200, 400))


# --- on what


class Noisy(nn.Module):
    """BatchNorm, dropout and a draw of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3)

    def forward(self, x):
        x = x + 0.01 * torch.randn_like(x) if self.training else x
        return self.last(self.drop(torch.relu(self.norm(self.first(x)))))


def train(monitored: bool, autocast: bool = False):
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    inputs = torch.randn(120, 6, generator=g)
    targets = (inputs @ torch.randn(6, 3, generator=g)).argmax(1)
    model = Noisy()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=12, shuffle=True)
    monitor = SharpnessMonitor(
        model, [(inputs[:24], targets[:24])], {"epsilon_box": EpsilonBox(), "bend": bend}, every="150 steps", budget=None,
        signals={"gradient_norm": gradient_norm(optimizer)},
    )  # fmt: skip
    step, losses = 0, []
    for _ in range(31):
        for x, y in loader:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            step += 1
            losses.append(loss.item())
            if monitored:
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    monitor.measure_if_due(at(step, 12))
    tensors = [*model.state_dict().values(), *(parameter.grad for parameter in model.parameters())]
    tensors += [state for entry in optimizer.state.values() for state in entry.values()]
    return [tensor.clone() for tensor in tensors], losses, torch.get_rng_state(), monitor


@pytest.mark.parametrize("autocast", [False, True])
def test_training_with_it_is_training_without_it_bit_for_bit(autocast):
    tensors, losses, state, monitor = train(monitored=True, autocast=autocast)
    plain_tensors, plain_losses, plain_state, _ = train(monitored=False, autocast=autocast)
    assert [made.step for made in monitor.history] == [1, 150, 300]
    assert all(made.notes == {} and min(made.values.values()) > 0 for made in monitor.history)
    assert losses == plain_losses
    assert len(tensors) == len(plain_tensors) > 20
    assert all(torch.equal(one, other) for one, other in zip(tensors, plain_tensors, strict=True))
    assert torch.equal(state, plain_state)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_hooks_of_trainers_run_in_other_modes_and_the_number_is_the_same(context):
    model = Noisy()
    probe = [(torch.linspace(-1, 1, 48).view(8, 6), torch.arange(8) % 3)]
    expected = measure_sharpness(model.eval(), probe, {"bend": bend})["bend"].value
    model.train()
    model.norm.eval()  # a mixture of modes, as in fine-tuning
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with context():
        inside = [(batch[0] + 0, batch[1] + 0) for batch in probe]  # inference tensors, under inference_mode
        monitor = SharpnessMonitor(model, inside, {"bend": bend}, budget=None)
        made = monitor.measure(at(1))
    assert made.values["bend"] == pytest.approx(expected, rel=1e-5)
    assert [module.training for module in model.modules()] == [True, True, False, True, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_probe_that_can_be_read_only_once_is_refused_at_the_beginning():
    with pytest.raises(LoaderError, match="the probe can be read only once"):
        SharpnessMonitor(tiny(), iter(PROBE))


# --- what fails


def failing(objective, rng):
    raise ArithmeticError("no number today")


def test_a_metric_that_fails_is_recorded_and_the_others_and_the_run_go_on():
    monitor = monitor_of({"failing": failing, "constant": constant})
    with pytest.warns(PluginWarning, match="metric 'failing' failed: ArithmeticError: no number today"):
        made = monitor.measure(at(1))
    assert math.isnan(made.values["failing"])
    assert made.values["constant"] == 2.5
    assert made.notes == {"failing": "failed: ArithmeticError: no number today"}
    assert json.loads(json.dumps(made.to_dict(), allow_nan=False))["values"] == {"failing": None, "constant": 2.5}


def test_a_model_without_a_finite_loss_is_recorded_with_the_signals_and_the_run_goes_on():
    monitor = monitor_of(signals={"level": lambda: 4.0})
    with torch.no_grad():
        monitor.model.weight.fill_(math.inf)
    with pytest.warns(PluginWarning, match="nothing was measured at step 5: NonFiniteLossError"):
        made = monitor.measure(at(5))
    assert made.notes["probe"].startswith("NonFiniteLossError")
    assert (made.loss, made.values) == (None, {"level": 4.0})
    assert monitor.history == [made]
    assert not monitor.is_due(at(6))


def test_ctrl_c_passes_and_leaves_the_model_in_its_mode():
    def interrupted(objective, rng):
        raise KeyboardInterrupt

    monitor = monitor_of({"interrupted": interrupted})
    monitor.model.train()
    weights = monitor.model.weight.clone()
    with pytest.raises(KeyboardInterrupt):
        monitor.measure(at(1))
    assert monitor.model.training
    assert torch.equal(monitor.model.weight, weights)
    assert monitor.history == []
    assert monitor.is_due(at(2))


@pytest.mark.parametrize("what", ["metric", "probe", "sink", "signal"])
def test_strict_mode_raises(monkeypatch, what):
    monkeypatch.setenv("SHARPNESS_PLUGINS_STRICT", "1")

    def broken(*args):
        raise ArithmeticError("no number today")

    monitor = monitor_of({"failing": broken} if what == "metric" else None)
    if what == "probe":
        monitor.probe = [(torch.zeros(4, 99), PROBE[0][1])]
    if what == "sink":
        monitor.sinks.append(broken)
    if what == "signal":
        monitor.signals["level"] = broken
    with pytest.raises(RuntimeError if what == "probe" else ArithmeticError):
        monitor.measure(at(1))


def test_a_sink_that_raises_is_a_warning_and_the_next_sink_is_told():
    told = []

    class Broken:
        def __repr__(self):
            return "Broken()"

        def __call__(self, made):
            raise OSError("no space left")

    monitor = monitor_of(sinks=[Broken(), told.append])
    with pytest.warns(PluginWarning, match=r"Broken\(\) did not take a measurement: OSError: no space left"):
        made = monitor.measure(at(1))
    assert told == [made] == monitor.history


def test_bad_settings_are_refused_at_the_beginning():
    with pytest.raises(UnknownNameError, match="Did you mean 'hessian_topk'"):
        monitor_of("hessian_topq")
    with pytest.raises(ValueError, match="write '10 min'"):
        monitor_of(every="now and then")
    with pytest.raises(ValueError, match="at most 1"):
        monitor_of(budget=2)
    with pytest.raises(ValueError, match="both a metric and a signal are named 'constant'"):
        monitor_of(signals={"constant": lambda: 1.0})
    with pytest.raises(ValueError, match=r"tells gradient_noise_scale, .* and no signal 'noise'"):
        monitor_of(signals={"noise": NoiseScaleMeter(tiny().parameters())})


# --- signals


def test_signals_cost_nothing_and_are_recorded_in_every_form():
    def off():
        raise RuntimeError("the sensor is off")

    signals = {
        "gap": lambda: 0.25,  # the surrogate gap of a SAM optimizer
        "tensor": lambda: torch.tensor(3.0, dtype=torch.float64, requires_grad=True),
        "not_yet": lambda: None,
        "known": lambda: Signal(7.0, 0.5, note="from 3 steps"),
        "unknown": lambda: Signal(None, note="too few steps"),
        "off": off,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = monitor_of(signals=signals).measure(at(1))
    assert {n: v for n, v in made.values.items() if not math.isnan(v)} == {
        "constant": 2.5,
        "gap": 0.25,
        "tensor": 3.0,
        "known": 7.0,
    }
    assert {n for n, v in made.values.items() if math.isnan(v)} == {"unknown", "off"}
    assert made.standard_errors == {"constant": 0.5, "known": 0.5}
    assert made.notes == {"known": "from 3 steps", "unknown": "too few steps", "off": "RuntimeError: the sensor is off"}


def test_the_noise_scale_comes_from_the_micro_batches_of_training():
    model = tiny()
    meter = NoiseScaleMeter(model.parameters())
    monitor = SharpnessMonitor(
        model, PROBE, (), budget=1e-9, signals={"gradient_noise_scale": meter, "gradient_variance": meter}
    )  # no metric: nothing is measured, so nothing waits for the budget
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        for _ in range(4):
            x, y = torch.randn(4, 3, generator=g), torch.randint(2, (4,), generator=g)
            with meter.micro_batch(4, weight=0.25):
                (functional.cross_entropy(model(x), y) * 0.25).backward()
        meter.step()
        model.zero_grad()
    made = monitor.measure_if_due(at(20))
    expected = meter.signal("gradient_variance", 20, 200)
    assert made.values["gradient_variance"] == expected.value
    assert made.standard_errors["gradient_variance"] == expected.standard_error
    assert "gradient_noise_scale" in made.values
    assert made.loss is None


def test_the_gradient_norm_is_that_of_all_gradients_together():
    weights = [
        nn.Parameter(torch.zeros(3)),
        nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)),
        nn.Parameter(torch.zeros(4)),
    ]
    complex_weight, embedding = nn.Parameter(torch.zeros(1, dtype=torch.complex64)), nn.Embedding(5, 2, sparse=True)
    optimizer = torch.optim.SGD([*weights, complex_weight, *embedding.parameters()], lr=0.1)
    read = gradient_norm(optimizer)
    assert read() is None
    weights[0].grad, weights[1].grad = torch.tensor([1.0, 2.0, 2.0]), torch.tensor([4.0, 4.0], dtype=torch.bfloat16)
    complex_weight.grad = torch.tensor([3 + 4j])
    embedding(torch.tensor([1, 1])).sum().backward()  # the sum over two rows of one entry: (2, 2)
    assert read() == pytest.approx(math.sqrt(9 + 32 + 25 + 8))
    assert gradient_norm(weights[:1])() == pytest.approx(3.0)


# --- files


def made(step: int, **values: float) -> Measurement:
    return Measurement(step, 10 * step, step / 4, 0.5, values, {"a": 0.1} if "a" in values else {}, {}, 1.5)


def rows(path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


def test_a_csv_file_has_a_row_each_and_a_new_number_a_new_column(tmp_path):
    path = tmp_path / "new" / "folder" / "run.csv"
    CSVSink(path)(made(1, a=1.0))
    CSVSink(path)(made(2, a=2.0))  # a resumed run goes on
    sink = CSVSink(path)
    sink(replace(made(3, b=1e-30, **{'odd, "name"': math.nan}), epoch=None, loss=None))
    sink(made(4))
    found = rows(path)
    assert [row["step"] for row in found] == ["1", "2", "3", "4"]
    assert [row["a"] for row in found] == ["1.0", "2.0", "", ""]
    assert [row["a_se"] for row in found] == ["0.1", "0.1", "", ""]
    assert [row["b"] for row in found] == ["", "", "1e-30", ""]
    assert [row["epoch"] for row in found] == ["0.25", "0.5", "", "1.0"]
    assert found[2]['odd, "name"'] == "nan"
    assert [file.name for file in path.parent.iterdir()] == ["run.csv"]


def test_a_jsonl_file_is_read_back_as_it_was(tmp_path):
    path = tmp_path / "run.jsonl"
    history = [made(1, a=1.0), replace(made(2, b=math.nan, c=math.inf), notes={"b": "failed: ü"}, epoch=None)]
    for measurement in history:
        JSONLSink(path)(measurement)
    found = [Measurement.from_dict(json.loads(line)) for line in path.read_text().splitlines()]
    assert found[0] == history[0]
    assert math.isnan(found[1].values["b"])
    assert math.isnan(found[1].values["c"])  # JSON has no infinity
    assert replace(found[1], values={}) == replace(history[1], values={})


@pytest.mark.parametrize(("sink", "name"), [(CSVSink, "run.csv"), (JSONLSink, "run.jsonl")])
@pytest.mark.parametrize("news", [{"a": 3.0}, {"a": 3.0, "another": 4.0}], ids=["another row", "another column"])
def test_a_full_disk_leaves_the_file_as_it_was_and_the_run_goes_on(tmp_path, sink, name, news):
    resource = pytest.importorskip("resource", reason="a limit on the size of files stands for a full disk")
    path = tmp_path / name
    monitor = monitor_of(sinks=sink(path))
    for step in (1, 2):
        monitor.sinks[0](made(step, a=1.0))
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 7, hard))  # a few bytes fit: half a line is written
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            monitor._tell(monitor.sinks[0], made(3, **news))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    (warning,) = told
    assert f"{sink.__name__}({str(path)!r}) did not take a measurement: OSError" in str(warning.message)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    monitor.sinks[0](made(4, **news))
    assert path.read_bytes().count(b"\n") == before.count(b"\n") + 1


@pytest.mark.parametrize(("sink", "name"), [(CSVSink, "run.csv"), (JSONLSink, "run.jsonl")])
def test_only_rank_zero_writes(tmp_path, monkeypatch, sink, name):
    monkeypatch.setattr("sharpness_plugins.distributed.rank", lambda: 1)
    sink(tmp_path / name)(made(1, a=1.0))
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize(
    ("settings", "asked"),
    [({"every": "1 step"}, False), ({"every": "1 step", "budget": 0.5}, True), ({"every": "5 s"}, True),
     ({"every": "1 step", "budget": 0.5, "budget_in": "samples"}, False)],
)  # fmt: skip
def test_where_a_clock_has_a_say_rank_zero_decides(monkeypatch, settings, asked):
    sent = []

    def from_rank_zero(value):
        sent.append(value)
        return not value  # rank 0 sees it otherwise

    monkeypatch.setattr("sharpness_plugins.distributed.from_rank_zero", from_rank_zero)
    clock = Clock()
    monitor = monitor_of(clock=clock, **settings)
    clock.now += 1000
    own = monitor.is_due(at(500))
    assert bool(sent) == asked
    assert own is (not sent[0] if sent else True)
