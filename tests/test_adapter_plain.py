"""The plain adapter: the user's loop unchanged, its clock, its loader, and everything as before afterwards."""

from __future__ import annotations

import contextlib
import io
import json
import math
import multiprocessing as mp
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from sharpness_adapters.plain import attach
from sharpness_plugins import measure_sharpness
from sharpness_plugins.errors import LoaderError, MeasurementWarning, RemoteFailureError, UnknownNameError
from sharpness_plugins.metrics import EpsilonBox, HessianTopK
from sharpness_plugins.noise_scale import NoiseScaleMeter
from sharpness_plugins.optimizers import GSAM, SAM, SharpnessAware
from sharpness_plugins.report import MetricResult

NUM_SAMPLES = 100


class Indexed(Dataset):
    """Inputs, targets and the index, so that a test sees what was delivered."""

    def __init__(self, num_samples: int = NUM_SAMPLES) -> None:
        g = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(num_samples, 6, generator=g)
        self.targets = (self.inputs @ torch.randn(6, 3, generator=g)).argmax(dim=1)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int):
        return self.inputs[index] + 0.01 * torch.randn(6), self.targets[index], index


class Triples(nn.Module):
    """So that the batches of three are for the loss function to take apart."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x):
        return self.layers(x)


def loss_fn(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1])


def slope(objective, rng):
    return MetricResult(float(objective.value_and_grad()[1].norm()))


COMMON = {"metrics": {"slope": slope}, "loss_fn": loss_fn, "budget": None}


def parts(batch_size: int = 10, optimizer=torch.optim.SGD, **loader):
    torch.manual_seed(0)
    model = Triples()
    loader = DataLoader(Indexed(), batch_size=batch_size, **{"shuffle": True, **loader})
    return model, optimizer(model.parameters(), lr=0.05), loader


def epoch(model, optimizer, loader, accumulate: int = 1) -> list[list[int]]:
    """The loop of a user who has never heard of us; returns what was delivered."""
    seen = []
    for position, (inputs, targets, indices) in enumerate(loader, 1):
        (functional.cross_entropy(model(inputs), targets) / accumulate).backward()
        if position % accumulate == 0 or position == len(loader):
            optimizer.step()
            optimizer.zero_grad()
        seen.append(indices.tolist())
    return seen


def flat(seen) -> list[int]:
    return sorted(index for indices in seen for index in indices)


def snapshot(model, optimizer):
    state = [entry for group in optimizer.state.values() for entry in group.values() if isinstance(entry, torch.Tensor)]
    return [tensor.clone() for tensor in (*model.state_dict().values(), *state)]


def same(one, other) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --- the loop unchanged


@pytest.mark.parametrize("workers", [{}, {"num_workers": 2, "persistent_workers": True}], ids=["none", "persistent"])
def test_training_with_it_is_training_without_it_bit_for_bit(workers):
    num_epochs = 5 if workers else 31

    def train(attached: bool):
        model, optimizer, loader = parts(optimizer=torch.optim.Adam, **workers)
        seen = []
        if not attached:
            for _ in range(num_epochs):
                seen += epoch(model, optimizer, loader)
            return snapshot(model, optimizer), seen, torch.get_rng_state(), []
        with attach(model, optimizer, loader, every="37 steps", **COMMON) as run:
            for _ in range(num_epochs):
                seen += epoch(model, optimizer, loader)
        return snapshot(model, optimizer), seen, torch.get_rng_state(), run.history

    tensors, seen, state, history = train(True)
    plain_tensors, plain_seen, plain_state, _ = train(False)
    assert len(seen) == 10 * num_epochs
    assert [made.step for made in history] == [1, *range(37, 10 * num_epochs, 37)]
    assert all(made.notes == {} and made.values["slope"] > 0 for made in history)
    assert seen == plain_seen
    assert same(tensors, plain_tensors)
    assert torch.equal(state, plain_state)


@pytest.mark.parametrize(
    ("every", "expected"),
    [("1ep", [1, 5, 10, 15]), ("4 steps", [1, 4, 8, 12]), ("50 samples", [1, 3, 5, 8, 10, 13, 15])],
)
def test_the_clock_is_the_optimizer_so_accumulation_counts_rightly(every, expected):
    model, optimizer, loader = parts()
    with attach(model, optimizer, loader, every=every, **COMMON) as run:
        for _ in range(3):
            epoch(model, optimizer, loader, accumulate=2)
            assert run.progress.epoch == int(run.progress.epoch)
    assert [made.step for made in run.history] == expected
    assert [(made.samples, made.epoch) for made in run.history] == [(20 * step, step / 5) for step in expected]
    assert (run.progress.step, run.progress.samples) == (15, 300)


def test_a_ragged_last_batch_is_counted_as_it_is():
    model, optimizer, loader = parts(batch_size=30)
    with attach(model, optimizer, loader, every="1 step", **COMMON) as run:
        epoch(model, optimizer, loader)
    assert [made.samples for made in run.history] == [30, 60, 90, 100]
    assert [made.epoch for made in run.history] == [0.25, 0.5, 0.75, 1.0]


def test_steps_that_a_gradient_scaler_skips_do_not_count():
    model, optimizer, loader = parts()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with attach(model, optimizer, loader, every="1 step", **COMMON) as run:
        for position, (inputs, targets, _) in enumerate(loader):
            loss = functional.cross_entropy(model(inputs), targets)
            scaler.scale(loss * (float("inf") if position in (2, 5) else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert run.progress.step == 8
    assert [made.samples for made in run.history] == [10, 20, 40, 50, 70, 80, 90, 100]


class Calling(torch.optim.SGD):
    """Does its own part after its base class's step, which runs the hooks a second time."""

    def step(self, closure=None):
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(0.5)
        return loss


