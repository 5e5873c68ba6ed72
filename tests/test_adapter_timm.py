"""timm: its tasks, loaders and optimizers in small loops of our own, and its train.py where one can be had.

``TIMM_TRAIN_PY=path/to/train.py`` names one, or several of different versions, separated as in ``PATH``; timm's wheel holds
none.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import gc
import importlib.util
import json
import logging
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import textwrap
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

timm = pytest.importorskip("timm", reason="timm is not installed: pip install 'sharpness-plugins[timm]'")
Image = pytest.importorskip("PIL.Image", reason="pillow, which timm reads images with, is not installed")

from timm.data import FastCollateMixup, create_dataset, create_loader  # noqa: E402
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy  # noqa: E402
from timm.models import create_model  # noqa: E402
from timm.optim import create_optimizer_v2, list_optimizers  # noqa: E402
from timm.optim._optim_factory import default_registry  # noqa: E402
from timm.task import ClassificationTask, LogitDistillationTask, resume_task_checkpoint  # noqa: E402
from timm.utils import CheckpointSaver, NativeScaler  # noqa: E402

import sharpness_adapters.timm as adapter  # noqa: E402
from sharpness_adapters import timm_script  # noqa: E402
from sharpness_adapters.plain import attach  # noqa: E402
from sharpness_adapters.timm import (  # noqa: E402
    SecondPass,
    Settings,
    TaskMonitor,
    bare_task,
    second_pass,
    second_pass_of,
)
from sharpness_adapters.timm.arguments import check_optimizer_name, set_script  # noqa: E402
from sharpness_adapters.timm.script import ScriptError, ScriptOptions, run_script  # noqa: E402
from sharpness_adapters.timm_checkpoint import read_timm_checkpoint  # noqa: E402
from sharpness_adapters.timm_task import task_loss  # noqa: E402
from sharpness_plugins import PluginWarning, measure_sharpness, metric  # noqa: E402
from sharpness_plugins.cli import main as sharpness  # noqa: E402
from sharpness_plugins.optimizers import ASAM, GSAM, SharpnessAware  # noqa: E402
from sharpness_plugins.plugin_loading import Source  # noqa: E402
from sharpness_plugins.registry import OptimizerSpec, fresh_registry, get_rule  # noqa: E402
from sharpness_plugins.texts import name_and_settings  # noqa: E402

# timm leaves the files of its images to the garbage collector
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

NUM_TRAIN, NUM_EVAL, CLASSES = 100, 12, 4


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """A registry with one cheap metric, one thread, and nothing left of a test before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    before = set(nn.modules.module._global_forward_pre_hooks)
    with fresh_registry():
        metric("gradient_length")(gradient_length)
        yield
    torch.set_num_threads(threads)
    if set(nn.modules.module._global_forward_pre_hooks) != before:
        gc.collect()  # optimizers that never trained
    assert set(nn.modules.module._global_forward_pre_hooks) == before


def gradient_length(objective):
    """Norm of the gradient."""
    return objective.value_and_grad()[1].norm()


class SmallNet(nn.Module):
    """BatchNorm, dropout, two layers; float32."""

    num_classes, in_chans = CLASSES, 3

    def __init__(self, dropout=0.0, norm=True):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(4 * 16, CLASSES)

    def forward(self, x):
        x = functional.adaptive_avg_pool2d(self.norm(self.conv(x)).relu(), 4)
        return self.head(self.dropout(x.flatten(1)))


def small_net(**settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SmallNet(**settings)


def batches(count, size=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, 8, 8, generator=generator), torch.randint(CLASSES, (size,), generator=generator))
        for _ in range(count)
    ]


