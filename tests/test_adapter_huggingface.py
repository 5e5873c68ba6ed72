"""Hugging Face Trainer and Accelerate, the real ones, on the CPU."""

from __future__ import annotations

import contextlib
import gc
import importlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

pytest.importorskip("transformers", reason="the Hugging Face adapter is tested where transformers is installed")
pytest.importorskip("accelerate", reason="the Hugging Face adapter is tested where accelerate is installed")

import transformers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EarlyStoppingCallback,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from sharpness_adapters.huggingface import (
    BatchSizeCallback,
    SAMCallback,
    SharpnessCallback,
    set_batch_size,
    train_in_phases,
)
from sharpness_adapters.plain import attach
from sharpness_plugins import distributed, measure_sharpness
from sharpness_plugins.controller import BatchController
from sharpness_plugins.errors import LoaderError
from sharpness_plugins.objective import Objective
from sharpness_plugins.optimizers import SharpnessAware, perturbed
from sharpness_plugins.probe import probe_batches
from sharpness_plugins.registry import get_rule
from sharpness_plugins.report import Kind, MetricResult, Status
from sharpness_plugins.samplers import ResizableBatchSampler
from sharpness_plugins.schedules import Plan, SharpnessSwitch
from sharpness_plugins.texts import name_and_settings

NUM_SAMPLES = 32


@dataclass(frozen=True)
class GradientNorm:
    """As cheap as a metric gets: one gradient."""

    name = "gradient_norm"

    def __call__(self, objective, rng):
        _, gradient = objective.value_and_grad()
        return MetricResult(gradient.norm().item(), status=Status(Kind.EXACT, ""))


METRIC = GradientNorm()