@pytest.mark.parametrize("schedule", [None, "0:10"])
def test_a_step_that_calls_its_base_classes_counts_once_and_is_measured_when_it_is_done(schedule):
    model, optimizer, loader = parts(optimizer=Calling)
    probe = [tuple(torch.utils.data.default_collate([Indexed()[i] for i in range(20)]))]
    after = []
    with attach(model, optimizer, loader, every="1 step", schedule=schedule, probe=probe, **COMMON) as run:
        for inputs, targets, _ in loader:
            functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
            model.eval()
            after.append(loss_fn(model, probe[0]).item())
            model.train()
    assert [made.step for made in run.history] == list(range(1, 11))
    assert [made.loss for made in run.history] == pytest.approx(after, rel=1e-6)


def test_a_step_that_raises_does_not_stop_the_clock():
    model, optimizer, loader = parts()
    with attach(model, optimizer, loader, every="1 step", **COMMON) as run:
        for position, (inputs, targets, _) in enumerate(loader):

            def closure(inputs=inputs, targets=targets, position=position):
                optimizer.zero_grad()
                loss = functional.cross_entropy(model(inputs), targets)
                loss.backward()
                if position == 3:
                    raise torch.OutOfMemoryError("out of memory")
                return loss

            try:
                optimizer.step(closure)
            except torch.OutOfMemoryError:
                continue
    assert [made.samples for made in run.history] == [10, 20, 30, 50, 60, 70, 80, 90, 100]


class Bare:
    """A wrapper around an optimizer, and no optimizer itself."""

    def __init__(self, optimizer) -> None:
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups

    def step(self):
        self.optimizer.step()

    def zero_grad(self):
        self.optimizer.zero_grad()


def lookahead(optimizer):
    timm = pytest.importorskip("timm.optim", reason="timm's Lookahead runs no step hooks until its first zero_grad")
    return timm.Lookahead(optimizer, k=3)


@pytest.mark.parametrize("wrapper", [Bare, lookahead, lambda optimizer: optimizer], ids=["bare", "lookahead", "none"])
def test_an_optimizer_that_runs_no_hooks_says_when_it_has_stepped_and_none_is_counted_twice(wrapper):
    model, optimizer, loader = parts()
    wrapped = wrapper(optimizer)
    with attach(model, wrapped, loader, every="4 steps", **COMMON) as run:
        for inputs, targets, _ in loader:
            functional.cross_entropy(model(inputs), targets).backward()
            wrapped.step()
            run.step()
            wrapped.zero_grad()
    assert [(made.step, made.samples) for made in run.history] == [(1, 10), (4, 40), (8, 80)]
    assert run.progress.step == 10


def test_a_sharpness_aware_optimizer_shows_its_gap_and_its_base_is_the_clock():
    model, data = Triples(), Indexed()
    optimizer = SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.1), SAM(), rho=0.1, model=model)
    loader, gaps, norms, losses = DataLoader(data, batch_size=10), [], [], []
    asked = {"metrics": slope, "loss_fn": loss_fn, "every": "1 step", "budget": None, "probe_samples": 10}
    with attach(model, optimizer, loader, schedule="0:10 1ep:25", coupling="none", **asked) as run:
        for _ in range(2):
            for number, batch in enumerate(loader):

                def closure(batch=batch, spoiled=number == 2):
                    loss = loss_fn(model, batch) * (math.nan if spoiled else 1.0)
                    loss.backward()
                    losses.append(loss.item())
                    return loss

                with pytest.warns(RuntimeWarning, match="was left out") if number == 2 else contextlib.nullcontext():
                    optimizer.step(closure)
                if number != 2:
                    gaps.append(losses[-1] - losses[-2])
                    norms.append(optimizer.gradient_norm)
    assert [made.step for made in run.history] == list(range(1, 13))  # 9 of 10, 3 of 4: none that was left out
    assert run.controller.step == 12
    assert [made.values["surrogate_gap"] for made in run.history] == pytest.approx(gaps, rel=1e-4, abs=1e-7)
    assert [made.values["gradient_norm"] for made in run.history] == norms


