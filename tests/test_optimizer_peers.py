"""Other libraries' sharpness-aware optimizers beside ours: the same weights where they are right, and where they are not.

davda54/sam is one file and no package: its tests run where ``DAVDA54_SAM`` names it.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import pytorch_optimizer as peer
import torch
from torch import nn
from torch.nn import functional
from torch.optim import SGD

from sharpness_plugins.optimizers import ASAM, FSAM, SAM, WSAM, LookSAM, SharpnessAware

SETTINGS = {"lr": 0.1, "momentum": 0.9}
STEPS = 25
DAVDA54 = os.environ.get("DAVDA54_SAM", "")
needs_davda54 = pytest.mark.skipif(not Path(DAVDA54).is_file(), reason="DAVDA54_SAM names no copy of davda54/sam's sam.py")

GENERATOR = torch.Generator().manual_seed(1)
INPUTS = torch.randn(STEPS, 8, 6, generator=GENERATOR, dtype=torch.float64)
LABELS = torch.randint(0, 4, (STEPS, 8), generator=GENERATOR)


@pytest.fixture
def davda54():
    spec = importlib.util.spec_from_file_location("davda54_sam", DAVDA54)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SAM


def network() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


class Counted:
    """A closure that works for all: it clears gradients, which ours lets be."""

    def __init__(self, model, optimizer):
        self.model, self.optimizer, self.batch, self.count = model, optimizer, 0, 0

    def __call__(self):
        self.optimizer.zero_grad()
        self.count += 1
        loss = functional.cross_entropy(self.model(INPUTS[self.batch]), LABELS[self.batch])
        loss.backward()
        return loss


def ours(rule, rho, *, steps=STEPS):
    model = network()
    optimizer = SharpnessAware(SGD(model.parameters(), **SETTINGS), rule, rho=rho, model=model)
    closure = Counted(model, optimizer)
    for closure.batch in range(steps):
        optimizer.step(closure)
    return flat(model), closure.count


def theirs(make, *, steps=STEPS):
    """As documented: a backward pass, then ``step(closure)``."""
    model = network()
    optimizer = make(model)
    closure = Counted(model, optimizer)
    for closure.batch in range(steps):
        closure()
        optimizer.step(closure)
    return flat(model), closure.count


@pytest.mark.parametrize(
    ("rule", "rho", "make"),
    [
        (SAM(), 0.05, lambda m: peer.SAM(m.parameters(), SGD, rho=0.05, **SETTINGS)),
        (ASAM(eta=0.0), 0.5, lambda m: peer.SAM(m.parameters(), SGD, rho=0.5, adaptive=True, **SETTINGS)),
        (FSAM(), 0.05, lambda m: peer.FriendlySAM(m.parameters(), SGD, rho=0.05, **SETTINGS)),
        (WSAM(), 0.05, lambda m: peer.WSAM(m, m.parameters(), SGD, rho=0.05, **SETTINGS)),
        (WSAM(decoupled=False), 0.05, lambda m: peer.WSAM(m, m.parameters(), SGD, rho=0.05, decouple=False, **SETTINGS)),
    ],
    ids=["SAM", "ASAM", "FSAM", "WSAM", "WSAM-coupled"],
)
def test_the_same_weights_as_pytorch_optimizer(rule, rho, make):
    """Up to its norms, which carry float32's rounding and an epsilon; without the ascent the weights differ by 1e-2."""
    own, passes = ours(rule, rho)
    other, _ = theirs(make)
    assert passes == 2 * STEPS
    torch.testing.assert_close(own, other, rtol=0, atol=1e-6)
    assert (own - ours(SAM(), 0.0)[0]).abs().max() > 1e-3