@pytest.fixture(autouse=True, scope="module")
def few_objects():
    """Trainer collects garbage whenever training begins, .3 s over what torch and transformers have made."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def bert(**settings) -> nn.Module:
    torch.manual_seed(0)
    config = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **settings}
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForSequenceClassification(BertConfig(vocab_size=16, max_position_embeddings=8, **sizes, **config))


def gpt(**settings) -> nn.Module:
    torch.manual_seed(0)
    config = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **settings}
    return GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2, **config))


def sentences(count: int = NUM_SAMPLES) -> list[dict[str, torch.Tensor]]:
    x = torch.randint(0, 16, (count, 6), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": (row[0] > 7).long()} for row in x]


def texts(count: int = NUM_SAMPLES) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in sentences(count)]


def trainer_of(folder: Path, model: nn.Module, data: list, cls: type[Trainer] = Trainer, **settings) -> Trainer:
    defaults = {
        "per_device_train_batch_size": 8,
        "num_train_epochs": 2,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "optim": "sgd",
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    args = TrainingArguments(output_dir=str(folder), **{**defaults, **settings})
    return cls(model=model, args=args, train_dataset=data, eval_dataset=data[:8])


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([value.detach().flatten().double() for value in model.state_dict().values()])


def logged(trainer: Trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class Watch(TrainerCallback):
    """What happens in each optimizer step: the samples it consumed, and the learning rate that it used."""

    def __init__(self, trainer: Trainer) -> None:
        self.batches: list[int] = []
        self.rows: list[tuple[int, ...]] = []
        self.rates: list[float] = []
        self.steps: list[int] = []
        self.epochs: list[float] = []
        self._count = 0
        step = trainer.training_step

        def training_step(model, inputs, *args, **kwargs):
            self._count += len(inputs["input_ids"])
            self.rows += [tuple(row.tolist()) for row in inputs["input_ids"]]
            return step(model, inputs, *args, **kwargs)

        trainer.training_step = training_step
        trainer.add_callback(self)

    def on_optimizer_step(self, args, state, control, lr_scheduler=None, **kwargs):
        self.batches.append(self._count)
        self.rates.append(lr_scheduler.get_last_lr()[0])
        self._count = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)
        self.epochs.append(state.epoch)


# --- measuring


@pytest.mark.parametrize(
    "settings", [{}, {"gradient_accumulation_steps": 2}, {"dataloader_num_workers": 1}, {"bf16": True}], ids=str
)
def test_training_with_measuring_is_training_without(tmp_path, settings):
    if "dataloader_num_workers" in settings:
        settings = {**settings, "dataloader_persistent_workers": True}
    plain = trainer_of(tmp_path / "plain", bert(hidden_dropout_prob=0.1), sentences(), **settings)
    plain.train()
    measured = trainer_of(tmp_path / "measured", bert(hidden_dropout_prob=0.1), sentences(), **settings)
    watch = Watch(measured)
    callback = SharpnessCallback([METRIC], every="1 step", budget=None, num_samples=8).attach(measured)
    measured.train()
    assert torch.equal(weights(plain.model), weights(measured.model))
    assert sum(watch.batches) == 2 * NUM_SAMPLES
    assert [made.step for made in callback.history] == [0, *watch.steps]
    # Trainer's own log of a step is not lost to ours
    assert logged(measured, "loss") == logged(plain, "loss")
    assert len(logged(measured, "loss")) == len(watch.steps)


def test_trainers_log_is_a_sink_with_steps_samples_and_signals(tmp_path):
    trainer = trainer_of(tmp_path, bert(), sentences(30), eval_strategy="epoch")
    told = []
    callback = SharpnessCallback(
        [METRIC], every="1ep", budget=None, num_samples=8, signals={"pi": lambda: 3.0}, sinks=told.append
    ).attach(trainer)
    trainer.train()
    assert [(made.step, made.samples, made.epoch) for made in callback.history] == [(0, 0, 0.0), (4, 30, 1.0), (8, 60, 2.0)]
    name = next(name for name in callback.history[0].values if name != "pi")
    assert logged(trainer, f"sharpness/{name}") == [made.values[name] for made in callback.history]
    assert logged(trainer, "sharpness/loss") == [made.loss for made in callback.history]
    assert logged(trainer, "sharpness/pi") == [3.0] * 3
    assert told == callback.history
    assert len(logged(trainer, "eval_loss")) == 2
    json.dumps(trainer.state.log_history)


def test_the_norm_of_the_gradient_and_the_surrogate_gap_come_by_themselves(tmp_path):
    settings = {"max_grad_norm": 0.05, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    trainer = trainer_of(tmp_path / "plain", gpt(), texts(), **settings)
    callback = SharpnessCallback(["fisher_trace"], every="1 step", budget=None, num_samples=8).attach(trainer)
    trainer.train()
    assert "gradient_norm" not in callback.history[0].values  # before the first step
    norms = [made.values["gradient_norm"] for made in callback.history[1:]]
    assert norms == pytest.approx([min(norm, 0.05) for norm in logged(trainer, "grad_norm")], rel=1e-3)  # as it was clipped
    assert callback._gradients == []
    trainer = trainer_of(tmp_path / "sam", gpt(), texts(), max_grad_norm=1e9)
    callback = SharpnessCallback(["fisher_trace"], every="1 step", budget=None, num_samples=8).attach(trainer)
    sam = SAMCallback(rho=0.5).attach(trainer)
    trainer.train()
    assert [made.values["gradient_norm"] for made in callback.history[1:]] == pytest.approx(logged(trainer, "grad_norm"))
    assert callback.history[-1].values["surrogate_gap"] == sam.surrogate_gap()
    assert logged(trainer, "sharpness/surrogate_gap")[-1] == sam.surrogate_gap()


def test_it_measures_the_model_and_the_mean_over_examples_whatever_trainer_scales_its_loss_by(tmp_path):
    trainer = trainer_of(tmp_path, bert(), sentences(), gradient_accumulation_steps=2, max_steps=1, learning_rate=0.0)
    callback = SharpnessCallback([METRIC], every="1 step", budget=None, num_samples=NUM_SAMPLES).attach(trainer)
    trainer.train()
    model = trainer.model.eval()
    x, y = (torch.stack([row[name] for row in sentences()]) for name in ("input_ids", "labels"))
    mean = F.cross_entropy(model(input_ids=x).logits.double(), y).item()
    assert callback.history[-1].loss == pytest.approx(mean, rel=1e-6)
    own = logged(trainer, "loss")[0]
    assert own > 1.8 * mean  # the trap: Trainer adds two means up, as the model ignores num_items_in_batch
    probe = probe_batches(trainer.get_train_dataloader(), NUM_SAMPLES)
    report = measure_sharpness(trainer.model, probe, [METRIC])
    assert list(callback.history[-1].values.values()) == [result.value for result in report.results.values()]
    rule = "model(**batch).loss, a cross-entropy"
    assert report.provenance["loss_rule"] == callback.history[-1].loss_rule == rule


def test_the_rule_of_a_language_model_is_the_next_token(tmp_path):
    trainer = trainer_of(tmp_path, gpt(), texts(), max_steps=1, learning_rate=0.0)
    callback = SharpnessCallback([METRIC], every="1 step", budget=None, num_samples=NUM_SAMPLES).attach(trainer)
    trainer.train()
    x = torch.stack([row["input_ids"] for row in texts()])
    logits = trainer.model.eval()(input_ids=x).logits.double()
    mean = F.cross_entropy(logits[:, :-1].reshape(-1, 16), x[:, 1:].reshape(-1)).item()
    assert callback.history[-1].loss == pytest.approx(mean, rel=1e-6)
    report = measure_sharpness(trainer.model, probe_batches(trainer.get_train_dataloader()), [METRIC])
    assert report.provenance["loss_rule"] == "model(**batch).loss, a cross-entropy of the next token"


def test_mixed_precision_is_measured_without_autocast(tmp_path):
    trainer = trainer_of(tmp_path, bert(), sentences(), bf16=True, max_steps=1, learning_rate=0.0)
    callback = SharpnessCallback([METRIC], every="1 step", budget=None, num_samples=NUM_SAMPLES).attach(trainer)
    trainer.train()
    probe = probe_batches(trainer.get_train_dataloader(), NUM_SAMPLES)
    report = measure_sharpness(bert(), probe, [METRIC])
    assert callback.history[-1].loss == report.loss
    assert list(callback.history[-1].values.values()) == [result.value for result in report.results.values()]
    assert vars(trainer.model)["forward"] is not trainer.model._original_forward  # training has its autocast back


def test_it_works_unattached_and_without_a_log(tmp_path):
    trainer = trainer_of(tmp_path, bert(), sentences())
    callback = SharpnessCallback([METRIC], every="1ep", budget=None, num_samples=8)
    trainer.add_callback(callback)
    trainer.train()
    assert [made.step for made in callback.history] == [0, 4, 8]
    assert not any(name.startswith("sharpness") for entry in trainer.state.log_history for name in entry)


def test_a_metric_that_fails_is_recorded_and_training_goes_on(tmp_path):
    def broken(objective, rng):
        raise RuntimeError("no")

    trainer = trainer_of(tmp_path, bert(), sentences())
    callback = SharpnessCallback({"broken": broken, "norm": METRIC}, every="1ep", budget=None, num_samples=8).attach(trainer)
    with pytest.warns(UserWarning, match="broken"):
        trainer.train()
    assert all(math.isnan(made.values["broken"]) and made.values["norm"] > 0 for made in callback.history)
    assert not logged(trainer, "sharpness/broken")
    assert len(logged(trainer, "sharpness/norm")) == 3


# --- resuming


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


@pytest.mark.parametrize(("stop", "restore"), [(3, False), (5, True), (6, False)])  # in an epoch of each size, and at an end
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, restore, stop):
    def make(folder):
        settings = {"optim": "adamw_torch", "num_train_epochs": 4, "restore_callback_states_from_checkpoint": restore}
        trainer = trainer_of(tmp_path / folder, gpt(resid_pdrop=0.1), texts(), **settings)
        sharpness = SharpnessCallback([METRIC], every="1 step", budget=None, num_samples=8).attach(trainer)
        SAMCallback(rho=0.1, rule="fsam" if restore else "looksam:k=4").attach(trainer)  # what they remember goes on, too
        sizes = BatchSizeCallback("0:8 1ep:16 2ep:32").attach(trainer)
        return trainer, Watch(trainer), sharpness, sizes

    whole, watch, sharpness, sizes = make("whole")
    whole.train()
    assert watch.batches == [8] * 4 + [16] * 2 + [32] * 2
    first, *_ = make("parts")
    first.add_callback(StopAt(stop))
    first.train()
    second, again, resumed, resumed_sizes = make("parts")
    second.train(resume_from_checkpoint=True)
    assert again.batches == watch.batches[stop:]
    assert again.rows == watch.rows[sum(watch.batches[:stop]) :]
    assert again.steps == watch.steps[stop:]
    assert again.epochs == watch.epochs[stop:]
    assert again.rates == watch.rates[stop:]
    assert torch.equal(weights(second.model), weights(whole.model))
    strip = [(made.step, made.samples, made.loss, made.values) for made in sharpness.history]
    assert [(made.step, made.samples, made.loss, made.values) for made in resumed.history] == strip
    assert [(c.step, c.new) for c in resumed_sizes.history] == [(c.step, c.new) for c in sizes.history]


def test_the_same_trainer_resumes_with_what_its_rule_remembers(tmp_path):
    def make(folder):
        trainer = trainer_of(tmp_path / folder, gpt(), texts())
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.01, momentum=0.9)  # kept from train to train
        return trainer, SAMCallback(rho=0.1, rule="looksam:k=4").attach(trainer)

    whole, _ = make("whole")
    whole.train()
    parts, sam = make("parts")
    parts.add_callback(stop := StopAt(6))
    parts.train()
    parts.remove_callback(stop)
    for parameter in parts.model.parameters():
        parameter.data.zero_()
    parts.train(resume_from_checkpoint=True)
    assert sam._sharp.num_steps == 8
    assert torch.equal(weights(parts.model), weights(whole.model))


def test_a_checkpoint_from_before_the_callback_can_be_resumed_and_saved_again(tmp_path):
    first = trainer_of(tmp_path, bert(), sentences(), save_strategy="steps", save_steps=4)
    first.train()
    second = trainer_of(tmp_path, bert(), sentences(), save_strategy="steps", save_steps=4, num_train_epochs=3)
    callback = SharpnessCallback([METRIC], every="4 steps", budget=None, num_samples=8).attach(second)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [made.step for made in callback.history] == [5, 8, 12]
    saved = json.loads((tmp_path / "checkpoint-12" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["SharpnessCallback"]["attributes"]["_saved"]["history"]


def test_settings_that_json_does_not_hold_are_not_lost_in_silence(tmp_path):
    settings = {"save_strategy": "epoch", "restore_callback_states_from_checkpoint": True}
    first = trainer_of(tmp_path, bert(), sentences(), **settings)
    first.add_callback(SharpnessCallback([METRIC], budget=None, num_samples=8))
    first.train()
    second = trainer_of(tmp_path, bert(), sentences(), **settings)
    second.add_callback(SharpnessCallback([METRIC], budget=None, num_samples=8))
    with pytest.raises(ValueError, match=r"metrics cannot be written as such\. Add it with attach"):
        second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_settings_that_json_holds_are_built_anew_without_being_attached(tmp_path):
    def make():
        trainer = trainer_of(
            tmp_path, bert(), sentences(), save_strategy="epoch", restore_callback_states_from_checkpoint=True
        )
        trainer.add_callback(SharpnessCallback(["fisher_trace"], "1ep", budget=None, num_samples=8))
        return trainer

    make().train()
    trainer = make()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    callback = next(one for one in trainer.callback_handler.callbacks if isinstance(one, SharpnessCallback))
    assert [made.step for made in callback.history] == [0, 4, 8]
    assert all(made.values["fisher_trace"] > 0 for made in callback.history)


# --- SAM


def reference_sam(model: nn.Module, batches: list, rho: float, lr: float, clip: float) -> None:
    """SAM by the textbook, on whole batches."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train()
    for batch in batches:
        gradients = torch.autograd.grad(model(**batch).loss, parameters, allow_unused=True)
        norm = torch.stack([g.double().pow(2).sum() for g in gradients if g is not None]).sum().sqrt().item()
        before = [parameter.detach().clone() for parameter in parameters]
        with torch.no_grad():
            for parameter, g in zip(parameters, gradients, strict=True):
                if g is not None:
                    parameter += rho / norm * g
        second = torch.autograd.grad(model(**batch).loss, parameters, allow_unused=True)
        length = torch.stack([g.double().pow(2).sum() for g in second if g is not None]).sum().sqrt().item()
        with torch.no_grad():
            for parameter, old, g in zip(parameters, before, second, strict=True):
                parameter.copy_(old)
                if g is not None:
                    parameter -= lr * min(1.0, clip / (length + 1e-6)) * g


