"""Each rule against its published formula on a quadratic, where every gradient is known: L(w) = ½ (w − c)ᵀ H (w − c)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD

from sharpness_plugins import sampling
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

RHO, LR, BETA, STEPS = 0.3, 0.05, 0.9, 7


class Quadratic(nn.Module):
    """Two parameters, so that norms and inner products run over tensors."""

    def __init__(self) -> None:
        super().__init__()
        rng = np.random.default_rng(0)
        root = rng.normal(size=(5, 5))
        self.H, self.c = root @ root.T + np.eye(5), rng.normal(size=5)
        start = torch.tensor(rng.normal(size=5))
        self.a, self.b = nn.Parameter(start[:2].clone()), nn.Parameter(start[2:].reshape(3, 1).clone())

    @property
    def w(self) -> np.ndarray:
        return torch.cat([self.a, self.b.flatten()]).detach().numpy().copy()

    def forward(self) -> torch.Tensor:
        offset = torch.cat([self.a, self.b.flatten()]) - torch.tensor(self.c)
        return 0.5 * offset @ torch.tensor(self.H) @ offset

    def gradient(self, w: np.ndarray) -> np.ndarray:
        return self.H @ (w - self.c)

    def closure(self) -> torch.Tensor:
        loss = self()
        loss.backward()
        return loss


def unit(x):
    return x / np.linalg.norm(x)


class Twin:
    """SGD with momentum, written out, on what ``make`` makes of the gradients."""

    def __init__(self, problem: Quadratic) -> None:
        self.grad, self.w, self.v, self.t, self.memory = problem.gradient, problem.w, None, 0, {}

    def step(self, make) -> None:
        gradient, drift = make(self), 0.0
        if isinstance(gradient, tuple):
            gradient, drift = gradient
        self.v = gradient if self.v is None else BETA * self.v + gradient
        self.w = self.w - LR * self.v - LR * drift
        self.t += 1


def sam(s):
    return s.grad(s.w + RHO * unit(s.grad(s.w)))


def asam(s, eta=0.01):
    t, g = np.abs(s.w) + eta, s.grad(s.w)
    return s.grad(s.w + RHO * t**2 * g / np.linalg.norm(t * g))


def gsam(s, alpha=0.4):
    g, up = s.grad(s.w), sam(s)
    return up - alpha * (g - (g @ up) / (up @ up) * up)


def wsam(s, gamma=0.9):
    g, up = s.grad(s.w), sam(s)
    return g, gamma / (1 - gamma) * (up - g)


def wsam_coupled(s, gamma=0.3):
    g, up = s.grad(s.w), sam(s)
    return (1 - 2 * gamma) / (1 - gamma) * g + gamma / (1 - gamma) * up


def fsam(s, sigma=1.0, decay=0.9):
    g = s.grad(s.w)
    m = s.memory.get("m")
    s.memory["m"] = g if m is None else decay * m + (1 - decay) * g
    return s.grad(s.w + RHO * unit(g if m is None else g - sigma * m))


def looksam(s, k=3, alpha=0.7):
    g = s.grad(s.w)
    if s.t % k == 0:
        up = sam(s)
        s.memory["v"] = up - (up @ unit(g)) * unit(g)
        return up
    return g + alpha * np.linalg.norm(g) * unit(s.memory["v"])


def msam(s):
    return s.grad(s.w if s.v is None else s.w - RHO * unit(s.v))


def two_steps(s):
    point = s.w + RHO / 2 * unit(s.grad(s.w))
    return s.grad(point + RHO / 2 * unit(s.grad(point)))


def projected(s, k=3, stride=0.8):
    point = s.w
    for _ in range(k):
        offset = point + stride * RHO * unit(s.grad(point)) - s.w
        point = s.w + offset * min(1.0, RHO / np.linalg.norm(offset))
    return s.grad(point)


def random(s):
    generator = sampling.generator_for(0, "ascent", s.t, 0)
    noise = (
        torch.randn(2, generator=generator, dtype=torch.float64),
        torch.randn(3, generator=generator, dtype=torch.float64),
    )
    return s.grad(s.w + RHO * unit(torch.cat(noise).numpy()))


FORMULAS = {
    "sam": (SAM(), sam, 2),
    "asam": (ASAM(), asam, 2),
    "asam_eta_0": (ASAM(eta=0.0), lambda s: asam(s, 0.0), 2),
    "gsam": (GSAM(), gsam, 2),
    "gsam_alpha": (GSAM(alpha=0.9), lambda s: gsam(s, 0.9), 2),
    "wsam": (WSAM(), wsam, 2),
    "wsam_coupled": (WSAM(gamma=0.3, decoupled=False), wsam_coupled, 2),
    "wsam_half": (WSAM(gamma=0.5, decoupled=False), sam, 2),
    "fsam": (FSAM(), fsam, 2),
    "fsam_settings": (FSAM(sigma=0.5, decay=0.6), lambda s: fsam(s, 0.5, 0.6), 2),
    "looksam": (LookSAM(k=3), looksam, 1 + 1 / 3),
    "msam": (MomentumSAM(), msam, 1),
    "two_steps": (KStepSAM(k=2), two_steps, 3),
    "one_step": (KStepSAM(k=1), sam, 2),
    "projected": (KStepSAM(k=3, step=0.8), projected, 4),
    "random": (RandomSAM(), random, 1),
}


@pytest.mark.parametrize("form", ["closure", "by hand"])
@pytest.mark.parametrize("name", FORMULAS)
def test_a_rule_is_its_formula(name, form):
    rule, formula, gradients = FORMULAS[name]
    problem = Quadratic()
    twin = Twin(problem)
    optimizer = SharpnessAware(SGD(problem.parameters(), lr=LR, momentum=BETA), rule, rho=RHO)
    assert optimizer.gradients_per_step == pytest.approx(gradients, rel=1e-12)
    for _ in range(STEPS):
        if form == "closure":
            optimizer.step(problem.closure)
        else:
            optimizer.zero_grad()
            if rule.needs_gradient:
                problem.closure()
            for ascent in optimizer.ascents():
                with ascent:
                    problem.closure()
            optimizer.step()
        twin.step(formula)
        np.testing.assert_allclose(problem.w, twin.w, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["sam", "fsam", "looksam"])
def test_an_interval_is_the_rule_in_each_so_manyth_step_and_plain_steps_between(name):
    rule, formula, _ = FORMULAS[name]
    problem = Quadratic()
    twin, asked = Twin(problem), 0
    optimizer = SharpnessAware(SGD(problem.parameters(), lr=LR, momentum=BETA), rule, rho=RHO, interval=3)
    for number in range(9):
        optimizer.step(problem.closure)
        if number % 3 == 0:
            twin.t = asked  # the rule counts the steps that it was asked for
            twin.step(formula)
            asked += 1
        else:
            twin.step(lambda s: s.grad(s.w))
        np.testing.assert_allclose(problem.w, twin.w, rtol=1e-12, atol=1e-13)


def test_t15_one_step_of_sam_on_a_quadratic():
    problem = Quadratic()
    w, H = problem.w - problem.c, problem.H
    SharpnessAware(SGD(problem.parameters(), lr=LR), SAM(), rho=RHO).step(problem.closure)
    expected = w - LR * H @ (w + RHO * H @ w / np.linalg.norm(H @ w))
    np.testing.assert_allclose(problem.w - problem.c, expected, rtol=1e-12)
