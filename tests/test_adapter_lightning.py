"""Lightning's real Trainer on the CPU, in the state that holds: what breaks otherwise is said beside each test."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, TensorDataset

pytest.importorskip("lightning.pytorch", reason="needs the extra [lightning]")

from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import MixedPrecision as FabricMixedPrecision
from lightning.fabric.strategies import ModelParallelStrategy as FabricModelParallelStrategy
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy

from sharpness_adapters.fabric import FabricSharpnessCallback, backward, batches, sam_step
from sharpness_adapters.lightning import (
    BatchSizeCallback,
    SAMCallback,
    SharpnessCallback,
    auto_callbacks,
    auto_fabric_callbacks,
    total_steps,
    training_step_loss,
)
from sharpness_plugins import distributed, measure_sharpness
from sharpness_plugins.controller import BatchController
from sharpness_plugins.errors import LoaderError, LossRuleError, PluginWarning, UnknownNameError
from sharpness_plugins.noise_scale import NoiseScaleMeter
from sharpness_plugins.optimizers import SAM, LookSAM, ProportionalToLearningRate, SharpnessAware, perturbed
from sharpness_plugins.registry import get_rule
from sharpness_plugins.texts import name_and_settings

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),  # advice about speed
    pytest.mark.filterwarnings("ignore:.*num_workers.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists:UserWarning"),
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided:UserWarning"),
    # torch's own of Lightning's pytree use, and of its save with an epoch-based scheduler
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning"),
]

METRIC = "hessian_topk:k=1,num_matvecs=4"
TOP = "sharpness/hessian_topk"
FEATURES, CLASSES = 6, 3


def dataset(num_samples=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num_samples, FEATURES, generator=generator)
    return TensorDataset(inputs, torch.randint(CLASSES, (num_samples,), generator=generator))


class Recorder:
    """What training did, step by step."""

    def __init__(self):
        self.batches, self.steps, self.rates, self.validations = [], [], [], 0


class RecordingSGD(torch.optim.SGD):
    """Notes the learning rate that each step really uses."""

    rates: list

    def step(self, closure=None):
        self.rates.append(self.param_groups[0]["lr"])
        return super().step(closure)


class Net(LightningModule):
    def __init__(self, *, dropout=0.0, batch_norm=False, lr=0.1, scheduler=None, log=True, batch_size=None):
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(FEATURES, 8), nn.BatchNorm1d(8) if batch_norm else nn.Identity(), nn.Tanh()]
        self.net = nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(8, CLASSES))
        self.lr, self.scheduler, self.log_loss = lr, scheduler, log
        self.seen = Recorder()
        if batch_size is not None:
            self.batch_size = batch_size

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        loss = nn.functional.cross_entropy(self.net(inputs), targets)
        if self.log_loss:
            self.log("train_loss", loss)
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen.batches.append((self.trainer.current_epoch, len(batch[0])))

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def on_validation_epoch_end(self):
        self.seen.validations += not self.trainer.sanity_checking

    def configure_optimizers(self):
        optimizer = RecordingSGD(self.parameters(), lr=self.lr, momentum=0.9)
        optimizer.rates = self.seen.rates
        if self.scheduler is None:
            return optimizer
        return [optimizer], [{"scheduler": self.scheduler(optimizer), "interval": "step"}]


class Data(LightningDataModule):
    def __init__(self, batch_size=8, num_samples=96, validation=False, drop_last=False, **settings):
        super().__init__()
        self.batch_size, self.data, self.validation = batch_size, dataset(num_samples), validation
        self.settings = {"drop_last": drop_last, **settings}

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=self.batch_size, **self.settings)

    def val_dataloader(self):
        return DataLoader(self.data, batch_size=24) if self.validation else []


class InOrderOfRanks(Data):
    """In one process, the order that Lightning gives to the ranks of ddp, which it shuffles in any case."""

    def train_dataloader(self):
        sampler = DistributedSampler(self.data, num_replicas=1, rank=0, seed=0)
        return DataLoader(self.data, batch_size=self.batch_size, sampler=sampler)


def fit(model, data, callbacks=(), *, epochs=2, ckpt=None, root=None, **settings):
    if not getattr(data, "validation", False):
        settings["limit_val_batches"] = 0
    settings = {"logger": False, "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks), **settings}
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=settings.pop("devices", 1),
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
        **settings,
    )
    if isinstance(data, LightningDataModule):
        trainer.fit(model, datamodule=data, ckpt_path=ckpt)
    else:
        trainer.fit(model, data, ckpt_path=ckpt)
    return trainer


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.state_dict().values() if p.is_floating_point()])


def measuring(**settings):
    return SharpnessCallback(METRIC, **{"budget": None, "num_samples": 32, "every": "3 steps", **settings})


def batches_of(model, epoch):
    return [size for at, size in model.seen.batches if at == epoch]


# --- measuring


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("extra", [{}, {"accumulate_grad_batches": 4, "gradient_clip_val": 0.1}])
def test_training_with_measuring_is_training_without_it(precision, extra):
    results = []
    for callbacks in ([], [measuring()]):
        model = Net(dropout=0.3, batch_norm=True)
        torch.manual_seed(1)
        fit(model, Data(shuffle=True, validation=True), callbacks, precision=precision, **extra)
        results.append((weights(model), torch.get_rng_state(), model.seen))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][2].__dict__ == results[1][2].__dict__
    history = callbacks[0].monitor.history
    num_steps = 2 * (12 // extra.get("accumulate_grad_batches", 1))
    assert [m.step for m in history] == [0, *range(3, num_steps + 1, 3)]
    assert all(math.isfinite(m.values["hessian_topk"]) for m in history)
    assert history[-1].samples == num_steps * 8 * extra.get("accumulate_grad_batches", 1)


def test_over_300_steps_too():
    results = []
    for callbacks in ([], [measuring(every="37 steps")]):
        model = Net(dropout=0.3, batch_norm=True)
        torch.manual_seed(1)
        fit(model, Data(shuffle=True, validation=True), callbacks, epochs=25)
        results.append((weights(model), torch.get_rng_state(), model.seen))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][2].__dict__ == results[1][2].__dict__
    assert [m.step for m in callbacks[0].monitor.history] == [0, *range(37, 301, 37)]


def test_persistent_workers_do_not_lose_or_repeat_a_batch():  # an inner pass over the loader made 10 batches into 13
    model = Net()
    fit(model, Data(num_samples=40, num_workers=1, persistent_workers=True), [measuring(every="1 step")], epochs=2)
    assert [batches_of(model, epoch) for epoch in (0, 1)] == [[8] * 5] * 2


def test_the_value_is_that_of_the_training_step_in_eval_mode():
    model, callback = Net(dropout=0.5), measuring(num_samples=96, every="1ep")
    fit(model, Data(), [callback], epochs=1)
    data = dataset()
    report = measure_sharpness(
        model.net,
        [data.tensors],
        [callback.metrics["hessian_topk"]],
        criterion=nn.CrossEntropyLoss(),
    )
    assert callback.last.epoch == 1
    assert callback.last.values["hessian_topk"] == pytest.approx(report["hessian_topk"].value, rel=1e-5)
    assert not {"log", "log_dict"} & set(vars(model))


def test_a_module_is_measured_by_its_training_step_without_being_told():  # rule 5: by hand, its net alone
    model, batch = Net(dropout=0.5), dataset().tensors
    model.log = model.log_dict = None  # what a user shadows comes back
    wrapped, _ = Fabric(accelerator="cpu").setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    expected = nn.functional.cross_entropy(model.net.eval()(batch[0]), batch[1]).item()
    model.train()
    for given in (model, wrapped, torch.compile(model)):
        report = measure_sharpness(given, [batch], [measuring().metrics["hessian_topk"]])
        assert report.loss == pytest.approx(expected, rel=1e-6)
        assert report.provenance["loss_rule"] == "plugin rule training_step_loss"
    assert vars(model)["log"] is None
    del model.log, model.log_dict

    class ByHand(Net):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            raise AssertionError("it would step")

    with pytest.raises(LossRuleError, match=r"ByHand optimizes by hand, so .* would step the optimizer\. Pass loss_fn="):
        measure_sharpness(ByHand(), [batch], "epsilon_box")
    with pytest.raises(LossRuleError, match="returned no loss"):
        training_step_loss(type("Silent", (Net,), {"training_step": lambda self, batch: None})(), batch)


def test_what_a_training_step_notes_is_trainings_alone():
    """Metrics that it updates, lists that it appends to, counters: as if neither probe nor second pass had run it."""
    torchmetrics = pytest.importorskip("torchmetrics", reason="Lightning brings it")

    class Noting(Net):
        def __init__(self):
            super().__init__(batch_norm=True)
            self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=CLASSES)
            self.mean, self.all = torchmetrics.MeanMetric(), torchmetrics.CatMetric()
            self.outputs, self.sums, self.calls = [], {"loss": torch.zeros(()), "each": [[]]}, 0
            self.told = []

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.accuracy(self.net(batch[0]), batch[1])
            self.mean.update(loss.detach())
            self.all.update(loss.detach())
            self.log("accuracy", self.accuracy)
            self.outputs.append(loss.detach())
            self.sums["loss"] += loss.detach()
            self.sums["each"][0].append(batch_idx)
            self.calls += 1
            self.last_loss = loss.item()
            return loss

        def on_train_epoch_end(self):
            noted = [self.mean.compute(), self.all.compute(), torch.stack(self.outputs), self.sums["loss"]]
            self.told.append([one.tolist() for one in noted] + [self.calls, list(self.sums["each"][0]), self.last_loss])
            self.outputs.clear()

    seen = []
    for callbacks in ([], [measuring(every="1 step")], [SAMCallback(rho=0.0)]):
        model = Noting()
        trainer = fit(model, Data(), callbacks)
        seen.append((model.told, trainer.callback_metrics["accuracy"], model.accuracy._update_count))
    assert seen[0][0][1][4] == 24
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize("validation", [False, True])
def test_checkpoint_and_early_stopping_monitor_our_values(tmp_path, validation):  # raises where a value is logged rarely
    callback = measuring(every="2ep")
    checkpoint = ModelCheckpoint(tmp_path, monitor=TOP, save_top_k=-1, filename="{epoch}")
    stopping = EarlyStopping(TOP, patience=100, check_on_train_epoch_end=True)
    trainer = fit(Net(), Data(validation=validation), [callback, checkpoint, stopping], epochs=5)
    assert [m.epoch for m in callback.monitor.history] == [0, 2, 4]
    assert len(list(tmp_path.glob("*.ckpt"))) == 5
    assert trainer.callback_metrics[TOP].item() == pytest.approx(callback.last.values["hessian_topk"])
    assert float(checkpoint.current_score) == pytest.approx(callback.last.values["hessian_topk"])


def test_values_reach_the_loggers_and_files(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    callback = measuring(csv=str(tmp_path / "own.csv"), jsonl=str(tmp_path / "own.jsonl"))
    fit(Net(log=False), Data(), [callback], epochs=1, logger=CSVLogger(tmp_path, name="", version=""), root=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "own.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 3, 6, 9, 12]
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert TOP in rows[0]
    assert len(rows) == 1 + 5
    assert (tmp_path / "own.csv").read_text().count("\n") == 6


def test_validate_measures_on_its_own_data_under_inference_mode():  # else: Inference tensors cannot be saved for backward
    model, callback = Net(batch_norm=True), measuring(num_samples=96)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[callback])
    (logged,) = trainer.validate(model, DataLoader(dataset(), batch_size=32), verbose=False)
    assert "probe" not in callback.last.notes
    assert logged[TOP] == pytest.approx(callback.last.values["hessian_topk"])
    assert not any(p.is_inference() for p in model.parameters())


def test_several_loaders_make_one_probe():
    class Both(Net):
        def training_step(self, batch, batch_idx):
            parts = batch.values() if isinstance(batch, dict) else batch
            return sum(nn.functional.cross_entropy(self.net(inputs), targets) for inputs, targets in parts)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            pass

    loaders = [DataLoader(dataset(seed=seed), batch_size=8) for seed in (0, 1)]
    values = []
    for loader in (dict(zip("ab", loaders, strict=True)), loaders):
        callback = measuring(num_samples=96)
        fit(Both(), loader, [callback], epochs=1)
        values.append([m.values["hessian_topk"] for m in callback.monitor.history])
        assert all(map(math.isfinite, values[-1]))
    assert values[0] == values[1]


def test_a_loader_without_a_data_set_is_refused_and_by_auto_callbacks_only_said():
    stream = [dataset(8).tensors] * 3

    class Stream:
        def __iter__(self):
            return iter(stream)

    with pytest.raises(LoaderError):
        fit(Net(), Stream(), [measuring()], epochs=1, limit_train_batches=3)
    callback = measuring()
    callback.is_optional = True
    with pytest.warns(PluginWarning, match="no sharpness is measured"):
        trainer = fit(Net(), Stream(), [callback], epochs=1, limit_train_batches=3)
    assert trainer.global_step == 3
    callback = measuring(probe=stream)
    fit(Net(), Stream(), [callback], epochs=1, limit_train_batches=3)
    assert [m.step for m in callback.monitor.history] == [0, 3]


def test_a_failing_metric_is_recorded_and_training_goes_on():
    def broken(objective, rng):
        raise RuntimeError("no")

    callback = SharpnessCallback([broken], budget=None, num_samples=8, every="1ep")
    with pytest.warns(UserWarning, match="no"):
        trainer = fit(Net(), Data(), [callback], epochs=1)
    assert trainer.global_step == 12
    assert math.isnan(callback.last.values["broken"])
    assert callback.last.values["gradient_norm"] > 0


# --- SAM


def sam_by_hand(model, data, *, rho, accumulate=1, clip=None, epochs=2, lr=0.1):
    """The plain loop: both gradients over all micro-batches of a step, the second one clipped."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for _ in range(epochs):
        loaded = list(DataLoader(data, batch_size=8))
        for at in range(0, len(loaded), accumulate):
            group = loaded[at : at + accumulate]

            def backward(group=group):
                for inputs, targets in group:
                    (nn.functional.cross_entropy(model.net(inputs), targets) / accumulate).backward()

            optimizer.zero_grad()
            backward()
            with perturbed(model.parameters(), rho, module=model):
                backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()


