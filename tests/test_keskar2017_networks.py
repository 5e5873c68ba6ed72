"""The paper's networks: sizes counted by hand from its Table 1, BatchNorm's two modes, initial weights."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from sharpness_plugins.experiments.keskar2017.networks import NETWORKS, build
from sharpness_plugins.experiments.networks import noisy_digits_network, relu_mlp


def dense(inputs, outputs):
    return inputs * outputs + outputs


def conv(inputs, outputs, side):
    return inputs * outputs * side * side + outputs


def norm(channels):
    return 2 * channels


def shallow(classes):
    first = conv(3, 64, 5) + norm(64) + conv(64, 64, 5) + norm(64)
    return first + dense(8 * 8 * 64, 384) + norm(384) + dense(384, 192) + norm(192) + dense(192, classes)


def deep(classes):
    filters = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    convolutions = sum(conv(i, o, 3) + norm(o) for i, o in itertools.pairwise(filters))
    return convolutions + dense(512, 512) + norm(512) + dense(512, classes)


SIZES = {
    "F1": ((1, 28, 28), 10, dense(784, 512) + 4 * dense(512, 512) + 5 * norm(512) + dense(512, 10)),
    "F2": ((360,), 1973, dense(360, 512) + 6 * dense(512, 512) + 7 * norm(512) + dense(512, 1973)),
    "C1": ((3, 32, 32), 10, shallow(10)),
    "C2": ((3, 32, 32), 10, deep(10)),
    "C3": ((3, 32, 32), 100, shallow(100)),
    "C4": ((3, 32, 32), 100, deep(100)),
    "R": ((64,), 10, dense(64, 256) + 3 * dense(256, 256) + dense(256, 10)),
    "A": ((64,), 10, dense(64, 128) + dense(128, 128) + dense(128, 10)),
    "small-conv": ((1, 8, 8), 10, conv(1, 16, 3) + norm(16) + conv(16, 32, 3) + norm(32) + dense(128, 64) + dense(64, 10)),
}


def test_every_network_is_counted():
    assert set(SIZES) == set(NETWORKS)


@pytest.mark.parametrize("name", SIZES)
def test_number_of_weights(name):
    inputs, classes, expected = SIZES[name]
    network = build(name, inputs=inputs, num_classes=classes, seed=0)
    assert sum(weight.numel() for weight in network.parameters()) == expected


@pytest.mark.parametrize("name", ["C1", "C2"])
def test_dropout_rates_are_those_of_the_scripts(name):
    network = build(name, inputs=(3, 32, 32), num_classes=10, seed=0, width=0.05)
    rates = [layer.p for layer in network if isinstance(layer, nn.Dropout)]
    assert rates == {"C1": [0.5, 0.5], "C2": [0.3, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.5, 0.5]}[name]


@pytest.mark.parametrize("name", [name for name, kind in NETWORKS.items() if kind.has_batch_norm])
def test_in_tests_a_sample_depends_on_its_batch_by_batch_statistics_alone(name):
    inputs, classes, _ = SIZES[name]
    samples = torch.rand(6, *inputs, generator=torch.Generator().manual_seed(0))
    for mode, depends in (("batch", True), ("running", False)):
        network = build(name, inputs=inputs, num_classes=classes, seed=0, width=0.05, batch_norm=mode).eval()
        with torch.no_grad():
            whole, part = network(samples)[:3], network(samples[:3])
        assert torch.allclose(whole, part, atol=1e-6) != depends


def test_initial_weights_are_uniform_as_in_keras():
    network = build("C1", inputs=(3, 32, 32), num_classes=10, seed=0)
    layers = [layer for layer in network if isinstance(layer, (nn.Conv2d, nn.Linear))]
    for layer, fans in ((layers[0], (3 + 64) * 25), (layers[2], 4096 + 384)):
        bound = math.sqrt(6 / fans)
        assert layer.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
        assert not layer.bias.any()


def test_the_seed_decides_and_the_caller_keeps_its_generator():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (build("F1", inputs=(64,), num_classes=10, seed=s, width=0.1) for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


def test_small_ones_are_those_of_the_demo_and_of_the_warm_start():
    for built, known in (
        (build("R", inputs=(64,), num_classes=10, seed=3), relu_mlp((64, 256, 256, 256, 256, 10), seed=3)),
        (build("A", inputs=(64,), num_classes=10, seed=3), noisy_digits_network(3)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(built.parameters(), known.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "small-con"}, "Did you mean 'small-conv'"),
        ({"batch_norm": "moving"}, "batch, running"),
        ({"width": 0.0}, "positive"),
        ({"inputs": (64,)}, "images"),
        ({"inputs": (3, 16, 16), "name": "C2"}, "32 pixels"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    given = {"name": "C1", "inputs": (3, 32, 32), "num_classes": 10, "seed": 0} | changes
    with pytest.raises(ValueError, match=message):
        build(given.pop("name"), **given)