@pytest.mark.parametrize(
    ("make", "size", "accumulation", "clip"), [(gpt, 16, 1, 1e6), (gpt, 4, 4, 1e6), (gpt, 8, 2, 0.05), (bert, 8, 2, 0.05)]
)
def test_sam_is_sam_with_accumulation_and_clipping(tmp_path, make, size, accumulation, clip):
    data = texts() if make is gpt else sentences()
    # Trainer sums a BERT's micro-batches; of a GPT's it counts six tokens per text, of which five have a next one
    factor = accumulation if make is bert else 5 / 6
    settings = {"train_sampling_strategy": "sequential", "lr_scheduler_type": "constant", "max_grad_norm": clip}
    trainer = trainer_of(
        tmp_path,
        make(),
        data,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        learning_rate=0.1 / factor,
        **{**settings, "max_grad_norm": clip * factor},
    )
    sam = SAMCallback(rho=0.5).attach(trainer)
    trainer.train()
    model = make()
    batches = [{name: torch.stack([row[name] for row in data[at : at + 16]]) for name in data[0]} for at in (0, 16)] * 2
    reference_sam(model, batches, rho=0.5, lr=0.1, clip=clip)
    torch.testing.assert_close(weights(trainer.model), weights(model), rtol=0, atol=1e-6)
    assert not torch.allclose(weights(model), weights(make()), rtol=0, atol=1e-3)
    assert sam.gradient_norm() > 0
    assert sam.surrogate_gap() > 0


@pytest.mark.parametrize(("size", "accumulation"), [(16, 1), (4, 4)])
@pytest.mark.parametrize("clip", [1e6, 0.05])
@pytest.mark.parametrize("rule", ["gsam", "wsam:decoupled=False", "fsam", "looksam:k=2", "momentum_sam", "k_step_sam"])
def test_every_rule_is_the_cores_own_loop(tmp_path, rule, clip, size, accumulation):
    """On whole batches, clipped once; Trainer clips before a callback can see the gradient, which these rules mix in."""
    factor = 5 / 6  # of six tokens that Trainer counts per text, five have a next one
    trainer = trainer_of(
        tmp_path,
        gpt(),
        data := texts(),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        learning_rate=0.1 / factor,
        max_grad_norm=clip * factor,
        train_sampling_strategy="sequential",
        lr_scheduler_type="constant",
    )
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1 / factor, momentum=0.9)
    sam = SAMCallback(rho=0.5, rule=rule).attach(trainer)
    trainer.train()
    name, given = name_and_settings(rule)
    model = gpt()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = SharpnessAware(base, get_rule(name, **given), rho=0.5, model=model)
    model.train()
    for at in (0, 16) * 2:
        batch = {name: torch.stack([row[name] for row in data[at : at + 16]]) for name in data[0]}

        def closure(batch=batch):
            loss = model(**batch).loss
            loss.backward()
            return loss

        optimizer.gradient(closure)
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    torch.testing.assert_close(weights(trainer.model), weights(model), rtol=0, atol=2e-6)
    assert not torch.allclose(weights(model), weights(gpt()), rtol=0, atol=1e-3)
    if optimizer.surrogate_gap is not None:
        assert sam.surrogate_gap() == pytest.approx(optimizer.surrogate_gap * factor, rel=1e-2)


@pytest.mark.parametrize(
    ("settings", "ascents"), [({"interval": 2}, 2), ({"rule": "looksam:k=3"}, 2), ({"rule": "k_step_sam"}, 8)]
)
def test_steps_without_an_ascent_cost_one_pass(tmp_path, settings, ascents):
    trainer = trainer_of(tmp_path, gpt(), texts(), gradient_accumulation_steps=2)
    watch = Watch(trainer)
    sam = SAMCallback(rho=0.1, **settings).attach(trainer)
    trainer.train()
    assert sum(watch.batches) == 2 * NUM_SAMPLES + 16 * ascents
    assert sam.gradient_norm() > 0


def give_scaler(trainer: Trainer) -> None:
    """What fp16 gives a trainer on a GPU, where alone Accelerate allows it."""
    scaler = trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer.accelerator.unscale_gradients = lambda optimizer=None: scaler.unscale_(trainer.optimizer.optimizer)


@pytest.mark.parametrize(("rule", "clip"), [("sam", 0.1), ("gsam", 0.1), ("fsam", 0.1), ("wsam", 0.1), ("fsam", 0.0)])
def test_sam_with_a_grad_scaler_is_sam_without(tmp_path, rule, clip):
    """A scale of 1024 is exact, so only a gradient that was scaled once too often or too rarely would differ."""

    def run(folder, scaled):
        trainer = trainer_of(tmp_path / folder, gpt(), texts(), gradient_accumulation_steps=2, max_grad_norm=clip)
        if scaled:
            give_scaler(trainer)
        SAMCallback(rho=0.5, rule=rule).attach(trainer)
        trainer.train()
        return weights(trainer.model)

    assert torch.equal(run("scaled", True), run("plain", False))


@pytest.mark.parametrize("which", ["first", "second"])
def test_a_step_whose_gradient_overflows_leaves_the_weights_alone(tmp_path, which):
    class Overflowing(Trainer):
        calls = 0

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            self.calls += 1
            return loss * (math.inf if self.calls == (1 if which == "first" else 2) else 1.0)

    trainer = trainer_of(tmp_path, gpt(), texts(), cls=Overflowing, max_steps=1, logging_nan_inf_filter=False)
    give_scaler(trainer)
    SAMCallback(rho=0.5).attach(trainer)
    trainer.train()
    assert torch.equal(weights(trainer.model), weights(gpt()))


def test_sam_under_bfloat16_autocast_takes_two_passes_per_step(tmp_path):
    trainer = trainer_of(tmp_path, gpt(), texts(), bf16=True, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    watch = Watch(trainer)
    sam = SAMCallback(rho=0.1).attach(trainer)
    signals = {"gap": sam.surrogate_gap, "norm": sam.gradient_norm}
    told = SharpnessCallback([METRIC], every="1 step", budget=None, num_samples=8, signals=signals).attach(trainer)
    trainer.train()
    assert watch.batches == [16] * 8  # eight samples, twice
    assert logged(trainer, "sharpness/norm") == [made.values["norm"] for made in told.history[1:]]
    assert all(made.values["gap"] > 0 for made in told.history[1:])
    assert torch.isfinite(weights(trainer.model)).all()


def test_batch_norm_sees_the_first_pass_only(tmp_path):
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 2)

        def forward(self, input_ids, labels):
            logits = self.head(self.norm(input_ids.float()))
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    def run(folder, rho):
        torch.manual_seed(0)
        trainer = trainer_of(tmp_path / folder, Normed(), sentences())
        if rho is not None:
            SAMCallback(rho=rho).attach(trainer)
        trainer.train()
        return trainer.model.norm

    plain, sam = run("plain", None), run("sam", 0.5)
    assert torch.equal(plain.running_mean, sam.running_mean)
    assert torch.equal(plain.num_batches_tracked, sam.num_batches_tracked)
    assert not torch.equal(plain.weight, sam.weight)


