"""T8, T9: a GradScaler in half precision, which works on the CPU, too; and autocast."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.nn import functional
from torch.optim import SGD, Adam

from sharpness_plugins.optimizers import (
    ASAM,
    FSAM,
    GSAM,
    SAM,
    WSAM,
    KStepSAM,
    LookSAM,
    MomentumSAM,
    RandomSAM,
    SharpnessAware,
)

RULES = [SAM(), ASAM(), GSAM(), WSAM(), FSAM(), LookSAM(k=3), MomentumSAM(), RandomSAM(), KStepSAM()]
rules = pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
BASES = {
    "sgd": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "fused_adam": lambda p: Adam(p, lr=0.01, fused=True),
    "fused_sgd": lambda p: SGD(p, lr=0.1, momentum=0.9, fused=True),
}
bases = pytest.mark.parametrize("base", BASES)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))


def batch(number):
    generator = torch.Generator().manual_seed(number)
    return torch.randn(16, 4, generator=generator), torch.randint(3, (16,), generator=generator)


def flat(tensors):
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


class Loop:
    """A training loop as torch's documentation writes it, with a second pass."""

    def __init__(self, rule, base, *, scale=1024.0, autocast=None, form="by hand", clip=None, enabled=True, poison=None):
        self.model = network()
        self.scaler = GradScaler("cpu", init_scale=scale, growth_interval=3, enabled=enabled)
        base = BASES[base](self.model.parameters())
        self.optimizer = SharpnessAware(base, rule, rho=0.1, model=self.model, scaler=self.scaler)
        self.autocast, self.form, self.clip, self.poison = autocast, form, clip, poison
        self.passes = 0

    def backward(self, data):
        with torch.autocast("cpu", dtype=self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            loss = functional.cross_entropy(self.model(data[0]).float(), data[1])
        self.scaler.scale(loss).backward()
        if self.passes == self.poison:
            self.model[0].weight.grad[0, 0] = torch.inf
        self.passes += 1
        return loss

    def step(self, data):
        optimizer = self.optimizer
        if self.form == "closure":
            optimizer.step(lambda: self.backward(data))
        elif self.form == "gradient":
            optimizer.gradient(lambda: self.backward(data))
            self.clip_and_step()
        else:
            optimizer.zero_grad()
            if optimizer.rule.needs_gradient or not optimizer.next_ascents:
                self.backward(data)
            for ascent in optimizer.ascents():
                with ascent:
                    self.backward(data)
            self.clip_and_step()
        self.scaler.update()

    def clip_and_step(self):
        if self.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.scaler.step(self.optimizer)

    def weights(self):
        return flat(self.model.parameters())


@rules
@bases
@pytest.mark.parametrize("form", ["closure", "by hand"])
def test_t8_a_scaled_loop_is_the_loop_without(rule, base, form):
    """Powers of two scale float32 exactly."""
    loop, plain = Loop(rule, base, form=form), Loop(rule, base, enabled=False, form=form)
    scales = set()
    for number in range(7):
        scales.add(loop.scaler.get_scale())
        for one in (loop, plain):
            one.step(batch(number))
    assert len(scales) > 1  # the scale grows meanwhile
    torch.testing.assert_close(loop.weights(), plain.weights(), rtol=1e-6, atol=1e-6)
    assert loop.optimizer.num_steps == 7
    assert all(torch.equal(a, b) for a, b in zip(loop.model.buffers(), plain.model.buffers(), strict=True)) or base != "sgd"


@rules
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["closure", "by hand"])
def test_t8_half_precision_trains(rule, dtype, form):
    loop, plain = Loop(rule, "sgd", autocast=dtype, form=form), Loop(rule, "sgd", enabled=False, form=form)
    for number in range(6):
        for one in (loop, plain):
            one.step(batch(number % 2))
    assert loop.optimizer.num_skipped == 0
    start = flat(network().parameters())
    moved, expected = loop.weights() - start, plain.weights() - start
    assert (moved - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("form", ["by hand", "gradient"])
@pytest.mark.parametrize("base", ["sgd", "fused_adam"])
def test_clipping_of_the_unscaled_gradient(base, form):
    loop, plain = Loop(GSAM(), base, clip=0.05, form=form), Loop(GSAM(), base, enabled=False, clip=0.05)
    for number in range(4):
        for one in (loop, plain):
            one.step(batch(number))
    torch.testing.assert_close(loop.weights(), plain.weights(), rtol=1e-5, atol=1e-6)


@rules
@bases
@pytest.mark.parametrize("where", [0, 1], ids=["first", "second"])
@pytest.mark.parametrize("form", ["closure", "by hand"])
def test_t9_overflow_in_either_pass_skips_the_step_and_lowers_the_scale(rule, base, where, form):
    if where and not rule.needs_gradient:
        where = 0
    loop = Loop(rule, base, form=form, poison=where)
    before, buffers = loop.weights(), [buffer.clone() for buffer in loop.model.buffers()]
    loop.step(batch(0))
    assert torch.equal(loop.weights(), before)
    assert loop.scaler.get_scale() == 512.0
    assert loop.optimizer.num_steps == 0
    assert not any(torch.equal(a, b) for a, b in zip(loop.model.buffers(), buffers, strict=True))  # a pass was made
    again = Loop(rule, base, form=form, scale=512.0)
    again.model.load_state_dict(loop.model.state_dict())
    for number in range(1, 5):
        for one in (loop, again):
            one.step(batch(number))
    assert torch.equal(loop.weights(), again.weights())  # nothing of it stayed: no momentum, no memory, no count
    assert loop.optimizer.num_steps == 4


def test_t9_true_overflow_of_float16():
    loop = Loop(SAM(), "sgd", scale=2.0**40, autocast=torch.float16)
    before = loop.weights()
    loop.step(batch(0))
    assert torch.equal(loop.weights(), before)
    for number in range(40):
        loop.step(batch(number))
    assert loop.optimizer.num_steps > 0
    assert torch.isfinite(loop.weights()).all()
    assert not torch.equal(loop.weights(), before)


@pytest.mark.parametrize("rule", [FSAM(), WSAM()], ids=["FSAM", "WSAM"])
def test_a_rule_that_keeps_gradients_out_of_the_scalers_sight_must_know_it(rule):
    loop = Loop(rule, "sgd")
    loop.optimizer = SharpnessAware(BASES["sgd"](loop.model.parameters()), rule, model=loop.model)
    before = loop.weights()
    with pytest.raises(ValueError, match="scaler=scaler"):
        loop.step(batch(0))
    assert torch.equal(loop.weights(), before)


def test_an_adapter_says_the_scale_itself():
    """The trainer has unscaled the first gradient, and steps its own optimizer."""
    for rule in RULES:
        model, plain = network(), Loop(rule, "sgd", enabled=False)
        base = BASES["sgd"](model.parameters())
        sharp = SharpnessAware(base, rule, rho=0.1, model=model)
        for number, scale in enumerate((64.0, 256.0, 32.0, 8.0)):
            data = batch(number)
            base.zero_grad()
            if rule.needs_gradient or not sharp.next_ascents:
                (functional.cross_entropy(model(data[0]), data[1]) * scale).backward()
            for ascent in sharp.ascents(scale=scale):
                with ascent:
                    (functional.cross_entropy(model(data[0]), data[1]) * scale).backward()
            for parameter in model.parameters():
                parameter.grad.div_(scale)
            base.step()
            plain.step(data)
        torch.testing.assert_close(flat(model.parameters()), plain.weights(), rtol=1e-5, atol=1e-6)