def test_t13_a_sharpness_aware_optimizer_in_automatic_optimization_makes_two_training_steps_per_step():
    steps = []

    class Sharp(Net):
        def training_step(self, batch, batch_idx):
            steps.append(batch_idx)
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            sgd = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            self.optimizer = SharpnessAware(sgd, SAM(), rho=0.2, model=self)
            return [self.optimizer], [torch.optim.lr_scheduler.StepLR(self.optimizer, 100)]

    model, twin = Sharp(batch_norm=True), Net(batch_norm=True)
    fit(model, Data(), [])
    sam_by_hand(twin, dataset(), rho=0.2)
    assert steps == [number for _ in range(2) for number in range(12) for _ in range(2)]
    torch.testing.assert_close(weights(model), weights(twin), rtol=1e-5, atol=1e-7)
    assert all(
        torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True) if a.is_floating_point() is False
    )
    assert model.optimizer.num_steps == 24
    assert model.optimizer.surrogate_gap != 0


@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (4, None), (4, 0.05)])
def test_sam_is_the_plain_loop(accumulate, clip):  # the closure way replays only the last micro-batch, and adds to g1
    model, twin = Net(batch_norm=True), Net(batch_norm=True)
    callback = SAMCallback(rho=0.2)
    settings = {"gradient_clip_val": clip} if clip else {}
    fit(model, Data(), [callback], accumulate_grad_batches=accumulate, **settings)
    sam_by_hand(twin, dataset(), rho=0.2, accumulate=accumulate, clip=clip)
    torch.testing.assert_close(weights(model), weights(twin), rtol=1e-5, atol=1e-7)
    assert len(model.seen.rates) == 24 // accumulate
    assert callback.surrogate_gap != 0
    assert callback.gradient_norm > 0


def test_sam_that_does_not_move_is_the_training_without_it():
    model, twin = Net(), Net()
    callback = SAMCallback(rho=0.0)
    fit(model, Data(), [callback])
    fit(twin, Data())
    assert torch.equal(weights(model), weights(twin))
    assert callback.surrogate_gap == 0
    callback = SAMCallback(rho=0.5)
    fit(model := Net(), Data(), [callback])
    assert not torch.allclose(weights(model), weights(twin))


@pytest.mark.parametrize("rule", ["random_sam", "momentum_sam"])
def test_statistics_see_the_trainers_first_pass_and_no_other_where_a_rule_needs_none(rule):
    model, twin = Net(batch_norm=True), Net(batch_norm=True)
    fit(model, Data(), [SAMCallback(rho=0.0, rule=rule)])
    fit(twin, Data())
    for name, value in twin.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_sam_in_bf16_trains_and_logs_once():
    model = Net()
    fit(model, Data(), [SAMCallback(rho=0.2)], precision="bf16-mixed")
    twin = Net()
    sam_by_hand(twin, dataset(), rho=0.2)
    torch.testing.assert_close(weights(model), weights(twin), rtol=0.05, atol=0.02)


class Scaler(torch.amp.GradScaler):
    def __init__(self, **settings):
        super().__init__("cpu", **settings)


def test_sam_under_a_grad_scaler():  # closure-SAM raises: the scaler passes no closure
    model = Net()
    callback = SAMCallback(rho=0.2)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=Scaler(init_scale=2.0**10))
    fit(model, Data(), [callback], plugins=[plugin], gradient_clip_val=0.5, accumulate_grad_batches=2)
    twin = Net()
    sam_by_hand(twin, dataset(), rho=0.2, accumulate=2, clip=0.5)
    assert len(model.seen.rates) == 12
    torch.testing.assert_close(weights(model), weights(twin), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("rule", ["sam", "gsam", "fsam"])
def test_a_fused_optimizer_under_a_grad_scaler_divides_by_itself(rule):
    """Lightning leaves its gradients scaled; a scale of 256 is exact but for what float16 rounds."""
    found = []
    for fused in (False, True):

        class Fused(Net):
            def configure_optimizers(self, fused=fused):
                return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, fused=fused)

        model = Fused()
        plugin = MixedPrecision("16-mixed", "cpu", scaler=Scaler(init_scale=2.0**8))
        fit(model, Data(), [SAMCallback(rho=0.2, rule=rule)], plugins=[plugin], accumulate_grad_batches=2)
        found.append(weights(model))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_steps_that_the_scaler_skips_leave_the_weights_and_are_not_counted():
    model, before = Net(lr=0.1), weights(Net())
    sam, sizes = SAMCallback(), BatchSizeCallback("8")
    plugin = MixedPrecision("16-mixed", "cpu", scaler=Scaler(init_scale=2.0**120, backoff_factor=0.5))
    fit(model, Data(), [sam, sizes], plugins=[plugin], epochs=1)
    assert torch.equal(weights(model), before)
    assert sizes.controller.step == 0
    assert sizes.controller.samples == 96


