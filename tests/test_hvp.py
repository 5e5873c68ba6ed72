"""Hessian-vector products: every way gives the Hessian, the cheapest right one is taken, and what is kept is freed."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import oracles
from sharpness_plugins.batches import rows_of
from sharpness_plugins.errors import SecondDerivativeError
from sharpness_plugins.hvp import HVP_MODES
from sharpness_plugins.memory import is_out_of_memory
from sharpness_plugins.objective import Objective

F64 = torch.float64
EXACT = ("retained double backward", "double backward", "forward over reverse")


def random_rows(objective: Objective, count: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, objective.dim, generator=generator, dtype=F64).to(objective.origin)


class Counting(nn.Module):
    """Counts its calls, and can be told to fail."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls, self.fail = inner, 0, None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.fail is not None:
            raise self.fail
        return self.inner(x)


def counting(*sizes: int, **settings) -> tuple[Counting, Objective, oracles.Classification]:
    problem = oracles.small_classifier()
    model = Counting(problem.model)
    return model, Objective(model, problem.loader(*sizes), **settings), problem


@pytest.mark.parametrize("mode", HVP_MODES)
@pytest.mark.parametrize("sizes", [(20,), (9, 9, 2)])
def test_every_way_gives_the_dense_hessian_with_one_vector_and_with_many(mode, sizes):
    problem = oracles.small_classifier()
    objective = Objective(problem.model, problem.loader(*sizes), hvp=mode)
    exact = problem.dense_hessian()
    tolerance = 1e-6 if mode == "central differences" else 1e-11
    rows = random_rows(objective, 3)
    with objective.session():
        for _ in range(2):  # the second time from graphs that were kept
            torch.testing.assert_close(objective.hvp(rows), rows @ exact, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(objective.hvp(rows[1]), exact @ rows[1], rtol=tolerance, atol=tolerance)
    assert objective.hvp_mode == ("retained double backward" if mode == "auto" else mode)


def test_dense_hessians_of_three_networks_at_the_origin_and_beside_it():
    for activation, num_samples in ((nn.Tanh, 20), (nn.ReLU, 50), (nn.GELU, 7)):
        problem = oracles.small_classifier(activation=activation, num_samples=num_samples)
        objective = Objective(problem.model, problem.loader(4, num_samples - 4))
        eye = torch.eye(objective.dim, dtype=F64)
        e = 0.3 * random_rows(objective, seed=3)[0]
        at_e = torch.autograd.functional.hessian(problem.flat_loss(), problem.flat_weights() + e)
        with objective.session():
            torch.testing.assert_close(objective.hvp(eye), problem.dense_hessian(), rtol=1e-8, atol=1e-11)
            torch.testing.assert_close(objective.hvp(eye, e), at_e, rtol=1e-8, atol=1e-11)


def test_the_work_of_a_product_in_gradients():
    """Floating point operations of a residual network: the floor is 2 with the first graph kept, 3 without."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=10)
    loader = [(torch.randn(4, 3, 32, 32), torch.arange(4))]

    def work(of) -> int:
        with FlopCounterMode(display=False) as counter:
            of()
        return counter.get_total_flops()

    ratios = {}
    for mode in EXACT:
        objective = Objective(model, loader, hvp=mode)
        v = random_rows(objective)[0]
        with objective.session():
            objective.hvp(v)  # the probe, and the graph
            ratios[mode] = work(lambda o=objective, v=v: o.hvp(v)) / work(objective.value_and_grad)
    assert ratios["retained double backward"] <= 2.3
    assert ratios["double backward"] <= 3.3
    assert ratios["forward over reverse"] <= 3.3


def test_kept_graphs_need_no_forward_pass_until_the_point_the_metric_or_the_session_changes():
    model, objective, _ = counting(12, 8)
    v = random_rows(objective)[0]
    with objective.session():
        objective.hvp(v)
        for change, forwards in (
            (lambda: objective.hvp(v), 0),
            (lambda: objective.hvp(v, torch.zeros_like(v)), 0),  # the same point
            (lambda: (objective.value_and_grad(), objective.hvp(v)), 2),  # the gradient's own
            (lambda: objective.hvp(v, 1e-3 * v), 2),
            (lambda: objective.hvp(v, 1e-3 * v), 0),
            (lambda: objective.hvp(v), 2),
            (lambda: (objective.announce("another", None), objective.hvp(v)), 2),
        ):
            before = model.calls
            change()
            assert model.calls - before == forwards
    before = model.calls
    objective.hvp(v)
    assert model.calls - before == 2
    assert objective.hvp_mode == "double backward"  # outside of a session, nothing can be kept


@pytest.mark.parametrize("error", [RuntimeError("the model's own"), KeyboardInterrupt()], ids=["exception", "ctrl-c"])
def test_an_error_frees_the_graphs_and_the_next_product_is_right(error):
    model, objective, problem = counting(12, 8)
    rows = random_rows(objective, 2)
    with objective.session():
        expected = objective.hvp(rows)
        assert objective._products.num_kept == 2
        model.fail = error
        with pytest.raises(type(error)):
            objective.hvp(rows, 1e-3 * rows[0])
        assert objective._products.num_kept == 0
        model.fail = None
        assert torch.equal(objective.hvp(rows), expected)
    torch.testing.assert_close(expected, rows @ problem.dense_hessian(), rtol=1e-11, atol=1e-13)


def test_the_session_that_ends_frees_the_activations():
    kept: list[weakref.ref] = []

    class Remembering(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            ctx.kept = x.detach().clone()
            kept.append(weakref.ref(ctx.kept))
            return x.exp()

        @staticmethod
        def backward(ctx, gradient: Tensor) -> Tensor:
            return gradient * ctx.kept

    class Watched(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return Remembering.apply(x) @ self.weight.T  # of the inputs, so that no second derivative is missing

    torch.manual_seed(0)
    objective = Objective(Watched(4, 3), [(torch.randn(6, 4).requires_grad_(), torch.arange(6) % 2)])
    v = random_rows(objective)[0]
    with objective.session():
        objective.hvp(v)
        assert objective._products.num_kept == 1
        graph = weakref.ref(next(iter(objective._products._graphs.values())).gradient)
        assert graph() is not None
    gc.collect()
    assert graph() is None
    assert not any(ref() is not None for ref in kept)


def test_as_many_graphs_are_kept_as_the_budget_allows_and_the_numbers_stay():
    _, whole, problem = counting(5, 5, 5, 5)
    rows = random_rows(whole, 2)
    with whole.session():
        expected = whole.hvp(rows)
        each = whole._products._bytes_per_sample * 5
    torch.testing.assert_close(expected, rows @ problem.dense_hessian(), rtol=1e-11, atol=1e-13)
    for graphs in range(5):
        model, objective, _ = counting(5, 5, 5, 5, graph_bytes=int(graphs * each) + (graphs > 0))
        with objective.session():
            objective.hvp(rows)
            assert objective._products.num_kept == graphs
            before = model.calls
            torch.testing.assert_close(objective.hvp(rows), expected, rtol=1e-13, atol=1e-15)
            assert model.calls - before == 4 - graphs
            assert objective.hvp_mode == ("retained double backward" if graphs else "double backward")


def test_batches_that_are_read_anew_at_every_pass_keep_no_graph():
    problem = oracles.small_classifier()
    data = torch.utils.data.TensorDataset(problem.inputs, problem.targets)
    objective = Objective(problem.model, torch.utils.data.DataLoader(data, batch_size=8), cache_bytes=0)
    v = random_rows(objective)[0]
    with objective.session():
        torch.testing.assert_close(objective.hvp(v), problem.dense_hessian() @ v, rtol=1e-11, atol=1e-13)
        assert objective._products.num_kept == 0


def test_the_probe_runs_once_and_is_counted():
    model, objective, _ = counting(20)
    v = random_rows(objective)[0]
    before, calls = objective.cost, model.calls
    objective.hvp(v)
    first, probe_calls = objective.cost - before, model.calls - calls - 1
    assert first.hvps == 1
    assert probe_calls == 2  # both exact modes, on eight samples
    assert first.gradients == pytest.approx((5 + 3) * 8 / 20)
    assert first.passes == pytest.approx(1 + first.gradients)
    before, calls = objective.cost, model.calls
    objective.hvp(v)
    assert (objective.cost - before).gradients == 0
    assert model.calls - calls == 1
    assert "forward over reverse agrees to" in objective.hvp_check
    assert objective.describe()["hvp_check"] == objective.hvp_check


def test_a_mode_can_be_asked_for_in_one_metric_and_is_put_back():
    _, objective, problem = counting(20)
    v = random_rows(objective)[0]
    with objective.hvp_by("forward over reverse"):
        torch.testing.assert_close(objective.hvp(v), problem.dense_hessian() @ v, rtol=1e-11, atol=1e-13)
        assert objective.hvp_mode == "forward over reverse"
    assert objective.hvp_mode is None
    with objective.hvp_by(None):
        objective.hvp(v)
    assert objective.hvp_mode == "retained double backward"
    for bad in ("exact", "", "forward"):
        with pytest.raises(ValueError, match="hvp must be one of"), objective.hvp_by(bad):
            pass
    with pytest.raises(ValueError, match="graph_bytes must be at least 0"):
        counting(20, graph_bytes=-1)


# ---------------------------------------------------------------- second derivatives that are missing or wrong


class Exponential(torch.autograd.Function):
    """Twice differentiable, without a forward mode."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0].exp()


class Detached(Exponential):
    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0].detach().exp()


