"""The second pass of sharpness-aware steps: where the weights stand, and that they come back."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from sharpness_plugins.optimizers import perturbed


def network() -> nn.Module:
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g, dtype=torch.float64))
    return model


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


@pytest.fixture
def data():
    g = torch.Generator().manual_seed(1)
    return torch.randn(8, 4, generator=g, dtype=torch.float64), torch.randint(0, 3, (8,), generator=g)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_the_second_gradient_is_that_at_the_formulas_point(data, adaptive, scale):
    model, twin = network(), network()
    functional.cross_entropy(model(data[0]), data[1]).mul(scale).backward()
    w, g = flat(model.parameters()), flat(p.grad for p in model.parameters())
    t = w.abs() + 0.01 if adaptive else torch.ones_like(w)
    point = w + 0.3 * t**2 * g / (t * g).norm()
    addresses = [p.data_ptr() for p in model.parameters()]
    with perturbed(model.parameters(), 0.3, adaptive=adaptive, module=model) as ascent:
        torch.testing.assert_close(flat(model.parameters()), point, rtol=1e-12, atol=1e-14)
        assert all(p.grad is None for p in model.parameters())
        functional.cross_entropy(model(data[0]), data[1]).backward()
    assert ascent.is_finite
    assert ascent.norm.item() == pytest.approx((t * g).norm().item(), rel=1e-12)
    assert torch.equal(flat(model.parameters()), w)
    assert [p.data_ptr() for p in model.parameters()] == addresses
    nn.utils.vector_to_parameters(point, twin.parameters())
    functional.cross_entropy(twin(data[0]), data[1]).backward()
    torch.testing.assert_close(
        flat(p.grad for p in model.parameters()), flat(p.grad for p in twin.parameters()), rtol=1e-10, atol=1e-12
    )


def test_buffers_are_those_of_one_forward_pass(data):
    model, twin = network(), network()
    functional.cross_entropy(model(data[0]), data[1]).backward()
    functional.cross_entropy(twin(data[0]), data[1]).backward()
    with perturbed(model.parameters(), 0.1, module=model):
        functional.cross_entropy(model(data[0]), data[1]).backward()
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_brings_weights_and_first_gradient_back(data, error):
    model = network()
    functional.cross_entropy(model(data[0]), data[1]).backward()
    w, g = flat(model.parameters()), flat(p.grad for p in model.parameters())
    with pytest.raises(error), perturbed(model.parameters(), 0.1, module=model):
        raise error
    assert torch.equal(flat(model.parameters()), w)
    assert torch.equal(flat(p.grad for p in model.parameters()), g)


@pytest.mark.parametrize("gradient", [0.0, float("inf"), float("nan")])
def test_a_gradient_without_direction_moves_nothing(gradient):
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.full((3,), gradient)
    with perturbed([weight], 0.5) as ascent:
        assert torch.equal(weight.detach(), torch.ones(3))
        assert not ascent.is_finite


def test_a_parameter_without_gradient_stays(data):
    model = network()
    model[0].bias.requires_grad_(False)
    functional.cross_entropy(model(data[0]), data[1]).backward()
    before = model[0].bias.clone()
    with perturbed(model.parameters(), 0.5):
        assert torch.equal(model[0].bias, before)
        assert not torch.equal(model[3].bias.detach(), torch.zeros(3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: (nn.Parameter(torch.ones(3, dtype=torch.bfloat16)), torch.ones(3, dtype=torch.bfloat16), 0.1), "bfloat16"),
        (lambda: (nn.Parameter(torch.ones(3)), torch.ones(3).to_sparse(), 0.1), "sparse"),
        (lambda: (nn.Parameter(torch.ones(3)), torch.ones(3), -0.1), "not negative, got -0.1"),
    ],
)
def test_what_cannot_be_right_is_refused_and_nothing_changes(make, message):
    weight, gradient, rho = make()
    weight.grad = gradient
    with pytest.raises(ValueError, match=message), perturbed([weight], rho):
        pass
    assert torch.equal(weight.detach().float(), torch.ones(3))
    assert weight.grad is gradient