def test_a_second_gradient_that_overflows_leaves_the_step_out_and_lowers_the_scale():
    class Cliff(Net):
        """Overflows at the perturbed weights only."""

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            moved = not torch.equal(self.net[0].weight.detach(), self.start)
            return loss * (1e38 if moved else 1.0) * (1e38 if moved else 1.0)

    model = Cliff()
    model.start = model.net[0].weight.detach().clone()
    scaler = Scaler(init_scale=4.0)
    callback = SAMCallback()
    fit(
        model,
        Data(),
        [callback],
        plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)],
        limit_train_batches=1,
        epochs=1,
    )
    assert torch.equal(model.net[0].weight.detach(), model.start)
    assert callback.num_skipped == 1
    assert scaler.get_scale() == 2.0


RULES = ["sam", "asam:eta=0.0", "gsam", "wsam", "fsam", "looksam:k=2", "momentum_sam", "random_sam", "k_step_sam"]


def by_hand(model, rule, *, rho=0.2, accumulate=1, epochs=2, **settings):
    """The core's own loop, which evaluates closures: the micro-batches of each step."""
    name, given = name_and_settings(rule)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = SharpnessAware(sgd, get_rule(name, **given), rho=rho, model=model, **settings)
    for _ in range(epochs):
        loaded = list(DataLoader(dataset(), batch_size=8))
        for at in range(0, len(loaded), accumulate):

            def closure(batch):
                loss = nn.functional.cross_entropy(model.net(batch[0]), batch[1]) / accumulate
                loss.backward()
                return loss

            optimizer.step([lambda batch=batch: closure(batch) for batch in loaded[at : at + accumulate]])
    return optimizer


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_its_plain_loop(rule, accumulate):
    model, twin = Net(batch_norm="momentum" not in rule and "random" not in rule), Net()
    twin.net = Net(batch_norm=isinstance(model.net[1], nn.BatchNorm1d)).net
    callback = SAMCallback(rho=0.2, rule=rule)
    fit(model, Data(), [callback], accumulate_grad_batches=accumulate)
    optimizer = by_hand(twin, rule, accumulate=accumulate)
    torch.testing.assert_close(weights(model), weights(twin), rtol=1e-5, atol=1e-6)
    assert optimizer.num_steps == 24 // accumulate
    if optimizer.surrogate_gap is not None and optimizer.rule.every == 1:
        assert callback.surrogate_gap == pytest.approx(optimizer.surrogate_gap, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "ascents"), [({"interval": 2}, 6), ({"rule": "looksam:k=3"}, 4), ({"rule": "k_step_sam"}, 24)]
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_without_an_ascent_cost_one_pass(settings, ascents, accumulate):
    passes = []

    class Counting(Net):
        def training_step(self, batch, batch_idx):
            passes.append(batch_idx)
            return super().training_step(batch, batch_idx)

    kept, callback = [], SAMCallback(**settings)

    class Watch(Callback):
        def on_train_batch_end(self, *args):
            kept.append(len(callback._batches))

    fit(Counting(), Data(), [callback, Watch()], epochs=accumulate, accumulate_grad_batches=accumulate)
    assert len(passes) == accumulate * (12 + ascents)
    assert (0 in kept) == (settings != {"rule": "k_step_sam"})  # batches are not held for nothing


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize(("rule", "interval"), [("looksam:k=4", 1), ("fsam", 4)])  # of six steps per epoch
def test_a_rule_that_remembers_goes_on_from_a_checkpoint_bit_for_bit(tmp_path, rule, interval, precision):
    def run(epochs, ckpt=None, rho=0.2):
        plugins = [MixedPrecision("16-mixed", "cpu", scaler=Scaler(init_scale=2.0**8))] if precision == "16-mixed" else []
        model, sam = Net(batch_norm=True), SAMCallback(rho=rho, rule=rule, interval=interval)
        return fit(model, Data(), [sam], epochs=epochs, ckpt=ckpt, plugins=plugins, accumulate_grad_batches=2)

    whole = weights(run(4).lightning_module)
    run(1).save_checkpoint(tmp_path / "last.ckpt")
    assert torch.equal(weights(run(4, ckpt=tmp_path / "last.ckpt").lightning_module), whole)
    other = run(4, ckpt=tmp_path / "last.ckpt", rho=0.4)  # arguments hold, whatever was saved
    assert not torch.equal(weights(other.lightning_module), whole)
    with pytest.raises(ValueError, match=r"the state is of .*, and this optimizer has SAM\(\)"):
        fit(Net(batch_norm=True), Data(), [SAMCallback()], ckpt=tmp_path / "last.ckpt")
    fit(Net(batch_norm=True), Data(), ckpt=tmp_path / "last.ckpt")  # who has none of us reads it as well


@pytest.mark.parametrize("rule", ["gsam", "wsam", "fsam", "looksam:k=2"])
def test_rules_that_mix_gradients_see_them_unscaled(rule):
    models = []
    for plugins in ([], [MixedPrecision("16-mixed", "cpu", scaler=Scaler(init_scale=2.0**8))]):
        models.append(Net())
        fit(models[-1], Data(), [SAMCallback(rho=0.2, rule=rule)], plugins=plugins, gradient_clip_val=0.5)
    torch.testing.assert_close(weights(models[0]), weights(models[1]), rtol=0.05, atol=0.02)


@pytest.mark.parametrize(("rule", "interval"), [("sam", 1), ("sam", 2), ("random_sam", 1)])
def test_a_norm_that_is_not_the_gradients_is_not_recorded_as_such(rule, interval):
    model, told = Net(), []

    class Watch(Callback):
        def on_before_zero_grad(self, trainer, module, optimizer):
            if module.net[0].weight.grad is not None:
                told.append(torch.cat([p.grad.flatten() for p in module.parameters()]).norm().item())

    sam, sharp = SAMCallback(0.2, rule=rule, interval=interval), measuring(every="1 step")
    fit(model, Data(), [sharp, sam, Watch()], epochs=1)
    found = [made.values["gradient_norm"] for made in sharp.monitor.history[1:]]
    assert (found[:-1] == pytest.approx(told, rel=1e-5)) == (not sam.follows_gradient)
    assert sharp.last.values["surrogate_gap"] == sam.surrogate_gap


