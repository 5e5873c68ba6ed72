"""The batch-size controller: exact resume, exact gradients, one decision for all ranks, budgets, vetoes."""

from __future__ import annotations

import gc
import io
import json
import math
import multiprocessing as mp
import weakref
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from sharpness_plugins import hookimpl
from sharpness_plugins.controller import BatchChange, BatchController
from sharpness_plugins.errors import LoaderError, UnknownNameError
from sharpness_plugins.noise_scale import NoiseScaleMeter
from sharpness_plugins.plugin_loading import PROJECT, Source
from sharpness_plugins.registry import CouplingSpec, ScheduleSpec, SignalSpec, fresh_registry, metric
from sharpness_plugins.schedules import (
    Decision,
    Fixed,
    FromLearningRate,
    NoiseScale,
    Plan,
    SharpnessSwitch,
    Signal,
    Steps,
    WarmStart,
)

NUM_SAMPLES = 203


class Indexed(Dataset):
    """Inputs, targets and the index, so that a test sees what was delivered."""

    def __init__(self, num_samples: int = NUM_SAMPLES, dtype: torch.dtype = torch.float32) -> None:
        g = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(num_samples, 6, generator=g).to(dtype)
        self.targets = (self.inputs @ torch.randn(6, 3, generator=g).to(dtype)).argmax(dim=1)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int):
        return self.inputs[index], self.targets[index], index


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def weights(model: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


class Run:
    """A training run that can be saved after any step, and continued from what was saved."""

    def __init__(self, schedule, *, num_workers=0, persistent=False, drop_last=False, **settings) -> None:
        self.model = network()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 0.97**step)
        self.loader = DataLoader(
            Indexed(),
            batch_size=8,
            shuffle=True,
            num_workers=num_workers,
            persistent_workers=persistent,
            drop_last=drop_last,
        )
        self.controller = BatchController(schedule, self.optimizer, model=self.model, **settings)
        self.delivered: list[tuple[int, list[int]]] = []  # the global batch size, and the indices
        self.saved: dict[int, bytes] = {}

    def states(self):
        return {name: getattr(self, name) for name in ("model", "optimizer", "scheduler", "controller")}

    def load(self, saved: bytes) -> Run:
        for name, state in torch.load(io.BytesIO(saved), weights_only=True).items():
            getattr(self, name).load_state_dict(state)
        return self

    def train(self, num_steps: int, *, save: bool = False) -> Run:
        while True:
            for inputs, targets, indices in self.controller.batches(self.loader):
                self.controller.backward(functional.cross_entropy(self.model(inputs), targets))
                self.delivered.append((self.controller.batch_size, indices.tolist()))
                if not self.controller.at_step:
                    continue
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.scheduler.step()
                if save:
                    buffer = io.BytesIO()
                    torch.save({name: thing.state_dict() for name, thing in self.states().items()}, buffer)
                    self.saved[self.controller.step] = buffer.getvalue()
                if self.controller.step == num_steps:
                    return self


# three switches in the middle of epochs, up and down, through accumulation
SCHEDULE = "0:8 100:40 350:20 1000:64"


def test_resumed_after_any_step_it_is_the_uninterrupted_run_bit_for_bit():
    whole = Run(SCHEDULE, max_micro_batch=16).train(60, save=True)
    assert {size for size, _ in whole.delivered} == {8, 40, 20, 64}
    counts = {step: json.loads(json.dumps(state_of(saved)))["samples"] for step, saved in whole.saved.items()}
    for step in range(1, 60):
        rest = Run(SCHEDULE, max_micro_batch=16).load(whole.saved[step])
        assert len(json.dumps(rest.controller.state_dict())) < 10_000
        rest.train(60)
        already = len(whole.delivered) - len(rest.delivered)
        assert rest.delivered == whole.delivered[already:]
        assert sum(len(indices) for _, indices in whole.delivered[:already]) == counts[step]
        assert torch.equal(weights(rest.model), weights(whole.model))
        assert rest.controller.samples == whole.controller.samples


def state_of(saved: bytes):
    return torch.load(io.BytesIO(saved), weights_only=True)["controller"]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("persistent", [False, True])
