"""The steps in a ball: reference against float64 by the book, Triton's interpreter against the reference, machine code."""

from __future__ import annotations

import pytest
import torch

import kernel_harness as harness
from sharpness_plugins.kernels import ball, dispatch, vectors
from sharpness_plugins.kernels.ball import BallStatistic

RHO = 0.05
PIECE = 2**15
LENGTHS = [0, 1, 5, PIECE + 3, 3 * PIECE + 1]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 5e-3}


def problem(length: int, dtype: torch.dtype, *, seed: int = 0):
    """A point well inside the ball, a gradient with zeros, and weights between 0.1 and 1.1."""
    generator = torch.Generator().manual_seed(seed)
    y, g = torch.randn(2, length, generator=generator).unbind()
    g[1::7] = 0
    y = 0.5 * RHO * y / max(length, 1) ** 0.5
    return y.to(dtype), g.to(dtype), (torch.rand(length, generator=generator) + 0.1).to(dtype)


def poisoned(like):
    return torch.full_like(like, torch.nan)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_step_is_what_the_formulas_say(length, dtype, weighted, share):
    y, g, t = problem(length, dtype)
    out = poisoned(y)
    found = ball.ball_step(out, y, g, t if weighted else None, RHO, share)
    y, g, t = y.double(), g.double(), t.double() if weighted else torch.ones(length, dtype=torch.float64)
    norm = (t * g).norm()
    vertex = RHO * t**2 * g / norm if norm > 0 else y
    expected = y + share * (vertex - y)
    scale = RHO / max(length, 1) ** 0.5
    torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE[dtype], atol=2 * scale * TOLERANCE[dtype])
    statistics = torch.zeros(4, dtype=torch.float64)
    statistics[BallStatistic.GAP] = (g * (vertex - y)).sum()
    statistics[BallStatistic.SLOPE] = RHO * norm
    statistics[BallStatistic.DISTANCE] = ((vertex - y) ** 2).sum()
    statistics[BallStatistic.NORM] = (expected**2).sum()
    torch.testing.assert_close(found, statistics, rtol=2e-6, atol=1e-15)


@pytest.mark.parametrize("weighted", [False, True])
def test_full_share_lands_on_the_maximizer_of_the_linear_function(weighted):
    """Hölder: no point of the ball has a larger product with the gradient than rho·‖Tg‖, and v has it, on the sphere."""
    y, g, t = problem(1000, torch.float64)
    out = poisoned(y)
    found = ball.ball_step(out, y, g, t if weighted else None, RHO, 1.0)
    t = t if weighted else torch.ones_like(t)
    assert (out / t).norm().item() == pytest.approx(RHO, rel=1e-12)
    assert (out @ g).item() == pytest.approx(RHO * (t * g).norm().item(), rel=1e-12)
    assert found[BallStatistic.SLOPE].item() == pytest.approx((out @ g).item(), rel=1e-12)
    again = ball.ball_step(poisoned(y), out, g, t if weighted else None, RHO, 1.0)
    assert abs(again[BallStatistic.GAP].item()) < 1e-12


@pytest.mark.parametrize("weighted", [False, True])
def test_parts_of_vectors_step_as_the_whole_with_its_norm(weighted):
    check_parts(weighted, PIECE + 10)


def check_parts(weighted: bool, cut: int) -> None:
    """Cut in three: the second part has nothing in it, the third a gradient of zeros, which moves nevertheless."""
    y, g, t = problem(cut + 30, torch.float64)
    g[cut:] = 0
    whole, square = poisoned(y), ((g * t if weighted else g) ** 2).sum()
    expected = ball.ball_step(whole, y, g, t if weighted else None, RHO, 0.3)
    found = torch.zeros_like(expected)
    for part in (slice(0, cut), slice(cut, cut), slice(cut, None)):
        out = poisoned(y[part])
        told = ball.ball_step(out, y[part], g[part], t[part] if weighted else None, RHO, 0.3, square)
        torch.testing.assert_close(out, whole[part], rtol=1e-13, atol=1e-18)
        if len(out):
            assert told[BallStatistic.SLOPE].item() == pytest.approx(expected[BallStatistic.SLOPE].item(), rel=1e-13)
        found += told
    others = [BallStatistic.GAP, BallStatistic.DISTANCE, BallStatistic.NORM]
    torch.testing.assert_close(found[others], expected[others], rtol=1e-12, atol=0)


@pytest.mark.parametrize("gradient", [0.0, torch.nan, torch.inf])
def test_without_a_finite_norm_it_stays(gradient):
    y = problem(100, torch.float32)[0]
    g = torch.zeros(100)
    g[3] = gradient
    out = poisoned(y)
    found = ball.ball_step(out, y, g, None, RHO, 0.7)
    assert torch.equal(out, y)
    assert found[BallStatistic.DISTANCE] == 0
    assert found[BallStatistic.SLOPE].isfinite() == (gradient == 0)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_projection_is_the_nearest_point_of_the_ball(length, dtype):
    outside, _, _ = problem(length, dtype)
    outside = outside * 20
    found = outside.clone()
    norm = ball.ball_project_(found, RHO)
    exact = outside.double().norm()
    assert norm.item() == pytest.approx(exact.item(), rel=1e-6)
    expected = outside.double() * (RHO / exact if exact > RHO else 1.0)
    torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE[dtype], atol=0)
    inside = problem(length, dtype)[0]
    same = inside.clone()
    ball.ball_project_(same, 10 * RHO)
    assert torch.equal(same, inside)