def test_what_a_rule_is_told():
    assert SAMCallback(adaptive=True, eta=0.1).rule == get_rule("asam", eta=0.1)
    assert SAMCallback(rule="gsam:rho=0.3,alpha=0.1,interval=4").rho == 0.3
    sloping = ProportionalToLearningRate(high=0.2, lr_high=0.1)
    one, other = Net(), Net()
    fit(one, Data(), [SAMCallback(rho=sloping, rule=LookSAM(k=2))])
    fit(other, Data(), [SAMCallback(rho=0.2, rule="looksam:k=2")])
    assert torch.equal(weights(one), weights(other))
    with pytest.raises(ValueError, match='short for rule="asam"'):
        SAMCallback(adaptive=True, rule="gsam")
    with pytest.raises(ValueError, match=r"rho=0\.1 was given, and rho=0\.2 with the rule"):
        SAMCallback(0.1, rule="sam:rho=0.2")
    with pytest.raises(ValueError, match=r"m=32 says how a step's first pass is made.*SharpnessAware\.step\(closure\)"):
        SAMCallback(rule="sam:m=32")
    with pytest.raises(UnknownNameError, match="Did you mean 'looksam'"):
        SAMCallback(rule="looksm")

    class Plain(Net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(ValueError, match="keeps none"):
        fit(Plain(), Data(), [SAMCallback(rule="momentum_sam")])


# --- batch sizes


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_steps_rates_and_validations_after_a_switch(workers):
    # changing the sampler alone: 16 -> 64 stopped validation, 64 -> 16 cut the epoch
    settings = {"num_workers": 1, "persistent_workers": True} if workers else {}
    model, callback = Net(), BatchSizeCallback("0:8 1ep:32 3ep:16")
    trainer = fit(model, Data(validation=True, **settings), [callback], epochs=4)
    assert [batches_of(model, epoch) for epoch in range(4)] == [[8] * 12, [32] * 3, [32] * 3, [16] * 6]
    assert trainer.global_step == callback.controller.step == 24
    assert callback.controller.samples == 4 * 96
    assert model.seen.validations == 4
    assert model.seen.rates == pytest.approx([0.1] * 12 + [0.4] * 6 + [0.2] * 6)  # linear, as for SGD
    assert [(c.step, c.epoch, c.new.batch_size) for c in callback.history] == [(12, 1, 32), (18, 3, 16)]
    logged = trainer.callback_metrics
    assert (logged["sharpness/batch_size"], logged["sharpness/learning_rate"]) == pytest.approx((16, 0.2))
    assert trainer.reload_dataloaders_every_n_epochs == 0
    assert trainer.accumulate_grad_batches == 1


def test_drop_last_does_not_delay_an_epoch():
    model, callback = Net(), BatchSizeCallback("0:10 2ep:20")
    fit(model, Data(num_samples=96, drop_last=True), [callback], epochs=3)
    assert [batches_of(model, epoch) for epoch in range(3)] == [[10] * 9, [10] * 9, [20] * 4]


def test_a_batch_size_of_the_module_is_set_where_it_has_the_loader():
    class Whole(Net):
        def train_dataloader(self):
            return DataLoader(dataset(), batch_size=self.batch_size)

    model = Whole(batch_size=64)
    fit(model, None, [BatchSizeCallback("0:8 1ep:32")])
    assert [batches_of(model, epoch) for epoch in range(2)] == [[8] * 12, [32] * 3]


def test_the_shared_sampler_follows():
    callback = BatchSizeCallback("0:8 1ep:32")
    model, data = Net(), dataset()
    fit(model, DataLoader(data, batch_sampler=callback.batch_sampler(RandomSampler(data))), [callback])
    assert [batches_of(model, epoch) for epoch in range(2)] == [[8] * 12, [32] * 3]


def test_large_batches_accumulate_where_memory_ends():
    model, callback = Net(), BatchSizeCallback("0:8 1ep:32", max_micro_batch=8)
    trainer = fit(model, Data(), [callback])
    assert [batches_of(model, epoch) for epoch in range(2)] == [[8] * 12] * 2
    assert trainer.global_step == 12 + 3
    assert model.seen.rates == pytest.approx([0.1] * 12 + [0.4] * 3)


def test_accumulation_changes_within_an_epoch_where_groups_are_whole():
    model, callback = Net(), BatchSizeCallback("0:8 6 steps:32", mode="accumulate")
    trainer = fit(model, DataLoader(dataset(), batch_size=8), [callback], epochs=1)
    # 6 batches alone; 6 is no multiple of 4, so batches 7 and 8 are too; then one group of 4
    assert trainer.global_step == 9
    assert model.seen.rates == pytest.approx([0.1] * 8 + [0.4])
    assert callback.history[0].samples == 64


@pytest.mark.parametrize("num_samples", [96, 90])
def test_accumulated_gradients_are_those_of_the_large_batch(num_samples):  # Lightning alone: mean of means, / 4 at the tail
    small, large = Net(lr=0.1), Net(lr=0.1)
    fit(small, DataLoader(dataset(num_samples), batch_size=8), [BatchSizeCallback("32", mode="accumulate")])
    fit(large, DataLoader(dataset(num_samples), batch_size=32))
    torch.testing.assert_close(weights(small), weights(large), rtol=1e-5, atol=1e-7)
    assert len(small.seen.rates) == len(large.seen.rates) == 6


def test_sam_weighs_a_ragged_group_as_the_large_batch():
    small, large = Net(), Net()
    fit(small, DataLoader(dataset(90), batch_size=8), [SAMCallback(0.2), BatchSizeCallback("32", mode="accumulate")])
    fit(large, DataLoader(dataset(90), batch_size=32), [SAMCallback(0.2)])
    torch.testing.assert_close(weights(small), weights(large), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["loader", "accumulate"])
def test_one_cycle_ends_where_training_does(mode):  # estimated_stepping_batches: half the rate, or one step too many
    callback = BatchSizeCallback("0:8 1ep:32 3ep:16", mode=mode, coupling="none", micro_batch=8)
    steps = callback.total_steps(90, 4)
    final = []

    def one_cycle(optimizer):
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
        final.append(scheduler)
        return scheduler

    trainer = fit(Net(scheduler=one_cycle), Data(num_samples=90, shuffle=True), [callback], epochs=4)
    assert trainer.global_step == steps
    assert final[0].last_epoch == steps
    assert len(callback.history) == 2


@pytest.mark.parametrize("schedule", ["0:8 6 steps:32", "0:8 50:24 1ep:8", "double(8, every='20 steps', cap=64)"])
@pytest.mark.parametrize("num_samples", [90, 96, 7])
@pytest.mark.parametrize("mode", ["loader", "accumulate"])
def test_total_steps_are_those_of_the_run(schedule, num_samples, mode):
    if schedule.startswith("0:8 50"):
        schedule = "0:8 50:24 120:8"
    trainer = fit(Net(), Data(num_samples=num_samples), [BatchSizeCallback(schedule, mode=mode)], epochs=3)
    assert trainer.global_step == total_steps(schedule, num_samples, 3, micro_batch=8 if mode == "accumulate" else None)


class StopAfter(Callback):
    """Ends the run in the middle, as a time limit does."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch + 1 >= self.epoch


@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.parametrize("mode", ["loader", "accumulate"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, stop, mode):  # in on_fit_start, current_epoch is still 0
    def callbacks():
        return [BatchSizeCallback("0:8 1ep:32 3ep:16", mode=mode), SAMCallback(0.1), measuring(every="1ep")]

    whole, parts = callbacks(), callbacks()
    model = Net()
    fit(model, Data(), whole, epochs=4)
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
    fit(Net(), Data(), [*parts, StopAfter(stop), checkpoint], epochs=4)
    resumed, later = Net(), callbacks()
    fit(resumed, Data(batch_size=3 if mode == "loader" else 8), later, epochs=4, ckpt=tmp_path / "last.ckpt")
    assert torch.equal(weights(resumed), weights(model))
    assert [batches_of(resumed, epoch) for epoch in range(stop, 4)] == [batches_of(model, e) for e in range(stop, 4)]
    assert resumed.seen.rates == model.seen.rates[-len(resumed.seen.rates) :]
    assert [(c.step, c.new) for c in later[0].history] == [(c.step, c.new) for c in whole[0].history]
    values = [[(m.step, m.samples, m.values["hessian_topk"]) for m in c[2].monitor.history] for c in (whole, later)]
    assert values[0] == values[1]
    assert len(json.dumps(later[0].state_dict())) < 10_000
    torch.load(tmp_path / "last.ckpt", weights_only=True)


def test_a_checkpoint_of_the_last_validation_resumes_with_the_next_size(tmp_path):
    # it is saved before on_train_epoch_end, in which the size changes
    checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_on_train_epoch_end=False)
    fit(Net(), Data(validation=True), [BatchSizeCallback("0:8 1ep:32"), checkpoint], epochs=1)
    model = Net()
    callback = BatchSizeCallback("0:8 1ep:32")
    fit(model, Data(validation=True), [callback], epochs=2, ckpt=next(tmp_path.glob("*.ckpt")))
    assert batches_of(model, 1) == [32] * 3
    assert callback.controller.samples == 2 * 96


def test_a_step_checkpoint_resumes_within_the_epoch(tmp_path):
    def sizes():
        return BatchSizeCallback("0:8 6 steps:32", mode="accumulate")

    model, resumed, first, second = Net(), Net(), sizes(), sizes()
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=9, filename="{step}")  # the end of epoch 1, 3 steps before
    fit(model, DataLoader(dataset(), batch_size=8), [first, checkpoint], epochs=2)
    trainer = fit(resumed, DataLoader(dataset(), batch_size=8), [second], epochs=2, ckpt=tmp_path / "step=9.ckpt")
    assert torch.equal(weights(resumed), weights(model))
    assert trainer.global_step == second.controller.step == 12
    assert second.controller.samples == first.controller.samples == 192


class Stream(IterableDataset):
    def __iter__(self):
        return iter(dataset(90))


@pytest.mark.parametrize("mode", ["loader", "accumulate"])
def test_a_stream_without_a_length(mode):
    class Streaming(Data):
        def train_dataloader(self):
            return DataLoader(Stream(), batch_size=self.batch_size)

    model, callback, sharp = Net(), BatchSizeCallback("0:8 1ep:32", mode=mode), measuring(every="1ep")
    trainer = fit(model, Streaming(), [callback, sharp], epochs=3)
    assert trainer.global_step == 12 + 2 * 3
    assert callback.controller.samples == 270
    assert model.seen.rates == pytest.approx([0.1] * 12 + [0.4] * 6)
    assert [m.epoch for m in sharp.monitor.history] == [0, 1, 2, 3]


def test_ctrl_c_in_the_second_pass_leaves_the_weights():
    passes = []  # where they took place; what the module notes of a second pass is forgotten

    class Interrupted(Net):
        def training_step(self, batch, batch_idx):
            passes.append(weights(self))
            if len(passes) == 4:  # the second pass of the second step
                raise KeyboardInterrupt
            return super().training_step(batch, batch_idx)

    class Keep(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.kept = weights(pl_module)

    model, keep = Interrupted(), Keep()
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        fit(model, Data(), [keep, SAMCallback(0.5)], epochs=1)
    assert torch.equal(weights(model), keep.kept)
    assert not torch.equal(passes[-1], keep.kept)
    assert not {"log", "log_dict"} & set(vars(model))


def test_a_second_fit_of_the_same_trainer_goes_on():
    callback, model, data = BatchSizeCallback("0:8 1ep:32"), Net(), Data()
    trainer = fit(model, data, [callback], epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, datamodule=data)
    assert [batches_of(model, epoch) for epoch in range(2)] == [[8] * 12, [32] * 3]
    assert callback.controller.samples == 2 * 96


def test_a_schedule_that_looks_at_sharpness_or_noise():
    rule = "window=1, every='6 steps', min_wait='6 steps', budget=1.0, deadline='2ep'"
    sharp = BatchSizeCallback(f"sharpness_switch(8, 32, 'hessian_topk:k=1', {rule})", num_samples=32)
    model = Net()
    fit(model, Data(), [sharp], epochs=4)
    assert batches_of(model, 3) == [32] * 3
    noise = BatchSizeCallback("noise_scale(16, 64, min_wait='2 steps')", mode="accumulate")
    callback = measuring(every="4 steps")
    fit(Net(), DataLoader(dataset(), batch_size=8), [noise, callback], epochs=4)
    assert "gradient_noise_scale" in noise.controller.signals
    assert noise._noise.meter.average.num_steps > 0
    assert "gradient_noise_scale" in callback.last.values


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("sized", [False, True])  # by Lightning's accumulation, or BatchSizeCallback's
def test_the_noise_scale_comes_from_the_micro_batches_of_training(sized, half):
    num_samples = 92  # of 12 batches the last has 4: Lightning gives it the weight of 8, which tells nothing
    model, callback = Net(), measuring(every="1ep", noise_scale=True)
    settings = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=Scaler(init_scale=2.0**8))]} if half else {}
    callbacks = [callback, SAMCallback(0.1)]
    if sized:
        callbacks.append(BatchSizeCallback("32", mode="accumulate"))
    else:
        settings["accumulate_grad_batches"] = 4
    fit(model, Data(num_samples=num_samples), callbacks, epochs=1, gradient_clip_val=0.01, **settings)
    twin = Net()
    meter = NoiseScaleMeter(twin.parameters())
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    loaded = list(DataLoader(dataset(num_samples), batch_size=8))
    for at in range(0, 12, 4):
        group = loaded[at : at + 4]
        total = sum(len(targets) for _, targets in group)

        def backward(group=group, total=total, weighted=contextlib.nullcontext):
            for inputs, targets in group:
                loss = nn.functional.cross_entropy(twin.net(inputs), targets)
                with weighted(len(targets)):
                    (loss * (len(targets) / total)).backward()

        optimizer.zero_grad()
        backward(weighted=meter.micro_batch)
        if total == 32 or sized:
            meter.step()
        else:
            meter.discard()
        with perturbed(twin.parameters(), 0.1):
            backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.01)
        optimizer.step()
    assert (callback._noise is None) == sized
    watch = callbacks[-1]._noise if sized else callback._noise
    assert watch.meter.average.num_steps == (3 if sized else 2)
    for name in ("gradient_variance", "gradient_norm_squared"):
        found, expected = (one.signal(name, 3, num_samples) for one in (watch.meter, meter))
        assert found.value == pytest.approx(expected.value, rel=0.1 if half else 1e-5)
    recorded, told = callback.last.values["gradient_noise_scale"], watch.signal(3, num_samples)
    assert (recorded == told.value) if told.value is not None else math.isnan(recorded)


def test_all_three_at_once():
    sizes, sam, sharp = BatchSizeCallback("0:8 1ep:32"), SAMCallback(0.1), measuring(every="1ep")
    model = Net(batch_norm=True)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=Scaler(init_scale=2.0**8))
    fit(model, Data(validation=True), [sharp, sam, sizes], epochs=3, gradient_clip_val=1.0, plugins=[plugin])
    assert [batches_of(model, epoch) for epoch in range(3)] == [[8] * 12, [32] * 3, [32] * 3]
    assert {"hessian_topk", "surrogate_gap", "gradient_norm"} <= set(sharp.last.values)
    twin = Net(batch_norm=True)
    fit(
        twin,
        Data(validation=True),
        [SAMCallback(0.1), BatchSizeCallback("0:8 1ep:32")],
        epochs=3,
        gradient_clip_val=1.0,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler=Scaler(init_scale=2.0**8))],
    )
    assert torch.equal(weights(model), weights(twin))


# --- weights in parts

TRAINS_SHARDS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 7)  # on the CPU
SHARDED_RUNS = ("plain", "measured", "SAM", "accumulated", "sizes", "all")


class ShardedNet(Net):
    """Lightning's sanity check leaves the weights of its outer group gathered."""

    def configure_model(self):
        if not any(isinstance(parameter, DTensor) for parameter in self.parameters()):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net[0], mesh=mesh)
            fully_shard(self.net, mesh=mesh)