@pytest.mark.parametrize("schedule", [None, "0:10 1ep:25"])
def test_ignites_engine_is_measured_and_told_of_batch_sizes(schedule):  # which counts batches once, and replays data
    ignite = pytest.importorskip("ignite.engine", reason="Ignite is not installed: pip install pytorch-ignite")

    def train(measured):
        model, optimizer, loader = parts()
        seen = []

        def update(engine, batch):
            seen.append((engine.state.epoch, len(batch[0])))
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()

        engine = ignite.Engine(update)
        asked = {"metrics": slope, "loss_fn": loss_fn, "every": "1ep", "budget": None, "schedule": schedule}
        with attach(model, optimizer, loader, **asked) if measured else contextlib.nullcontext() as run:
            if schedule is not None:

                @engine.on(ignite.Events.EPOCH_STARTED)
                def follow(engine):
                    run.controller.decide()
                    engine.state.epoch_length = len(run.loader)
                    engine.state.iteration = (engine.state.epoch - 1) * len(run.loader)

            engine.run(loader, max_epochs=3)
        return model.state_dict(), run, seen

    after, run, seen = train(measured=True)
    assert [made.samples for made in run.history] == [10, 100, 200, 300]
    if schedule is not None:
        assert seen == [(1, 10)] * 10 + [(2, 25)] * 4 + [(3, 25)] * 4
        assert (run.controller.step, run.controller.samples) == (18, 300)
        return
    assert seen == [(epoch, 10) for epoch in (1, 2, 3) for _ in range(10)]
    plain, _, _ = train(measured=False)
    assert all(torch.equal(after[name], plain[name]) for name in plain)


def test_steps_that_nobody_sees_are_said_at_the_end():
    model, optimizer, loader = parts()
    optimizer = Bare(optimizer)
    with (
        pytest.warns(MeasurementWarning, match=r"no step of the optimizer was seen.*call run\.step\(\)"),
        attach(model, optimizer, loader, **COMMON),
    ):
        epoch(model, optimizer, loader)
    with (
        pytest.raises(TypeError, match="runs no step hooks"),
        attach(model, optimizer, loader, schedule="0:5 1ep:10", **COMMON),
    ):
        pass
    assert type(loader) is DataLoader


@pytest.mark.parametrize("schedule", [None, "0:10 100samples:20"])
def test_another_pass_under_no_grad_or_to_measure_is_no_training(schedule):
    model, optimizer, loader = parts()
    with attach(model, optimizer, loader, every="1ep", schedule=schedule, **COMMON) as run:
        for _ in range(2):
            epoch(model, optimizer, loader)
            with torch.no_grad():
                assert [len(indices) for _, _, indices in loader] == [10] * 10
            with pytest.warns(MeasurementWarning, match="the loader gives other data"):  # its noise is drawn anew
                measured = measure_sharpness(model, loader, {"slope": slope}, loss_fn=loss_fn)
            assert measured.provenance["num_samples"] == NUM_SAMPLES
    assert (run.progress.samples, run.progress.epoch) == (200, 2.0)
    assert run.progress.step == (20 if schedule is None else 15)


def test_two_runs_at_once_on_one_loader():
    model, optimizer, loader = parts()
    with (
        attach(model, optimizer, loader, every="1ep", **COMMON) as one,
        attach(model, optimizer, loader, every="4 steps", **COMMON) as other,
    ):
        epoch(model, optimizer, loader)
    assert [[made.samples for made in run.history] for run in (one, other)] == [[10, 100], [10, 40, 80]]
    assert type(loader) is DataLoader


def test_an_epoch_that_is_left_in_the_middle_counts_as_far_as_it_went():
    model, optimizer, loader = parts()
    with attach(model, optimizer, loader, every="1ep", **COMMON) as run:
        for inputs, targets, _ in loader:
            functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            if run.progress.step == 4:
                break
        epoch(model, optimizer, loader)
    assert run.progress.epoch == pytest.approx(1.4)
    assert [made.step for made in run.history] == [1, 10]