class DetachedAll(Exponential):
    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient.detach() * ctx.saved_tensors[0].detach().exp()


class OnceDifferentiable(Exponential):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0].exp()


class Applying(nn.Module):
    def __init__(self, function: type[torch.autograd.Function], kinks: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 3)
        self.function, self.kinks = function, kinks

    def forward(self, x: Tensor) -> Tensor:
        z = self.function.apply(self.a(x))
        return self.b(torch.relu(z - 1) if self.kinks else z)


@pytest.mark.parametrize("kinks", [False, True])
@pytest.mark.parametrize("function", [Exponential, Detached, DetachedAll, OnceDifferentiable])
def test_custom_functions_without_a_second_derivative_are_found_out_also_beside_kinks(function, kinks):
    problem = oracles.small_classifier(torch.float32)
    objective = Objective(Applying(function, kinks), problem.loader(11, 9))
    v = random_rows(objective)[0]
    if function is Exponential:
        expected = Applying(function, kinks)
        expected.function = type("Plain", (), {"apply": staticmethod(torch.exp)})
        torch.testing.assert_close(objective.hvp(v), Objective(expected, problem.loader()).hvp(v), rtol=1e-4, atol=1e-6)
        assert "differences of gradients in float64 agree" in objective.hvp_check
        return
    with pytest.raises(SecondDerivativeError, match=function.__name__):
        objective.hvp(v)