def callbacks_and_settings(name):
    sam = [SAMCallback(0.1)] * (name in ("SAM", "accumulated", "all"))
    sizes = [BatchSizeCallback("0:8 1ep:32 3ep:16")] * (name in ("sizes", "all"))
    extra = {"accumulate_grad_batches": 2} if name == "accumulated" else {"gradient_clip_val": 0.1}
    return [*([measuring(num_samples=48)] * (name != "plain")), *sam, *sizes], extra


def sharded_run(name, rank):
    """``rank`` None: one process with the whole batches."""
    callbacks, settings = callbacks_and_settings(name)
    data = (InOrderOfRanks if rank is None else Data)(validation=True)
    data.data = TensorDataset(data.data.tensors[0].double(), data.data.tensors[1])
    if rank is None:
        model = Net().double()
    else:
        model = ShardedNet().double()
        data.batch_size = 8 if name in ("sizes", "all") else 4
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
        settings |= {"devices": 2, "strategy": strategy}
    fit(model, data, callbacks, epochs=4, **settings)
    whole = [distributed.whole(parameter.detach()).flatten() for parameter in model.parameters()]
    history = callbacks[0].monitor.history if callbacks else []
    return {
        "weights": torch.cat(whole).tolist(),
        "rng": torch.get_rng_state().sum().item(),
        "history": [[made.step, made.samples, made.loss, dict(made.values)] for made in history],
    }


def sharded_on_fabric(rank, sam):
    settings = {"accelerator": "cpu", "callbacks": [callback := fabric_callback(num_samples=16)]}
    plain = Net().double()
    if rank is not None:
        settings |= {
            "devices": 2,
            "strategy": FabricModelParallelStrategy(
                lambda module, mesh: fully_shard(module, mesh=mesh["data_parallel"]),
                data_parallel_size=2,
                tensor_parallel_size=1,
                process_group_backend="gloo",
            ),
        }
    fabric = Fabric(**settings)
    fabric.launch()
    model = fabric.setup(plain.net)
    optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    inputs, targets = dataset().tensors
    for index, rows in enumerate(torch.arange(96).split(16)):
        batch = inputs[rows].double(), targets[rows]
        fabric.call("on_train_batch_start", batch, index)
        mine = [part if rank is None else part[rank::2] for part in batch]

        def closure(mine=mine):
            loss = nn.functional.cross_entropy(model(mine[0]), mine[1])
            fabric.backward(loss)
            return loss

        optimizer.zero_grad()
        sam_step(optimizer, closure, 0.1, module=model) if sam else (closure(), optimizer.step())
    whole = [distributed.whole(parameter.detach()).flatten() for parameter in plain.net.parameters()]
    values = [[made.step, made.loss, dict(made.values)] for made in callback.monitor.history]
    return {"weights": torch.cat(whole).tolist(), "values": values}


SHARDED_SCRIPT = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import warnings
from test_adapter_lightning import *
warnings.simplefilter("ignore")
child = os.fork()  # before any thread; so that Lightning is imported once
rank = 0 if child else 1
os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
out = {name: sharded_run(name, rank) for name in SHARDED_RUNS}
out |= {f"Fabric {sam}": sharded_on_fabric(rank, sam) for sam in (False, True)}
try:
    fit(ShardedNet(), Data(), [measuring(noise_scale=True)], devices=2, strategy=ModelParallelStrategy(2, 1, True, "gloo"))
except ValueError as error:
    out["noise"] = str(error)
with open(sys.argv[2] + os.environ["RANK"], "w") as file:
    json.dump(out, file)
if child:
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.fixture(scope="module")
def sharded_ranks(tmp_path_factory):
    return on_two_ranks(tmp_path_factory.mktemp("sharded"), SHARDED_SCRIPT)


@pytest.mark.skipif(not TRAINS_SHARDS, reason="torch 2.6 trains fully_shard on accelerators only")
@pytest.mark.parametrize("name", SHARDED_RUNS)
def test_fully_sharded_is_one_process(sharded_ranks, name):
    alone = sharded_run(name, None)
    for found in sharded_ranks:
        assert found[name]["weights"] == pytest.approx(alone["weights"], rel=1e-10, abs=1e-12)
        assert [made[:2] for made in found[name]["history"]] == [made[:2] for made in alone["history"]]
        for one, other in zip(found[name]["history"], alone["history"], strict=True):
            assert one[2] == pytest.approx(other[2], rel=1e-10)
            assert one[3] == pytest.approx(other[3], rel=1e-10)
        assert found["measured"]["weights"] == found["plain"]["weights"]
        assert found["measured"]["rng"] == found["plain"]["rng"]
    if name != "plain":
        assert len(alone["history"]) > 3
        assert "gradient_norm" in alone["history"][-1][3]


@pytest.mark.skipif(not TRAINS_SHARDS, reason="torch 2.6 trains fully_shard on accelerators only")
@pytest.mark.parametrize("sam", [False, True])
def test_fully_sharded_on_fabric_is_one_process(sharded_ranks, sam):
    alone = sharded_on_fabric(None, sam)
    assert [step for step, *_ in alone["values"]] == [1, 3, 6]
    assert set(alone["values"][0][2]) == {"hessian_topk", "gradient_norm"} | ({"surrogate_gap"} if sam else set())
    for found in sharded_ranks:
        assert found[f"Fabric {sam}"]["weights"] == pytest.approx(alone["weights"], rel=1e-10, abs=1e-12)
        for one, other in zip(found[f"Fabric {sam}"]["values"], alone["values"], strict=True):
            assert one[:2] == pytest.approx(other[:2], rel=1e-10)
            assert one[2] == pytest.approx(other[2], rel=1e-10)