class Stream(IterableDataset):
    def __iter__(self):
        dataset = Indexed()
        return (dataset[index] for index in range(len(dataset)))


def test_of_a_stream_whole_passes_are_counted_and_every_sample():
    model, optimizer, _ = parts()
    loader = DataLoader(Stream(), batch_size=30)
    with attach(model, optimizer, loader, every="1ep", **COMMON) as run:
        for _ in range(3):
            for inputs, targets, _ in loader:
                functional.cross_entropy(model(inputs), targets).backward()
                optimizer.step()
    assert run.progress.samples == 300
    assert [made.step for made in run.history] == [1, 5, 9]  # the end of a pass is known at the next one's first step


def test_a_list_of_batches_counts_through_the_runs_loader():
    model, optimizer, loader = parts()
    batches = list(loader)
    with attach(model, optimizer, batches, every="1ep", **COMMON) as run:
        assert len(run.loader) == 10
        for _ in range(2):
            epoch(model, optimizer, run.loader)
    assert [made.epoch for made in run.history] == [0.1, 1.0, 2.0]
    with attach(model, optimizer, batches, every="1ep", **COMMON), pytest.raises(RuntimeError, match=r"Iterate run\.loader"):
        epoch(model, optimizer, batches)
    with attach(model, optimizer, batches, every="4 steps", **COMMON) as run:  # steps need no data
        epoch(model, optimizer, batches)
    assert [made.step for made in run.history] == [1, 4, 8]


class OwnLoader:
    """Somebody's loader, of some class, that forbids to set attributes."""

    def __init__(self, batches) -> None:
        self.__dict__["batches"] = batches

    def __setattr__(self, name, value):
        raise AttributeError("read only")

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


def test_a_loader_of_any_class_counts():
    model, optimizer, loader = parts()
    batches = list(loader)
    own = OwnLoader(batches)
    with attach(model, optimizer, own, every="1ep", probe=batches[:2], **COMMON) as run:
        assert run.loader is own
        assert isinstance(own, OwnLoader)
        epoch(model, optimizer, own)
    assert [made.epoch for made in run.history] == [0.1, 1.0]
    assert type(own) is OwnLoader


# --- with a schedule


@pytest.mark.parametrize(
    "workers", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}], ids=["0", "2", "2p"]
)
def test_the_users_own_loader_delivers_the_new_size_with_the_very_next_batch(workers):
    """torch alone is late by the prefetched batches: 4 of them with two workers."""
    schedule = "0:5 40samples:20 100samples:50 200samples:25"
    model, optimizer, loader = parts(batch_size=5, **workers)
    with attach(model, optimizer, loader, every="1ep", schedule=schedule, **COMMON) as run:
        lengths, epochs = [], []
        for _ in range(3):
            lengths.append(len(loader))
            epochs.append(epoch(model, optimizer, loader))
    sizes = [[len(indices) for indices in seen] for seen in epochs]
    assert sizes == [[5] * 8 + [20] * 3, [50, 50], [25] * 4]
    assert all(flat(seen) == list(range(NUM_SAMPLES)) for seen in epochs)  # each sample once per epoch
    assert lengths == [20, 2, 4]  # of a whole epoch at the size that it begins with
    assert [(made.step, made.samples, made.epoch) for made in run.history] == [
        (1, 5, 0.05),
        (11, 100, 1.0),
        (13, 200, 2.0),
        (17, 300, 3.0),
    ]
    assert [(change.old.batch_size, change.new.batch_size, change.samples) for change in run.changes] == [
        (5, 20, 40), (20, 50, 100), (50, 25, 200)
    ]  # fmt: skip


def test_the_learning_rate_follows_and_the_users_scheduler_and_groups_see_none_of_it():
    model, optimizer, loader = parts(batch_size=10)
    (weight, *_) = model.parameters()
    moves = []
    with attach(model, optimizer, loader, schedule="0:10 1ep:50", **COMMON) as run:
        for _ in range(2):
            for inputs, targets, _ in loader:
                functional.cross_entropy(model(inputs), targets).backward()
                before = weight.detach().clone()
                optimizer.step()
                moves.append((before - weight.detach()).norm().item() / weight.grad.norm().item())
                assert optimizer.param_groups[0]["lr"] == 0.05
                optimizer.zero_grad()
    assert moves == pytest.approx([0.05] * 10 + [0.25] * 2, rel=1e-3)  # linear, for SGD
    assert run.controller.batch_size == 50