def test_sam_of_radius_zero_is_plain_training_with_label_smoothing_and_a_loss_of_ones_own(tmp_path):
    class Own(Trainer):
        def compute_loss(self, *args, **kwargs):
            return 2 * super().compute_loss(*args, **kwargs)

    def run(folder, rho):
        trainer = trainer_of(tmp_path / folder, bert(), sentences(), Own, label_smoothing_factor=0.1)
        if rho is not None:
            SAMCallback(rho=rho).attach(trainer)
        trainer.train()
        return weights(trainer.model)

    assert torch.equal(run("sam", 0.0), run("plain", None))
    assert not torch.equal(run("sam", 0.5), run("plain", None))


def test_adaptive_sam_is_another(tmp_path):
    def run(adaptive):
        trainer = trainer_of(tmp_path, gpt(), texts(), max_steps=1)
        SAMCallback(rho=0.5, adaptive=adaptive).attach(trainer)
        trainer.train()
        return weights(trainer.model)

    assert not torch.equal(run(True), run(False))
    with pytest.raises(ValueError, match="rho is a radius"):
        SAMCallback(rho=-1.0)
    with pytest.raises(ValueError, match=r"m=8 says how a step's first pass is made"):
        SAMCallback(rule="sam:m=8")


def test_an_interrupted_run_leaves_the_trainer_as_it_was(tmp_path):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    trainer = trainer_of(tmp_path, gpt(), texts())
    BatchSizeCallback("0:8 1ep:32").attach(trainer)
    interrupt = Interrupt()
    trainer.add_callback(interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.args.gradient_accumulation_steps == 1
    trainer.remove_callback(interrupt)
    watch = Watch(trainer)
    trainer.train()  # and once more, from the beginning
    assert watch.batches == [8] * 4 + [32]
    trainer.pop_callback(BatchSizeCallback)
    trainer.add_callback(interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_in_phases(trainer, "0:8 1ep:32")
    assert trainer.args.per_device_train_batch_size == 8
    assert "create_scheduler" not in vars(trainer)
    assert interrupt is trainer.callback_handler.callbacks[-1]


def test_a_batch_that_did_not_fit_is_made_smaller_and_the_schedule_begins_anew(tmp_path):
    class Full(Trainer):
        is_full = False

        def compute_loss(self, *args, **kwargs):
            if self.state.global_step == 2 and not self.is_full:
                self.is_full = True
                raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
            return super().compute_loss(*args, **kwargs)

    trainer = trainer_of(tmp_path, gpt(), texts(28), Full, auto_find_batch_size=True)
    watch = Watch(trainer)
    BatchSizeCallback("0:8 1ep:28", coupling="none").attach(trainer)
    trainer.train()
    assert watch.batches[2:] == [8 + 7, 7, 7, 7, 28]  # what was begun with the batch that did not fit, then sevens
    assert watch.rates[2:] == pytest.approx(closing_rates(8, [0, 1, 2, 3, 4]))


def test_a_checkpoint_of_other_batches_is_refused(tmp_path):
    first = trainer_of(tmp_path, gpt(), texts(), save_strategy="steps", save_steps=4)
    BatchSizeCallback("0:16").attach(first)
    first.train()
    second = trainer_of(tmp_path, gpt(), texts(), per_device_train_batch_size=4)
    BatchSizeCallback("0:16").attach(second)
    with pytest.raises(ValueError, match="batches of 8 as the smallest, and the trainer's arguments make 4"):
        second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_sam_taken_off_again_is_no_sam(tmp_path):
    plain = trainer_of(tmp_path / "plain", gpt(), texts())
    plain.train()
    trainer = trainer_of(tmp_path / "sam", gpt(), texts())
    sam = SAMCallback().attach(trainer)
    trainer.remove_callback(sam)
    trainer.train()
    assert torch.equal(weights(plain.model), weights(trainer.model))
    assert not sam._micro_batches


@pytest.mark.parametrize("callback", [SAMCallback(), BatchSizeCallback("0:8")], ids=["sam", "batch_size"])
def test_what_must_know_the_trainer_says_so(tmp_path, callback):
    trainer = trainer_of(tmp_path, gpt(), texts())
    trainer.add_callback(callback)
    with pytest.raises(ValueError, match=r"attach\(trainer\)"):
        trainer.train()


@pytest.mark.parametrize(("engine", "name"), [("is_deepspeed_enabled", "DeepSpeed"), ("is_fsdp_enabled", "FSDP1")])
def test_sharded_engines_are_refused_by_name(tmp_path, engine, name):
    trainer = trainer_of(tmp_path, gpt(), texts())
    setattr(trainer, engine, True)
    kinds = (SharpnessCallback(), SAMCallback(), BatchSizeCallback("0:8"))
    attempts = {type(one).__name__: one.attach for one in kinds}
    attempts["train_in_phases"] = lambda trainer: train_in_phases(trainer, "0:8")
    for what, attempt in attempts.items():
        with pytest.raises(ValueError, match=rf"^{what} does not work with {name}, .* fully_shard \(FSDP2\)$"):
            attempt(trainer)
    wrapped = trainer_of(tmp_path, gpt(), texts())
    wrapped.add_callback(SharpnessCallback([METRIC]))  # does not know the trainer, and sees the model
    wrapped.model.__class__ = type("FullyShardedDataParallel", (type(wrapped.model),), {})
    with pytest.raises(ValueError, match=r"^SharpnessCallback does not work with FSDP1"):
        wrapped.train()


def test_two_of_a_kind_are_refused(tmp_path):
    trainer = trainer_of(tmp_path, gpt(), texts())
    SAMCallback().attach(trainer)
    with pytest.raises(ValueError, match="SAMCallback already"):
        SAMCallback().attach(trainer)


# --- batch sizes by accumulation


def closing_rates(total: int, at: list[int], lr: float = 0.01) -> list[float]:
    """A linear decay to 0 over ``total`` planned steps, where that many are behind."""
    return [lr * (1 - done / total) for done in at]


@pytest.mark.parametrize(
    ("schedule", "batches", "behind"),
    [
        ("0:8", [8] * 4 + [8] * 4, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("0:8 1ep:32", [8] * 4 + [32], [0, 1, 2, 3, 4]),  # the row of the table: naively 4 of 16 steps
        ("0:8 1ep:24", [8] * 4 + [24, 8], [0, 1, 2, 3, 4, 7]),
        ("0:32 1ep:8", [32] + [8] * 4, [0, 4, 5, 6, 7]),  # naively the epoch is cut
        ("0:8 16:16", [8, 8, 16, 16, 16], [0, 1, 2, 4, 6]),  # in the middle of an epoch
        ("0:8 8:16", [8, 8, 16, 16, 16], [0, 1, 2, 4, 6]),  # where 8 samples are no whole batch of 16, one later
        ("0:8 8:32", [8] * 4 + [32], [0, 1, 2, 3, 4]),
        ("0:8 1ep:20", [8] * 4 + [16, 16], [0, 1, 2, 3, 4, 6]),  # whole multiples
    ],
)
def test_batches_samples_and_learning_rates_are_exact_after_a_switch(tmp_path, schedule, batches, behind):
    trainer = trainer_of(tmp_path, gpt(), texts(), eval_strategy="epoch")
    watch = Watch(trainer)
    callback = BatchSizeCallback(schedule, coupling="none").attach(trainer)
    trainer.train()
    assert watch.batches == batches
    assert watch.rates == pytest.approx(closing_rates(8, behind))
    assert watch.epochs[-1] == 2.0
    assert sorted(watch.rows[:NUM_SAMPLES]) == sorted(watch.rows[NUM_SAMPLES:]) == sorted(set(watch.rows))
    assert trainer.lr_scheduler.get_last_lr() == pytest.approx([0.0, 0.0], abs=1e-12)
    assert len(logged(trainer, "eval_loss")) == 2
    assert callback.controller.samples == 2 * NUM_SAMPLES
    assert callback.controller.step == len(batches) == trainer.state.global_step
    assert trainer.args.gradient_accumulation_steps == 1


def test_ragged_epochs_lose_no_sample(tmp_path):
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 3}
    trainer = trainer_of(tmp_path, gpt(), texts(30), **settings)
    watch = Watch(trainer)
    BatchSizeCallback("0:8 1ep:24", coupling="none").attach(trainer)
    trainer.train()
    assert watch.batches == [8, 8, 8, 6, 24, 6, 24, 6]
    assert watch.rates == pytest.approx(closing_rates(12, [0, 1, 2, 3, 4, 7, 8, 11]))
    assert trainer.args.gradient_accumulation_steps == 2


def test_dropped_samples_are_not_counted(tmp_path):
    settings = {"dataloader_drop_last": True, "num_train_epochs": 2}
    trainer = trainer_of(tmp_path, gpt(), texts(30), **settings)
    watch = Watch(trainer)
    callback = BatchSizeCallback("0:8 1ep:16", coupling="none").attach(trainer)
    trainer.train()
    assert watch.batches == [8, 8, 8, 16, 8]
    assert watch.rates == pytest.approx(closing_rates(6, [0, 1, 2, 3, 5]))
    assert callback.controller.samples == 48


def test_a_schedule_of_one_size_is_no_schedule(tmp_path):
    plain = trainer_of(tmp_path / "plain", gpt(resid_pdrop=0.1), texts())
    plain.train()
    scheduled = trainer_of(tmp_path / "fixed", gpt(resid_pdrop=0.1), texts())
    BatchSizeCallback("0:8").attach(scheduled)
    scheduled.train()
    assert torch.equal(weights(plain.model), weights(scheduled.model))
    assert logged(plain, "loss") == logged(scheduled, "loss")


@pytest.mark.parametrize(("optim", "factor"), [("sgd", 4.0), ("adamw_torch", 2.0)])
def test_the_learning_rate_follows_the_batch_size(tmp_path, optim, factor):
    used = []
    trainer = trainer_of(tmp_path, gpt(), texts(), lr_scheduler_type="constant", optim=optim)
    callback = BatchSizeCallback("0:8 1ep:32", on_change=[lambda change: used.append(str(change))]).attach(trainer)
    watch = Watch(trainer)
    trainer.train()
    assert callback.controller._coupling.learning_rates() == pytest.approx([0.01 * factor] * 2)
    assert watch.rates == [0.01] * 5  # in logs the unscaled one
    assert len(used) == 1
    assert "8 -> 32" in used[0]


def test_a_model_that_ignores_num_items_gets_means_and_a_warning(tmp_path):
    def run(folder, size, schedule):
        settings = {"train_sampling_strategy": "sequential", "lr_scheduler_type": "constant", "max_grad_norm": 1e9}
        trainer = trainer_of(tmp_path / folder, bert(), sentences(), per_device_train_batch_size=size, **settings)
        BatchSizeCallback(schedule, coupling="none").attach(trainer)
        with pytest.warns(UserWarning, match="BertForSequenceClassification takes num_items_in_batch and ignores it"):
            trainer.train()
        assert trainer.model_accepts_loss_kwargs
        return weights(trainer.model)

    torch.testing.assert_close(run("many", 8, "0:16"), run("one", 16, "0:16"), rtol=0, atol=1e-7)


def test_max_steps_is_so_much_data(tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 100, "eval_strategy": "steps", "eval_steps": 100}
    trainer = trainer_of(tmp_path, gpt(), texts(), **settings)
    watch = Watch(trainer)
    BatchSizeCallback("0:8 1ep:16", coupling="none").attach(trainer)
    trainer.train()
    assert watch.batches == [8] * 4 + [16]
    assert (tmp_path / "checkpoint-5").is_dir()
    assert len(logged(trainer, "eval_loss")) == 1


def test_a_schedule_may_follow_what_is_measured(tmp_path):
    trainer = trainer_of(tmp_path, gpt(), texts(), num_train_epochs=4)
    often = {"window": 1, "min_wait": "1 step", "every": "1 step"}
    schedule = SharpnessSwitch(8, 32, "hessian_topk:k=1,tolerance=0.5", "below_peak", deadline="1ep", threshold=9.0, **often)
    watch = Watch(trainer)
    callback = BatchSizeCallback(schedule, budget=1.0, budget_in="samples", num_samples=1).attach(trainer)
    trainer.train()
    assert watch.batches == [8] * 4 + [32] * 3
    assert callback.controller.signals[schedule.metric].value > 0


@pytest.mark.parametrize(
    ("schedule", "settings", "message"),
    [
        ("0:4 1ep:8", {}, "goes down to batches of 4, and the trainer's arguments make 8"),
        ("0:8 1ep:16", {"max_steps": 4, "stream": True}, "no length"),
        ("noise_scale(8, 32)", {"per_device_train_batch_size": 4}, "gradient noise"),
    ],
)
def test_what_cannot_be_scheduled_is_refused(tmp_path, schedule, settings, message):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(texts())

    settings = dict(settings)
    trainer = trainer_of(tmp_path, gpt(), texts(), **{key: value for key, value in settings.items() if key != "stream"})
    if "stream" in settings:
        trainer.train_dataset = Stream()
    callback = BatchSizeCallback(schedule).attach(trainer)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert callback.controller is None


# --- one train() per phase


@pytest.mark.parametrize(
    ("schedule", "most", "batches", "behind"),
    [
        ("0:8 1ep:32", None, [8] * 4 + [32, 32], [0, 1, 2, 3, 4, 8]),
        ("0:8 1ep:32 2ep:16", 16, [8] * 4 + [32, 16, 16], [0, 1, 2, 3, 4, 8, 10]),
        ("0:32 1ep:8", None, [32] + [8] * 8, [0, 4, 5, 6, 7, 8, 9, 10, 11]),
    ],
)
def test_phases_are_one_run(tmp_path, schedule, most, batches, behind):
    trainer = trainer_of(tmp_path, gpt(), texts(), num_train_epochs=3, eval_strategy="epoch")
    watch = Watch(trainer)
    sharpness = SharpnessCallback([METRIC], every="1ep", budget=None, num_samples=8).attach(trainer)
    outputs = train_in_phases(trainer, schedule, max_micro_batch=most, coupling="none")
    assert watch.batches == batches
    assert watch.rates == pytest.approx(closing_rates(12, behind))
    assert watch.steps == list(range(1, len(batches) + 1))
    assert watch.epochs == pytest.approx([sum(batches[: n + 1]) / NUM_SAMPLES for n in range(len(batches))])
    assert len(logged(trainer, "loss")) == len(batches)
    assert len(logged(trainer, "eval_loss")) == 3
    assert [made.samples for made in sharpness.history] == [0, 32, 64, 96]
    assert len(outputs) == len(schedule.split())
    assert trainer.args.per_device_train_batch_size == 8
    assert trainer.args.num_train_epochs == 3
    reference = trainer_of(tmp_path, gpt(), texts(), num_train_epochs=3)
    other = Watch(reference)
    reference.train()
    assert watch.rows == other.rows  # the order of the data is that of one run


def test_one_phase_is_plain_training(tmp_path):
    plain = trainer_of(tmp_path / "plain", gpt(resid_pdrop=0.1), texts(), optim="adamw_torch")
    plain.train()
    phased = trainer_of(tmp_path / "phased", gpt(resid_pdrop=0.1), texts(), optim="adamw_torch")
    train_in_phases(phased, "0:8")
    assert torch.equal(weights(plain.model), weights(phased.model))
    assert logged(plain, "loss") == logged(phased, "loss")


def test_phases_and_accumulation_take_the_same_steps(tmp_path):
    def run(folder):
        return trainer_of(tmp_path / folder, gpt(), texts(), optim="adamw_torch", lr_scheduler_type="cosine")

    phased, accumulated = run("phased"), run("accumulated")
    train_in_phases(phased, "0:8 1ep:32")
    BatchSizeCallback("0:8 1ep:32").attach(accumulated)
    accumulated.train()
    torch.testing.assert_close(weights(phased.model), weights(accumulated.model), rtol=0, atol=1e-6)


def test_phases_end_where_another_callback_ends_them_and_load_the_best_model_once(tmp_path):
    settings = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "eval_strategy": "epoch"}
    trainer = trainer_of(tmp_path, gpt(), texts(), num_train_epochs=4, save_strategy="epoch", learning_rate=0.0, **settings)
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    watch = Watch(trainer)
    train_in_phases(trainer, "0:8 1ep:32")
    assert watch.batches == [8] * 4 + [32] * 2  # the first evaluation is the best, the next two are no better
    assert trainer.state.best_global_step == 4
    assert trainer.args.load_best_model_at_end


@pytest.mark.parametrize(
    ("schedule", "settings", "message"),
    [
        ("0:8 1ep:32", {"max_steps": 4}, "whole epochs"),
        ("0:8 1ep:32", {"num_train_epochs": 1.5}, "whole epochs"),
        ("sharpness_switch(8, 32, deadline='9ep')", {}, "signals"),
    ],
)
def test_what_has_no_phases_is_refused(tmp_path, schedule, settings, message):
    with pytest.raises(ValueError, match=message):
        train_in_phases(trainer_of(tmp_path, gpt(), texts(), **settings), schedule)


# --- Accelerate


def loaders(batch_size: int, **settings) -> DataLoader:
    data = TensorDataset(torch.arange(NUM_SAMPLES, dtype=torch.float32)[:, None])
    return DataLoader(data, batch_size=batch_size, **settings)


@pytest.mark.parametrize("drop_last", [False, True])
def test_the_batch_size_of_an_accelerate_loader_changes_between_passes(drop_last):
    from accelerate import Accelerator

    loader = Accelerator(cpu=True).prepare(loaders(8, shuffle=True, drop_last=drop_last))
    for size, expected in ((8, [8] * 4), (32, [32]), (12, [12, 12] if drop_last else [12, 12, 8]), (8, [8] * 4)):
        set_batch_size(loader, size)
        seen = [len(x) for (x,) in loader]
        assert seen == expected
        assert len(loader) == len(expected)
        assert loader.total_batch_size == size


class RecordingSGD(torch.optim.SGD):
    def step(self, closure=None):
        self.rates.append(self.param_groups[0]["lr"])
        return super().step(closure)


def accelerate_loop(*, accumulation=1, measured=False, schedule=None, epochs=3, batch_size=8):
    """A loop of one's own, as Accelerate's users write it. Losses, sizes, rates, evaluations."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    torch.manual_seed(4)
    net = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 2))
    data = TensorDataset(torch.randn(NUM_SAMPLES, 1), torch.arange(NUM_SAMPLES) % 2)
    inner = RecordingSGD(net.parameters(), lr=0.1, momentum=0.9)
    inner.rates = []
    given = net, inner, DataLoader(data, batch_size=batch_size, shuffle=True), DataLoader(data, batch_size=16)
    model, optimizer, loader, evaluation = accelerator.prepare(*given)
    sizes, losses, evaluated = [], [], []
    controller = None if schedule is None else BatchController(schedule, optimizer.optimizer, num_samples=len(data))
    settings = {"metrics": METRIC, "every": "1 step", "budget": None, "probe_samples": 8, "criterion": nn.CrossEntropyLoss()}
    with attach(model, optimizer, loader, **settings) if measured else contextlib.nullcontext() as run:
        for _ in range(epochs):
            if controller is not None:
                set_batch_size(loader, controller.decide().batch_size)
            sizes.append([])
            for x, y in loader:
                sizes[-1].append(len(x))
                with accelerator.accumulate(model):
                    loss = F.cross_entropy(model(x), y)
                    accelerator.backward(loss)
                    losses.append(loss.item())
                    optimizer.step()
                    optimizer.zero_grad()
                if controller is not None:
                    controller.advance(len(x) * accelerator.num_processes)
            model.eval()
            with torch.no_grad():
                evaluated.append(sum(len(x) for x, _ in evaluation))
            model.train()
    history = [] if run is None else [(made.step, made.samples, made.epoch, dict(made.values)) for made in run.history]
    found = {"losses": losses, "sizes": sizes, "rates": inner.rates, "evaluated": evaluated, "history": history}
    if controller is not None:
        found |= {"step": controller.step, "samples": controller.samples}
    return {**found, "weights": weights(accelerator.unwrap_model(model)).tolist(), "rng": torch.get_rng_state().sum().item()}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_measuring_a_loop_of_accelerate_leaves_it_as_it_is(accumulation):
    plain, measured = (accelerate_loop(accumulation=accumulation, measured=measured) for measured in (False, True))
    history = measured.pop("history")
    del plain["history"]
    assert measured == plain
    assert [entry[:3] for entry in history] == [
        (n, 8 * accumulation * n, n * accumulation / 4) for n in range(1, 12 // accumulation + 1)
    ]
    assert all(entry[3]["gradient_norm"] > 0 for entry in history)


def test_a_schedule_with_a_loader_of_accelerate_counts_exactly():
    found = accelerate_loop(schedule="0:8 1ep:32 2ep:16", epochs=4)
    assert found["sizes"] == [[8] * 4, [32], [16] * 2, [16] * 2]
    assert found["rates"] == pytest.approx([0.1] * 4 + [0.4] + [0.2] * 4)
    assert (found["step"], found["samples"]) == (9, 4 * NUM_SAMPLES)
    assert found["evaluated"] == [NUM_SAMPLES] * 4


def test_what_cannot_be_resized_is_refused(monkeypatch):
    from accelerate import Accelerator, DistributedType, PartialState

    accelerator = Accelerator(cpu=True)
    with pytest.raises(ValueError, match="a batch of 0 cannot be shared out"):
        set_batch_size(accelerator.prepare(loaders(8)), 0)
    data = loaders(8).dataset
    own = DataLoader(data, batch_sampler=ResizableBatchSampler(NUM_SAMPLES, 8))
    with pytest.raises(LoaderError, match="come from a ResizableBatchSampler"):
        set_batch_size(own, 16)
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(ValueError, match=r"^set_batch_size does not work with DeepSpeed"):
        set_batch_size(own, 16)


RANKS = """
import json, os, sys, traceback
from datetime import timedelta
from pathlib import Path
import torch, torch.distributed as dist
torch.set_num_threads(1)
folder = Path(sys.argv[1])
sys.path.insert(0, sys.argv[2])
import test_adapter_huggingface as given  # once: what it imports takes longer than what it does
rank = 0 if os.fork() else 1
os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60))
try:
    found = json.dumps(getattr(given, sys.argv[3])(folder))