@pytest.mark.skipif(not TRAINS_SHARDS, reason="torch 2.6 trains fully_shard on accelerators only")
def test_the_noise_of_sharded_gradients_is_refused(sharded_ranks):
    assert all("sharded over the ranks (FSDP)" in found["noise"] for found in sharded_ranks)


# --- refused in words


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="batch_size of the datamodule"):
        fit(Net(), DataLoader(dataset(), batch_size=8), [BatchSizeCallback("8", mode="loader")])
    with pytest.raises(ValueError, match="does not use batch_size"):
        fit(Net(batch_size=4), DataLoader(dataset(), batch_size=8), [BatchSizeCallback("16")])
    with pytest.raises(ValueError, match="Leave it out of the Trainer"):
        fit(Net(), Data(), [BatchSizeCallback("8")], accumulate_grad_batches=2)
    with pytest.raises(ValueError, match="mode is"):
        BatchSizeCallback("8", mode="both")
    with pytest.raises(ValueError, match="radius"):
        SAMCallback(rho=-1)
    with pytest.raises(ValueError, match="nobody knows"):
        total_steps("noise_scale(16, 64)", 96, 2)
    model = Net()
    model.automatic_optimization = False
    for callback in (SAMCallback(), BatchSizeCallback("8")):
        with pytest.raises(ValueError, match="automatic optimization"):
            fit(model, Data(), [callback])
    for name in ("FSDPStrategy", "DeepSpeedStrategy"):
        for callback in (SharpnessCallback(METRIC), SAMCallback(), BatchSizeCallback("8")):
            trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
            trainer.strategy.__class__ = type(name, (type(trainer.strategy),), {})  # the real ones begin on GPUs only
            what = type(callback).__name__
            with pytest.raises(ValueError, match=rf"^{what} does not work with {name}, .* fully_shard \(FSDP2\)$"):
                callback.setup(trainer, model, "fit")
        automatic = SharpnessCallback(METRIC)
        automatic.is_optional = True
        with pytest.warns(PluginWarning, match=f"no sharpness is measured: ValueError: SharpnessCallback .* {name}"):
            automatic.setup(trainer, model, "fit")
        automatic.on_train_start(trainer, model)
        assert automatic.monitor is None
    with pytest.raises(TypeError, match=r"Import Trainer and LightningModule from lightning\.pytorch"):
        SharpnessCallback().setup(object(), model, "fit")


# --- two ranks

SCRIPT = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import warnings
from test_adapter_lightning import *
from torch.utils.data import SequentialSampler
from sharpness_plugins.errors import RemoteFailureError
warnings.simplefilter("ignore")
child = os.fork()  # before any thread; so that Lightning is imported once
os.environ["RANK"] = os.environ["LOCAL_RANK"] = "0" if child else "1"
out = {}
ddp = dict(devices=2, strategy="ddp", num_nodes=1)

def run(name, callbacks, data=None, **settings):
    model = Net(batch_norm=False)
    trainer = fit(model, data or Data(), callbacks, **{'epochs': 4, **ddp, **settings})
    out[name] = {"batches": model.seen.batches, "rates": model.seen.rates, "weights": weights(model).tolist(),
                 "steps": trainer.global_step, "rng": torch.get_rng_state().sum().item()}
    return out[name]

schedule = "0:8 1ep:32 3ep:16"
sharp, sizes = measuring(every="1ep"), BatchSizeCallback(schedule)
found = run("three", [sharp, SAMCallback(0.1), sizes], gradient_clip_val=1.0)
run("rules", [SAMCallback(0.1, rule="looksam:k=2"), BatchSizeCallback("0:16")], gradient_clip_val=1.0)
found["history"] = [{**m.to_dict(), "seconds": 0} for m in sharp.monitor.history]
found["changes"] = [[c.step, c.samples, c.epoch, c.new.batch_size] for c in sizes.history]
found["monitored"] = sharp.last.values
run("two", [SAMCallback(0.1), BatchSizeCallback(schedule)], gradient_clip_val=1.0)
growing = BatchSizeCallback("0:8 15 steps:32 18 steps:24", mode="accumulate", micro_batch=4)
run("accumulate", [SAMCallback(0.1), growing], Data(batch_size=4, num_samples=90))
callback = BatchSizeCallback(schedule)
data = dataset()
run("shared", [callback], DataLoader(data, batch_sampler=callback.batch_sampler(SequentialSampler(data))))
run("timed", [measuring(every="0.01 s")], epochs=1)
sharp = measuring(every="4 steps", noise_scale=True)
run("noise", [sharp], epochs=2)
meter = sharp._noise.meter
out["noise"]["noise"] = [meter.average.num_steps, meter.signal("gradient_variance", 0, 0).value]
run("bf16", [measuring(every="5 steps"), SAMCallback(0.1)], precision="bf16-mixed", epochs=1)
half = [MixedPrecision("16-mixed", "cpu", scaler=Scaler(init_scale=2.0**8))]
run("fp16", [measuring(every="5 steps"), SAMCallback(0.1), BatchSizeCallback(schedule)], plugins=half, gradient_clip_val=1.0)
on_fabric = dict(devices=2, schedule="0:16 1ep:48", epochs=3)
given, shown = fabric_callback(probe=DataLoader(dataset(), batch_size=16)), fabric_callback()
model, controller, sizes = fabric_run(given, **on_fabric)
fabric_run(shown, **on_fabric)
out["fabric"] = {
    "weights": weights(model).tolist(), "unmeasured": weights(fabric_run(**on_fabric)[0]).tolist(), "sizes": sizes,
    "rates": controller.optimizer.rates, "counts": [controller.step, controller.samples],
    **{name: [[m.step, m.samples, m.values["hessian_topk"]] for m in one.monitor.history]
       for name, one in (("history", given), ("shown", shown))},
    "sam": weights(fabric_run(sam=0.2, clip=0.1, devices=2)[0]).tolist(),
}
for name in ("optional", "asked for"):
    broken = measuring(probe=iter(()) if os.environ["RANK"] == "1" else None)
    broken.is_optional = name == "optional"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PluginWarning)
        try:
            found = run(name, [broken], epochs=1)
        except (LoaderError, RemoteFailureError) as error:
            found = out[name] = {"error": f"{type(error).__name__}: {error}"}
    found["said"] = [str(one.message) for one in caught if issubclass(one.category, PluginWarning)]
run("alone", [], epochs=1)
with open(sys.argv[2] + os.environ["RANK"], "w") as file:
    json.dump(out, file)
if child:
    assert os.waitpid(child, 0)[1] == 0
