"""Value, gradient and Hessian-vector products: right numbers, any batching, no trace."""

from __future__ import annotations

import copy
import random
import signal
import threading
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import oracles
from sharpness_plugins.errors import LoaderError, NonFiniteLossError, SecondDerivativeError
from sharpness_plugins.hvp import HVP_MODES
from sharpness_plugins.objective import Objective


def direction(dim: int, seed: int, like: torch.Tensor) -> torch.Tensor:
    return torch.randn(dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(like)


@pytest.mark.parametrize("sizes", [(20,), (7, 7, 6), (1, 19), (5, 5, 5, 5)])
def test_any_batching_gives_the_loss_gradient_and_hessian_of_the_whole(sizes):
    problem = oracles.small_classifier()
    objective = Objective(problem.model, problem.loader(*sizes))
    e, v = direction(objective.dim, 1, objective.origin), direction(objective.dim, 2, objective.origin)

    point = (problem.flat_weights() + 0.1 * e).requires_grad_()
    loss = problem.flat_loss()(point)
    (gradient,) = torch.autograd.grad(loss, point)
    product = torch.autograd.functional.hvp(problem.flat_loss(), point.detach(), v)[1]

    assert objective.value(0.1 * e) == pytest.approx(loss.item(), rel=1e-13)
    found, found_gradient = objective.value_and_grad(0.1 * e)
    assert found == pytest.approx(loss.item(), rel=1e-13)
    torch.testing.assert_close(found_gradient, gradient, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(objective.hvp(v, 0.1 * e), product, rtol=1e-11, atol=1e-13)


def test_a_sweep_serves_all_rows():
    problem = oracles.small_classifier()
    objective = Objective(problem.model, problem.loader(8, 8, 4))
    objective.hvp(torch.ones(objective.dim))  # with the probe
    before = objective.cost
    rows = objective.hvp(torch.eye(objective.dim, dtype=torch.float64))
    torch.testing.assert_close(rows, problem.dense_hessian(), rtol=1e-9, atol=1e-11)
    cost = objective.cost - before
    assert (cost.hvps, cost.gradients) == (objective.dim, 0)
    assert cost.passes == pytest.approx(1)


def test_hvp_of_a_linear_loss_is_zero():
    slope = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    objective = oracles.objective_of(lambda w: slope @ w, torch.ones(3, dtype=torch.float64))
    for mode in HVP_MODES:
        with objective.hvp_by(mode):
            for _ in range(2):
                assert objective.hvp(slope).abs().max() <= 1e-9 * (mode == "central differences")


def test_unused_parameters_have_zero_derivatives():
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([3.0]))

        def forward(self) -> torch.Tensor:
            return (self.used**3).sum()

    objective = Objective(Half(), [torch.zeros(1)], loss_fn=lambda model, batch: model())
    assert objective.value_and_grad()[1].tolist() == [3.0, 12.0, 0.0]
    assert objective.hvp(torch.ones(3)).tolist() == [6.0, 12.0, 0.0]


def test_a_loss_that_does_not_depend_on_the_weights_is_an_error():
    objective = oracles.objective_of(lambda w: w.detach().sum() * 0 + 1, torch.ones(3))
    with pytest.raises(ValueError, match="does not depend on the selected parameters"):
        objective.value_and_grad()


def test_loss_accumulates_in_float64_on_float32_models():
    """A saturated softmax: float32 cross-entropy rounds to 0, and its gradient with it."""
    model = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[20.0], [0.0]]))
    objective = Objective(model, [(torch.ones(3, 1), torch.zeros(3, dtype=torch.long))])
    assert objective.loss == pytest.approx(np.log1p(np.exp(-20.0)), rel=1e-7)


def test_tied_weights_count_once_and_get_both_gradients():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3, bias=False)
            self.second = nn.Linear(3, 3, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))

    model = Tied().double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    objective = Objective(model, [(x, y)])
    assert objective.dim == 9
    loss = nn.functional.cross_entropy(model(x), y)
    (expected,) = torch.autograd.grad(loss, model.first.weight)
    torch.testing.assert_close(objective.value_and_grad()[1], expected.reshape(-1))
    # and the perturbation reaches both places
    e = 0.1 * torch.ones(9, dtype=torch.float64)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved.first.weight += 0.1
    assert objective.value(e) == pytest.approx(nn.functional.cross_entropy(moved(x), y).item(), rel=1e-13)


