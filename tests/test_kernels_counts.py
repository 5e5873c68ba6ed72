"""Bytes, launches and synchronizations of one step on ResNet-50's parameters, counted without a GPU."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kernel_harness as harness
from sharpness_plugins import optimizers
from sharpness_plugins.kernels import ball, box, dispatch, sam, vectors

COUNTING = Path(__file__).parent.parent / "benchmarks" / "counting.py"


def _load_counting():
    """By its path: another package on this machine may be called ``benchmarks``."""
    spec = importlib.util.spec_from_file_location("benchmarks_counting", COUNTING)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


counting = _load_counting()


@pytest.fixture(scope="module")
def shapes() -> list[torch.Size]:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model("resnet50")
    shapes = [parameter.shape for parameter in model.parameters()]
    assert (len(shapes), sum(map(torch.Size.numel, shapes))) == (161, 25_557_032)
    return shapes


def on_gpu(shapes) -> list[torch.Tensor]:
    """Without memory, and without a GPU: inside ``FakeTensorMode``."""
    return [torch.empty(shape, device="cuda") for shape in shapes]


def number() -> torch.Tensor:
    return torch.empty((), device="cuda")


def double() -> torch.Tensor:
    return torch.empty((), dtype=torch.float64, device="cuda")


class TestCounter:
    """The rules, on operations whose traffic is plain."""

    def count(self, work, **settings):
        with counting.Traffic(**settings) as found:
            work()
        return found

    @pytest.mark.parametrize(
        ("work", "expected"),
        [
            (lambda x, y: x + y, 12),
            (lambda x, y: x * x, 8),
            (lambda x, y: x.mul_(y), 12),
            (lambda x, y: x.copy_(y), 8),
            (lambda x, y: x.fill_(1.0), 4),
            (lambda x, y: torch.add(x, y, out=torch.empty_like(x)), 12),
            (lambda x, y: x > y, 9),
            (lambda x, y: x.expand(1, 1000).view(-1)[:1000].detach(), 0),
            (lambda x, y: x[:500] + y[500:], 6),
            (lambda x, y: torch.empty(1000), 0),
            (lambda x, y: torch.lerp(x, y, 0.5), 12),
            (lambda x, y: torch._foreach_add([x[:400], x[400:]], [y[:400], y[400:]]), 12),
            (lambda x, y: torch._foreach_copy_([x], [y]), 8),
            (lambda x, y: torch.stack([x, y]), 16),
        ],
    )
    def test_bytes(self, work, expected):
        x, y = torch.rand(2, 1000).unbind()
        found = self.count(lambda: work(x, y))
        assert found.bytes == 1000 * expected
        assert found.launches == (expected > 0)
        assert found.syncs == 0

    @pytest.mark.parametrize(
        "work", [lambda x: x[0].item(), lambda x: bool(x[0] > 0), lambda x: x.nonzero(), lambda x: x.equal(x)]
    )
    def test_syncs(self, work):
        assert self.count(lambda: work(torch.ones(5))).syncs == 1

    def test_multi_tensor_launches(self):
        """By hand: full tables of tensors, full tables of blocks, a tensor that is cut."""
        assert counting.multi_tensor_launches([1] * 110, 1) == 1
        assert counting.multi_tensor_launches([1] * 111, 1) == 2
        assert counting.multi_tensor_launches([1, 0] * 64, 2) == 1
        assert counting.multi_tensor_launches([65536 * 320], 2) == 1
        assert counting.multi_tensor_launches([65536 * 320 + 1], 2) == 2
        assert counting.multi_tensor_launches([65536 * 960], 3) == 3
        assert counting.multi_tensor_launches([], 1) == 0

    def test_own_operations_count_what_they_declare(self):
        y, g, a, s = torch.zeros(1000), torch.ones(1000), torch.ones(1000), torch.tensor(0.5)
        found = self.count(lambda: box.box_vertex_step(torch.empty(1000), y, g, a, s, s, s))
        assert (found.bytes, found.launches) == (16 * 1000 + 3 * 4 + 5 * 8, 2)

    def test_the_cache_holds_what_fits(self):
        """A chain in place moves the vector once if it fits, each time if it does not."""
        x = torch.zeros(2**18)

        def chain():
            for _ in range(4):
                x.add_(1)

        fits, misses = self.count(chain, cache_bytes=2**21), self.count(chain, cache_bytes=2**19)
        page = 4096
        assert fits.bytes == misses.bytes == 4 * 2 * x.nbytes
        assert fits.memory_bytes == pytest.approx(2 * x.nbytes, abs=2 * page)
        assert misses.memory_bytes == pytest.approx(4 * 2 * x.nbytes, abs=16 * page)


def box_arguments(size: int, device: str):
    vectors_of_it = [torch.zeros(size, device=device) for _ in range(4)]
    return *vectors_of_it, *(torch.zeros((), device=device) for _ in range(3))


def test_box_step_by_triton(shapes):
    """16 bytes per parameter and two launches: the step, and the sum over its programs."""
    dim = sum(map(torch.Size.numel, shapes))
    with FakeTensorMode():
        args = box_arguments(dim, "cuda")
        with counting.Traffic() as found:
            box.box_vertex_step(*args)
    assert found.bytes / dim <= 16.001
    assert (found.launches, found.syncs) == (2, 0)


def test_box_step_by_plain_torch(shapes):
    """Piece by piece: at most 18 bytes per parameter to and from memory behind 2 MB of cache, of 220 that are worked on."""
    dim = sum(map(torch.Size.numel, shapes))
    args = box_arguments(dim, "cpu")
    with counting.Traffic(cache_bytes=2**21, inside=True) as found:
        box.box_vertex_step(*args)
    assert found.memory_bytes / dim <= 18
    assert found.bytes / dim <= 221
    assert found.syncs == 0


def test_box_step_by_plain_torch_on_a_gpu(shapes, monkeypatch):
    """Where Triton cannot be had: 18 bytes behind 32 MB, in larger pieces, but hundreds of launches."""
    dim = sum(map(torch.Size.numel, shapes))
    with FakeTensorMode():
        args = box_arguments(dim, "cuda")
        with counting.Traffic(inside=True) as found:
            box.box_vertex_step(*args)
    assert found.syncs == 0
    assert found.launches <= 30 * len(list(vectors.pieces(dim, args[0].device)))
    monkeypatch.setattr(vectors, "_CACHED", vectors._LAUNCHED)  # addresses are needed, so on the CPU
    args = box_arguments(dim, "cpu")
    with counting.Traffic(cache_bytes=2**25, inside=True) as found:
        box.box_vertex_step(*args)
    assert found.memory_bytes / dim <= 18


def test_sam_by_triton(shapes):
    """20 bytes per parameter and two launches up; 20 and one back, as many as the step of SGD takes alone."""
    dim = sum(map(torch.Size.numel, shapes))
    with FakeTensorMode():
        weights, gradients, backups, buffers = (on_gpu(shapes) for _ in range(4))
        with counting.Traffic() as up:
            sam.sam_ascent_(weights, gradients, backups, double())
        with counting.Traffic() as back:
            sam.restore_sgd_(weights, backups, gradients, buffers, lr=double(), momentum=0.9, weight_decay=1e-4)
    assert (round(up.bytes / dim, 3), up.launches, up.syncs) == (20, 2, 0)
    assert (round(back.bytes / dim, 3), back.launches, back.syncs) == (20, 1, 0)


def test_sam_by_plain_torch_on_a_gpu(shapes):
    """32 bytes per parameter and 20 launches, up and back; 28 bytes and 8 launches back with the step of SGD."""
    dim = sum(map(torch.Size.numel, shapes))
    with FakeTensorMode():
        weights, gradients, backups, buffers = (on_gpu(shapes) for _ in range(4))
        with counting.Traffic(inside=True) as found:
            sam.sam_ascent_(weights, gradients, backups, double())
            sam.restore_(weights, backups)
        with counting.Traffic(inside=True) as back:
            sam.restore_sgd_(weights, backups, gradients, buffers, lr=double(), momentum=0.9, weight_decay=1e-4)
    assert found.bytes / dim <= 32.001
    assert found.launches <= 20
    assert found.syncs == 0
    assert back.bytes / dim <= 28.001
    assert (back.launches <= 8, back.syncs) == (True, 0)


@pytest.mark.parametrize(
    ("rule", "by_triton", "bytes_per_parameter", "launches"),
    [
        (optimizers.SAM(), True, 28, 3),  # 20 up in 2, and 8 back
        (optimizers.SAM(), False, 32, 20),
        (optimizers.ASAM(), True, 28, 3),  # the weights that T is made of are read anyway: 4 more for the norm
        (optimizers.MomentumSAM(), True, 36, 6),  # the momentum times -1 is a vector of its own
    ],
)
def test_an_ascent_of_the_optimizer(shapes, rule, by_triton, bytes_per_parameter, launches):
    """Up and back, as loops and adapters run it, on a GPU: what the kernels take, but for numbers, and nothing waits."""
    dim = sum(map(torch.Size.numel, shapes))
    with FakeTensorMode():
        parameters = [torch.nn.Parameter(weight) for weight in on_gpu(shapes)]
        sgd = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        made = [torch.empty_like(parameter) for parameter in parameters]
        for parameter, gradient in zip(parameters, made, strict=True):
            parameter.grad = gradient
            sgd.state[parameter]["momentum_buffer"] = torch.empty_like(parameter)
        optimizer = optimizers.SharpnessAware(sgd, rule)
        with counting.Traffic(inside=not by_triton) as found:
            for ascent in optimizer.ascents():
                with ascent:
                    for parameter, gradient in zip(parameters, made, strict=True):
                        parameter.grad = gradient
    numbers = found.by_operation["aten::full"] + found.by_operation["aten::mul"] + found.by_operation["aten::add_"]
    assert found.bytes / dim <= bytes_per_parameter + 0.001
    assert (found.launches - numbers <= launches, numbers <= 4) == (True, True)
    assert found.syncs == 0


def test_adaptive_sam_waits_for_nothing(shapes):
    with FakeTensorMode():
        weights, gradients, backups = (on_gpu(shapes) for _ in range(3))
        with counting.Traffic(inside=True) as found:
            sam.sam_ascent_(weights, gradients, backups, double(), eta=double())
    assert found.syncs == 0


@pytest.mark.parametrize(
    ("work", "bytes_per_parameter", "launches"),
    [
        (lambda v, s: box.box_gap(*v[:3], s, s), 12, 2),
        (lambda v, s: box.box_linear_step(*v[:3], s, s, s), 20, 2),
        (lambda v, s: box.box_projected_step(*v, s, s, s, s, signed=True), 20, 2),
        (lambda v, s: box.box_projected_step(v[0], v[1], None, *v[3:], s, s, s, s, signed=True), 16, 2),
        (lambda v, s: box.box_secant(*v, s, s), 20, 2),
        (lambda v, s: ball.ball_step(*v[:3], None, s, s), 16, 3),
        (lambda v, s: ball.ball_step(*v[:3], v[3], s, s), 24, 3),
        (lambda v, s: ball.ball_project_(v[0], s), 12, 2),
    ],
)
def test_every_operation_declares_what_its_docstring_says(work, bytes_per_parameter, launches):
    with FakeTensorMode():
        vectors_of_it = [torch.empty(10**6, device="cuda") for _ in range(5)]
        with counting.Traffic() as found:
            work(vectors_of_it, number())
    assert round(found.bytes / 10**6, 3) == bytes_per_parameter
    assert (found.launches, found.syncs) == (launches, 0)


# in the interpreter: that the Triton forms start what they declare


def case_launches_are_as_declared(monkeypatch):
    x, s = [torch.ones(3000) for _ in range(5)], torch.tensor(0.5)
    lists, d = [[torch.ones(5), torch.ones(2, 3)] for _ in range(4)], torch.tensor(0.5, dtype=torch.float64)
    calls = {
        "box_vertex_step": (*x[:4], s, s, s),
        "box_gap": (*x[:3], s, s),
        "box_linear_step": (*x[:3], s, s, s),
        "box_projected_step": (*x, s, s, s, s, True),
        "box_secant": (*x, s, s),
        "ball_step": (*x[:4], s, s),
        "ball_project_": (x[0], s),
        "sam_norm": (lists[0], [], None),
        "sam_perturb_": (*lists[:3], d, d, None),
        "sam_ascent_": (*lists[:3], d, None),
        "sam_restore_": (*lists[:2],),
        "sam_restore_sgd_": (*lists, d, 0.9, 0.0, 0.0, False, False, False),
    }
    for name, args in calls.items():
        dispatch.operation(name)(*args)  # the tables of addresses are made once and kept
        started: list = []
        with monkeypatch.context() as patch, counting.Traffic() as found:
            patch.setattr(dispatch, "launch", lambda kernel, *args, seen=started, **settings: seen.append(kernel))
            dispatch.operation(name).launcher()(*args)
        assert len(started) + found.launches == dispatch.operation(name).launches, name
        assert found.syncs == 0, name


@harness.needs_triton
def test_the_interpreter_agrees():
    assert harness.run_in_interpreter(__file__) == 1