"""


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def on_two_ranks(folder, script):
    """What two gloo ranks found, started as torchrun starts them."""
    (folder / "script.py").write_text(script)
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(free_port()), "TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(folder / "script.py"), str(Path(__file__).parent), str(folder / "out")]
    told = subprocess.run(command, env={**os.environ, **common}, capture_output=True, text=True, timeout=120)
    assert told.returncode == 0, told.stderr[-3000:]
    return [json.loads((folder / f"out{rank}").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_two_ranks(tmp_path_factory.mktemp("ranks"), SCRIPT)


@pytest.mark.parametrize("name", ["three", "two", "rules", "accumulate", "shared", "timed", "noise", "bf16", "fp16"])
def test_two_ranks_stay_one_model(ranks, name):
    assert {key: value for key, value in ranks[0][name].items() if key != "rng"} == {
        key: value for key, value in ranks[1][name].items() if key != "rng"
    }


def test_two_ranks_measure_without_a_trace(ranks):
    assert ranks[0]["three"]["weights"] == ranks[0]["two"]["weights"]
    assert ranks[0]["three"]["rng"] == ranks[0]["two"]["rng"]


def test_what_one_rank_cannot_draw_ends_measuring_on_both_and_training_only_where_it_was_asked_for(ranks):
    cause = "LoaderError: a tuple_iterator has no data set that could be read beside training"
    for found, start in zip(ranks, (f"RemoteFailureError: rank 1 failed: {cause}", cause), strict=True):
        (said,) = found["optional"]["said"]
        assert said.startswith(f"no sharpness is measured: {start}")
        assert found["optional"]["steps"] == found["alone"]["steps"] == 6
        assert found["optional"]["weights"] == found["alone"]["weights"]
        assert found["asked for"]["error"].startswith(start)


def test_two_ranks_tell_the_noise_with_one_micro_batch_each(ranks):
    assert ranks[0]["noise"]["noise"] == ranks[1]["noise"]["noise"]
    num_steps, variance = ranks[0]["noise"]["noise"]
    assert num_steps == ranks[0]["noise"]["steps"] == 12
    assert variance > 0


def test_two_ranks_train_as_one_process_does(ranks):
    # ranks 0 and 1 take every other sample of an order, so the global batches are those of one process
    sharp, sizes = measuring(every="1ep"), BatchSizeCallback("0:8 1ep:32 3ep:16")
    model = Net()
    fit(model, InOrderOfRanks(), [sharp, SAMCallback(0.1), sizes], epochs=4, gradient_clip_val=1.0)
    found = ranks[0]["three"]
    torch.testing.assert_close(torch.tensor(found["weights"]), weights(model), rtol=1e-4, atol=1e-6)
    assert [tuple(batch) for batch in found["batches"]] == [(epoch, size // 2) for epoch, size in model.seen.batches]
    assert found["rates"] == pytest.approx(model.seen.rates)
    assert found["changes"] == [[c.step, c.samples, c.epoch, c.new.batch_size] for c in sizes.history]
    for one, two in zip(found["history"], sharp.monitor.history, strict=True):
        assert (one["step"], one["samples"], one["epoch"]) == (two.step, two.samples, two.epoch)
        assert one["values"]["hessian_topk"] == pytest.approx(two.values["hessian_topk"], rel=1e-3)


def test_two_ranks_follow_a_rule_as_one_process_does(ranks):
    model = Net()
    callbacks = [SAMCallback(0.1, rule="looksam:k=2"), BatchSizeCallback("0:16")]
    fit(model, InOrderOfRanks(), callbacks, epochs=4, gradient_clip_val=1.0)
    torch.testing.assert_close(torch.tensor(ranks[0]["rules"]["weights"]), weights(model), rtol=1e-4, atol=1e-6)


def test_two_ranks_accumulate_and_count_as_planned(ranks):
    model = Net()
    schedule = "0:8 15 steps:32 18 steps:24"
    callbacks = [SAMCallback(0.1), BatchSizeCallback(schedule, mode="accumulate")]
    fit(model, InOrderOfRanks(batch_size=8, num_samples=90), callbacks, epochs=4)
    found = ranks[0]["accumulate"]
    torch.testing.assert_close(torch.tensor(found["weights"]), weights(model), rtol=1e-4, atol=1e-6)
    assert found["steps"] == total_steps(schedule, 90, 4, world_size=2, micro_batch=4)
    assert found["rates"] == pytest.approx(model.seen.rates)


def test_a_shared_sampler_is_handed_on_to_the_one_that_lightning_makes_for_ddp(ranks):  # a kept reference does nothing
    sizes = [[size for at, size in ranks[0]["shared"]["batches"] if at == epoch] for epoch in range(4)]
    assert sizes == [[4] * 12, [16] * 3, [16] * 3, [8] * 6]


# --- Lightning's command line, and entry points


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")  # of Lightning's own calls
def test_lightning_cli_builds_all_three_from_yaml_and_arguments(tmp_path, monkeypatch):
    pytest.importorskip("jsonargparse", reason="LightningCLI needs jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    config = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "limit_val_batches": 0,
        "callbacks": [
            {
                "class_path": "sharpness_adapters.lightning.SharpnessCallback",
                "init_args": {
                    "metrics": [METRIC],
                    "every": "6 steps",
                    "budget": None,
                    "num_samples": 16,
                    "noise_scale": True,
                },
            },
            {"class_path": "sharpness_adapters.lightning.SAMCallback", "init_args": {"rho": 0.1, "rule": "looksam:k=3"}},
        ],
    }
    (tmp_path / "config.yaml").write_text(json.dumps({"trainer": config}))  # JSON is YAML
    monkeypatch.setattr(sys, "argv", ["train"])
    args = ["fit", f"--config={tmp_path / 'config.yaml'}", "--data.batch_size=8", "--trainer.callbacks+=BatchSizeCallback"]
    args += ["--trainer.callbacks.schedule=0:8 1ep:32", "--trainer.callbacks.coupling=none"]
    cli = LightningCLI(Net, Data, args=args, save_config_callback=None, seed_everything_default=False)
    assert [batches_of(cli.model, epoch) for epoch in range(2)] == [[8] * 12, [32] * 3]
    sharp, sam, sizes = (cli.trainer.callbacks[at] for at in range(3))
    assert [m.step for m in sharp.monitor.history] == [0, 6, 12]
    assert sam.rule == LookSAM(k=3)
    assert (sam.rho, sizes.coupling, cli.model.seen.rates[-1]) == (0.1, "none", 0.1)


def test_auto_callbacks_are_opt_in_and_never_raise(monkeypatch):
    monkeypatch.delenv("SHARPNESS_AUTO", raising=False)
    assert auto_callbacks() == auto_fabric_callbacks() == []
    monkeypatch.setenv("SHARPNESS_AUTO", "1")
    monkeypatch.setenv("SHARPNESS_AUTO_METRICS", "hessian_topk")
    monkeypatch.setenv("SHARPNESS_AUTO_EVERY", "5 steps")
    (callback,) = auto_callbacks()
    assert (callback.every, callback.num_samples) == ("5 steps", 512)
    automatic = fit(Net(), Data(), epochs=1).callbacks  # by the entry point
    (found,) = [one for one in automatic if isinstance(one, SharpnessCallback)]
    assert list(found.monitor.history[0].values) == ["hessian_topk"]  # no gradient before the first step
    own = SharpnessCallback(["hessian_topk:k=1"])
    both = [one for one in fit(Net(), Data(), [own], epochs=1).callbacks if isinstance(one, SharpnessCallback)]
    assert [one.last is not None for one in both] == [one is own for one in both]
    assert len(both) == 2
    assert isinstance(auto_fabric_callbacks()[0], FabricSharpnessCallback)
    monkeypatch.setenv("SHARPNESS_AUTO_METRICS", "hessian_tokp")
    with pytest.warns(UserWarning, match="Did you mean"):
        assert auto_callbacks() == []


def test_the_factory_module_imports_nothing_that_costs():
    script = "import sys, sharpness_adapters.lightning_auto as auto; assert auto.auto_callbacks() == []; "
    script += "assert not {'torch', 'lightning', 'sharpness_plugins'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "SHARPNESS_AUTO": ""})


@pytest.mark.parametrize("is_missing", [True, False], ids=["missing", "old"])
@pytest.mark.parametrize("name", ["lightning", "fabric"])
def test_a_missing_or_old_lightning_is_one_sentence(monkeypatch, name, is_missing):
    if is_missing:
        monkeypatch.setitem(sys.modules, {"lightning": "lightning.pytorch", "fabric": "lightning.fabric"}[name], None)
    else:
        monkeypatch.setattr("sharpness_adapters.lightning_versions.metadata.version", lambda distribution: "2.3.1")
    monkeypatch.delitem(sys.modules, f"sharpness_adapters.{name}")
    found = "needs lightning, which is not installed" if is_missing else "needs lightning>=2.4, and 2.3.1 is installed"
    with pytest.raises(ImportError) as caught:
        importlib.import_module(f"sharpness_adapters.{name}")
    sentence, _, command = str(caught.value).partition(found)
    assert sentence.startswith(f"sharpness_adapters.{name} ")
    assert command == '. Install it with: pip install "sharpness-plugins[lightning]"'


# --- Fabric


def fabric_run(
    callback=None,
    *,
    schedule="16",
    sam=None,
    clip=None,
    epochs=2,
    max_micro_batch=None,
    precision="32-true",
    devices=1,
    scale=1024.0,
):
    """Fabric's loop for a plain network; what it trained, the controller, and the sizes of its batches on this rank."""
    settings = {"accelerator": "cpu", "devices": devices, "callbacks": [callback] if callback else []}
    if devices > 1:
        settings["strategy"] = "ddp"
    if precision == "16-mixed":
        settings["plugins"] = [FabricMixedPrecision(precision, "cpu", scaler=Scaler(init_scale=scale))]
    else:
        settings["precision"] = precision
    fabric = Fabric(**settings)
    fabric.launch()
    plain = Net(log=False)
    inner = RecordingSGD(plain.parameters(), lr=0.1, momentum=0.9)
    inner.rates = []
    model, optimizer = fabric.setup(plain.net, inner)
    sizes = []
    if sam is not None:
        loader = fabric.setup_dataloaders(DataLoader(dataset(), batch_size=16 // devices))
        for _ in range(epochs):
            for inputs, targets in loader:
                optimizer.zero_grad()
                sizes.append(len(inputs))

                def closure(inputs=inputs, targets=targets):
                    loss = nn.functional.cross_entropy(model(inputs), targets)
                    fabric.backward(loss)
                    return loss

                limit = None if clip is None else lambda: fabric.clip_gradients(model, optimizer, max_norm=clip)
                sam_step(optimizer, closure, sam, module=model, clip=limit)
        return plain, None, sizes
    controller = BatchController(schedule, inner, model=plain, max_micro_batch=max_micro_batch)
    loader = DataLoader(dataset(), batch_size=16)
    for _ in range(epochs):
        for index, (inputs, targets) in enumerate(batches(fabric, controller, loader, model)):
            fabric.call("on_train_batch_start", (inputs, targets), index)
            sizes.append(len(inputs))
            backward(fabric, controller, nn.functional.cross_entropy(model(inputs), targets))
            if controller.at_step:
                optimizer.step()
                optimizer.zero_grad()
        fabric.call("on_train_epoch_end")
    return plain, controller, sizes


def fabric_callback(**settings):
    return FabricSharpnessCallback(
        METRIC, criterion=nn.CrossEntropyLoss(), **{"budget": None, "every": "3 steps", "num_samples": 32, **settings}
    )


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_fabric_measures_without_a_trace(precision):
    given = fabric_callback(probe=DataLoader(dataset(), batch_size=16))
    seen = fabric_callback()  # takes the first batches that the loop shows
    states = [weights(fabric_run(callback, precision=precision)[0]) for callback in (None, given, seen)]
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])
    assert [m.step for m in given.monitor.history] == [1, 3, 6, 9, 12]
    assert [m.samples for m in given.monitor.history] == [16, 48, 96, 144, 192]
    assert all(m.values["gradient_norm"] > 0 for m in given.monitor.history)
    assert {m.loss_rule for m in given.monitor.history} == {"criterion CrossEntropyLoss"}
    assert [m.step for m in seen.monitor.history] == [2, 3, 6, 9, 12]
    later = fabric_callback(probe=DataLoader(dataset(), batch_size=16))
    later.load_state_dict(json.loads(json.dumps(given.state_dict())))
    fabric_run(later, epochs=1, precision=precision)
    assert [m.step for m in later.monitor.history] == [1, 3, 6, 9, 12, 15, 18]