def test_frozen_and_unselected_parameters_stay():
    problem = oracles.small_classifier()
    problem.model[0].weight.requires_grad_(False)
    objective = Objective(problem.model, problem.loader(), select="*weight")
    assert objective.space.names == ["2.weight"]
    full = Objective(problem.model, problem.loader())
    assert full.space.names == ["0.bias", "2.weight", "2.bias"]
    torch.testing.assert_close(objective.value_and_grad()[1], full.value_and_grad()[1][6:24])


def test_half_precision_is_measured_in_float32_and_said():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).to(torch.bfloat16)
    x, y = torch.randn(6, 4).to(torch.bfloat16), torch.tensor([0, 1, 2, 0, 1, 2])
    objective = Objective(model, [(x, y)])
    reference = Objective(copy.deepcopy(model).float(), [(x.float(), y)])
    assert objective.loss == reference.loss
    assert objective.origin.dtype == torch.float32
    e = torch.full((objective.dim,), 1e-4)
    assert objective.value(e) == reference.value(e) != objective.loss
    assert any("float32 copy" in note for note in objective.notes)
    assert model[0].weight.dtype == torch.bfloat16


def batch_norm_net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    model(3 + 2 * torch.randn(64, 4))  # running statistics that differ from the batch's
    return model


def test_batch_norm_policies():
    model = batch_norm_net().double()
    x, y = torch.randn(12, 4, dtype=torch.float64), torch.arange(12) % 3
    running = Objective(model, [(x, y)])
    batch = Objective(model, [(x, y)], batch_norm="batch")
    assert running.loss == pytest.approx(nn.functional.cross_entropy(model.eval()(x), y).item(), rel=1e-12)
    by_hand = copy.deepcopy(model).eval()
    by_hand[1].train()
    assert batch.loss == pytest.approx(nn.functional.cross_entropy(by_hand(x), y).item(), rel=1e-12)
    assert abs(running.loss - batch.loss) > 1e-3
    assert any("BatchNorm" in note for note in batch.notes)
    # with batch statistics, a bias before the normalization does not matter
    bias = torch.zeros(batch.dim, dtype=torch.float64)
    bias[32:40] = 1.0
    assert batch.value(bias) == pytest.approx(batch.loss, rel=1e-9)
    assert abs(running.value(bias) - running.loss) > 1e-3
    for objective in (running, batch):
        v = direction(objective.dim, 0, objective.origin)
        first = objective.hvp(v)
        with objective.hvp_by("forward over reverse"):
            torch.testing.assert_close(first, objective.hvp(v), rtol=1e-9, atol=1e-11)


def fingerprint(model: nn.Module) -> list[object]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return [
        [(name, tensor.detach().clone(), id(tensor), tensor._version, tensor.requires_grad) for name, tensor in named],
        [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()],
        [module.training for module in model.modules()],
        [len(module._forward_hooks) for module in model.modules()],
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state(),  # noqa: NPY002
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.backends.mha.get_fastpath_enabled(),
    ]


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


class Failing(nn.Module):
    """Fails from a given call on, wherever that falls."""

    def __init__(self, inner: nn.Module, at_call: int, error: BaseException) -> None:
        super().__init__()
        self.inner, self.at_call, self.error, self.calls = inner, at_call, error, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls >= self.at_call:
            raise self.error
        return self.inner(x)


def mixed_mode_model() -> nn.Module:
    model = batch_norm_net()
    model.train()
    model[1].eval()
    model[4].bias.requires_grad_(False)
    model(torch.randn(8, 4)).sum().backward()
    return model


@pytest.mark.parametrize("batch_norm", ["eval", "batch"])
@pytest.mark.parametrize("grad", [True, False])
def test_no_trace_after_success(batch_norm, grad):
    model = mixed_mode_model()
    data = torch.utils.data.TensorDataset(torch.randn(12, 4), torch.arange(12) % 3)
    own = torch.Generator().manual_seed(7)
    loader = torch.utils.data.DataLoader(data, batch_size=5, shuffle=True, generator=own)
    before, before_own = fingerprint(model), own.get_state()
    with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=torch.bfloat16, enabled=grad):
        inside = fingerprint(model)
        objective = Objective(model, loader, batch_norm=batch_norm, cache_bytes=0)
        objective.value_and_grad()
        objective.hvp(torch.ones(objective.dim))
        sketch = objective.sketch(6)
        sketch.gradient(torch.ones(len(sketch.probabilities())))
        assert same(fingerprint(model), inside)
    assert same(fingerprint(model), before)
    assert torch.equal(own.get_state(), before_own)