def test_a_constant_schedule_changes_no_update():
    def weights(schedule):
        model, optimizer, loader = parts(shuffle=False)
        loader.dataset.__class__.__getitem__, original = (
            lambda self, i: (self.inputs[i], self.targets[i], i),
            loader.dataset.__class__.__getitem__,
        )
        try:
            with attach(model.eval(), optimizer, loader, schedule=schedule, **COMMON):
                epoch(model, optimizer, loader)
        finally:
            loader.dataset.__class__.__getitem__ = original
        return snapshot(model, optimizer)

    assert same(weights("0:10"), weights(None))


def test_a_warm_start_starts_the_optimizer_anew():
    from sharpness_plugins.schedules import WarmStart

    model, optimizer, loader = parts(optimizer=torch.optim.Adam)
    with attach(model, optimizer, loader, schedule=WarmStart(10, 50, at="1ep"), **COMMON) as run:
        for _ in range(2):
            epoch(model, optimizer, loader)
    assert {int(entry["step"]) for entry in optimizer.state.values()} == {2}
    assert [change.new.batch_size for change in run.changes] == [50]


def test_a_scheduler_that_counts_steps_ends_where_the_data_do():
    model, optimizer, loader = parts(batch_size=10)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=20)
    with attach(model, optimizer, loader, schedule="0:10 1ep:50", scheduler=scheduler, **COMMON):
        for _ in range(2):
            epoch(model, optimizer, loader)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)


def test_a_loader_whose_size_cannot_change_is_refused_before_anything_is_touched():
    model, optimizer, loader = parts()
    for refused, why in (
        (DataLoader(Stream(), batch_size=10), "iterable data set"),
        (list(loader), "a list is no DataLoader"),
        (DataLoader(Indexed(), batch_sampler=[[0, 1], [2, 3]]), "its batches come from a list"),
    ):
        kind = type(refused)
        with (
            pytest.raises(
                LoaderError, match=rf"{why}.*the loop as it is, so it cannot accumulate.*BatchController\.batches"
            ),
            attach(model, optimizer, refused, schedule="0:10 1ep:50", **COMMON),
        ):
            pass
        assert type(refused) is kind
    assert not optimizer._optimizer_step_pre_hooks


# --- coming back


@pytest.mark.parametrize("stop", [3, 12, 13])
@pytest.mark.parametrize("schedule", [None, "0:10 120samples:25 200samples:50"])
def test_resumed_it_measures_what_the_whole_run_did(stop, schedule):
    """With a schedule the loader goes on in the middle of the epoch; without one, resuming the data is the loop's affair."""

    def train(run, model, optimizer, loader, until: int, saved: dict):
        while run.progress.step < until:
            for inputs, targets, indices in loader:
                functional.cross_entropy(model(inputs), targets).backward()
                optimizer.step()
                optimizer.zero_grad()
                seen[run.progress.step] = indices.tolist()
                if run.progress.step == stop:
                    buffer = io.BytesIO()
                    state = {"model": model, "optimizer": optimizer, "run": run}
                    told = {name: part.state_dict() for name, part in state.items()}
                    torch.save({**told, "random": torch.get_rng_state()}, buffer)
                    saved["bytes"] = buffer.getvalue()
                if run.progress.step == until:
                    break

    def new():
        model, optimizer, loader = parts()
        return model.eval(), optimizer, loader

    seen: dict[int, list[int]] = {}
    model, optimizer, loader = new()
    kept: dict = {}
    with attach(model, optimizer, loader, every="2 steps", schedule=schedule, **COMMON) as run:
        train(run, model, optimizer, loader, 20, kept)
    expected, steps, expected_seen = snapshot(model, optimizer), [made.step for made in run.history], dict(seen)
    model, optimizer, loader = new()
    with attach(model, optimizer, loader, every="2 steps", schedule=schedule, **COMMON) as rest:
        saved = torch.load(io.BytesIO(kept["bytes"]), weights_only=True)
        assert len(json.dumps(saved["run"], allow_nan=False)) < 10_000
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        rest.load_state_dict(saved["run"])
        torch.set_rng_state(saved["random"])
        train(rest, model, optimizer, loader, 20, {})
    assert [made.step for made in rest.history] == steps
    assert rest.progress.step == 20
    if schedule is not None:
        assert seen == expected_seen
        assert same(snapshot(model, optimizer), expected)
        assert rest.progress.samples == run.progress.samples


def test_a_state_of_another_kind_of_run_is_refused():
    model, optimizer, loader = parts()
    with attach(model, optimizer, loader, **COMMON) as run:
        saved = run.state_dict()
    with (
        attach(model, optimizer, loader, schedule="0:10 1ep:50", **COMMON) as run,
        pytest.raises(ValueError, match="saved without a schedule, and here is one"),
    ):
        run.load_state_dict(saved)