def test_projection_onto_a_point():
    x = torch.ones(5)
    ball.ball_project_(x, 0.0)
    assert (x == 0).all()
    ball.ball_project_(x, 0.0)
    assert (x == 0).all()


def test_a_step_may_be_written_over_the_point_it_begins_at():
    y, g, t = problem(PIECE + 3, torch.float32)
    out, over = poisoned(y), y.clone()
    assert torch.equal(ball.ball_step(out, y, g, t, RHO, 0.4), ball.ball_step(over, over, g, t, RHO, 0.4))
    assert torch.equal(out, over)


def test_vectors_that_do_not_fit_are_refused():
    y, g, t = problem(10, torch.float32)
    with pytest.raises(ValueError, match="weight must be like out"):
        ball.ball_step(poisoned(y), y, g, t[:-1], RHO, 1.0)


def arguments(name: str, length: int, dtype: torch.dtype):
    y, g, t = problem(length, dtype)
    rho, share = vectors.scalar(RHO, y), vectors.scalar(0.3, y)
    return {
        "ball_step": (poisoned(y), y, g, None, rho, share),
        "ball_step weighted": (poisoned(y), y, g, t, rho, share),
        "ball_project_": (20 * y, rho),
    }[name]


NAMES = ["ball_step", "ball_step weighted", "ball_project_"]


def operation(name: str):
    return dispatch.operation(name.split()[0])


@pytest.mark.parametrize("name", NAMES)
def test_operators_keep_torchs_rules(name):
    torch.library.opcheck(operation(name).overload, arguments(name, 100, torch.float32))


@pytest.mark.parametrize("name", NAMES)
def test_two_runs_give_the_same_bits(name):
    first, second = (arguments(name, 2 * PIECE + 5, torch.float32) for _ in range(2))
    assert torch.equal(operation(name)(*first), operation(name)(*second))
    assert torch.equal(first[0], second[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocks", [0, 0.001, 1, 3])
@pytest.mark.parametrize("name", NAMES)
def case_kernel_equals_reference(name, blocks, dtype):
    """To a few roundings of the scale, which depends on a sum that is added up in another order."""
    from sharpness_plugins.kernels import blocks as blocking

    length = int(blocks * blocking.size(torch.empty(0, dtype=dtype))) + 5
    first, second = arguments(name, length, dtype), arguments(name, length, dtype)
    torch.testing.assert_close(operation(name)(*second), operation(name).reference(*first), rtol=1e-6, atol=0)
    # twice the unit in the last place: the interpreter cuts bfloat16 off where a GPU rounds to nearest
    rounding = (8 if dtype in (torch.float32, torch.float64) else 2) * torch.finfo(dtype).eps
    scale = first[0].double().abs().max().item()
    torch.testing.assert_close(second[0], first[0], rtol=rounding, atol=rounding * scale)


@pytest.mark.parametrize("name", NAMES)
def case_nothing_beyond_the_end_is_written(name):
    args = list(arguments(name, 4099, torch.float32))
    whole = torch.full((4099 + 64,), 7.0)
    whole[3:-61] = args[0]
    args[0] = whole[3:-61]
    operation(name)(*args)
    assert (whole[:3] == 7).all()
    assert (whole[-61:] == 7).all()
    assert args[0].isfinite().all()


@pytest.mark.parametrize("gradient", [0.0, torch.nan, torch.inf])
def case_without_a_finite_norm_it_stays(gradient):
    y, g, out = problem(100, torch.float32)[0], torch.zeros(100), torch.full((100,), torch.nan)
    g[3] = gradient
    ball.ball_step(out, y, g, None, RHO, 0.7)
    assert torch.equal(out, y)


@pytest.mark.parametrize("weighted", [False, True])
def case_parts_of_vectors_step_as_the_whole_with_its_norm(weighted):
    check_parts(weighted, 3000)


@harness.needs_triton
def test_the_interpreter_agrees():
    assert harness.run_in_interpreter(__file__) > 3 * 4 * len(NAMES)


KERNELS = {"squares_kernel": (2, 0), "step_kernel": (3, 1), "project_kernel": (1, 1)}


@harness.needs_triton
@pytest.mark.parametrize("architecture", harness.ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_spill_nothing_and_read_128_bits_at_once(name, dtype, architecture):
    from sharpness_plugins.kernels import ball_triton, blocks

    kernel = getattr(ball_triton, name)
    element, number = harness.TYPES[dtype], harness.TYPES[vectors.arithmetic_dtype(dtype)]
    types = {"length": "i64", "num_squares": "i32", "rho": f"*{number}", "share": f"*{number}"}
    types |= dict.fromkeys(("partials", "squares", "norm"), "*fp64")
    like = torch.empty(0, dtype=dtype)
    constants = {"WEIGHTED": True, "MAX_PARTIALS": blocks.MAX_PARTIALS}
    constants |= {"BLOCK": blocks.size(like), "dtype": blocks.dtype_of(like)}
    found = harness.compile_for(kernel, architecture, {a: types.get(a, f"*{element}") for a in kernel.arg_names}, constants)
    found.assert_sound()
    read, written = KERNELS[name]
    wide = harness.wide_accesses(constants["BLOCK"], dtype)
    assert (found.ptx_loads[128], found.ptx_stores[128]) == (read * wide, written * wide)
    if (architecture, dtype) == (90, torch.float32):
        assert (found.loads[128], found.stores[128], found.spilled) == (read * wide, written * wide, 0)