@pytest.mark.parametrize("error", [RuntimeError("model"), KeyboardInterrupt()], ids=["exception", "ctrl-c"])
@pytest.mark.parametrize("at_call", [1, 2, 3, 4, 5])
def test_no_trace_after_a_failure(error, at_call):
    model = Failing(mixed_mode_model(), at_call, error)
    loader = [(torch.randn(6, 4), torch.arange(6) % 3)]
    before = fingerprint(model)

    def measure() -> None:
        objective = Objective(model, loader, hvp="double backward")
        objective.value_and_grad()
        objective.hvp(torch.ones(objective.dim))
        for _ in range(5):
            objective.value()

    with pytest.raises(type(error)):
        measure()
    assert same(fingerprint(model), before)


def test_works_inside_inference_mode_and_on_inference_tensors():
    problem = oracles.small_classifier(torch.float32)
    expected = Objective(problem.model, problem.loader())
    with torch.inference_mode():
        x = problem.inputs.clone()
        objective = Objective(problem.model, [(x, problem.targets)])
        value, gradient = objective.value_and_grad()
        product = objective.hvp(torch.ones(objective.dim))
    assert value == expected.loss
    torch.testing.assert_close(gradient.clone(), expected.value_and_grad()[1])
    torch.testing.assert_close(product.clone(), expected.hvp(torch.ones(expected.dim)))


def test_autocast_around_the_call_changes_nothing():
    problem = oracles.small_classifier(torch.float32)
    plain = Objective(problem.model, problem.loader())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = Objective(problem.model, problem.loader())
        assert inside.loss == plain.loss
        assert torch.equal(inside.value_and_grad()[1], plain.value_and_grad()[1])


def test_a_model_that_writes_to_its_inputs_sees_them_fresh_each_time():
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.mul_(2)
            return self.linear(x)

    torch.manual_seed(0)
    model, x, y = Writes(), torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    kept = x.clone()
    objective = Objective(model, [(x, y)])
    assert objective.value() == objective.value() == objective.loss
    assert objective.loss == pytest.approx(nn.functional.cross_entropy(model.linear(2 * kept), y).item(), rel=1e-6)
    assert torch.equal(x, kept)


def test_nan_loss_names_the_batch():
    problem = oracles.small_classifier(torch.float32)
    loader = problem.loader(5, 5, 5, 5)
    loader[2][0][1, 1] = float("nan")
    with pytest.raises(NonFiniteLossError, match=r"nan on batch 2 of 4 \(counted from 0\)"):
        Objective(problem.model, loader)


def test_a_loss_that_overflows_only_when_perturbed_is_a_value_and_no_error():
    objective = oracles.objective_of(lambda w: torch.exp(w.sum()), torch.zeros(2))
    assert objective.value(torch.full((2,), 1e3)) == float("inf")


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"model": "net"}, TypeError, "must be a torch.nn.Module"),
        ({"criterion": nn.MSELoss(), "loss_fn": nn.MSELoss()}, ValueError, "both loss_fn and criterion"),
        ({"loader": []}, LoaderError, "empty"),
        ({"loader": iter([1])}, LoaderError, "only once"),
        ({"batch_norm": "train"}, ValueError, "batch_norm must be one of"),
        ({"select": "nothing*"}, ValueError, "matches no trainable parameter"),
        ({"max_samples": 0}, ValueError, "max_samples must be at least 1"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(arguments, error, match):
    problem = oracles.small_classifier()
    given = {"model": problem.model, "loader": problem.loader(), **arguments}
    with pytest.raises(error, match=match):
        Objective(given.pop("model"), given.pop("loader"), **given)


def test_scripted_models_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.script is deprecated
        scripted = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"scripted.*Pass the nn.Module it was made from"):
        Objective(scripted, [(torch.zeros(1, 2), torch.tensor([0]))])


def test_a_perturbation_of_the_wrong_shape_is_refused():
    problem = oracles.small_classifier()
    objective = Objective(problem.model, problem.loader())
    for call in (objective.value, objective.value_and_grad, objective.hvp):
        with pytest.raises(ValueError, match=r"must have shape \(51,\)"):
            call(torch.zeros(50))