# --- afterwards


@pytest.mark.parametrize("error", [None, ArithmeticError, KeyboardInterrupt])
@pytest.mark.parametrize("schedule", [None, "0:10 1ep:50"])
def test_everything_is_as_before_afterwards(error, schedule):
    model, optimizer, loader = parts(num_workers=0)
    before = dict(loader.__dict__)
    training = [module.training for module in model.modules()]

    def use():
        with attach(model, optimizer, loader, schedule=schedule, **COMMON) as run:
            assert type(loader) is not DataLoader
            assert isinstance(loader, DataLoader)
            for inputs, targets, _ in loader:
                functional.cross_entropy(model(inputs), targets).backward()
                optimizer.step()
                if error is not None:
                    raise error
        return run

    if error is None:
        run = use()
    else:
        with pytest.raises(error):
            use()
    assert type(loader) is DataLoader
    assert loader.__dict__ == before
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert [module.training for module in model.modules()] == training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    if error is None:
        steps = run.progress.step
        epoch(model, optimizer, loader)
        assert run.progress.step == steps


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"metrics": "hessian_topq"}, UnknownNameError, "Did you mean"),
        ({"every": "sometimes"}, ValueError, "write '10 min'"),
        ({"schedule": "0:8 nonsense"}, ValueError, "nonsense"),
        ({"schedule": "0:10 1ep:50", "coupling": "cubic"}, LookupError, "cubic"),
        ({"log": "run.txt"}, ValueError, r"end in \.csv or \.jsonl, got 'run\.txt'"),
        ({"scheduler": object()}, ValueError, "follow a batch-size schedule, and there is none"),
        ({"budget": 3.0}, ValueError, "at most 1"),
        ({"probe_samples": 0}, ValueError, "at least 1"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_touched(settings, error, message):
    model, optimizer, loader = parts()
    with pytest.raises(error, match=message), attach(model, optimizer, loader, **{**COMMON, **settings}):
        pass
    assert type(loader) is DataLoader
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_metric_of_the_name_of_an_automatic_signal_is_the_users():
    model, data = Triples(), Indexed()
    optimizer, loader = torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(data, batch_size=50)
    with attach(model, optimizer, loader, metrics={"gradient_norm": slope}, loss_fn=loss_fn, budget=None) as run:
        for batch in loader:
            loss_fn(model, batch).backward()
            optimizer.step()
    assert list(run.history[-1].values) == ["gradient_norm"]
    assert run.history[-1].loss_rule == "loss_fn loss_fn"


@pytest.mark.parametrize("way", ["FSDP1", "tensor parallelism (DTensor)"])
def test_a_model_sharded_in_another_way_is_refused_by_name(way):
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of one rank alone
            net = Triples()
            if way == "FSDP1":
                net = FullyShardedDataParallel(net, device_id=torch.device("cpu"))
            else:
                net = parallelize_module(net, dist.init_device_mesh("cpu", (1,)), {"layers.0": ColwiseParallel()})
        optimizer, loader = torch.optim.SGD(net.parameters(), lr=0.1), DataLoader(Indexed(), batch_size=50)
        told = rf"^attach does not work with {re.escape(way)}, .* or with fully_shard \(FSDP2\)$"
        with pytest.raises(ValueError, match=told), attach(net, optimizer, loader, loss_fn=loss_fn):
            pass
    finally:
        dist.destroy_process_group()


def test_the_training_loader_is_no_probe():
    model, optimizer, loader = parts()
    with pytest.raises(ValueError, match="the probe is the training loader"), attach(model, optimizer, loader, probe=loader):
        pass


# --- what it tells


def test_the_report_is_a_table_with_sentences(tmp_path):
    model, optimizer, loader = parts()

    def failing(objective, rng):
        raise ArithmeticError("no number today")

    metrics = {"slope": slope, "failing": failing, "spread": lambda o, r: MetricResult(2.0, standard_error=0.125)}
    told = []
    files = [tmp_path / "run.csv", str(tmp_path / "run.jsonl")]
    settings = {**COMMON, "metrics": metrics, "schedule": "0:10 1ep:50", "log": files, "sinks": told.append}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "metric 'failing' failed: ArithmeticError: no number today")
        with attach(model, optimizer, loader, **settings) as run:
            for _ in range(2):
                epoch(model, optimizer, loader)
    lines = run.report().splitlines()
    assert lines[0] == "Triples after 12 steps, 200 samples, 2 epochs"
    assert lines[2].split() == [
        "step",
        "samples",
        "epoch",
        "batch",
        "size",
        "loss",
        "slope",
        "failing",
        "spread",
        "gradient_norm",
        "seconds",
    ]
    cells = [line.split() for line in lines[4:7]]
    assert [row[:4] for row in cells] == [["1", "10", "0.1", "10"], ["10", "100", "1", "10"], ["12", "200", "2", "50"]]
    assert all(row[6:9] == ["nan", "2", "±0.1"] for row in cells)
    assert len({len(line) for line in lines[2:7]}) == 1
    assert "batch size 10 -> 50: 1 epoch reached" in lines[8]
    assert lines[9] == "failing (step 12): failed: ArithmeticError: no number today"
    assert lines[10].startswith("Measuring took ")
    assert lines[10].endswith("% of training.")
    assert told == run.history
    assert all(made.values["gradient_norm"] > 0 for made in told)
    assert (tmp_path / "run.csv").read_text().count("\n") == 4
    assert [json.loads(line)["step"] for line in (tmp_path / "run.jsonl").read_text().splitlines()] == [1, 10, 12]