def test_steps_that_fabrics_scaler_skips_are_not_counted():
    callback = fabric_callback(probe=DataLoader(dataset(), batch_size=16), every="1 step")
    model, controller, _ = fabric_run(callback, precision="16-mixed", scale=2.0**120, epochs=1)
    assert torch.equal(weights(model), weights(Net()))
    assert controller.step == 0
    assert [(m.step, m.epoch) for m in callback.monitor.history] == [(0, 1.0)]
    assert controller.samples == 96


def test_fabric_measures_a_lightning_module_by_its_training_step():
    callback = FabricSharpnessCallback(METRIC, probe=DataLoader(dataset(), batch_size=16), budget=None, every="1ep")
    fabric = Fabric(accelerator="cpu", callbacks=[callback])
    model = Net()
    module, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    module.mark_forward_method("training_step")
    model.log_loss = False
    fabric.backward(module.training_step(dataset().tensors, 0))
    optimizer.step()
    assert math.isfinite(callback.monitor.last.values["hessian_topk"])


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_fabric_with_a_schedule_is_the_large_batch(precision):
    small, controller, sizes = fabric_run(schedule="0:16 1ep:48", max_micro_batch=16, precision=precision)
    assert sizes == [16] * 12
    assert controller.step == 6 + 2
    large, controller, sizes = fabric_run(schedule="0:16 1ep:48", precision=precision)
    assert sizes == [16] * 6 + [48] * 2
    assert controller.optimizer.rates == pytest.approx([0.1] * 6 + [0.3] * 2)
    assert (controller.step, controller.samples) == (8, 192)
    close = {"rtol": 1e-5, "atol": 1e-7} if precision == "32-true" else {"rtol": 0.05, "atol": 0.02}
    torch.testing.assert_close(weights(small), weights(large), **close)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_the_noise_of_fabrics_gradients_is_that_of_the_unscaled_ones(precision):
    _, controller, _ = fabric_run(
        schedule="noise_scale(32, 64, min_wait='99 steps')", max_micro_batch=8, precision=precision
    )
    _, plain, _ = fabric_run(schedule="noise_scale(32, 64, min_wait='99 steps')", max_micro_batch=8)
    assert controller._meter.average.num_steps == 6
    for name in ("gradient_variance", "gradient_norm_squared"):
        found, expected = (one._meter.signal(name, 0, 0).value for one in (controller, plain))
        assert found == pytest.approx(expected, rel=1e-9 if precision == "32-true" else 0.05)


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_fabric_sam_is_the_plain_loop(precision, clip):
    callback = fabric_callback(probe=[dataset().tensors], every="1 step")
    model, _, _ = fabric_run(callback, sam=0.2, clip=clip, precision=precision)
    twin = Net()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    gaps = []
    for _ in range(2):
        for inputs, targets in DataLoader(dataset(), batch_size=16):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(twin.net(inputs), targets)
            loss.backward()
            with perturbed(twin.parameters(), 0.2):
                uphill = nn.functional.cross_entropy(twin.net(inputs), targets)
                uphill.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(twin.parameters(), clip)
            optimizer.step()
            gaps.append((uphill - loss).item())
    exact = precision == "32-true"
    close = {"rtol": 1e-6, "atol": 1e-8} if exact else {"rtol": 0.05, "atol": 0.02}
    torch.testing.assert_close(weights(model), weights(twin), **close)
    recorded = [m.values["surrogate_gap"] for m in callback.monitor.history]
    assert recorded == pytest.approx(gaps, rel=1e-4 if exact else 0.2)
    assert clip is None or all(m.values["gradient_norm"] <= 1.001 * clip for m in callback.monitor.history)


def fabric_steps(model, optimizer, fabric, numbers, accumulate=2, **settings):
    """One ``sam_step`` for each of these steps, of two micro-batches; returns the passes over the data."""
    loaded, passes = list(DataLoader(dataset(), batch_size=8)), []
    for number in numbers:
        group = [loaded[(number * accumulate + at) % len(loaded)] for at in range(accumulate)]

        def closure(group=group):
            passes.append(1)
            total = 0.0
            for index, (inputs, targets) in enumerate(group, 1):
                with fabric.no_backward_sync(model, enabled=index < len(group)):
                    loss = nn.functional.cross_entropy(model(inputs), targets) / accumulate
                    fabric.backward(loss)
                total += loss.detach()
            return total

        sam_step(optimizer, closure, module=model, **settings)
    return len(passes)


def on_fabric(precision="32-true"):
    half = precision == "16-mixed"
    plugins = [FabricMixedPrecision(precision, "cpu", scaler=Scaler(init_scale=1024.0))] if half else None
    fabric = Fabric(accelerator="cpu", devices=1, plugins=plugins)
    plain = Net(batch_norm=True)
    model, optimizer = fabric.setup(plain.net, torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9))
    return plain, model, optimizer, fabric


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_on_fabric_is_the_cores_own_loop(rule):
    plain, model, optimizer, fabric = on_fabric()
    passes = fabric_steps(model, optimizer, fabric, range(12), rho=0.2, rule=rule)
    twin = Net(batch_norm=True)
    core = by_hand(twin, rule, accumulate=2)
    torch.testing.assert_close(weights(plain), weights(twin), rtol=1e-5, atol=1e-6)
    assert passes == 12 * core.gradients_per_step


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize(("rule", "interval", "ascents"), [("looksam:k=4", 1, 1), ("fsam", 3, 2)])  # in steps 8; 6 and 9
def test_fabrics_checkpoint_holds_what_a_rule_remembers(tmp_path, rule, interval, ascents, precision):
    settings = {"rho": 0.2, "rule": rule, "interval": interval}
    plain, model, optimizer, fabric = on_fabric(precision)
    fabric_steps(model, optimizer, fabric, range(5), **settings)
    fabric.save(tmp_path / "state.ckpt", {"model": model, "optimizer": optimizer})
    fabric_steps(model, optimizer, fabric, range(5, 12), **settings)
    again, model, optimizer, fabric = on_fabric(precision)
    fabric.load(tmp_path / "state.ckpt", {"model": model, "optimizer": optimizer})
    assert fabric_steps(model, optimizer, fabric, range(5, 12), **settings) == 7 + ascents
    assert torch.equal(weights(again), weights(plain))


def test_fabrics_radius_may_be_another_in_each_step():
    one, other = on_fabric(), on_fabric()
    radii = [0.1, 0.3, 0.2]
    for number, rho in enumerate(radii):
        fabric_steps(*one[1:], [number], rho=rho)
    fabric_steps(*other[1:], range(3), rho=radii.__getitem__)
    assert torch.equal(weights(one[0]), weights(other[0]))


def test_two_ranks_of_fabric_are_one_process(ranks):
    assert ranks[0]["fabric"] == ranks[1]["fabric"]
    found = ranks[0]["fabric"]
    assert found["weights"] == found["unmeasured"]
    callback = fabric_callback(probe=DataLoader(dataset(), batch_size=16))
    model, controller, sizes = fabric_run(callback, schedule="0:16 1ep:48", epochs=3)
    torch.testing.assert_close(torch.tensor(found["weights"]), weights(model), rtol=1e-4, atol=1e-6)
    assert found["sizes"] == [size // 2 for size in sizes]  # a custom sampler that Fabric sets up would stay at 8
    assert found["rates"] == pytest.approx(controller.optimizer.rates)
    assert found["counts"] == [controller.step, controller.samples]
    told = [[m.step, m.samples, m.values["hessian_topk"]] for m in callback.monitor.history]
    assert [row[:2] for row in found["history"]] == [row[:2] for row in told]
    assert [row[2] for row in found["history"]] == pytest.approx([row[2] for row in told], rel=1e-3)
    assert [row[0] for row in found["shown"]] == [4, 6, 9]  # four batches of 8 on rank 0
    torch.testing.assert_close(torch.tensor(found["sam"]), weights(fabric_run(sam=0.2, clip=0.1)[0]), rtol=1e-4, atol=1e-6)


def test_the_example_runs(tmp_path):
    pytest.importorskip("matplotlib", reason="the example draws")
    pytest.importorskip("sklearn", reason="the example trains on scikit-learn's digits")
    example = runpy.run_path(str(Path(__file__).parents[1] / "adapters" / "examples" / "lightning_digits.py"))
    sharpness, sizes, accuracy = example["train"](tmp_path)
    example["plot"](sharpness, sizes).savefig(tmp_path / "plot.png")
    assert [(change.epoch, change.new.batch_size) for change in sizes.history] == [(3, 256)]
    assert len(sharpness.monitor.history) == 11
    assert accuracy > 0.9
    assert (tmp_path / "flattest.ckpt").exists()