def test_no_second_derivative_is_a_clear_error_and_a_failing_model_keeps_its_own():
    bag = nn.Sequential(nn.EmbeddingBag(10, 4), nn.Linear(4, 2))
    objective = Objective(bag, [(torch.randint(0, 10, (6, 3)), torch.arange(6) % 2)])
    named = r"product of module '0' \(EmbeddingBag\) \(double backward: .*forward over reverse: "
    with pytest.raises(SecondDerivativeError, match=named):
        objective.hvp(torch.ones(objective.dim))
    failing = Failing(nn.Linear(3, 2), 10**9, RuntimeError("the model's own"))
    objective = Objective(failing, [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))])

    class Always(RuntimeError):
        pass

    def broken(x: torch.Tensor) -> torch.Tensor:
        raise Always("the model's own")

    failing.inner.forward = broken
    with pytest.raises(Always, match="the model's own"):
        objective.hvp(torch.ones(objective.dim))


def test_cost_counts_full_data_equivalents():
    problem = oracles.small_classifier()
    objective = Objective(problem.model, problem.loader(8, 12))
    objective.hvp(torch.ones(objective.dim))  # with the probe
    before = objective.cost
    objective.value()
    objective.value_and_grad()
    objective.hvp(torch.ones(objective.dim))
    objective.hvp(torch.ones(3, objective.dim))
    cost = objective.cost - before
    assert (cost.values, cost.gradients, cost.hvps) == (1, 1, 4)
    assert cost.passes == pytest.approx(4)
    assert cost.seconds > 0


def test_a_batch_without_weight_does_not_count():
    problem = oracles.small_classifier()
    ignored = (problem.inputs[:4], torch.full((4,), -100))
    with_it = Objective(problem.model, [*problem.loader(), ignored])
    without = Objective(problem.model, problem.loader())
    assert with_it.loss == pytest.approx(without.loss, rel=1e-14)
    torch.testing.assert_close(with_it.value_and_grad()[1], without.value_and_grad()[1])
    with pytest.raises(ValueError, match="every target is ignored"):
        Objective(problem.model, [ignored])


def test_a_batch_without_weight_may_have_no_loss_at_all():
    """A mean over nothing is NaN; it must not reach the sum, the gradient or the products."""
    problem = oracles.small_classifier()

    def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, int]:
        x, y = batch
        return nn.functional.cross_entropy(model(x), y), int((y >= 0).sum())

    ignored = (problem.inputs[:4], torch.full((4,), -100))
    found = Objective(problem.model, [ignored, *problem.loader()], loss_fn=loss_fn)
    expected = Objective(problem.model, problem.loader())
    v = direction(found.dim, 0, found.origin)
    assert found.loss == pytest.approx(expected.loss, rel=1e-12)
    torch.testing.assert_close(found.value_and_grad()[1], expected.value_and_grad()[1])
    torch.testing.assert_close(found.hvp(v), expected.hvp(v))
    probe = found.cost.gradients - 1
    assert found.cost.passes == pytest.approx(3 + probe)


def test_one_flat_leaf_is_split_and_not_sliced():
    """Slicing one leaf per parameter costs 82 times a split: every slice's backward writes a full-size zero tensor."""
    problem = oracles.small_classifier()
    objective = Objective(problem.model, problem.loader())
    with torch.profiler.profile() as profile:
        objective.value_and_grad()
    operations = {event.key for event in profile.key_averages()}
    assert any("Split" in name for name in operations)
    assert not any("SliceBackward" in name or "NarrowBackward" in name for name in operations)