def test_nothing_measured_for_lack_of_budget_is_said_at_the_end():
    model, optimizer, loader = parts()
    with (
        pytest.warns(
            MeasurementWarning, match=r"nothing was measured: a measurement is due since step 1 and waits.*Raise budget"
        ),
        attach(model, optimizer, loader, **{**COMMON, "budget": 1e-6}) as run,
    ):
        epoch(model, optimizer, loader)
    assert run.history == []
    assert "A measurement is due since step 1" in run.report()


def test_without_metrics_only_the_schedule_and_the_signals_and_no_probe():
    model, optimizer, loader = parts()
    meter = NoiseScaleMeter(model.parameters())
    signals = {"gradient_variance": meter, "surrogate_gap": lambda: 0.5}
    asked = {"metrics": (), "schedule": "0:10 1ep:50", "signals": signals, "probe_samples": 0, "budget": None}
    with attach(model, optimizer, loader, **asked) as run:
        for inputs, targets, _ in loader:
            for half in (slice(0, 5), slice(5, None)):
                with meter.micro_batch(5, weight=0.5):
                    (0.5 * functional.cross_entropy(model(inputs[half]), targets[half])).backward()
            meter.step()
            optimizer.step()
            optimizer.zero_grad()
    assert [made.step for made in run.history] == [1, 10]
    assert run.history[-1].values["surrogate_gap"] == 0.5
    assert run.history[-1].values["gradient_variance"] > 0
    assert run.measure().step == 10


# --- ranks


def on_rank(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    try:
        model, _, loader = parts()
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05)
        settings = {**COMMON, "every": "0.05 s"}  # by a clock, so rank 0 decides
        with attach(wrapped, optimizer, loader, schedule="0:10 1ep:50", log=f"{folder}/run.csv", **settings) as run:
            epochs = [epoch(wrapped, optimizer, loader) for _ in range(2)]
        history = [(made.step, made.samples, made.loss, made.values["slope"]) for made in run.history]
        told = {"epochs": epochs, "history": history, "weights": model.layers[0].weight.tolist()}
        try:
            with attach(wrapped, optimizer, loader if rank == 0 else {"no data set": 0}, **COMMON):
                pass
        except (LoaderError, RemoteFailureError) as error:
            told["broken"] = f"{type(error).__name__}: {error}"
        Path(folder, f"{rank}.json").write_text(json.dumps(told))
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


def test_two_ranks_share_the_batches_and_measure_the_same_at_the_same_steps(tmp_path):
    first, second = run_on_two(on_rank, tmp_path)
    for one, other in zip(first["epochs"], second["epochs"], strict=True):
        assert [len(indices) for indices in one] == [len(indices) for indices in other]
        assert flat([*one, *other]) == list(range(NUM_SAMPLES))
    assert [len(indices) for seen in first["epochs"] for indices in seen] == [5] * 10 + [25] * 2
    assert first["weights"] == second["weights"]
    assert second["broken"].startswith("LoaderError: a dict has no data set")
    assert first["broken"] == f"RemoteFailureError: rank 1 failed: {second['broken']}"
    assert [step for step, *_ in first["history"]] == [step for step, *_ in second["history"]]
    assert first["history"], "nothing was measured"
    assert all(samples == (10 * step if step <= 10 else 100 + 50 * (step - 10)) for step, samples, *_ in first["history"])
    assert (tmp_path / "run.csv").read_text().count("\n") == 1 + len(first["history"])