def train(task, optimizer, data, *, accumulate=1, clip=None, autocast=None, scaler=None, ema=False):
    """A loop such as people write around ``timm.task``."""
    if ema:
        task.setup_ema(decay=0.9)
    for step in range(len(data) // accumulate):
        group = data[step * accumulate : (step + 1) * accumulate]
        for index, (x, y) in enumerate(group):
            last = index == len(group) - 1
            with task.no_sync() if not last else contextlib.nullcontext():
                with torch.autocast("cpu", autocast, enabled=autocast is not None):
                    loss = task(x, y)["loss"]
                if accumulate > 1:
                    loss /= accumulate
                if scaler is not None:
                    parameters = task.get_clip_parameters()
                    scaler(loss, optimizer, clip_grad=clip, parameters=parameters, need_update=last)
                else:
                    loss.backward()
        if scaler is None:
            if clip is not None:
                nn.utils.clip_grad_norm_(task.get_clip_parameters(), clip)
            optimizer.step()
        optimizer.zero_grad()
        task.update_ema(step=step + 1)
    return {name: value.clone() for name, value in task.state_dict().items()}


def task_of(model, criterion=None):
    return ClassificationTask(model, criterion=criterion or nn.CrossEntropyLoss(), verbose=False)


def optimizer_of(model, name, **settings):
    return create_optimizer_v2(model, opt=name, lr=0.1, momentum=0.9, weight_decay=1e-3, **settings)


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


# --- names


def test_every_first_order_optimizer_of_timm_has_a_sharpness_aware_one():
    names = adapter.register_optimizers()
    assert {"samsgd", "samadamw", "samlamb", "sammuon"} <= set(names) <= set(list_optimizers())
    for rule in ("asam", "fsam", "gsam", "wsam", "looksam", "momentumsam", "randomsam", "kstepsam"):
        assert {f"{rule}sgd", f"{rule}adamw"} <= set(names)
    assert not [name for name in names if "_" in name]
    assert "samadahessian" not in list_optimizers()
    assert adapter.register_optimizers() == names  # again, without a second registration
    optimizer = optimizer_of(small_net(), "samadamw", rho=0.2, adaptive=True)
    assert type(optimizer) is type(optimizer_of(small_net(), "adamw"))
    assert (second_pass_of(optimizer).rho, second_pass_of(optimizer).adaptive) == (0.2, True)
    assert second_pass_of(optimizer_of(small_net(), "sgd")) is None
    with pytest.raises(ValueError, match="rho is a radius"):
        optimizer_of(small_net(), "samsgd", rho=-1.0)
    given = {"alpha": 0.8, "rule_alpha": 0.1, "interval": 3}  # of the base, of the rule, of the core
    optimizer = create_optimizer_v2(small_net(), opt="gsamrmsprop", lr=0.1, **given)
    assert optimizer.param_groups[0]["alpha"] == 0.8
    made = second_pass_of(optimizer)
    assert (made.rule, made.interval, made.rho) == (GSAM(alpha=0.1), 3, None)
    with pytest.raises(TypeError, match="sigma"):
        optimizer_of(small_net(), "looksamsgd", rule_sigma=1.0)


def test_rules_of_plugins_are_offered_and_names_of_timms_own_are_left_alone(monkeypatch):
    monkeypatch.setattr(taken := default_registry, "_optimizers", dict(default_registry._optimizers))
    monkeypatch.setattr(second_pass, "_names", set(second_pass._names))
    theirs = replace(taken.get_optimizer_info("sgd"), name="acmesgd")
    taken.register(theirs)
    with fresh_registry() as registry:
        registry.register(OptimizerSpec("acme", ASAM))
        registry.register(OptimizerSpec("acme_two", ASAM))
        names = adapter.register_optimizers()
        optimizer = optimizer_of(small_net(), "acmetwosgd")
    assert {"acmeadamw", "acmetwosgd"} <= set(names)
    assert "acmesgd" not in names
    assert taken.get_optimizer_info("acmesgd") is theirs
    assert second_pass_of(optimizer).rule == ASAM()


def test_an_underscore_which_timm_would_drop_is_refused(monkeypatch):
    assert second_pass_of(optimizer_of(small_net(), "sam_sgd")) is None  # timm: plain SGD, without a word
    script = type("Script", (), {"parser": None, "train_one_epoch": None})
    try:
        for name, is_wrong in (
            ("sam_sgd", True),
            ("look_sam_sgd", True),
            ("lookahead_gsam_sgd", True),
            ("lookahead_samsgd", False),
            ("samsgd", False),
        ):
            script._parse_args = staticmethod(lambda name=name: (type("Args", (), {})(), ""))
            given = type("Args", (), {})()
            given.opt = name
            script._parse_args = staticmethod(lambda given=given: (given, ""))
            set_script(script)
            with pytest.raises(ValueError, match="plain sgd") if is_wrong else contextlib.nullcontext():
                check_optimizer_name()
    finally:
        set_script(None)


# --- the second pass

CASES = {
    "plain": {},
    "accumulation": {"accumulate": 2},
    "clipping": {"clip": 0.1},
    "bfloat16": {"autocast": torch.bfloat16},
    "averaged model": {"ema": True},
    "all": {"accumulate": 2, "clip": 0.1, "autocast": torch.bfloat16, "ema": True},
}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", ["sgd", "adamw", "lookahead_sgd"])
def test_radius_zero_is_the_optimizer_itself_bit_for_bit(case, name):
    """Dropout draws the same masks in both passes, running statistics see one of them, and clipping happens twice."""
    settings = CASES[case]
    ours = name.replace("sgd", "samsgd").replace("adamw", "samadamw")
    states = []
    for which in (name, ours):
        model = small_net(dropout=0.3)
        rho = {"rho": 0.0, "clip_grad": settings.get("clip")} if which == ours else {}
        optimizer = optimizer_of(model, which, **rho)
        torch.manual_seed(3)
        state = train(task_of(model), optimizer, batches(8), **settings)
        states.append({**state, "rng": torch.get_rng_state()})
    assert_same(*states)


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("adaptive", [False, True])
def test_step_is_the_one_of_the_papers(clip, adaptive):
    """Against SAM written out by hand in float64: two micro-batches, BatchNorm's batch statistics, SGD."""
    rho, data = 0.3, [(x.double(), y) for x, y in batches(2)]
    model, reference = small_net().double(), small_net().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    second_pass = SecondPass(optimizer, rho, adaptive=adaptive, clip_grad=clip)
    train(task_of(model), optimizer, data, accumulate=2)

    def gradient(network):
        loss = sum(functional.cross_entropy(network(x), y) for x, y in data) / 2
        return loss, torch.autograd.grad(loss, list(network.parameters()))

    uphill = copy.deepcopy(reference)
    loss, first = gradient(reference)
    weights = [p.detach().abs() + 0.01 if adaptive else torch.ones_like(p) for p in reference.parameters()]
    norm = torch.cat([(g * t).flatten() for g, t in zip(first, weights, strict=True)]).norm()
    with torch.no_grad():
        for p, g, t in zip(uphill.parameters(), first, weights, strict=True):
            p += rho * t**2 * g / norm
    above, second = gradient(uphill)
    length = torch.cat([g.flatten() for g in second]).norm()
    factor = 1.0 if clip is None else clip / (length + 1e-6)
    for p, before, g in zip(model.parameters(), reference.parameters(), second, strict=True):
        torch.testing.assert_close(p.detach(), before.detach() - 0.1 * factor * g, rtol=1e-9, atol=1e-12)
    assert second_pass.surrogate_gap() == pytest.approx((above - loss).item(), rel=1e-6)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, reference.get_buffer(name))  # two forward passes, not four


RULES = ["gsam", "wsam", "fsam", "looksam:k=2", "momentum_sam", "random_sam", "k_step_sam", "asam:eta=0.0"]


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_the_cores_own_loop(rule):
    """Which evaluates closures, two micro-batches in each of its five steps; float64."""
    data = [(x.double(), y) for x, y in batches(10)]
    keeps_up = "momentum" not in rule and "random" not in rule  # else the core makes no first pass for the statistics
    models = [small_net(norm=keeps_up).double() for _ in range(2)]
    settings = {"lr": 0.1, "momentum": 0.9}
    optimizer = torch.optim.SGD(models[0].parameters(), **settings)
    second_pass = SecondPass(optimizer, 0.3, rule=rule)
    train(task_of(models[0]), optimizer, data, accumulate=2)
    name, given = name_and_settings(rule)
    base = torch.optim.SGD(models[1].parameters(), **settings)
    reference = SharpnessAware(base, get_rule(name, **given), rho=0.3, model=models[1])

    def closure(batch):
        loss = functional.cross_entropy(models[1](batch[0]), batch[1]) / 2
        loss.backward()
        return loss

    for at in range(0, 10, 2):
        reference.step([lambda batch=batch: closure(batch) for batch in data[at : at + 2]])
    for first, second in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12)
    if reference.surrogate_gap is not None:
        assert second_pass.surrogate_gap() == pytest.approx(reference.surrogate_gap, rel=1e-6)


@pytest.mark.parametrize("name", ["randomsamsgd", "momentumsamsgd"])
def test_radius_zero_of_other_rules_is_the_optimizer_itself(name):
    states = []
    for which, settings in (("sgd", {}), (name, {"rho": 0.0})):
        model = small_net(dropout=0.3)
        torch.manual_seed(3)
        states.append(train(task_of(model), optimizer_of(model, which, **settings), batches(8), accumulate=2))
    assert_same(*states)


@pytest.mark.parametrize(("name", "settings", "ascents"), [("samsgd", {"interval": 2}, 3), ("looksamsgd", {"rule_k": 3}, 2)])
def test_steps_without_an_ascent_cost_one_pass(name, settings, ascents):
    model, passes, kept = small_net(), [], []
    optimizer, task = optimizer_of(model, name, **settings), task_of(model)
    model.register_forward_hook(lambda *_: passes.append(1))
    optimizer.register_step_pre_hook(lambda *_: kept.append(second_pass_of(optimizer)._recorder.keep_inputs))
    train(task, optimizer, batches(12), accumulate=2)
    assert len(passes) == 12 + 2 * ascents
    assert sum(kept) == ascents  # else batches are not held