def test_the_module_without_a_second_derivative_is_named():
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch._C._nn.hardsigmoid(x)

    data = [(torch.randn(6, 4), torch.arange(6) % 2)]
    model = nn.Sequential(nn.Linear(4, 5), nn.ModuleDict({"gate": Own()})["gate"], nn.Linear(5, 2))
    wrapped = nn.Sequential(nn.Linear(4, 4), model)
    with pytest.raises(SecondDerivativeError, match=r"product of module '1\.1' \(Own\) .*hardsigmoid_backward"):
        Objective(wrapped, data).hvp(torch.ones(4 * 4 + 4 + 4 * 5 + 5 + 5 * 2 + 2))
    assert not any(module._forward_pre_hooks for module in wrapped.modules())


@pytest.mark.parametrize("activation", [nn.Hardsigmoid, nn.Hardswish])
def test_hard_activations_have_their_hessian(activation):
    problem = oracles.small_classifier(activation=activation, num_samples=30)
    objective = Objective(problem.model, problem.loader())
    v = random_rows(objective)[0]
    step = 1e-7
    difference = objective.value_and_grad(step * v)[1] - objective.value_and_grad(-step * v)[1]
    torch.testing.assert_close(objective.hvp(v), difference / (2 * step), rtol=1e-5, atol=1e-6)


def test_central_differences_are_refused_where_kinks_spoil_them():
    torch.manual_seed(0)
    x, y = torch.randn(400, 8), torch.arange(400) % 3
    for activation, fine in ((nn.Tanh, True), (nn.ReLU, False)):
        model = nn.Sequential(nn.Linear(8, 256), activation(), nn.Linear(256, 64), activation(), nn.Linear(64, 3))
        objective = Objective(model, [(x, y)], hvp="central differences")
        v = random_rows(objective)[0]
        if not fine:
            with pytest.raises(SecondDerivativeError, match="the loss has kinks"):
                objective.hvp(v)
            continue
        exact = Objective(model, [(x, y)]).hvp(v)
        assert (objective.hvp(v) - exact).norm() <= 2e-3 * exact.norm()
        assert objective.hvp_mode == "central differences"


def test_differences_of_a_zero_vector_are_zero():
    _, objective, _ = counting(20, hvp="central differences")
    assert not objective.hvp(torch.zeros_like(objective.origin)).any()


# ---------------------------------------------------------------- memory runs out


def out_of_memory(kind: str) -> BaseException:
    if kind == "device":
        return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return RuntimeError(
        "[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"
    )


class Small(nn.Module):
    """Cannot hold more than ``most`` samples."""

    def __init__(self, inner: nn.Module, most: int, kind: str) -> None:
        super().__init__()
        self.inner, self.most, self.kind, self.sizes = inner, 10**9, kind, []
        self.limit = most

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        if len(x) > self.most:
            raise out_of_memory(self.kind)
        return self.inner(x)