# --- weights in parts

TRAINS_SHARDS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 7)  # on the CPU
SAMPLES_SHARDED = 60
SHARDED_STEPS = {"AdamW": [1, 4, 5, 8, 10, 12, 15], "GSAM": [1, 4, 5, 8, 10, 12, 15], "schedule": [1, 4, 5, 8, 8, 11]}


def sharded_run(rank: int | None, how: str, *, attached: bool) -> dict:
    """Three epochs with AdamW; ``rank`` None: the whole batches in one process.

    Rank ``r`` has rows ``r``, ``r + 2``, ... of each batch of 12, so that the mean of the ranks' gradients is the batch's.
    A schedule shares batches of the one loader out by itself.
    """
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    if rank is not None:
        from torch.distributed.fsdp import fully_shard

        fully_shard(model[0])
        fully_shard(list(model[2:]), reshard_after_forward=False)
        fully_shard(model)
    data = Indexed(SAMPLES_SHARDED)
    mine, size = (slice(None), 12) if rank is None or how == "schedule" else (slice(rank, None, 2), 6)
    order = [i for at in range(0, SAMPLES_SHARDED, 12) for i in range(at, at + 12)[mine]]
    loader = DataLoader(TensorDataset(data.inputs[order].double(), data.targets[order]), batch_size=size)
    base = torch.optim.AdamW(model.parameters(), lr=0.02)
    optimizer = SharpnessAware(base, GSAM(), rho=0.1, model=model) if how == "GSAM" else base
    probe = list(zip(data.inputs.double().split(20), data.targets.split(20), strict=True))
    metrics = {"top": HessianTopK(k=1), "slope": slope, "box": EpsilonBox(maximizer="lbfgsb_published")}
    settings = {"metrics": metrics if attached else (), "every": "4 steps", "probe": probe, "budget": None}
    if how == "schedule":
        settings["schedule"] = "0:12 1ep:24"
    with contextlib.ExitStack() as stack:
        attaches = attached or how == "schedule"
        run = stack.enter_context(attach(model, optimizer, loader, **settings)) if attaches else None
        for _ in range(3):
            for inputs, targets in loader:

                def closure(inputs=inputs, targets=targets):
                    loss = functional.cross_entropy(model(inputs), targets)
                    loss.backward()
                    return loss

                if how == "GSAM":
                    optimizer.step(closure)
                else:
                    closure()
                    optimizer.step()
                optimizer.zero_grad()
            with torch.no_grad():
                model(data.inputs.double())  # what is left gathered after a pass without a backward is measured, too
            if run is not None:
                run.measure()
    parameters = [getattr(one.data, "full_tensor", lambda one=one: one.data)() for one in model.parameters()]
    return {
        "weights": torch.cat([one.flatten() for one in parameters]).tolist(),
        "rng": torch.get_rng_state().sum().item(),
        "history": [] if run is None else [[made.step, made.samples, made.loss, dict(made.values)] for made in run.history],
        "notes": [] if run is None else [dict(made.notes) for made in run.history],
    }


def on_sharded_rank(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    try:
        found = {how: [sharded_run(rank, how, attached=attached) for attached in (False, True)] for how in SHARDED_STEPS}
        Path(folder, f"{rank}.json").write_text(json.dumps(found))
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


def run_on_two(target, folder) -> list[dict]:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo"])
    processes = [context.Process(target=target, args=(rank, 2, str(folder))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.skipif(not TRAINS_SHARDS, reason="torch 2.6 trains fully_shard on accelerators only")
def test_fully_sharded_training_is_measured_as_one_process_and_trains_as_if_it_were_not(tmp_path):
    ranks = run_on_two(on_sharded_rank, tmp_path)
    for how, steps in SHARDED_STEPS.items():
        alone = sharded_run(None, how, attached=True)
        assert [step for step, *_ in alone["history"]] == steps
        signals = {"gradient_norm", "surrogate_gap"} if how == "GSAM" else {"gradient_norm"}
        assert set(alone["history"][0][3]) == {"top", "slope", "box"} | signals
        for plain, measured in (found[how] for found in ranks):
            assert measured["weights"] == plain["weights"]
            assert measured["rng"] == plain["rng"]
            assert measured["weights"] == pytest.approx(alone["weights"], rel=1e-9, abs=1e-12)
            assert measured["notes"] == [{}] * len(steps)
            for found, expected in zip(measured["history"], alone["history"], strict=True):
                assert found[:3] == pytest.approx(expected[:3], rel=1e-10)
                assert found[3] == pytest.approx(expected[3], rel=1e-10)