def test_workers_that_read_ahead_change_nothing(persistent, drop_last):
    here = Run(SCHEDULE, max_micro_batch=16, drop_last=drop_last).train(45)
    ahead = Run(SCHEDULE, max_micro_batch=16, drop_last=drop_last, num_workers=2, persistent=persistent)
    ahead.train(45, save=True)
    assert ahead.delivered == here.delivered
    assert torch.equal(weights(ahead.model), weights(here.model))
    resumed = Run(SCHEDULE, max_micro_batch=16, drop_last=drop_last, num_workers=2, persistent=persistent)
    resumed.load(ahead.saved[17]).train(45)
    assert resumed.delivered == here.delivered[-len(resumed.delivered) :]
    assert torch.equal(weights(resumed.model), weights(here.model))


def test_the_order_follows_torchs_seed_and_a_resumed_run_keeps_its_own():
    def first_batch(seed: int, saved: bytes | None = None) -> list[int]:
        torch.manual_seed(seed)
        run = Run("0:8")
        run.load(saved) if saved else None
        return next(run.controller.batches(run.loader))[2].tolist()

    assert first_batch(1) == first_batch(1) != first_batch(2)
    torch.manual_seed(3)
    whole = Run("0:8").train(3, save=True)
    assert first_batch(4, whole.saved[2]) == whole.delivered[2][1]


def test_a_run_that_is_dropped_is_gone_at_once():
    """Without a collection of garbage: persistent workers in a cycle of references would each take 5 s to end."""
    gc.collect()
    gc.disable()
    try:
        run = Run(SCHEDULE).train(5)
        watched = weakref.ref(run.controller)
        del run
        assert watched() is None
    finally:
        gc.enable()


def test_every_sample_is_seen_once_per_epoch_whatever_the_size():
    run = Run(SCHEDULE, max_micro_batch=16)
    for _ in range(6):
        run.delivered.clear()
        for inputs, targets, indices in run.controller.batches(run.loader):
            run.controller.backward(functional.cross_entropy(run.model(inputs), targets))
            run.delivered.append((run.controller.batch_size, indices.tolist()))
            if run.controller.at_step:
                run.optimizer.step()
                run.optimizer.zero_grad()
        assert sorted(index for _, indices in run.delivered for index in indices) == list(range(NUM_SAMPLES))
    assert run.controller.progress.epoch == 6
    assert run.controller.samples == 6 * NUM_SAMPLES


def test_accumulated_steps_are_those_of_whole_batches():
    """Ragged micro-batches of 48 and of the 203 samples' rest, against one backward pass on the same indices."""
    dataset = Indexed(dtype=torch.float64)
    model, twin = network(torch.float64), network(torch.float64)
    optimizer, reference = (torch.optim.SGD(net.parameters(), lr=0.1) for net in (model, twin))
    controller = BatchController("0:48", optimizer, max_micro_batch=13)
    taken: list[int] = []
    for inputs, targets, indices in controller.batches(DataLoader(dataset, batch_size=4, shuffle=True)):
        assert len(targets) <= 13
        controller.backward(functional.cross_entropy(model(inputs), targets))
        taken += indices.tolist()
        if controller.at_step:
            reference.zero_grad()
            functional.cross_entropy(twin(dataset.inputs[taken]), dataset.targets[taken]).backward()
            for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-12, atol=1e-14)
            optimizer.step()
            reference.step()
            optimizer.zero_grad()
            taken.clear()
    assert controller.step == math.ceil(NUM_SAMPLES / 48)


def test_a_step_in_the_middle_of_a_batch_is_refused_and_changes_nothing():
    run = Run("0:40", max_micro_batch=10)
    before = weights(run.model)
    batches = run.controller.batches(run.loader)
    inputs, targets, _ = next(batches)
    run.controller.backward(functional.cross_entropy(run.model(inputs), targets))
    with pytest.raises(RuntimeError, match=r"after 10 samples of a batch of 40.*at_step"):
        run.optimizer.step()
    assert torch.equal(weights(run.model), before)
    assert (run.controller.step, run.controller.samples) == (0, 0)


def test_a_checkpoint_in_the_middle_of_a_batch_delivers_that_batch_again():
    run = Run("0:40", max_micro_batch=10).train(2)
    started = run.controller.batches(run.loader)
    first = next(started)[2].tolist()
    state = run.controller.state_dict()
    again = Run("0:40", max_micro_batch=10)
    again.controller.load_state_dict(state)
    assert next(again.controller.batches(again.loader))[2].tolist() == first
    assert again.controller.samples == 80