@pytest.mark.parametrize(("name", "settings"), [("looksamadamw", {"rule_k": 4}), ("fsamsgd", {"interval": 3})])
@pytest.mark.parametrize("outer", ["", "lookahead_"])
def test_a_rule_that_remembers_goes_on_from_a_checkpoint_bit_for_bit(tmp_path, outer, name, settings):
    def made():
        model = small_net(dropout=0.3)
        return model, task_of(model), optimizer_of(model, outer + name, rho=0.3, **settings)

    torch.manual_seed(3)
    model, task, optimizer = made()
    data = batches(12)
    train(task, optimizer, data[:5])
    saver = CheckpointSaver(model, optimizer, task=task, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    saver.save_checkpoint(0, 0.5)
    state, whole = torch.get_rng_state(), train(task, optimizer, data[5:])
    model, task, optimizer = made()
    if outer:  # one that has trained takes it up as well
        train(task, optimizer, data[:4])
    resume_task_checkpoint(task, str(tmp_path / "last.pth.tar"), optimizer=optimizer, log_info=False)
    torch.set_rng_state(state)
    assert_same(train(task, optimizer, data[5:]), whole)


def test_clipping_comes_too_early_for_rules_that_mix_the_first_gradient_in():
    for name in ("gsamsgd", "wsamsgd", "fsamsgd", "looksamsgd"):
        with pytest.raises(ValueError, match=r"Train without --clip-grad"):
            optimizer_of(small_net(), name, clip_grad=1.0)
    for name in ("samsgd", "momentumsamsgd", "kstepsamsgd"):
        optimizer_of(small_net(), name, clip_grad=1.0)


def test_a_grad_scaler_that_skips_steps_leaves_no_trace_in_the_next_one():
    """float16 with a scale that overflows at first, against one that does not: the same steps, and as many."""
    data, states = batches(10), []
    for scale, expected in ((2.0**16, 8), (2.0**4, 8)):
        model = small_net(norm=False)
        optimizer = optimizer_of(model, "samsgd", rho=0.05)
        task, scaler = task_of(model), NativeScaler(device="cpu")
        scaler._scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        monitor = TaskMonitor(Settings())
        if scale > 2.0**8:  # two micro-batches whose gradient is infinite: the step is skipped
            poisoned = [(x * 6e4, y) for x, y in data[:2]]
            before = copy.deepcopy(model.state_dict())
            train(task, optimizer, poisoned, accumulate=2, autocast=torch.float16, scaler=scaler)
            assert_same(before, model.state_dict())
            assert monitor.step == 0
        state = train(task, optimizer, data[2:], autocast=torch.float16, scaler=scaler)
        assert monitor.step == expected
        assert monitor.samples == expected * 6
        monitor.close()
        states.append(state)
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name], rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("name", ["samsgd", "fsamsgd"])
def test_a_second_gradient_that_overflows_leaves_the_step_to_the_first_one(name):
    class Cliff(SmallNet):
        """Overflows uphill only."""

        def forward(self, x):
            return super().forward(x) * (1.0 if torch.equal(self.conv.weight, self.start) else torch.inf)

    states = []
    for which in ("sgd", name):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Cliff(norm=False)
        model.start = model.conv.weight.detach().clone()
        optimizer, scaler = optimizer_of(model, which), NativeScaler(device="cpu")
        scaler._scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        states.append(train(task_of(model), optimizer, batches(1), autocast=torch.float16, scaler=scaler))
    assert_same(*states)
    assert second_pass_of(optimizer)._sharp.num_steps == 0  # and the rule remembers nothing of it
    assert not optimizer.state_dict()["param_groups"][0]["sharpness_aware"]["state"]


@pytest.mark.parametrize("name", ["samsgd", "fsamsgd"])
def test_a_fused_optimizer_that_unscales_by_itself_gets_scaled_gradients(name):
    """As a GradScaler leaves them to it where nothing is clipped; float16's rounding apart, the steps of the plain one."""
    states = []
    for fused in (False, True):
        model = small_net(norm=False)
        optimizer = optimizer_of(model, name, fused=fused)
        scaler = NativeScaler(device="cpu")
        scaler._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        states.append(train(task_of(model), optimizer, batches(6), autocast=torch.float16, scaler=scaler))
    for key in states[0]:
        torch.testing.assert_close(states[0][key], states[1][key], rtol=1e-3, atol=1e-4)


def test_what_cannot_be_repeated_is_said():
    model = small_net()
    optimizer = optimizer_of(model, "samsgd")
    functional.cross_entropy(model(batches(1)[0][0]), batches(1)[0][1]).backward()
    with pytest.raises(RuntimeError, match=r"no forward pass of a timm.task.TrainingTask"):
        optimizer.step()
    with pytest.raises(ValueError, match="cannot take a closure"):
        optimizer.step(lambda: None)
    train(task_of(model), optimizer, batches(1))  # and goes on
    half = small_net().bfloat16()
    optimizer = optimizer_of(half, "samsgd")
    with pytest.raises(ValueError, match=r"Keep the\s+parameters in float32"):
        train(task_of(half), optimizer, [(x.bfloat16(), y) for x, y in batches(1)])


def test_distillation_and_channels_last():
    """The teacher and the averaged model are neither moved nor measured."""
    teacher = small_net(dropout=0.5)
    teacher.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    model = small_net().to(memory_format=torch.channels_last)
    model.pretrained_cfg = teacher.pretrained_cfg
    task = LogitDistillationTask(model, teacher, criterion=nn.CrossEntropyLoss(), verbose=False)
    before = copy.deepcopy(teacher.state_dict())
    optimizer = optimizer_of(model, "samadamw")
    data = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in batches(4)]
    train(task, optimizer, data, ema=True)
    assert_same(before, teacher.state_dict())
    report = measure_sharpness(bare_task(task), data, "gradient_length", loss_fn=task_loss)
    assert report["gradient_length"].value > 0
    assert report.provenance["num_parameters"] == sum(p.numel() for p in model.parameters())
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)


# --- measuring


@pytest.mark.parametrize("name", ["sgd", "samsgd", "lookahead_samadamw"])
def test_training_with_measuring_equals_training_without_it_bit_for_bit(name, tmp_path):
    states = []
    settings = Settings(("gradient_length",), every="2 steps", out=tmp_path / "out.csv", num_samples=12, budget=None)
    for measured in (False, True):
        model = small_net(dropout=0.3)
        optimizer = optimizer_of(model, name)
        monitor = TaskMonitor(settings if measured else Settings())
        torch.manual_seed(3)
        state = train(task_of(model), optimizer, batches(12), accumulate=2, autocast=torch.bfloat16, ema=True, clip=1.0)
        states.append({**state, "rng": torch.get_rng_state()})
        assert (monitor.step, monitor.samples, monitor.base_batch_size) == (6, 72, 12)
        monitor.close()
    assert_same(*states)
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "4", "6"]
    assert [row["samples"] for row in rows] == ["12", "24", "48", "72"]
    assert all(float(row["gradient_length"]) > 0 and float(row["gradient_norm"]) > 0 for row in rows)
    assert ("surrogate_gap" in rows[0]) == ("sam" in name)