@needs_davda54
@pytest.mark.parametrize(("rule", "rho", "adaptive"), [(SAM(), 0.05, False), (ASAM(eta=0.0), 0.5, True)])
def test_the_same_weights_as_davda54(davda54, rule, rho, adaptive):
    other, _ = theirs(lambda model: davda54(model.parameters(), SGD, rho=rho, adaptive=adaptive, **SETTINGS))
    torch.testing.assert_close(ours(rule, rho)[0], other, rtol=0, atol=1e-6)


def test_looksam_saves_passes_here_and_not_there():
    """25 steps with k = 5: 5 of them make two passes, the others one."""
    _, own = ours(LookSAM(k=5), 0.1)
    _, other = theirs(lambda model: peer.LookSAM(model.parameters(), SGD, rho=0.1, k=5, **SETTINGS))
    assert own == 30
    assert other == 50


def overflow(make):
    """One step on a loss whose first gradient is infinite."""
    model = network()
    before = flat(model)
    optimizer = make(model)
    scales = iter([float("inf"), 1.0])

    def closure():
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(INPUTS[0]), LABELS[0]) * next(scales)
        loss.backward()
        return loss

    return before, model, optimizer, closure


def test_an_overflow_costs_a_step_here_and_the_weights_there():
    before, model, optimizer, closure = overflow(lambda m: SharpnessAware(SGD(m.parameters(), **SETTINGS), SAM(), model=m))
    with pytest.warns(RuntimeWarning, match="not finite"):
        optimizer.step(closure)
    assert torch.equal(flat(model), before)

    before, model, optimizer, closure = overflow(lambda m: peer.SAM(m.parameters(), SGD, rho=0.05, **SETTINGS))
    closure()
    optimizer.step(closure)
    assert flat(model).isnan().any()


class Branches(nn.Module):
    """Weights that a pass uses or not."""

    def __init__(self):
        super().__init__()
        self.always, self.sometimes = nn.Linear(6, 4), nn.Linear(6, 4)
        self.uses = True

    def forward(self, inputs):
        return self.always(inputs) + (self.sometimes(inputs) if self.uses else 0)


def first_pass_only(make, *, gradient_before=True):
    torch.manual_seed(0)
    model = Branches().double()
    optimizer = make(model)
    before = model.sometimes.weight.detach().clone()
    uses = iter([True, False])

    def closure():
        model.uses = next(uses)
        loss = functional.cross_entropy(model(INPUTS[0]), LABELS[0])
        loss.backward()
        return loss

    if gradient_before:
        closure()
    optimizer.step(closure)
    return model, before


def test_weights_of_the_first_pass_alone_come_back():
    plain = {"lr": 0.1}
    model, before = first_pass_only(
        lambda m: SharpnessAware(SGD(m.parameters(), **plain), SAM(), rho=0.05, model=m), gradient_before=False
    )
    assert torch.equal(model.sometimes.weight, before)


@needs_davda54
def test_weights_of_the_first_pass_alone_stay_uphill_in_davda54(davda54):
    model, before = first_pass_only(lambda m: davda54(m.parameters(), SGD, rho=0.05, lr=0.1))
    assert not torch.equal(model.sometimes.weight, before)


@needs_davda54
def test_davda54_moves_the_weights_in_memory_and_loses_momentum_in_checkpoints(davda54):
    model = network()
    optimizer = davda54(model.parameters(), SGD, rho=0.05, **SETTINGS)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    closure = Counted(model, optimizer)
    closure()
    optimizer.step(closure)
    assert addresses != [parameter.data_ptr() for parameter in model.parameters()]
    assert all("momentum_buffer" not in state for state in optimizer.state_dict()["state"].values())


def test_here_weights_stay_where_they_are_and_checkpoints_hold_momentum():
    model = network()
    optimizer = SharpnessAware(SGD(model.parameters(), **SETTINGS), SAM(), model=model)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    optimizer.step(Counted(model, optimizer))
    assert addresses == [parameter.data_ptr() for parameter in model.parameters()]
    assert all("momentum_buffer" in state for state in optimizer.state_dict()["state"].values())
