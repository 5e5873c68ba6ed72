"""Closed forms of second derivatives: the same functions and derivatives as torch's own, and fewer passes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from sharpness_plugins import closed_forms
from sharpness_plugins.closed_forms import ClosedForms
from sharpness_plugins.objective import Objective

F64 = torch.float64
PLAIN = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=F64) - 0.5


def derivatives(of, tensors: list[Tensor], *, closed: bool) -> tuple[list[Tensor], str]:
    """Value, gradients and products of the Hessian of ``tanh`` of it with a vector, with respect to the tensors."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    forms = ClosedForms()

    def found() -> list[Tensor]:
        value = of(*leaves)
        gradients = torch.autograd.grad(value.tanh().sum(), leaves, create_graph=True)
        tangents = [uniform(*leaf.shape, seed=9 + i) for i, leaf in enumerate(leaves)]
        return [value, *gradients, *torch.autograd.grad(gradients, leaves, tangents)]

    if not closed:
        return found(), ""
    with forms:
        return found(), forms.used


def agree(of, tensors: list[Tensor], used: str) -> None:
    expected, _ = derivatives(of, tensors, closed=False)
    got, said = derivatives(of, tensors, closed=True)
    assert said == used
    for mine, torchs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("num_axes", [1, 2, 3])
def test_convolutions_have_their_derivatives(num_axes):
    """Every stride, padding, dilation and number of groups, on images larger and smaller than the kernel."""
    cases = itertools.product((1, 2), (0, 1, 3), (1, 2), (1, 2), (True, False), (1, 2, 5))
    for stride, padding, dilation, groups, biased, size in cases:
        if size + 2 * padding < 2 * dilation + 1:
            continue  # torch refuses such a kernel
        tensors = [uniform(2, 4, *[size] * num_axes), uniform(6, 4 // groups, *[3] * num_axes, seed=1)]
        tensors += [uniform(6, seed=2)] * biased

        def of(input: Tensor, weight: Tensor, bias: Tensor | None = None, moves=(stride, padding, dilation, groups)) -> Tensor:
            return PLAIN[num_axes](input, weight, bias, *moves)

        agree(of, tensors, "1 convolutions")


def test_uneven_images_and_kernels():
    for shape, kernel, moves in (
        ((1, 5), (3, 2), {"padding": (1, 0)}),
        ((1, 7), (5, 3), {"padding": [2, 1], "stride": (1, 2)}),
        ((4, 1), (1, 3), {"padding": (0, 1), "dilation": (1, 1)}),
        ((2, 2), (7, 7), {"padding": 3, "stride": 2}),
        ((3, 1), (3, 3), {"padding": 4, "dilation": (2, 4)}),
    ):
        tensors = [uniform(2, 3, *shape), uniform(4, 3, *kernel, seed=1)]
        agree(lambda x, w, m=moves: functional.conv2d(x, w, **m), tensors, "1 convolutions")


def test_what_is_not_known_stays_as_it_is():
    x, w, b = uniform(2, 4, 5, 5), uniform(6, 4, 3, 3, seed=1), uniform(6, seed=2)
    agree(lambda x, w: functional.conv2d(x, w, padding="same"), [x, w], "")
    agree(lambda x, w: functional.conv2d(x, w), [x[0], w], "")  # a single image
    agree(lambda x, w: functional.conv_transpose2d(x, w.transpose(0, 1)), [x, w], "")
    mean, var = uniform(4), uniform(4) + 1
    agree(lambda x: functional.batch_norm(x, mean.clone(), var.clone(), training=True), [x], "")
    with ClosedForms() as forms:
        found = functional.conv2d(x.to(torch.bfloat16), w.to(torch.bfloat16), b.to(torch.bfloat16))
        empty = functional.conv2d(x[:0], w, b)
    assert torch.equal(found, functional.conv2d(x.to(torch.bfloat16), w.to(torch.bfloat16), b.to(torch.bfloat16)))
    assert empty.shape == (0, 6, 3, 3)
    assert forms.used == ""


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("num_axes", [1, 2, 3])
@pytest.mark.parametrize("size", [2, 9])  # weights more, and fewer, than activations
def test_batch_norm_after_a_convolution_and_elsewhere(num_axes, affine, size):
    x, w, b = uniform(3, 4, *[size] * num_axes), uniform(6, 2, *[3] * num_axes, seed=1), uniform(6, seed=2)
    mean, var, scale, shift = (uniform(6, seed=seed) + 0.7 for seed in range(3, 7))
    tensors = [x, w, b] + [scale, shift] * affine

    def folded(x: Tensor, w: Tensor, b: Tensor, *affine: Tensor) -> Tensor:
        return functional.batch_norm(PLAIN[num_axes](x, w, b, padding=1, groups=2), mean, var, *affine)

    def beside(x: Tensor, w: Tensor, b: Tensor, *affine: Tensor) -> Tensor:
        return functional.batch_norm(PLAIN[num_axes](x, w, b, padding=1, groups=2).sigmoid(), mean, var, *affine, eps=0.1)

    agree(folded, tensors, "1 convolutions and 1 BatchNorm")
    agree(beside, tensors, "1 convolutions and 1 BatchNorm")


def test_batch_norm_takes_back_only_a_convolution_that_is_as_it_was():
    x, w = uniform(3, 4, 6, 6), uniform(4, 4, 3, 3, seed=1)
    mean, var = uniform(4, seed=3), uniform(4, seed=4) + 1

    def norm(y: Tensor) -> Tensor:
        return functional.batch_norm(y, mean, var)

    def written_after(x: Tensor, w: Tensor) -> Tensor:
        return norm(functional.conv2d(x, w, padding=1).mul_(2))

    def input_written_after(x: Tensor, w: Tensor) -> Tensor:
        z = uniform(3, 4, 6, 6, seed=7)  # neither it nor the weights need a gradient, so both may change
        y = functional.conv2d(z, w.detach(), padding=1)
        z.add_(1)
        return norm(y) * x.square() + w.square().sum()

    def used_twice(x: Tensor, w: Tensor) -> Tensor:
        y = functional.conv2d(x, w, padding=1)
        return norm(y) + y + norm(y).relu()

    def relu_in_place(x: Tensor, w: Tensor) -> Tensor:
        return norm(functional.conv2d(x, w, padding=1)).relu_() * x

    agree(written_after, [x, w], "1 convolutions and 1 BatchNorm")
    agree(input_written_after, [x, w], "1 convolutions and 1 BatchNorm")
    agree(used_twice, [x, w], "1 convolutions and 2 BatchNorm")
    agree(relu_in_place, [x, w], "1 convolutions and 1 BatchNorm")


def test_derivatives_of_any_order_are_right():
    x, w, b = uniform(1, 2, 4), uniform(2, 2, 3, seed=1), uniform(2, seed=2)
    with ClosedForms():
        leaves = [tensor.requires_grad_() for tensor in (x, w, b)]
        assert torch.autograd.gradcheck(lambda *t: functional.conv1d(*t, padding=1).tanh(), leaves)
        assert torch.autograd.gradgradcheck(lambda *t: functional.conv1d(*t, padding=1).tanh(), leaves)

    def third(*leaves: Tensor) -> Tensor:
        loss = functional.conv1d(*leaves, padding=1).tanh().sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad([g.square().sum() for g in first], leaves, create_graph=True)
        return torch.stack([g.square().sum() for g in second]).sum()

    agree(third, [x.detach(), w.detach(), b.detach()], "1 convolutions")


class Frozen(nn.Module):
    """A network whose first layers are not trained, with two BatchNorms, one of them beside a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.second, self.other = nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)
        for parameter in self.first.parameters():
            parameter.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.first(x)))
        h = h + torch.tanh(self.other(self.second(h) + h))
        return self.head(h.mean((2, 3)))


def network(build=Frozen) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().double()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                    tensor.uniform_(0.5, 1.5)
        x = torch.randn(10, 3, 5, 5, dtype=F64)
    return model.eval(), [(x[:6], torch.arange(6) % 3), (x[6:], torch.arange(4) % 3)]


def products(objective: Objective, count: int = 3) -> Tensor:
    rows = torch.randn(count, objective.dim, generator=torch.Generator().manual_seed(0), dtype=F64)
    with objective.session():
        return torch.stack([objective.hvp(row) for row in rows])


@pytest.mark.parametrize("mode", ["retained double backward", "double backward"])
def test_products_are_those_of_forward_over_reverse_which_has_no_closed_forms(mode):
    model, loader = network()
    objective = Objective(model, loader, hvp=mode)
    expected = products(Objective(model, loader, hvp="forward over reverse"))
    torch.testing.assert_close(products(objective), expected, rtol=1e-11, atol=1e-13)
    assert objective.hvp_check.endswith("; closed forms of 2 convolutions and 2 BatchNorm")
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("fault", ["wrong", "raises"])
def test_a_closed_form_that_fails_the_probe_is_not_used(monkeypatch, fault):
    model, loader = network()
    expected = products(Objective(model, loader, hvp="forward over reverse"))

    def faulty(*args):
        if fault == "raises":
            raise RuntimeError("no such kernel")
        return tuple(None if g is None else 1.5 * g for g in right(*args))

    right = closed_forms._backward
    monkeypatch.setattr(closed_forms, "_backward", faulty)
    objective = Objective(model, loader)
    torch.testing.assert_close(products(objective), expected, rtol=1e-11, atol=1e-13)
    assert objective.hvp_mode == "retained double backward"
    assert "closed forms" not in objective.hvp_check


def test_checkpointed_layers_are_built_again_in_the_same_form():
    class Checkpointed(Frozen):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.norm(self.first(x)))
            h = checkpoint(lambda h: torch.tanh(self.other(self.second(h))), h, use_reentrant=False)
            return self.head(h.mean((2, 3)))

    model, loader = network(Checkpointed)
    objective = Objective(model, loader)
    found = products(objective)
    assert objective.hvp_mode == "retained double backward"
    assert "closed forms of 2 convolutions" in objective.hvp_check

    class Plain(Checkpointed):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.norm(self.first(x)))
            return self.head(torch.tanh(self.other(self.second(h))).mean((2, 3)))

    plain, _ = network(Plain)
    torch.testing.assert_close(found, products(Objective(plain, loader, hvp="forward over reverse")), rtol=1e-11, atol=1e-13)


def test_a_function_mode_that_an_interrupt_left_behind_goes_with_the_session():
    model, loader = network()
    objective = Objective(model, loader)
    with torch.device("cpu"):  # the caller's own stays
        before = torch._C._len_torch_function_stack()
        with objective.session():
            ClosedForms().__enter__()
            assert torch._C._len_torch_function_stack() == before + 1
        assert torch._C._len_torch_function_stack() == before > 0


def test_products_of_a_residual_network_take_fewer_operations_than_two_gradients():
    """On 32x32 images a third of what torch's own kernels multiply is padding."""
    timm = pytest.importorskip("timm")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("resnet18", num_classes=10)
        objective = Objective(model, [(torch.randn(4, 3, 32, 32), torch.arange(4))])
    v = torch.ones(objective.dim)

    def work(of) -> int:
        with FlopCounterMode(display=False) as counter:
            of()
        return counter.get_total_flops()

    with objective.session():
        objective.hvp(v)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            objective.hvp(v)
        ratio = work(lambda: objective.hvp(v)) / work(objective.value_and_grad)
    assert ratio <= 1.6
    counts = {event.key: event.count for event in profile.key_averages()}
    assert "aten::native_batch_norm_backward" not in counts
    # 20 layers: the tangent of each but the first comes from two, gradients of inputs and of weights from two each
    assert counts["aten::convolution"] == 39
    assert counts["aten::convolution_backward"] == 19 + 19 + 20