def test_what_is_measured_is_the_tasks_loss_on_the_first_batches_of_training():
    model, data = small_net(), batches(6)
    task = task_of(model, LabelSmoothingCrossEntropy(0.1))
    monitor = TaskMonitor(Settings(("gradient_length",), every="1 step", num_samples=9, budget=None))
    optimizer = optimizer_of(model, "sgd")
    train(task, optimizer, data[:2])  # 12 samples: more than 9 are there
    weights = copy.deepcopy(model)
    (made,) = monitor.monitor.history
    monitor.close()
    smooth = LabelSmoothingCrossEntropy(0.1)
    loss = smooth(weights.eval()(torch.cat([x for x, _ in data[:2]])), torch.cat([y for _, y in data[:2]]))
    gradients = torch.autograd.grad(loss, list(weights.parameters()))
    assert made.step == 2
    assert made.loss == pytest.approx(loss.item(), rel=1e-6)
    assert made.values["gradient_length"] == pytest.approx(
        torch.cat([g.flatten() for g in gradients]).norm().item(), rel=1e-5
    )


def test_a_checkpoint_brings_the_counts_and_the_pace_back(tmp_path):
    """In the optimizer's own state, which timm saves and reads with weights_only=True."""
    settings = Settings(("gradient_length",), every="4 steps", num_samples=6, budget=None)
    model = small_net()
    optimizer, task = optimizer_of(model, "samsgd"), task_of(model)
    monitor = TaskMonitor(settings)
    train(task, optimizer, batches(6))
    monitor.close()
    saver = CheckpointSaver(model, optimizer, task=task, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    saver.save_checkpoint(0, 0.5)

    resumed = small_net()
    optimizer, task = optimizer_of(resumed, "samsgd"), task_of(resumed)
    monitor = TaskMonitor(settings)
    assert resume_task_checkpoint(task, str(tmp_path / "last.pth.tar"), optimizer=optimizer, log_info=False) == 1
    train(task, optimizer, batches(4, seed=2))
    assert (monitor.step, monitor.samples) == (10, 60)
    assert [made.step for made in monitor.monitor.history] == [1, 4, 8]
    monitor.close()
    plain = optimizer_of(small_net(), "sgd")  # who has none of us reads it as well
    plain.load_state_dict(torch.load(tmp_path / "last.pth.tar", weights_only=True)["optimizer"])


def test_a_metric_that_fails_does_not_stop_training():
    @metric("broken")
    def broken(objective):
        raise RuntimeError("out of order")

    model = small_net()
    optimizer = optimizer_of(model, "sgd")
    monitor = TaskMonitor(Settings(("broken",), every="1 step", num_samples=6, budget=None))
    with pytest.warns(PluginWarning, match="out of order"):
        train(task_of(model), optimizer, batches(2))
    assert monitor.step == 2
    assert "out of order" in monitor.monitor.last.notes["broken"]
    monitor.close()


def test_settings_come_from_the_environment(monkeypatch):
    given = {
        "SHARPNESS_METRICS": "gradient_length hessian_topk:k=1",
        "SHARPNESS_EVERY": "10 steps",
        "SHARPNESS_BUDGET": "none",
    }
    settings = Settings.from_environment({**given, "SHARPNESS_OUT": "a.jsonl", "SHARPNESS_SAMPLES": "64"})
    expected = Settings(("gradient_length", "hessian_topk:k=1"), "10 steps", Path("a.jsonl"), 64, None)
    assert settings == expected
    assert list(settings.resolved()) == ["gradient_length", "hessian_topk"]
    assert Settings.from_environment({}) == Settings()
    with pytest.raises(ValueError, match="SHARPNESS_SAMPLES=many"):
        Settings.from_environment({"SHARPNESS_SAMPLES": "many"})
    monkeypatch.setenv("SHARPNESS_METRICS", "gradient_length")
    monkeypatch.setenv("SHARPNESS_EVERY", "1ep")
    with pytest.raises(ValueError, match=r"run train.py through sharpness-timm"):
        adapter.activate()
    monkeypatch.setenv("SHARPNESS_EVERY", "5 steps")
    assert adapter.activate() is not None
    monkeypatch.delenv("SHARPNESS_METRICS")
    assert adapter.activate() is None


# --- data and scripts


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of small pictures as timm reads it, four classes that differ in colour."""
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for split, number in (("train", NUM_TRAIN), ("validation", NUM_EVAL)):
        for index in range(number):
            label = index % CLASSES
            pixels = torch.randint(120, (16, 16, 3), generator=generator) + torch.tensor([label * 40, 60, 120 - label * 40])
            place = folder / split / f"class{label}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(place / f"{index}.png")
    return folder


def test_measuring_leaves_persistent_workers_and_mixup_alone(images):
    """Every epoch has its batches and every one of them its samples; an inner pass over the loader breaks that."""
    seen = []
    for measured in (False, True):
        collate = FastCollateMixup(mixup_alpha=0.2, num_classes=CLASSES)
        dataset = create_dataset("", root=str(images), split="train", is_training=True)
        settings = {"is_training": True, "num_workers": 2, "persistent_workers": True, "collate_fn": collate}
        torch.manual_seed(5)
        loader = create_loader(dataset, (3, 16, 16), batch_size=10, device=torch.device("cpu"), **settings)
        model = small_net()
        optimizer = optimizer_of(model, "samsgd")
        task = task_of(model, SoftTargetCrossEntropy())
        monitor = TaskMonitor(
            Settings(("gradient_length",), every="3 steps", num_samples=20, budget=None) if measured else Settings()
        )
        counts = []
        for _ in range(2):
            epoch = list(loader)
            counts.append(len(epoch))
            state = train(task, optimizer, epoch)
        assert counts == [10, 10]
        assert monitor.samples == 200
        assert measured == (monitor.monitor is not None)
        monitor.close()
        seen.append(state)
    assert_same(*seen)


def test_a_loop_of_ones_own_on_timms_loaders_is_measured_on_what_the_model_gets(images):
    """Its default loader normalizes whole batches outside of the DataLoader, which alone gives bytes."""
    values = []
    for use_prefetcher in (True, False):
        states = []
        for measured in (False, True):
            dataset = create_dataset("", root=str(images), split="train", is_training=True)
            settings = {"is_training": True, "num_workers": 0, "persistent_workers": False, "no_aug": True}
            settings |= {"use_prefetcher": use_prefetcher, "device": torch.device("cpu")}
            torch.manual_seed(5)
            loader = create_loader(dataset, (3, 16, 16), batch_size=20, **settings)
            model = small_net(dropout=0.3)
            optimizer = optimizer_of(model, "sgd")
            asked = {"metrics": "gradient_length", "every": "2 steps", "budget": None, "probe_samples": 30}
            with attach(model, optimizer, loader, **asked) if measured else contextlib.nullcontext() as run:
                for x, y in loader:
                    functional.cross_entropy(model(x), y).backward()
                    optimizer.step()
                    optimizer.zero_grad()
            states.append({**model.state_dict(), "rng": torch.get_rng_state()})
        assert_same(*states)
        assert [(made.step, made.samples) for made in run.history] == [(1, 20), (2, 40), (4, 80)]
        values.append([made.loss for made in run.history])
    assert values[0] == pytest.approx(values[1], rel=1e-5)


MINI = """
    import argparse, json, os
    import torch
    from timm.data import create_dataset, create_loader
    from timm.models import create_model
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.task import ClassificationTask, resume_task_checkpoint
    from timm.utils import CheckpointSaver, init_distributed_device, random_seed

    parser = argparse.ArgumentParser()
    for name, kind, default in [
        ("data-dir", str, ""), ("batch-size", int, 8), ("epochs", int, 4), ("grad-accum-steps", int, 1), ("workers", int, 0),
        ("opt", str, "sgd"), ("lr", float, 0.1), ("output", str, ""), ("experiment", str, "run"), ("resume", str, ""),
        ("mixup", float, 0.0), ("cutmix", float, 0.0), ("num-classes", int, 4), ("model", str, ""), ("device", str, "cpu"),
        ("img-size", int, 16),
    ]:
        parser.add_argument("--" + name, type=kind, default=default)

    def _parse_args():
        args = parser.parse_args()
        args.cutmix_minmax = None
        return args, ""

    def main():
        args, _ = _parse_args()
        device = init_distributed_device(args)
        random_seed(42, args.rank)
        model = create_model(args.model, num_classes=args.num_classes)
        shared = dict(input_size=(3, 16, 16), batch_size=args.batch_size, device=device, distributed=args.distributed)
        data = create_dataset("", root=args.data_dir, split="train", is_training=True)
        shared.update(num_workers=args.workers, persistent_workers=args.workers > 0)
        loader = create_loader(data, is_training=True, **shared)
        create_loader(create_dataset("", root=args.data_dir, split="validation"), is_training=False, crop_pct=1.0, **shared)
        task = ClassificationTask(model, torch.nn.CrossEntropyLoss(), verbose=False)
        optimizer = create_optimizer_v2(model, opt=args.opt, lr=args.lr)
        first = resume_task_checkpoint(task, args.resume, optimizer, log_info=False) if args.resume else 0
        if args.distributed:
            task.prepare_distributed(device_ids=[device])
        updates = -(-len(loader) // args.grad_accum_steps)
        scheduler, _ = create_scheduler_v2(
            optimizer, sched="cosine", num_epochs=args.epochs, step_on_epochs=False, updates_per_epoch=updates
        )
        scheduler.step_update(first * updates)
        folder = os.path.join(args.output, args.experiment)
        os.makedirs(folder, exist_ok=True)
        saver = CheckpointSaver(model, optimizer, args=args, checkpoint_dir=folder, recovery_dir=folder, task=task)
        for epoch in range(first, args.epochs):
            if args.distributed:
                loader.sampler.set_epoch(epoch)
            row = train_one_epoch(epoch, model, loader, optimizer, args, task=task, lr_scheduler=scheduler)
            if args.rank == 0:
                saver.save_checkpoint(epoch, row["loss"])
                with open(os.path.join(folder, "rows.jsonl"), "a") as file:
                    file.write(json.dumps({"epoch": epoch, **row}) + "\\n")
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        torch.save(weights, os.path.join(folder, f"weights{args.rank}.pt"))

    def train_one_epoch(epoch, model, loader, optimizer, args, task=None, lr_scheduler=None):
        sizes, rates, losses, number = [], [], [], len(loader)
        updates = -(-number // args.grad_accum_steps)
        for index, (x, y) in enumerate(loader):
            loss = task(x, y)["loss"]
            losses.append(loss.item())
            (loss / args.grad_accum_steps).backward()
            sizes.append(len(y))
            if (index + 1) % args.grad_accum_steps == 0 or index == number - 1:
                optimizer.step()
                optimizer.zero_grad()
                done = epoch * updates + index // args.grad_accum_steps + 1
                lr_scheduler.step_update(num_updates=done)
                rates.append(optimizer.param_groups[0]["lr"])
        return {"loss": sum(losses) / len(losses), "sizes": sizes, "rates": rates}

    if __name__ == "__main__":
        main()
"""


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """A script with the names of timm's train.py and a loop of its own."""
    path = tmp_path_factory.mktemp("script") / "mini_train.py"
    path.write_text(textwrap.dedent(MINI))
    return path


def real_train_py():
    """Those of timm that are at hand."""
    named = os.environ.get("TIMM_TRAIN_PY")
    root = Path(timm.__file__).parents
    places = [Path(place) for place in named.split(os.pathsep)] if named else [root[1] / "train.py", root[2] / "train.py"]
    return [place for place in places if place.is_file() and "create_loader" in place.read_text()]


@pytest.fixture(params=real_train_py() or [None], ids=lambda place: place and place.parent.name)
def train_py(request):
    if request.param is None:
        pytest.skip(
            "timm's wheel holds no train.py: name one with TIMM_TRAIN_PY (timm's tasks and loaders are tested above)"
        )
    before = logging.getLogger().handlers[:], logging.getLogger().level
    yield request.param
    logging.getLogger().handlers[:], _ = before
    logging.getLogger().setLevel(before[1])


@pytest.fixture
def task_train_py(train_py):
    if not has_tasks(train_py):
        pytest.skip(f"{train_py} is from before timm had tasks, and is refused by name (tested)")
    return train_py


def has_tasks(place):
    return "task=None" in place.read_text()


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """sys.argv, sys.path and modules as they were, afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("mini_train", "train"):
        sys.modules.pop(name, None)


def of_mini(images, out, *more, name="run"):
    place = ["--data-dir", str(images), "--output", str(out), "--experiment", name]
    return [*place, "--model", "test_resnet", "--lr", "0.1", *more]


def rows_of(out, name="run"):
    return [json.loads(line) for line in (out / name / "rows.jsonl").read_text().splitlines()]


def cosine(done, total, lr=0.1):
    return 0.5 * lr * (1 + torch.tensor(torch.pi * done / total, dtype=torch.float64).cos().item())


def test_script_grows_its_batches_between_epochs(mini, images, in_folder):
    """Batches, samples, both learning rates, and the columns after each of four epochs: 100 images, 8 then 32 a batch."""
    options = ScriptOptions(
        "0:8 2ep:32", "linear", settings=Settings(("gradient_length",), "1ep", num_samples=20, budget=None)
    )
    run_script(str(mini), of_mini(images, in_folder, "--workers", "2"), options)
    rows = rows_of(in_folder)
    assert [row["sizes"] for row in rows] == [[8] * 12, [8] * 12, [32] * 3, [32] * 3]
    assert [row["batch_size"] for row in rows] == [8, 8, 32, 32]
    assert [row["updates"] for row in rows] == [12, 24, 27, 30]
    assert [row["samples"] for row in rows] == [96, 192, 288, 384]
    for epoch, row in enumerate(rows):  # the schedule per update, laid out for 48 of them
        steps = 12 // len(row["rates"])
        expected = [cosine(12 * epoch + steps * (index + 1), 48) for index in range(len(row["rates"]))]
        assert row["rates"] == pytest.approx(expected, abs=1e-12)
        before = cosine(12 * (epoch + 1) - steps, 48)
        assert row["lr_effective"] == pytest.approx(before * row["batch_size"] / 8, abs=1e-12)
    assert all(row["sharpness_gradient_length"] > 0 for row in rows)
    assert len({row["sharpness_gradient_length"] for row in rows}) == 4


def test_script_accumulates_what_is_too_large_for_the_device(mini, images, in_folder):
    run_script(str(mini), of_mini(images, in_folder, "--epochs", "2"), ScriptOptions("0:8 1ep:32", max_micro_batch=8))
    first, second = rows_of(in_folder)
    assert (first["sizes"], second["sizes"]) == ([8] * 12, [8] * 12)
    assert (first["updates"], second["updates"]) == (12, 12 + 3)


def test_script_without_a_schedule_and_measuring_trains_as_it_does_by_itself(mini, images, in_folder):
    settings = Settings(("gradient_length",), "3 steps", num_samples=20, budget=None)
    arguments = ["--epochs", "1", "--opt", "samsgd"]
    run_script(str(mini), of_mini(images, in_folder, *arguments, name="measured"), ScriptOptions(settings=settings))
    sys.argv = [str(mini), *of_mini(images, in_folder, *arguments, name="alone")]
    runpy.run_path(str(mini), run_name="__main__")
    assert torch.equal(torch.load(in_folder / "measured/weights0.pt"), torch.load(in_folder / "alone/weights0.pt"))


def test_script_resumes_with_the_size_that_it_had(mini, images, in_folder):
    options = ScriptOptions("0:8 1ep:24 3ep:48", settings=Settings(("gradient_length",), "1ep", num_samples=20, budget=None))
    run_script(str(mini), of_mini(images, in_folder, "--epochs", "4"), options)
    sys.modules.pop("mini_train")
    checkpoint = str(in_folder / "run/checkpoint-1.pth.tar")
    run_script(str(mini), of_mini(images, in_folder, "--epochs", "4", "--resume", checkpoint, name="again"), options)
    whole, rest = rows_of(in_folder)[2:], rows_of(in_folder, "again")
    for name in ("epoch", "sizes", "rates", "batch_size", "lr_effective", "updates", "samples"):
        assert [row[name] for row in rest] == [row[name] for row in whole], name


@pytest.mark.parametrize(
    ("arguments", "more", "message"),
    [
        (["--schedule", "0:16"], [], "the schedule begins with batches of 16, and train.py with 8"),
        (["--schedule", "0:8 1ep:512"], [], "an epoch has 100 samples"),
        (["--schedule", "0:8 1ep"], [], "--schedule '0:8 1ep'"),
        (["--schedule", "norm_test:small=8"], [], "norm_test"),
        (["--metric", "gradient_lenth"], [], "Did you mean 'gradient_length'"),
        (["--budget", "much"], [], "could not convert"),
        ([], ["--opt", "sam_sgd"], "Write samsgd"),
    ],
)
def test_what_does_not_fit_is_one_sentence(mini, images, in_folder, capsys, arguments, more, message):
    given = [*arguments, str(mini), *of_mini(images, in_folder, "--epochs", "2", *more)]
    assert timm_script.main(given) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("sharpness-timm: error: ")
    assert message in lines[-1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def main(): pass", "it has no train_one_epoch, create_loader, _parse_args"),
        ("def train_one_epoch(model, loader): pass", "has no argument args, epoch, lr_scheduler, optimizer, task"),
        ("def create_loader(dataset): pass", "its create_loader is not timm's"),
        ("def main():\n    train_one_epoch()", r"its main\(\) does not call create_loader"),
    ],
)
def test_a_script_that_is_not_understood_is_refused_and_left_alone(mini, in_folder, text, message):
    head = "" if message.startswith("it has") else mini.read_text().replace('__name__ == "__main__"', "False")
    path = in_folder / "train.py"
    path.write_text(f"{head}\n{text}\n" + ("" if not head else "\n_before = (create_loader, train_one_epoch)\n"))
    with pytest.raises(ScriptError, match=message):
        run_script(str(path), [], ScriptOptions())
    module = sys.modules["train"]
    if head:
        assert (module.create_loader, module.train_one_epoch) == module._before


def test_batches_that_others_put_together_are_refused(mini, images, in_folder):
    path = in_folder / "train.py"
    path.write_text(
        mini.read_text().replace("data, is_training=True", "data, use_multi_epochs_loader=True, is_training=True")
    )
    with pytest.raises(ScriptError, match="_RepeatSampler: leave out --use-multi-epochs-loader"):
        run_script(str(path), of_mini(images, in_folder), ScriptOptions("0:8 1ep:16"))


# --- checkpoints


@pytest.fixture
def our_plugin(monkeypatch):
    point = EntryPoint("timm", "sharpness_adapters.timm_plugin", "sharpness_plugins")
    source = Source(point, "sharpness-plugins", "0", "timm")
    monkeypatch.setattr("sharpness_plugins.registry.installed_sources", lambda: [source])
    with fresh_registry():
        metric("gradient_length")(gradient_length)
        yield


@pytest.mark.parametrize("wrapped", ["bare", "ema", "compiled inside", "compiled"])
def test_a_task_is_measured_by_its_own_loss(our_plugin, wrapped):
    model, data = small_net(), batches(2)
    task = task_of(model, LabelSmoothingCrossEntropy(0.1))
    if wrapped == "ema":
        task.setup_ema(decay=0.9)
    if wrapped == "compiled inside":
        task.trainable_module = torch.compile(model)
    report = measure_sharpness(torch.compile(task) if wrapped == "compiled" else task, data, "gradient_length")
    loss = LabelSmoothingCrossEntropy(0.1)(model.eval()(torch.cat([x for x, _ in data])), torch.cat([y for _, y in data]))
    assert report.loss == pytest.approx(loss.item(), rel=1e-6)
    assert report.provenance["loss_rule"] == "plugin rule task_loss"
    assert report.provenance["dim"] == sum(p.numel() for p in model.parameters())  # and not the averaged ones


def test_a_checkpoint_of_train_py_is_measured_without_a_word_about_the_model(mini, images, in_folder, our_plugin, capsys):
    """Model and transform come from the file; the oracle builds them by hand, with the seed that the script set."""
    run_script(str(mini), of_mini(images, in_folder, "--epochs", "1"), ScriptOptions())
    capsys.readouterr()
    checkpoint = str(in_folder / "run/last.pth.tar")
    command = ["measure", "--checkpoint", checkpoint, "--metric", "gradient_length", "--json", "-", "--quiet"]
    assert sharpness([*command, "--data", str(images)]) == 0
    told = json.loads(capsys.readouterr().out)

    model = create_model("test_resnet", num_classes=CLASSES)
    model.load_state_dict(torch.load(checkpoint, weights_only=False)["state_dict"])
    config = timm.data.resolve_data_config({"img_size": 16}, model=model)
    dataset = create_dataset("", root=str(images), split="train")
    dataset.transform = timm.data.create_transform(**config, is_training=False)
    report = measure_sharpness(model.eval(), torch.utils.data.DataLoader(dataset, batch_size=50), "gradient_length")
    assert told["loss"] == pytest.approx(report.loss, rel=1e-5)
    assert told["results"]["gradient_length"]["value"] == pytest.approx(report["gradient_length"].value, rel=1e-4)
    assert told["provenance"]["num_samples"] == NUM_TRAIN

    assert sharpness([*command, "--data", str(images / "validation")]) == 0
    assert json.loads(capsys.readouterr().out)["provenance"]["num_samples"] == NUM_EVAL

    opened = read_timm_checkpoint(checkpoint).open(str(images))
    labels = torch.cat([y for _, y in opened["loader"]])
    assert len(set(labels[:20].tolist())) == CLASSES  # the first ones are of all classes, unlike in the folder

    errors = {
        ("--data", "nowhere"): "there is no folder nowhere",
        ("--data", str(in_folder / "run")): "holds no images",
        (): "Give SETUP",
    }
    for more, message in errors.items():
        assert sharpness([*command, *more]) == 1
        assert message in capsys.readouterr().err
    torch.save({"state_dict": {}}, in_folder / "other.pt")
    assert sharpness(["measure", "--checkpoint", "other.pt", "--data", str(images)]) == 1
    assert "does not describe its model" in capsys.readouterr().err
    assert sharpness(["measure", "--checkpoint", "absent.pt", "--data", str(images)]) == 1
    assert "there is no checkpoint absent.pt" in capsys.readouterr().err
    assert sharpness(["measure", "file.py:build", "--data", str(images)]) == 1
    assert "--data is for checkpoints" in capsys.readouterr().err


# --- two ranks


def on_rank(rank, port, script, images, out):
    """One of two processes of a training run, first with a task of our own, then through the script."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    os.chdir(out)
    options = ScriptOptions("0:8 1ep:32", "none", settings=Settings(("epsilon_box",), "1ep", Path("r.csv"), 8, None))
    run_script(script, of_mini(Path(images), Path(out), "--epochs", "2", "--batch-size", "4"), options)
    model = small_net(norm=False)
    task = task_of(model).prepare_distributed()
    optimizer = optimizer_of(model, "samsgd", rho=0.2, clip_grad=0.5)
    data = [(x[rank::2], y[rank::2]) for x, y in batches(8)]
    state = train(task, optimizer, data, accumulate=2, clip=0.5)
    torch.save({name.replace(".module.", "."): value for name, value in state.items()}, f"{out}/state{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_ranks_train_as_one_and_change_their_batches_together(mini, images, in_folder):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "timm"])
    given = (port, str(mini), str(images), str(in_folder))
    processes = [context.Process(target=on_rank, args=(rank, *given)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=180)
        assert process.exitcode == 0
    first, second = (torch.load(in_folder / f"state{rank}.pt") for rank in range(2))
    assert_same(first, second)
    model = small_net(norm=False)
    alone = train(task_of(model), optimizer_of(model, "samsgd", rho=0.2, clip_grad=0.5), batches(8), accumulate=2, clip=0.5)
    for name, value in alone.items():
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-6)

    rows = rows_of(in_folder)
    assert [row["sizes"] for row in rows] == [[4] * 12, [16] * 3]  # of this rank; 50 images each
    assert [(row["batch_size"], row["updates"], row["samples"]) for row in rows] == [(8, 12, 96), (32, 15, 192)]
    assert torch.equal(torch.load(in_folder / "run/weights0.pt"), torch.load(in_folder / "run/weights1.pt"))
    with (in_folder / "r.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "12", "15"]


# --- timm's train.py


def of_train_py(images, out, *more, name="run"):
    place = ["--data-dir", str(images), "--output", str(out), "--experiment", name, "--device", "cpu", "--img-size", "32"]
    run = [
        "--model",
        "test_resnet",
        "--num-classes",
        str(CLASSES),
        "-b",
        "8",
        "--warmup-epochs",
        "0",
        "--cooldown-epochs",
        "0",
    ]
    return [*place, *run, "--lr", "0.05", *more]


def run_train_py(place, arguments, *, measured=True, out="out.csv", command=()):
    """Its own process and command line."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if measured:
        environment |= {"SHARPNESS_METRICS": "fisher_trace", "SHARPNESS_EVERY": "3 steps", "SHARPNESS_OUT": out}
        environment |= {"SHARPNESS_SAMPLES": "16", "SHARPNESS_BUDGET": "none"}
    whole = [sys.executable, *command, str(place), *arguments]
    return subprocess.run(whole, env=environment, capture_output=True, text=True, timeout=300)


def rows_in(path):
    with open(path) as file:
        return list(csv.DictReader(file))


SHARPNESS_TIMM = ["-m", "sharpness_adapters.timm_script"]
OURS = ["--device-modules", "sharpness_adapters.timm"]
SAM = [*OURS, "--opt", "samsgd", "--opt-kwargs", "rho=0.1"]


def test_unmodified_train_py_with_every_switch(task_train_py, images, in_folder):
    """EMA, mixup, channels-last, bf16, accumulation, clipping; then it is resumed."""
    switches = ["--model-ema", "--mixup", "0.2", "--channels-last", "--amp", "--amp-dtype", "bfloat16", "--clip-grad", "1"]
    arguments = of_train_py(images, in_folder, *switches, *SAM, "--grad-accum-steps", "2", "--workers", "2")
    done = run_train_py(task_train_py, [*arguments, "--epochs", "1"])
    assert done.returncode == 0, done.stderr
    assert "Created SGD (samsgd)" in done.stderr
    rows = rows_in("out.csv")
    assert [row["step"] for row in rows] == ["1", "3", "6"]
    assert [row["samples"] for row in rows] == ["16", "48", "96"]
    assert all(float(row["fisher_trace"]) > 0 and float(row["surrogate_gap"]) > 0 for row in rows)
    assert all(float(row["gradient_norm"]) <= 1.0001 for row in rows)  # clipped, the second one
    saved = torch.load(in_folder / "run/last.pth.tar", weights_only=False)
    assert saved["optimizer"]["param_groups"][0]["sharpness"]["step"] == 6
    done = run_train_py(task_train_py, [*arguments, "--epochs", "2", "--resume", str(in_folder / "run/last.pth.tar")])
    assert done.returncode == 0, done.stderr
    assert [(row["step"], row["samples"]) for row in rows_in("out.csv")[3:]] == [("9", "144"), ("12", "192")]


@pytest.mark.parametrize(
    "switches",
    [
        ["--opt", "sgd", "--model-ema", "--mixup", "0.2", "--amp", "--amp-dtype", "bfloat16", "--workers", "2"],
        ["--opt", "samsgd", "--torchcompile", "eager", "--no-prefetcher", "--workers", "1"],
        ["--opt", "lookahead_samadamw", "--opt-kwargs", "adaptive=True", "--grad-accum-steps", "2", "--workers", "0"],
    ],
    ids=["data", "compiled", "lookahead"],
)
def test_measuring_leaves_train_py_as_it_is_bit_for_bit(task_train_py, images, in_folder, switches):
    states = []
    for measured in (False, True):
        arguments = of_train_py(images, in_folder, *OURS, *switches, "--epochs", "1", name=f"run{measured}")
        done = run_train_py(task_train_py, arguments, measured=measured)
        assert done.returncode == 0, done.stderr
        states.append(torch.load(in_folder / f"run{measured}/last.pth.tar", weights_only=False)["state_dict"])
    assert_same(*states)
    assert all(float(row["fisher_trace"]) > 0 for row in rows_in("out.csv"))


def test_a_train_py_without_tasks_is_refused_by_name(train_py, images, in_folder):
    if has_tasks(train_py):
        pytest.skip(f"{train_py} has tasks; name an older one with TIMM_TRAIN_PY too (timm 1.0.22 or before)")
    arguments = of_train_py(images, in_folder, "--workers", "0", "--epochs", "1")
    command = [*SHARPNESS_TIMM, "--schedule", "0:8"]
    done = run_train_py(train_py, arguments, measured=False, command=command)
    assert done.returncode == 1
    assert "is not a train.py of timm that is understood: its train_one_epoch has no argument task" in done.stderr
    assert not (in_folder / "run").exists()
    done = run_train_py(train_py, [*arguments, *SAM], measured=False)
    assert "RuntimeError: no forward pass of a timm.task.TrainingTask came before this step" in done.stderr


def test_train_py_grows_its_batches_and_resumes(task_train_py, images, in_folder, our_plugin, capsys):
    settings = Settings(("gradient_length",), "1ep", num_samples=20, budget=None)
    options = ScriptOptions("0:8 1ep:32", "linear", settings=settings)
    arguments = ["--workers", "2", "--sched-on-updates", "--epochs", "3"]
    run_script(str(task_train_py), of_train_py(images, in_folder, *arguments), options)
    rows = rows_in(in_folder / "run/summary.csv")
    assert [row["train_batch_size"] for row in rows] == ["8", "32", "32"]
    assert [row["train_updates"] for row in rows] == ["12", "15", "18"]
    assert [row["train_samples"] for row in rows] == ["96", "192", "288"]
    assert [float(row["lr"]) for row in rows] == pytest.approx([cosine(e, 3, 0.05) for e in (1, 2, 3)], abs=1e-12)
    assert float(rows[1]["train_lr_effective"]) == pytest.approx(4 * cosine(20, 36, 0.05))
    assert all(float(row["train_sharpness_gradient_length"]) > 0 for row in rows)
    assert all(row["eval_loss"] for row in rows)

    sys.modules.pop("train")
    resume = ["--resume", str(in_folder / "run/checkpoint-1.pth.tar")]
    run_script(str(task_train_py), of_train_py(images, in_folder, *arguments, *resume, name="again"), options)
    (row,) = rows_in(in_folder / "again/summary.csv")
    for name in ("epoch", "train_batch_size", "train_lr_effective", "train_updates", "train_samples", "lr"):
        assert row[name] == rows[2][name], name
    capsys.readouterr()
    command = ["measure", "--checkpoint", str(in_folder / "run/last.pth.tar"), "--data", str(images), "--quiet"]
    assert sharpness([*command, "--metric", "gradient_length"]) == 0


def test_train_pys_own_changes_of_size_are_measured_and_stand_against_a_schedule(task_train_py, images, in_folder):
    if "--train-batch-sizes" not in task_train_py.read_text():
        pytest.skip(f"{task_train_py} has no --train-batch-sizes")
    sizes = ["--train-img-sizes", "32", "32", "--train-batch-sizes", "8", "16", "--workers", "0", "--epochs", "1"]
    done = run_train_py(task_train_py, [*of_train_py(images, in_folder, *sizes), *SAM])
    assert done.returncode == 0, done.stderr
    assert all(float(row["surrogate_gap"]) > 0 for row in rows_in("out.csv"))
    command = [*SHARPNESS_TIMM, "--schedule", "0:8 1ep:16"]
    done = run_train_py(task_train_py, of_train_py(images, in_folder, *sizes), measured=False, command=command)
    assert done.returncode == 1
    assert "leave out --use-multi-epochs-loader and --train-img-sizes" in done.stderr.splitlines()[-1]


def test_train_py_on_two_ranks(task_train_py, images, in_folder):
    """On CPUs, which it cannot do by itself: it gives DDP their device numbers."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "sharpness_adapters.timm_script",
        "--schedule",
        "0:8 1ep:32",
        "--metric",
        "fisher_trace",
    ]
    command += ["--samples", "16", "--budget", "none", str(task_train_py)]
    command += of_train_py(images, in_folder, "--workers", "0", "--epochs", "2", "--opt", "samsgd", "-b", "4")
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(command, env={**common, "RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    told = [one.communicate(timeout=300)[1] for one in started]
    assert [one.returncode for one in started] == [0, 0], told
    rows = rows_in(in_folder / "run/summary.csv")
    assert [(row["train_batch_size"], row["train_updates"], row["train_samples"]) for row in rows] == [
        ("8", "12", "96"),
        ("32", "15", "192"),
    ]
    assert all(float(row["train_sharpness_fisher_trace"]) > 0 for row in rows)


# --- the example


def test_the_example_runs(in_folder, capsys):
    pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib, which draws the plot, is not installed")
    example = Path(__file__).parents[1] / "adapters" / "examples" / "timm_digits.py"
    history = runpy.run_path(str(example))["main"](in_folder, epochs=2, num_train=160)
    assert [row["step"] for row in history] == [4, 10, 11]  # the probe is full; one epoch of 10 steps; one of a single step
    assert all(row["hessian_topk"] > 0 for row in history)
    assert (in_folder / "timm_digits.png").stat().st_size > 10_000
    assert "epoch 1: batches of 16" in capsys.readouterr().out


# --- without timm


def test_a_missing_or_old_timm_is_one_sentence(monkeypatch):
    code = "import sys; sys.modules['timm'] = None; from sharpness_adapters import timm_script as s; sys.exit(s.main(['t']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    expected = (
        'sharpness_adapters.timm needs timm, which is not installed. Install it with: pip install "sharpness-plugins[timm]"'
    )
    assert done.stderr.strip() == f"sharpness-timm: error: {expected}"
    from sharpness_adapters.timm import versions

    monkeypatch.setattr(versions.metadata, "version", lambda name: "1.0.9")
    with pytest.raises(ImportError, match=r"needs timm>=1.0.27, and 1.0.9 is installed"):
        versions.check_version()


def test_the_plugin_imports_no_timm_and_no_torch():
    code = "import sys, sharpness_adapters.timm_plugin; print([m for m in ('timm', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    assert done.stdout.strip() == "[]"
    assert importlib.util.find_spec("sharpness_adapters.timm_plugin") is not None