@pytest.mark.parametrize("kind", ["device", "host"])
@pytest.mark.parametrize("most", [1, 3, 7, 12])
def test_batches_are_halved_when_memory_runs_out_and_the_numbers_stay(kind, most):
    problem = oracles.small_classifier()
    model = Small(problem.model, most, kind)
    objective = Objective(model, problem.loader(13, 7))
    expected = Objective(problem.model, problem.loader(13, 7))
    rows, e = random_rows(objective, 2), 0.1 * random_rows(objective, seed=1)[0]
    model.most = model.limit
    assert objective.value(e) == pytest.approx(expected.value(e), rel=1e-13)
    value, gradient = objective.value_and_grad(e)
    assert value == pytest.approx(expected.value(e), rel=1e-13)
    torch.testing.assert_close(gradient, expected.value_and_grad(e)[1], rtol=1e-11, atol=1e-13)
    with objective.session():
        for _ in range(2):
            torch.testing.assert_close(objective.hvp(rows, e), expected.hvp(rows, e), rtol=1e-11, atol=1e-13)
    model.sizes.clear()
    objective.value_and_grad()
    objective.hvp(rows)
    assert max(model.sizes) <= most  # the size that worked is remembered
    assert any("memory ran out" in note for note in objective.notes)
    assert objective.cost.passes == pytest.approx(
        round(objective.cost.passes - objective.cost.gradients, 9) + objective.cost.gradients
    )


def test_halves_are_weighted_by_their_targets_and_one_without_any_does_not_count():
    problem = oracles.small_classifier()
    targets = problem.targets.clone()
    targets[10:] = -100
    targets[3] = -100
    model = Small(problem.model, 5, "host")
    objective, expected = (Objective(m, [(problem.inputs, targets)]) for m in (model, problem.model))
    v = random_rows(objective)[0]
    model.most = model.limit
    assert objective.value() == pytest.approx(expected.loss, rel=1e-13)
    torch.testing.assert_close(objective.value_and_grad()[1], expected.value_and_grad()[1], rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(objective.hvp(v), expected.hvp(v), rtol=1e-11, atol=1e-13)


def test_kept_graphs_go_first_when_memory_runs_out():
    problem = oracles.small_classifier()

    class Crowded(nn.Module):
        """Holds the second batch only while nothing of the first is kept."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.objective = problem.model, None

        def forward(self, x: Tensor) -> Tensor:
            kept = vars(self)["objective"]
            if kept is not None and len(x) == 9 and kept._products.num_kept:
                raise out_of_memory("device")
            return self.inner(x)

    model = Crowded()
    objective = Objective(model, problem.loader(11, 9))
    vars(model)["objective"] = objective
    v = random_rows(objective)[0]
    with objective.session():
        for _ in range(2):
            torch.testing.assert_close(objective.hvp(v), problem.dense_hessian() @ v, rtol=1e-11, atol=1e-13)
            assert objective._products.num_kept == 0
    assert objective.hvp_mode == "double backward"
    assert not objective.notes  # no batch was taken apart


@pytest.mark.parametrize(
    ("make", "settings", "match"),
    [
        (
            lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)),
            {"batch_norm": "batch"},
            "BatchNorm uses the statistics",
        ),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)), {}, "BatchNorm uses"),
        (lambda: nn.Linear(4, 3), {}, "A single sample does not fit"),
    ],
)
def test_what_cannot_be_halved_is_an_error_of_the_same_kind_that_says_why(make, settings, match):
    problem = oracles.small_classifier(torch.float32)
    model = Small(make(), 0, "device")
    objective = Objective(model, problem.loader(), **settings)
    model.most = model.limit
    with pytest.raises(torch.OutOfMemoryError, match=match):
        objective.value_and_grad()


def test_models_that_draw_are_not_taken_apart():
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 0.1 * torch.rand_like(x)

    problem = oracles.small_classifier(torch.float32)
    model = Small(nn.Sequential(Noisy(), nn.Linear(4, 3)), 10, "host")
    objective = Objective(model, problem.loader())
    model.most = model.limit
    with pytest.raises(RuntimeError, match="the model draws random numbers"):
        objective.value_and_grad()


def test_only_a_lack_of_memory_is_one():
    assert is_out_of_memory(out_of_memory("device"))
    assert is_out_of_memory(out_of_memory("host"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("not enough memory of the sequence"))


def test_parts_of_nested_batches():
    batch = {"x": torch.arange(10), "names": list("abcdefghij"), "pair": (torch.ones(10, 2), torch.tensor(3.0)), "k": 7}
    parts = [rows_of(batch, slice(start, start + 4), 10) for start in (0, 4, 8)]
    assert torch.equal(torch.cat([part["x"] for part in parts]), batch["x"])
    assert [name for part in parts for name in part["names"]] == batch["names"]
    assert [part["pair"][0].shape[0] for part in parts] == [4, 4, 2]
    assert all(part["pair"][1] == 3 and part["k"] == 7 for part in parts)