def test_a_step_that_the_scaler_skips_consumes_samples_and_is_no_step():
    run = Run("0:50")
    for number, (inputs, targets, _) in enumerate(run.controller.batches(run.loader)):
        run.controller.backward(functional.cross_entropy(run.model(inputs), targets))
        if number != 1:
            run.optimizer.step()
    assert (run.controller.step, run.controller.samples) == (4, NUM_SAMPLES)


def test_a_grad_scaler_scales_what_is_accumulated():
    run = Run("0:40", max_micro_batch=10, scaler=torch.amp.GradScaler("cpu", init_scale=64.0))
    plain = Run("0:40", max_micro_batch=10)
    for one in (run, plain):
        for inputs, targets, _ in one.controller.batches(one.loader):
            one.controller.backward(functional.cross_entropy(one.model(inputs), targets))
            if one.controller.at_step:
                break
    for scaled, parameter in zip(run.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(scaled.grad, 64 * parameter.grad)


# --- the learning rate


class Spy(torch.optim.SGD):
    """Notes the learning rate that each step in fact uses."""

    def step(self, closure=None):
        self.__dict__.setdefault("used", []).append(self.param_groups[0]["lr"])
        return super().step(closure)


def rates(schedule, *, decay=lambda step: 1.0, num_steps=12, optimizer=Spy, **settings):
    model = network()
    made = optimizer(model.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(made, decay)
    controller = BatchController(schedule, made, **settings)
    loader = DataLoader(Indexed(), batch_size=8)
    sizes: list[int] = []
    while True:
        for inputs, targets, _ in controller.batches(loader):
            controller.backward(functional.cross_entropy(model(inputs), targets))
            if controller.at_step:
                made.step()
                scheduler.step()
                sizes.append(controller.batch_size)
                if len(sizes) == num_steps:
                    return sizes, [rate / 0.5 for rate in made.used], controller


@pytest.mark.parametrize(("coupling", "factor"), [("linear", 2.0), ("sqrt", math.sqrt(2)), ("none", 1.0), ("auto", 2.0)])
def test_the_learning_rate_follows_the_size_in_use(coupling, factor):
    # 41 wanted, and 4 micro-batches of 10 used: the learning rate goes by 40
    sizes, used, controller = rates("0:20 4steps:41", coupling=coupling, max_micro_batch=10)
    assert sizes == [20] * 4 + [40] * 8
    assert used == pytest.approx([1.0] * 4 + [factor] * 8, rel=1e-12)
    assert controller.optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(("rule", "power"), [("smith", 1.0), ("seesaw", 0.5)])
def test_growing_instead_of_decaying_keeps_the_noise_of_the_decay_run(rule, power):
    """Smith: lr / B is that of the run that decays at B = 8. Seesaw: lr / sqrt(B), as if the batch had stayed."""

    def decay(step: int) -> float:
        return 0.5 ** (step // 3)

    sizes, used, _ = rates(FromLearningRate(8, 64, rule), decay=decay, num_steps=9)
    assert sizes == [8] * 3 + [16] * 3 + [32] * 3
    decayed = [decay(step) for step in range(9)]
    noise = [rate / (size / 8) ** power for rate, size in zip(used, sizes, strict=True)]
    assert noise == pytest.approx(decayed, rel=1e-12)


def test_a_warm_start_with_a_fresh_optimizer_forgets_its_moments_and_keeps_its_learning_rate():
    run = Run(WarmStart(8, 40, at="5 steps"))
    seen = []
    run.optimizer.register_step_pre_hook(
        lambda *_: seen.append(next(iter(run.optimizer.state.values()), {}).get("step", torch.tensor(0.0)).item())
    )
    run.train(8)
    assert seen == [0, 1, 2, 3, 4, 0, 1, 2]
    assert run.controller._coupling.multipliers.learning_rate == 1


# --- signals


@dataclass(frozen=True)
class Scripted:
    """Grows when its one signal passes a threshold, and remembers how often it was asked."""

    name = "scripted"
    metric: str = "acme_level"
    every: str | None = "3 steps"
    budget: float | None = None
    threshold: float = 5.0
    coupling: str | None = None

    @property
    def signals(self):
        return {self.metric: self.every}

    def initial(self) -> Decision:
        return Decision(10, "begin", {"asked": 0})

    def __call__(self, progress, memory) -> Decision:
        signal = progress.signals.get(self.metric)
        large = signal is not None and signal.value is not None and signal.value > self.threshold
        asked = {"asked": memory["asked"] + 1}
        return Decision(30, f"level {signal.value:g}", asked) if large else Decision(10, "low", asked)


@dataclass
class Level:
    """A signal that tells the number of the step, and by which clock it takes a second."""

    measured: list = field(default_factory=list)
    clock: Clock | None = None

    def __call__(self, context) -> Signal:
        self.measured.append(context.step)
        if self.clock is not None:
            self.clock.now += 1.0
        return Signal(float(context.step), 0.1, context.step, context.samples, work=20.0)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def plugin():
    """Adds the functions given to the registry, as a plugin named acme would."""
    with fresh_registry() as registry:
        table = registry._hooks()
        source = Source(EntryPoint("acme", "acme", PROJECT), "acme-tools", "1.0", "acme")

        def add(**hooks):
            taken, problems = table.add(type("Acme", (), {n: staticmethod(hookimpl(f)) for n, f in hooks.items()})(), source)
            assert (sorted(taken), problems) == (sorted(hooks), [])
            for spec in (
                spec
                for name, hook in hooks.items()
                if name.endswith(("schedules", "signals", "lr_couplings"))
                for spec in hook()
            ):
                registry.register(spec)

        yield add


def test_signals_are_measured_when_due_and_a_plugin_of_three_kinds_works(plugin):
    level = Level()
    plugin(
        sharpness_signals=lambda: [SignalSpec("acme_level", lambda: level)],
        sharpness_batch_schedules=lambda: [ScheduleSpec("acme", Scripted)],
        sharpness_lr_couplings=lambda: [CouplingSpec("acme_triple", lambda: lambda kappa, signals: three(kappa))],
    )
    run = Run("acme(threshold=5)", coupling="acme_triple").train(12)
    assert level.measured == [0, 3, 6, 9]
    assert [size for size, _ in run.delivered] == [10] * 6 + [30] * 6
    (change,) = run.controller.history
    assert (change.step, change.reason, change.signals["acme_level"].value) == (6, "level 6", 6.0)
    assert run.controller._coupling.multipliers.learning_rate == 3
    assert run.controller._memory == {"asked": 12}


def three(kappa):
    from sharpness_plugins.coupling import Multipliers

    return Multipliers(learning_rate=kappa)


@pytest.mark.parametrize("budget", [0.02, 0.1, 0.5])
def test_measuring_keeps_to_its_budget_of_time(plugin, budget):
    clock, level = Clock(), Level()
    level.clock = clock
    plugin(sharpness_signals=lambda: [SignalSpec("acme_level", lambda: level)])
    run = Run(Scripted(every="1 step", budget=budget, threshold=1e9), clock=clock)
    for _ in range(10):
        for inputs, targets, _ in run.controller.batches(run.loader):
            run.controller.backward(functional.cross_entropy(run.model(inputs), targets))
            run.optimizer.step()
            clock.now += 0.5  # a step takes half a second, and a measurement one
            trained = 0.5 * run.controller.step
            assert len(level.measured) <= 1 + 1.2 * budget * trained  # the first one tells what it costs
    assert len(level.measured) >= 0.8 * budget * trained
    assert run.controller.measured_share <= 1.2 * budget


def test_a_budget_in_samples_measures_at_the_same_steps_after_a_resume(plugin):
    levels = [Level(), Level()]
    current = iter(levels)
    plugin(sharpness_signals=lambda: [SignalSpec("acme_level", lambda: next(current))])
    schedule = Scripted(every="1 step", budget=0.25, threshold=20)
    whole = Run(schedule, budget_in="samples").train(50, save=True)
    assert 3 < len(levels[0].measured) < 40
    rest = Run(schedule, budget_in="samples").load(whole.saved[23]).train(50)
    assert levels[1].measured == [
        step for step in levels[0].measured if step > 23 or (step == 23 and step in levels[1].measured)
    ]
    assert torch.equal(weights(rest.model), weights(whole.model))
    assert whole.controller.measured_share <= 0.25


def test_a_metric_is_a_signal_and_measuring_it_leaves_training_as_it_was():
    probe = [(Indexed().inputs[:8], Indexed().targets[:8])]
    never = SharpnessSwitch(10, 100, metric="hessian_topk:k=1", rule="below_peak", threshold=5.0, deadline="9ep")
    run = Run(never, probe=probe, budget=1.0, budget_in="samples").train(50)
    assert run.controller.signals["hessian_topk:k=1"].value > 0
    plain = Run(Fixed(10)).train(50)
    assert torch.equal(weights(run.model), weights(plain.model))


@metric("acme_failing")
def failing(objective):
    raise ArithmeticError("no number today")


def test_a_metric_that_fails_is_an_unknown_signal_and_the_deadline_still_holds():
    schedule = SharpnessSwitch(
        10, 50, metric="acme_failing", rule="plateau", window=1, deadline="2ep", every="10 steps", min_wait="1 step"
    )
    run = Run(schedule, probe=[(torch.ones(2, 6), torch.tensor([0, 1]))], budget=1.0, budget_in="samples")
    with pytest.warns(UserWarning, match="no number today"):
        run.train(45)
    assert run.controller.signals["acme_failing"].value is None
    (change,) = run.controller.history
    assert change.epoch == pytest.approx(2.0)
    assert change.new.batch_size == 50


def test_a_signal_that_raises_is_unknown_and_training_goes_on(plugin):
    def broken(context):
        raise OSError("the sensor is off")

    plugin(sharpness_signals=lambda: [SignalSpec("acme_level", lambda: broken)])
    run = Run(Scripted(every="30 steps"))
    with pytest.warns(UserWarning, match=r"signal 'acme_level' failed at step 0: OSError: the sensor is off"):
        run.train(5)
    assert run.controller.signals["acme_level"].value is None
    assert run.controller.step == 5


def test_a_metric_without_a_probe_is_refused_at_once():
    schedule = SharpnessSwitch(8, 80, deadline="30ep")
    with pytest.raises(ValueError, match=r"'hessian_topk', which is measured on a model and on data of its own.*probe="):
        BatchController(schedule, torch.optim.SGD(network().parameters(), lr=0.1))


def test_the_noise_scale_of_training_grows_the_batch():
    run = Run(NoiseScale(4, max_batch_size=64), max_micro_batch=2).train(120)
    signal = run.controller.signals["gradient_noise_scale"]
    assert signal.value is not None
    assert signal.standard_error > 0
    grown = [change.new.batch_size for change in run.controller.history]
    assert grown == sorted(grown)
    assert all(size <= 64 for size in grown)
    assert all(new <= 2 * old for old, new in zip([4, *grown], grown, strict=False))


def test_without_two_groups_a_step_the_noise_scale_stays_unknown():
    run = Run(NoiseScale(8, max_batch_size=64)).train(20)
    assert run.controller.signals["gradient_noise_scale"].value is None
    assert "one micro-batch" in run.controller.signals["gradient_noise_scale"].note
    assert run.controller.history == []


def test_the_meter_sees_what_per_micro_batch_gradients_say():
    """Against |g_j|² taken apart by hand, on the very batches delivered."""
    dataset = Indexed(dtype=torch.float64)
    model = network(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    meter = NoiseScaleMeter(model.parameters())
    controller = BatchController("0:40", optimizer, max_micro_batch=10, meter=meter)
    gradients = []
    for inputs, targets, _ in controller.batches(DataLoader(dataset, batch_size=4)):
        gradient = torch.autograd.grad(functional.cross_entropy(model(inputs), targets), list(model.parameters()))
        gradients.append(nn.utils.parameters_to_vector(gradient))
        controller.backward(functional.cross_entropy(model(inputs), targets))
        if controller.at_step:
            break
    g = torch.stack(gradients)
    mean = g.mean(dim=0)
    spread = ((g**2).sum(1).mean() - mean @ mean) / (1 / 10 - 1 / 40)
    square = (40 * mean @ mean - 10 * (g**2).sum(1).mean()) / 30
    estimate = meter.estimate()
    assert estimate.gradient_variance == pytest.approx(spread.item(), rel=1e-9)
    assert estimate.gradient_norm_squared == pytest.approx(square.item(), rel=1e-9)


def test_a_scheduler_given_to_the_controller_ends_where_the_data_do():
    """LinearLR to 0 over 4 epochs of 16 steps; the batch doubles in the second. By optimizer steps it ends at .375."""

    def last_rate(by_samples: bool) -> tuple[float, int]:
        model = nn.Linear(6, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=64)
        controller = BatchController("0:4 1ep:8", optimizer, coupling="none", scheduler=scheduler if by_samples else None)
        loader = DataLoader(Indexed(64), batch_size=4, shuffle=True)
        for _ in range(4):
            for inputs, targets, _ in controller.batches(loader):
                controller.backward(functional.cross_entropy(model(inputs), targets))
                optimizer.step()
                optimizer.zero_grad()
                if not by_samples:
                    scheduler.step()
        return optimizer.param_groups[0]["lr"], controller.step

    assert last_rate(by_samples=True) == (0.0, 40)
    assert last_rate(by_samples=False) == (pytest.approx(0.375), 40)


def test_the_state_stays_small_whatever_happened():
    sizes = " ".join(f"{step} steps:{8 + step % 7}" for step in range(1, 90))
    run = Run(f"0:8 {sizes}", max_micro_batch=4, meter=None).train(95)
    assert len(run.controller.history) > 50
    assert len(json.dumps(run.controller.state_dict())) < 10_000
    noisy = Run(NoiseScale(4, max_batch_size=64, min_wait="1 step"), max_micro_batch=2).train(120)
    assert len(json.dumps(noisy.controller.state_dict())) < 10_000


def test_the_table_counts_each_phase_in_three_currencies():
    clock = Clock()
    run = Run("0:10 5steps:20", clock=clock)
    run.optimizer.register_step_post_hook(lambda *_: setattr(clock, "now", clock.now + 2.0))
    table = run.train(8).controller.table().splitlines()
    assert [line.split()[:4] for line in table[1:]] == [
        ["10", "5", "50", "10.0"],
        ["20", "3", "60", "6.0"],
        ["all", "8", "110", "16.0"],
    ]
    assert table[0].split() == ["batch", "size", "steps", "samples", "seconds", "began", "because"]
    assert "5 steps reached" in table[2]


# --- listeners and vetoes


def test_a_veto_keeps_the_old_size_and_is_logged_once_and_listeners_hear_of_every_change(plugin):
    asked, told, heard = [], [], []

    def veto(change):
        asked.append(change.step)
        return "the cluster is full" if change.step < 15 else None

    plugin(sharpness_before_batch_change=veto, sharpness_batch_size_changed=lambda change: told.append(change))
    run = Run("0:10 10steps:20 17steps:30", on_change=heard.append).train(25)
    assert asked == [10, 11, 12, 13, 14, 15, 17]
    assert [(change.step, change.new.batch_size, change.veto) for change in run.controller.history] == [
        (10, 20, "acme: the cluster is full"),
        (15, 20, None),
        (17, 30, None),
    ]
    assert heard == told == run.controller.history
    assert [size for size, _ in run.delivered] == [10] * 15 + [20] * 2 + [30] * 8
    assert "batch size stays 10, not 20: acme: the cluster is full" in str(heard[0])
    assert "batch size 10 -> 20" in str(heard[1])
    assert "step 15, 150 samples" in str(heard[1])


def test_a_change_survives_json():
    change = BatchChange(3, 30, 0.15, 1.5, Plan(10, 1), Plan(15, 2), "why", None, {"x": Signal(1.0, 0.5, 2, 20, "note")})
    assert BatchChange.from_dict(json.loads(json.dumps(change.to_dict()))) == change


# --- what is refused


@pytest.mark.parametrize(
    ("schedule", "error", "message"),
    [
        ("0:256 40ep:5000 30ep:100", ValueError, "30ep"),
        ("5:256", ValueError, "5:256"),
        ("warm_start(256, 100, at='40ep')", ValueError, "100"),
        ("warm_strat(256, 1000, at='40ep')", ValueError, "Did you mean 'warm_start'"),
        (
            SharpnessSwitch(8, 80, metric="hesian_topk", deadline="30ep"),
            UnknownNameError,
            "'hesian_topk'.*Did you mean 'hessian_topk'",
        ),
    ],
)
def test_bad_schedules_are_refused_with_the_text_at_fault(schedule, error, message):
    optimizer = torch.optim.SGD(network().parameters(), lr=0.1)
    with pytest.raises(error, match=message):
        BatchController(schedule, optimizer)
    BatchController("0:8", optimizer)  # nothing is left behind that a second one would trip over


def test_an_unknown_coupling_is_refused_and_leaves_the_optimizer_alone():
    optimizer = torch.optim.SGD(network().parameters(), lr=0.1)
    with pytest.raises(UnknownNameError, match=r"no coupling 'sqr'.*Did you mean 'sqrt'"):
        BatchController("0:8", optimizer, coupling="sqr")
    assert not optimizer._optimizer_step_pre_hooks


def test_a_state_of_another_schedule_is_refused_and_nothing_changes():
    run = Run("0:8 2ep:40").train(3)
    other = Run("0:8 3ep:40")
    before = other.controller.state_dict()
    with pytest.raises(ValueError, match=r"saved by .*2ep.* this controller has .*3ep"):
        other.controller.load_state_dict(run.controller.state_dict())
    after = other.controller.state_dict()
    assert {**after, "seconds": 0} == {**before, "seconds": 0}


def test_a_state_that_other_limits_cannot_continue_is_refused():
    run = Run("0:20").train(3)
    with pytest.raises(ValueError, match="goes on with batches of 20, and here they would have 21"):
        Run("0:20", max_micro_batch=7, multiple=7).controller.load_state_dict(run.controller.state_dict())


def test_other_data_than_in_the_saved_run_are_refused():
    run = Run("0:20").train(3)
    other = Run("0:20")
    other.controller.load_state_dict(run.controller.state_dict())
    with pytest.raises(ValueError, match="num_samples = 203, here it is 100"):
        next(other.controller.batches(DataLoader(Indexed(100), batch_size=20, shuffle=True)))


def test_a_second_loader_is_refused():
    run = Run("0:20").train(3)
    with pytest.raises(ValueError, match="another loader"):
        next(run.controller.batches(DataLoader(Indexed(), batch_size=8)))


def test_an_iterator_is_refused():
    run = Run("0:20")
    with pytest.raises(LoaderError, match="only once"):
        next(run.controller.batches(iter(run.loader)))


# --- other ways to deliver


class Stream(IterableDataset):
    def __iter__(self):
        data = Indexed(60, torch.float64)
        yield from (data[index] for index in range(60))


def test_a_stream_grows_by_accumulation_alone():
    model, twin = network(torch.float64), network(torch.float64)
    optimizer, reference = (torch.optim.SGD(net.parameters(), lr=0.1) for net in (model, twin))
    controller = BatchController("0:8 24:24", optimizer, coupling="none")
    loader = DataLoader(Stream(), batch_size=8)
    data, groups, group = Indexed(60, torch.float64), [], []
    for inputs, targets, indices in controller.batches(loader):
        controller.backward(functional.cross_entropy(model(inputs), targets))
        group += indices.tolist()
        if controller.at_step:
            reference.zero_grad()
            functional.cross_entropy(twin(data.inputs[group]), data.targets[group]).backward()
            for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-12, atol=1e-14)
            for one in (optimizer, reference):
                one.step()
                one.zero_grad()
            groups.append(len(group))
            group = []
    assert groups == [8, 8, 8, 24, 12]
    assert (controller.step, controller.samples) == (5, 60)


def test_batches_in_a_list_are_accumulated():
    data = Indexed(40)
    batches = [(data.inputs[start : start + 4], data.targets[start : start + 4]) for start in range(0, 40, 4)]
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = BatchController("0:12", optimizer)
    steps = []
    for inputs, targets in controller.batches(batches):
        controller.backward(functional.cross_entropy(model(inputs), targets))
        if controller.at_step:
            optimizer.step()
            optimizer.zero_grad()
            steps.append(controller.samples)
    assert (controller.batch_size, steps) == (12, [12, 24, 36, 40])
    with pytest.raises(LoaderError, match="does not say how many samples"):
        next(BatchController("0:12", torch.optim.SGD(model.parameters(), lr=0.1)).batches(dict.fromkeys(range(3))))


def test_a_trainer_that_delivers_by_itself_asks_and_tells():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0)
    controller = BatchController("0:32 1Ktokens:128", optimizer, max_micro_batch=64, num_samples=64)
    plans = []
    for _ in range(6):
        plan = controller.decide()
        plans.append((plan.micro_batch, plan.accumulation))
        optimizer.step()
        controller.advance(plan.batch_size)
        controller.count_tokens(10 * plan.batch_size)
    assert plans == [(32, 1)] * 4 + [(64, 2)] * 2
    assert (controller.step, controller.samples, controller.progress.epoch) == (6, 384, 6.0)
    assert controller.progress.tokens == 3840
    with pytest.raises(ValueError, match="backwards"):
        controller.advance(-1)


def test_detached_it_leaves_the_optimizer_alone():
    run = Run("0:8 1steps:40").train(3)
    run.controller.detach()
    step = run.controller.step
    run.optimizer.step()
    assert run.controller.step == step
    assert not run.optimizer._optimizer_step_post_hooks


# --- ranks


def on_rank(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    try:
        told = train_on_ranks(rank, world_size)
        Path(folder, f"{rank}.json").write_text(json.dumps(told))
    finally:
        torch.distributed.destroy_process_group()


def train_on_ranks(rank: int, world_size: int) -> dict:
    torch.manual_seed(0)
    dataset = Indexed(dtype=torch.float64)
    model: nn.Module = network(torch.float64)
    if world_size > 1:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with fresh_registry() as registry:
        # every rank measures something else, and rank 0's number decides
        registry.register(
            SignalSpec("acme_level", lambda: lambda context: Signal(float(context.step if rank == 0 else 100)))
        )
        schedule = Scripted(every="1 step")
        meter = NoiseScaleMeter(model.parameters(), sum_over_ranks=_sum(world_size))
        controller = BatchController(schedule, optimizer, model=model, max_micro_batch=5, meter=meter)
        loader = DataLoader(dataset, batch_size=5, shuffle=True)
        seen, sizes = [], []
        for _ in range(2):
            for inputs, targets, indices in controller.batches(loader):
                controller.backward(functional.cross_entropy(model(inputs), targets))
                seen += indices.tolist()
                if controller.at_step:
                    optimizer.step()
                    optimizer.zero_grad()
                    sizes.append(controller.batch_size)
    estimate = meter.estimate()
    return {
        "seen": seen,
        "sizes": sizes,
        "samples": controller.samples,
        "weights": weights(model).tolist(),
        "noise": [estimate.gradient_variance, estimate.gradient_norm_squared],
        "state": controller.state_dict()["memory"],
    }


def _sum(world_size: int):
    from sharpness_plugins.distributed import sum_over_ranks

    return sum_over_ranks if world_size > 1 else None


def test_two_ranks_take_rank_zeros_decisions_and_train_as_one_process_does(tmp_path):
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo"])  # which DDP imports: 4 s in each process
    processes = [context.Process(target=on_rank, args=(rank, 2, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode == 0
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["sizes"] == second["sizes"]
    assert first["state"] == second["state"]
    assert first["weights"] == second["weights"]
    assert (first["noise"], first["samples"]) == (second["noise"], second["samples"])
    assert not set(first["seen"][:90]) & set(second["seen"][:90])
    alone = train_on_ranks(0, 1)
    assert alone["sizes"] == first["sizes"]
    torch.testing.assert_close(torch.tensor(first["weights"]), torch.tensor(alone["weights"]), rtol=1e-6, atol=1e-8)
    assert first["noise"] == pytest.approx(alone["noise"], rel=0.5)  # other micro-batches of the same batches


def test_a_schedule_below_the_number_of_ranks_is_refused(monkeypatch):
    monkeypatch.setattr("sharpness_plugins.distributed.world_size", lambda: 16)
    with pytest.raises(ValueError, match=r"may ask for a batch of 8, but 16 devices"):
        BatchController(Steps("0:8 2ep:64"), torch.optim.SGD(network().parameters(), lr=0.1))


def test_the_dataset_need_not_be_ours():
    """A TensorDataset, tuples as batches, a generator of the user's own, drop_last."""
    data = TensorDataset(torch.arange(50.0)[:, None], torch.arange(50.0)[:, None])
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    controller = BatchController("0:7 20:14", optimizer)
    loader = DataLoader(data, batch_size=7, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(3))
    sizes = []
    for inputs, targets in controller.batches(loader):
        controller.backward(functional.mse_loss(model(inputs), targets))
        optimizer.step()
        sizes.append(len(inputs))
    assert sizes == [7, 7, 7, 14, 14]