@pytest.mark.parametrize("api", ["parametrization", "hook"])
@pytest.mark.parametrize("mode", ["forward over reverse", "retained double backward"])
def test_weight_norm_has_the_right_hessian(api, mode):
    """torch's own double backward of weight norm is wrong: an asymmetric Hessian."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 4).double()
    if api == "hook":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the old form is deprecated
            layer = nn.utils.weight_norm(layer)
    else:
        layer = nn.utils.parametrizations.weight_norm(layer)
    plain = vars(layer).get("weight")
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 2).double())
    objective = Objective(model, [(torch.randn(9, 3, dtype=torch.float64), torch.arange(9) % 2)], hvp=mode)
    hessian = objective.hvp(torch.eye(objective.dim, dtype=torch.float64))
    step = 1e-5
    differences = [
        (objective.value_and_grad(step * e)[1] - objective.value_and_grad(-step * e)[1]) / (2 * step)
        for e in torch.eye(objective.dim, dtype=torch.float64)
    ]
    torch.testing.assert_close(hessian, torch.stack(differences), rtol=1e-6, atol=1e-8)
    assert vars(layer).get("weight") is plain  # the hook's own tensor, and not one of ours


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of those that Python drops
@pytest.mark.parametrize("seed", range(4))
def test_no_trace_after_a_real_interrupt_at_any_moment(seed):
    """A signal falls where it wants, also between the swap of two weights: nothing but a timer finds those places."""
    torch.manual_seed(0)
    model = nn.Sequential(*[layer for _ in range(12) for layer in (nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())])
    model.train()
    loader = [(torch.randn(6, 8), torch.arange(6) % 8)]
    objective = Objective(model, loader)
    before = fingerprint(model)
    owners = [(m, dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    delays = random.Random(seed)

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    def evaluate_until_interrupted(seconds: float) -> None:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        while True:
            objective.value_and_grad()
            if signal.getitimer(signal.ITIMER_REAL)[0] == 0:  # it fell into a destructor, where Python drops exceptions
                signal.setitimer(signal.ITIMER_REAL, seconds)

    handler = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(40):
            with pytest.raises(KeyboardInterrupt):
                evaluate_until_interrupted(delays.uniform(1e-4, 2e-2))
            for module, parameters, buffers in owners:
                assert all(module._parameters[name] is parameter for name, parameter in parameters.items())
                assert all(module._buffers[name] is buffer for name, buffer in buffers.items())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert same(fingerprint(model), before)


def test_frozen_weights_that_the_model_writes_to_are_copies():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 5, max_norm=1.0), nn.Flatten(), nn.Linear(15, 2))
    with torch.no_grad():
        model[0].weight.mul_(10)
    model[0].weight.requires_grad_(False)
    kept = model[0].weight.clone()
    objective = Objective(model, [(torch.randint(0, 10, (6, 3)), torch.arange(6) % 2)])
    assert objective.value() == objective.loss
    assert torch.equal(model[0].weight, kept)


def test_a_loss_function_may_take_its_batch_apart():
    problem = oracles.small_classifier()
    batch = {"x": problem.inputs, "y": problem.targets, "weight": torch.linspace(0, 2, 20, dtype=torch.float64)}

    def loss_fn(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        weight = batch.pop("weight", None)
        losses = nn.functional.cross_entropy(model(batch.pop("x").requires_grad_()), batch["y"], reduction="none")
        return losses.mean() if weight is None else (weight * losses).mean()

    objective = Objective(problem.model, [batch], loss_fn=loss_fn)
    assert objective.value() == objective.loss == objective.value_and_grad()[0]
    assert list(batch) == ["x", "y", "weight"]
    assert not batch["x"].requires_grad


def test_a_model_that_draws_in_eval_mode_repeats_itself_and_it_is_said():
    class MonteCarloDropout(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(nn.functional.dropout(x, 0.5, training=True))

    problem = oracles.small_classifier(torch.float32)
    torch.manual_seed(0)
    model = MonteCarloDropout()
    objective = Objective(model, problem.loader(9, 11))
    assert objective.value() == objective.loss == objective.value_and_grad()[0]
    assert any("draws random numbers in eval mode" in note for note in objective.notes)
    u, v = direction(objective.dim, 0, objective.origin), direction(objective.dim, 1, objective.origin)
    assert (u @ objective.hvp(v)).item() == pytest.approx((v @ objective.hvp(u)).item(), rel=1e-4)


def test_a_loss_that_takes_derivatives_with_respect_to_its_inputs():
    """Physics-informed losses need gradients where only the value is asked for."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def residual(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_()
        u = model(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return (slope + u).square().mean()

    points = torch.linspace(0, 1, 7, dtype=torch.float64)[:, None]
    objective = Objective(model, [points], loss_fn=residual)
    assert objective.loss == pytest.approx(residual(model, points.clone()).item(), rel=1e-12)
    v = direction(objective.dim, 0, objective.origin)
    step = 1e-5
    difference = objective.value_and_grad(step * v)[1] - objective.value_and_grad(-step * v)[1]
    torch.testing.assert_close(objective.hvp(v), difference / (2 * step), rtol=1e-6, atol=1e-8)


def test_a_loss_function_that_ignores_its_model_is_an_error():
    problem = oracles.small_classifier()
    other = copy.deepcopy(problem.model)
    objective = Objective(problem.model, problem.loader(), loss_fn=lambda model, b: other(b[0]).square().mean())
    for call in (objective.value_and_grad, lambda: objective.hvp(torch.ones(objective.dim))):
        with pytest.raises(ValueError, match="must use the model that it is given"):
            call()


def test_a_criterion_that_is_a_module_is_in_eval_mode_and_put_back():
    problem = oracles.small_classifier()
    criterion = nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.Dropout(0.5)).double()

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = criterion

        def forward(self, output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.head(output).square().mean()

    loss = Loss().train()
    objective = Objective(problem.model, problem.loader(), criterion=loss)
    assert objective.value() == objective.loss
    assert all(module.training for module in loss.modules())
    assert criterion[0].num_batches_tracked == 0


def test_batch_norm_without_running_statistics_is_said():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False))
    problem = oracles.small_classifier(torch.float32)
    assert any("statistics of each evaluation batch" in note for note in Objective(model, problem.loader()).notes)


