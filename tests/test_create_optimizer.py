"""Sharpness-aware optimizers by name, and rules of third parties."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from sharpness_plugins import available_optimizers, create_optimizer, get_rule
from sharpness_plugins.cli import main
from sharpness_plugins.errors import UnknownNameError
from sharpness_plugins.optimizers import ASAM, GSAM, SAM, LookSAM, Rule
from sharpness_plugins.registry import OptimizerSpec, fresh_registry


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))


def test_every_built_in_rule_is_found_and_trains(model):
    for name in available_optimizers():
        optimizer = create_optimizer(model, name, base="sgd", lr=0.1, momentum=0.9)
        assert optimizer.param_groups[0]["rho"] == type(optimizer.rule).default_rho
        optimizer.step(lambda: model(torch.ones(2, 3)).square().sum().backward())
        assert optimizer.num_steps == 1
    assert {"sam", "asam", "gsam", "wsam", "fsam", "looksam", "momentum_sam"} <= set(available_optimizers())


def test_settings_go_where_they_belong(model):
    optimizer = create_optimizer(model, "gsam:rho=0.1,alpha=0.3,m=16,interval=2", base="AdamW", lr=1e-3, weight_decay=0.2)
    assert isinstance(optimizer.base, AdamW)
    assert optimizer.rule == GSAM(alpha=0.3)
    assert (optimizer.m, optimizer.interval) == (16, 2)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["rho"]) == (1e-3, 0.2, 0.1)


def test_frozen_parameters_groups_and_other_bases(model):
    model[0].weight.requires_grad_(False)
    assert len(create_optimizer(model, lr=0.1).param_groups[0]["params"]) == 3
    groups = [{"params": [model[0].bias], "rho": 0.5}, {"params": model[1].parameters(), "lr": 0.3}]
    optimizer = create_optimizer(groups, "asam:eta=0.0", base=SGD, lr=0.1)
    assert [(group["lr"], group["rho"]) for group in optimizer.param_groups] == [(0.1, 0.5), (0.3, 0.5)]
    assert optimizer.rule == ASAM(eta=0.0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("sma",), UnknownNameError, "Did you mean 'sam'"),
        (("sam", "sdg"), UnknownNameError, "torch.optim has no optimizer 'sdg'. Did you mean 'sgd'"),
        (("sam:alpha=1",), TypeError, "optimizer 'sam' has no setting 'alpha'"),
        (("looksam:k=0",), ValueError, "k must be at least 1, got 0"),
        (("sam:rho=-1",), ValueError, "not negative, got -1"),
        (("sam", "lbfgs"), TypeError, "first-order"),
    ],
)
def test_what_does_not_fit_is_told(model, arguments, error, message):
    with pytest.raises(error) as caught:
        create_optimizer(model, *arguments, lr=0.1)
    assert message in str(caught.value)


@dataclass(frozen=True)
class Opposite(Rule):
    """Downhill."""

    strength: float = 1.0

    def direction(self, step):
        return [-self.strength * gradient for gradient in step.gradients]


def test_a_rule_of_a_third_party(model, capsys):
    with fresh_registry() as registry:
        registry.register(OptimizerSpec("acme_opposite", Opposite, summary="downhill first"))
        registry.register(OptimizerSpec("acme_number", lambda: 3))
        optimizer = create_optimizer(model, "acme_opposite:strength=2.0,rho=0.3", lr=0.1)
        assert optimizer.rule == Opposite(strength=2.0)
        with pytest.raises(TypeError, match=r"is 3, which has no combine\(\)"):
            get_rule("acme_number")
        assert main(["list", "--kind", "optimizer"]) == 0
        listed = capsys.readouterr().out
        assert "acme_opposite" in listed
        assert "downhill first" in listed
        assert "looksam" in listed


def test_names_are_those_of_the_classes():
    assert get_rule("sam") == SAM()
    assert get_rule("looksam", k=5) == LookSAM(k=5)