except BaseException:
    found = traceback.format_exc()
(folder / f"rank{rank}").write_text(found)
sys.stdout.flush()
dist.barrier()
dist.destroy_process_group()
if rank == 0:
    os.wait()
os._exit(0)
"""


def on_two_ranks(folder: Path) -> dict:
    """All that is done on two ranks, once, as processes are slow to start."""
    import torch.distributed as dist
    from accelerate import Accelerator

    gc.freeze()
    found: dict = {}
    accelerator = Accelerator(cpu=True)
    # sizes, by setting both and by a sampler that tells none
    found["sizes"] = []
    for split in (False, True):
        accelerator.dataloader_config.split_batches = split
        loader = accelerator.prepare(loaders(16 if split else 8, shuffle=True))
        passes = []
        for size in (16, 32, 8, 16):
            set_batch_size(loader, size)
            passes.append([x.flatten().int().tolist() for (x,) in loader])
        found["sizes"].append(passes)
    accelerator.dataloader_config.split_batches = False
    sampler = ResizableBatchSampler(NUM_SAMPLES, Plan(4, 1))
    loader = accelerator.prepare(DataLoader(loaders(4).dataset, batch_sampler=sampler))
    found["sampler"] = []
    for micro in (4, 8, 2):
        sampler.resize(Plan(micro, 1))
        found["sampler"].append([x.flatten().int().tolist() for (x,) in loader])
    # SAM in a loop of one's own: all micro-batches of the step are seen twice
    torch.manual_seed(0)
    model, optimizer = torch.nn.Linear(1, 1), None
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loaders(4))
    batches = [x / NUM_SAMPLES for (x,) in loader]
    for _ in range(3):

        def backward():
            for number, x in enumerate(batches, 1):
                last = number == len(batches)
                with contextlib.nullcontext() if last else accelerator.no_sync(model):
                    accelerator.backward(((model(x) - x.sin()) ** 2).mean() / len(batches))

        backward()
        with perturbed(model.parameters(), 0.1):
            backward()
        optimizer.step()
        optimizer.zero_grad()
    found["loop"] = weights(accelerator.unwrap_model(model)).tolist()
    # a loop of one's own, measured and not, and with a schedule
    found["plain"], found["measured"] = (accelerate_loop(measured=measured, batch_size=4) for measured in (False, True))
    found["scheduled"] = accelerate_loop(schedule="0:8 1ep:32 2ep:16", epochs=4, batch_size=4)
    # and Trainer with all callbacks, and with measuring left out
    twin = trainer_of(folder / "twin", gpt(), texts(), per_device_train_batch_size=4, num_train_epochs=3)
    SAMCallback(rho=0.1).attach(twin)
    BatchSizeCallback("0:8 1ep:32 2ep:16").attach(twin)
    twin.train()
    found["unmeasured"] = weights(twin.model).tolist()
    trainer = trainer_of(folder / "trainer", gpt(), texts(), per_device_train_batch_size=4, num_train_epochs=3)
    told = SharpnessCallback([METRIC], every="1ep", budget=None, num_samples=8).attach(trainer)
    SAMCallback(rho=0.1).attach(trainer)
    changes = BatchSizeCallback("0:8 1ep:32 2ep:16").attach(trainer)
    watch = Watch(trainer)
    trainer.train()
    found["batches"], found["rates"] = watch.batches, watch.rates
    found["weights"] = weights(trainer.model).tolist()
    found["history"] = [(made.step, made.samples, list(made.values.values())) for made in told.history]
    found["changes"] = [(change.step, change.new.batch_size) for change in changes.history]
    phased = trainer_of(folder / "phased", gpt(), texts(), per_device_train_batch_size=4, num_train_epochs=3)
    watch = Watch(phased)
    train_in_phases(phased, "0:8 1ep:32 2ep:16")
    found["phases"] = watch.batches
    found["same"] = dist.get_world_size()
    return found


def start_two_ranks(folder, work: str) -> list[dict]:
    env = {**os.environ, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # asked for, and not used: the ranks meet by the file
    command = [sys.executable, "-W", "ignore", "-c", RANKS, str(folder), str(Path(__file__).parent), work]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=150)
    answers = [(folder / f"rank{rank}").read_text() if done.returncode == 0 else done.stderr[-3000:] for rank in range(2)]
    assert all(answer.startswith("{") for answer in answers), answers
    return [json.loads(answer) for answer in answers]


def test_two_ranks(tmp_path):
    one, two = start_two_ranks(tmp_path, "on_two_ranks")
    for passes in zip(one["sizes"], two["sizes"], strict=True):
        for size, first, second in zip((16, 32, 8, 16), *passes, strict=True):
            assert [len(batch) for batch in first] == [len(batch) for batch in second] == [size // 2] * (NUM_SAMPLES // size)
            assert sorted(itertools.chain(*first, *second)) == list(range(NUM_SAMPLES))
    for size, first, second in zip((4, 8, 2), one["sampler"], two["sampler"], strict=True):
        assert [len(batch) for batch in first] == [len(batch) for batch in second] == [size] * (NUM_SAMPLES // size // 2)
        assert sorted(itertools.chain(*first, *second)) == list(range(NUM_SAMPLES))
    for rank in (one, two):
        history = rank["measured"].pop("history")
        assert rank["plain"].pop("history") == []
        assert rank["measured"] == rank["plain"]
        assert [entry[:3] for entry in history] == [[n, 8 * n, n / 4] for n in range(1, 13)]
        found = rank["scheduled"]
        assert found["sizes"] == [[4] * 4, [16], [8] * 2, [8] * 2]
        assert found["rates"] == pytest.approx([0.1] * 4 + [0.4] + [0.2] * 4)
        assert (found["step"], found["samples"], found["evaluated"]) == (9, 4 * NUM_SAMPLES, [NUM_SAMPLES // 2] * 4)
    assert one["scheduled"]["weights"] == two["scheduled"]["weights"]
    assert one["weights"] == one["unmeasured"]
    # the same on both ranks, and what one process does
    for name in ("loop", "weights", "rates", "history", "changes", "batches", "phases"):
        assert one[name] == two[name], name
    assert one["batches"] == [4] * 4 + [16] + [8] * 2
    assert one["phases"] == [4] * 4 + [16] + [8] * 2
    assert one["changes"] == [[4, 32], [5, 16]]
    assert [entry[1] for entry in one["history"]] == [0, 32, 64, 96]
    single = trainer_of(tmp_path / "single", gpt(), texts(), num_train_epochs=3)
    SAMCallback(rho=0.1).attach(single)
    BatchSizeCallback("0:8 1ep:32 2ep:16").attach(single)
    watch = Watch(single)
    single.train()
    assert one["rates"] == pytest.approx(watch.rates)
    model = nn.Linear(1, 1)
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    x = torch.arange(NUM_SAMPLES, dtype=torch.float32)[:, None] / NUM_SAMPLES
    for _ in range(3):
        ((model(x) - x.sin()) ** 2).mean().backward()
        with perturbed(model.parameters(), 0.1):
            ((model(x) - x.sin()) ** 2).mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 1e-4 * parameter.grad
                parameter.grad = None
    assert one["loop"] == pytest.approx(weights(model).tolist(), rel=1e-6)


# --- measuring on loaders that Accelerate has made


class Stream(IterableDataset):
    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __iter__(self):
        return iter(self.data)


def few(count: int) -> TensorDataset:
    g = torch.Generator().manual_seed(count)
    return TensorDataset(torch.randn(count, 4, generator=g).double(), torch.randint(3, (count,), generator=g))


def prepared(accelerator, count: int, what: str, setting: tuple[bool, bool, bool]):
    config = accelerator.dataloader_config
    config.split_batches, config.dispatch_batches, config.even_batches = setting
    size = 8 if config.split_batches else 4
    if what == "stream":
        return accelerator.prepare(DataLoader(Stream(few(count)), batch_size=size))
    loader = accelerator.prepare(DataLoader(few(count), batch_size=size, shuffle=what != "in order"))
    return accelerator.skip_first_batches(loader, 0) if what == "skipped" else loader


LOADERS = [
    (count, what, setting)
    for count in (3, 16, 29)  # fewer than a batch for each rank, whole batches, a ragged last one
    for what in ("in order", "shuffled", "skipped", "stream")
    for setting in itertools.product((False, True), repeat=3)
]


def small() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def on_ranks_with_loaders(folder: Path) -> dict:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    found = {}
    for case in LOADERS:
        try:
            objective = Objective(small(), prepared(accelerator, *case), criterion=nn.CrossEntropyLoss())
            told = [objective.num_samples, objective.loss, *objective.value_and_grad()[1].tolist()]
        except LoaderError as error:
            told = str(error)
        found[repr(case)] = told
    return found


def test_a_loader_of_accelerate_is_measured_as_in_one_process_without_its_repeats(tmp_path):
    ranks = start_two_ranks(tmp_path, "on_ranks_with_loaders")
    for count, what, setting in LOADERS:
        objective = Objective(small(), [few(count).tensors], criterion=nn.CrossEntropyLoss())
        expected = [count, objective.loss, *objective.value_and_grad()[1].tolist()]
        for found in ranks:
            told = found[repr((count, what, setting))]
            if what == "stream" and setting[1]:
                assert "(Accelerate's dispatch_batches), and fills its last batch up" in told
            else:
                assert told == pytest.approx(expected, rel=1e-10, abs=1e-13), (count, what, setting)


# --- weights in parts

TRAINS_SHARDS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 7)  # on the CPU
SHARDED_RUNS = ("plain", "measured", "SAM", "sizes", "all", "phases")


def shard_on_cpu() -> None:
    """Accelerate shards on accelerators only: let it take its group of CPUs for one of those."""
    from accelerate import DistributedType, PartialState
    from accelerate.state import AcceleratorState

    begun = AcceleratorState.__init__

    def begin(self, *args, fsdp_plugin=None, **settings):
        begun(self, *args, fsdp_plugin=fsdp_plugin, **settings)
        if fsdp_plugin is not None:
            AcceleratorState._shared_state["fsdp_plugin"] = fsdp_plugin
            for state in (AcceleratorState, PartialState):
                state._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = begin


def sharded_run(folder: Path, name: str, *, alone: bool) -> dict:
    settings = {"per_device_train_batch_size": 8, "num_train_epochs": 3}
    if not alone:
        version = {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "NO_WRAP"}}
        settings |= {"per_device_train_batch_size": 4, **version}
    trainer = trainer_of(folder / name, gpt().double(), texts(), **settings)
    told = SharpnessCallback([METRIC], every="3 steps", budget=None, num_samples=8)
    if name != "plain":
        told.attach(trainer)
    if name in ("SAM", "all"):
        SAMCallback(rho=0.1).attach(trainer)
    if name in ("sizes", "all"):
        BatchSizeCallback("0:8 1ep:32 2ep:16").attach(trainer)
    if name == "phases":
        train_in_phases(trainer, "0:8 1ep:32 2ep:16")
    else:
        trainer.train()
    return {
        "kind": {type(parameter.data).__name__ for parameter in trainer.model.parameters()}.pop(),
        "weights": torch.cat([distributed.whole(p.detach()).flatten() for p in trainer.model.parameters()]).tolist(),
        "rng": torch.get_rng_state().sum().item(),
        "history": [[made.step, made.samples, made.loss, dict(made.values)] for made in told.history],
    }


def on_sharded_ranks(folder: Path) -> dict:
    gc.freeze()
    shard_on_cpu()
    return {name: sharded_run(folder, name, alone=False) for name in SHARDED_RUNS} | {"loop": sharded_loop(alone=False)}


def sharded_loop(*, alone: bool) -> dict:
    """A loop of one's own with ``Accelerator.prepare``, and ``attach`` around it."""
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin

    plugin = None if alone else FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap")
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    torch.manual_seed(4)
    net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    data = TensorDataset(torch.randn(NUM_SAMPLES, 1, dtype=torch.float64), torch.arange(NUM_SAMPLES) % 2)
    given = net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), DataLoader(data, batch_size=8 if alone else 4)
    model, optimizer, loader = accelerator.prepare(*given)
    settings = {"criterion": nn.CrossEntropyLoss(), "every": "3 steps", "budget": None, "probe_samples": 8}
    with attach(model, optimizer, loader, metrics=["hessian_topk"], **settings) as run:
        for x, y in itertools.chain(loader, loader):
            accelerator.backward(F.cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
    return {
        "kind": {type(parameter.data).__name__ for parameter in model.parameters()}.pop(),
        "weights": torch.cat([distributed.whole(p.detach()).flatten() for p in model.parameters()]).tolist(),
        "history": [[made.step, made.samples, made.loss, dict(made.values)] for made in run.history],
    }


@pytest.mark.skipif(not TRAINS_SHARDS, reason="torch 2.6 trains fully_shard on accelerators only")
@pytest.mark.skipif(
    transformers.__version__.startswith("4."), reason="before transformers 5 settings of FSDP have other names"
)
def test_fully_sharded_is_one_process(tmp_path):
    ranks = start_two_ranks(tmp_path, "on_sharded_ranks")
    for name in (*SHARDED_RUNS, "loop"):
        alone = sharded_loop(alone=True) if name == "loop" else sharded_run(tmp_path / "alone", name, alone=True)
        assert len(alone["history"]) == {"plain": 0, "measured": 5, "SAM": 5, "loop": 3}.get(name, 3)
        for found in ranks:
            assert found[name]["kind"] == "DTensor"
            assert found[name]["weights"] == pytest.approx(alone["weights"], rel=1e-10, abs=1e-12)
            for one, other in zip(found[name]["history"], alone["history"], strict=True):
                one[3].pop("surrogate_gap", None), other[3].pop("surrogate_gap", None)
                assert one[:3] == pytest.approx(other[:3], rel=1e-10)
                assert one[3] == pytest.approx(other[3], rel=1e-10)
    for found in ranks:
        assert found["measured"]["weights"] == found["plain"]["weights"]
        assert found["measured"]["rng"] == found["plain"]["rng"]


# --- what is there


def test_the_package_imports_no_trainer():
    code = (
        "import sys, sharpness_adapters; assert not {'transformers', 'accelerate', 'lightning', 'timm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("is_missing", [True, False], ids=["missing", "old"])
def test_a_missing_or_old_trainer_gives_one_sentence(monkeypatch, is_missing):
    if is_missing:
        monkeypatch.setitem(sys.modules, "transformers.trainer_callback", None)
        message = "needs transformers, which is not installed. Install it with: pip install"
    else:
        monkeypatch.delattr("transformers.trainer_callback.ExportableState")
        message = f"needs transformers>=4.46, and {transformers.__version__} is installed. Install it with: pip install -U"
    monkeypatch.delitem(sys.modules, "sharpness_adapters.huggingface")
    with pytest.raises(ImportError, match=re.escape(f'sharpness_adapters.huggingface {message} "sharpness-plugins[hug')):
        importlib.import_module("sharpness_adapters.huggingface")


def test_the_example_runs_and_draws(tmp_path):
    pytest.importorskip("matplotlib", reason="the example draws with matplotlib")
    example = Path(__file__).parents[1] / "adapters" / "examples" / "huggingface_text.py"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, str(example), "--out", str(tmp_path), "--epochs", "2"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "huggingface_text.png").stat().st_size > 5000
    lines = [json.loads(line) for line in (tmp_path / "sharpness.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0.0, 1.0, 2.0]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert "batch size 16 -> 128" in done.stdout