def test_two_threads_measure_two_models_one_after_the_other():
    problem = oracles.small_classifier()
    expected = Objective(problem.model, problem.loader()).hvp(torch.ones(51))
    found: list[torch.Tensor] = []

    def work() -> None:
        twin = copy.deepcopy(problem.model)
        found.extend(Objective(twin, problem.loader()).hvp(torch.ones(51)) for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 60
    assert all(torch.equal(product, expected) for product in found)
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_models_have_the_derivatives_of_plain_ones(use_reentrant):
    """A checkpointed layer runs again in the backward pass, and must find the perturbed weights there."""

    class Net(nn.Module):
        def __init__(self, checkpointed: bool) -> None:
            super().__init__()
            self.a, self.b, self.checkpointed = nn.Linear(4, 8), nn.Linear(8, 3), checkpointed

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            def layer(z: torch.Tensor) -> torch.Tensor:
                return torch.tanh(self.a(z))

            if self.checkpointed:
                x = x.clone().requires_grad_()
                return self.b(torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=use_reentrant))
            return self.b(layer(x))

    problem = oracles.small_classifier()
    plain, checkpointed = Net(False).double(), Net(True).double()
    checkpointed.load_state_dict(plain.state_dict())
    one, other = Objective(plain, problem.loader(9, 11)), Objective(checkpointed, problem.loader(9, 11))
    e, v = 0.3 * direction(one.dim, 0, one.origin), direction(one.dim, 1, one.origin)
    assert other.value(e) == pytest.approx(one.value(e), rel=1e-13)
    torch.testing.assert_close(other.value_and_grad(e)[1], one.value_and_grad(e)[1], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(other.hvp(v, e), one.hvp(v, e), rtol=1e-10, atol=1e-12)
    with other.session():  # the layer runs again in every product, also from a graph that was kept
        for _ in range(3):
            torch.testing.assert_close(other.hvp(v, e), one.hvp(v, e), rtol=1e-10, atol=1e-12)
        assert other.hvp_mode == "retained double backward"
    assert "differences of gradients in float64 agree" in other.hvp_check  # no forward mode goes through it
    raised = torch.tensor([0.0, 1.0, -1.0])
    torch.testing.assert_close(other.sketch(9).gradient(raised), one.sketch(9).gradient(raised), rtol=1e-12, atol=1e-14)


def test_a_bag_leaves_its_padding_out():
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(6, 4, padding_idx=0), nn.Linear(4, 2))
    x, y = torch.randint(0, 3, (7, 3)), torch.arange(7) % 2
    expected = nn.functional.cross_entropy(model(x), y).item()
    assert Objective(model, [(x, y)]).loss == pytest.approx(expected, rel=1e-6)
    assert model[0].padding_idx == 0


@pytest.mark.parametrize("setting", ["padding_idx", "scale_grad_by_freq"])
def test_embeddings_that_alter_their_gradient_have_the_derivatives_of_the_loss(setting):
    torch.manual_seed(0)
    embedding = nn.Embedding(6, 4, **{setting: 0 if setting == "padding_idx" else True})
    with torch.no_grad():
        embedding.weight.normal_()
    model = nn.Sequential(embedding, nn.Flatten(), nn.Tanh(), nn.Linear(12, 2)).double()
    objective = Objective(model, [(torch.randint(0, 3, (7, 3)), torch.arange(7) % 2)])
    u, v = direction(objective.dim, 0, objective.origin), direction(objective.dim, 1, objective.origin)
    step = 1e-6
    slope = (objective.value(step * u) - objective.value(-step * u)) / (2 * step)
    assert (objective.value_and_grad()[1] @ u).item() == pytest.approx(slope, rel=1e-7)
    assert (u @ objective.hvp(v)).item() == pytest.approx((v @ objective.hvp(u)).item(), rel=1e-10)
    assert getattr(embedding, setting) in (0, True)
