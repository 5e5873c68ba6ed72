"""The steps in a box: reference against float64 by the book, Triton's interpreter against the reference, machine code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernel_harness as harness
from sharpness_plugins.kernels import box, dispatch, vectors
from sharpness_plugins.kernels.box import ProjectedStatistic, SecantStatistic, VertexStatistic

SLOPE, OFFSET = 1.5e-3, 0.7e-3
PIECE = 2**15
LENGTHS = [0, 1, 5, PIECE + 3, 3 * PIECE + 1]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 5e-3}


def problem(length: int, dtype: torch.dtype, *, seed: int = 0):
    """A point of the box (a third of it at the bounds, a third at zero), a gradient and an anchor, both with zeros."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.randint(-1, 2, (length,), generator=generator) * torch.rand(length, generator=generator).mul(2).clamp(
        max=1
    )
    gradient, anchor = torch.randn(2, length, generator=generator).unbind()
    gradient[::7] = 0
    anchor[::5] = 0
    gradient, anchor = (1e-2 * gradient).to(dtype), anchor.to(dtype)
    width = (anchor.abs().to(vectors.arithmetic_dtype(dtype)) * SLOPE).add(OFFSET)
    return (place * width).to(dtype), gradient, anchor


def by_the_book(perturbation, gradient, anchor, share=1.0):
    """Vertex, result and statistics, straight from the formulas in float64."""
    y, g, b = perturbation.double(), gradient.double(), SLOPE * anchor.double().abs() + OFFSET
    vertex = torch.where(g == 0, y, b * g.sign())
    out = y + share * (vertex - y)
    statistics = torch.zeros(5, dtype=torch.float64)
    statistics[VertexStatistic.GAP] = (g * (vertex - y)).sum()
    statistics[VertexStatistic.SLOPE] = (b * g.abs()).sum()
    statistics[VertexStatistic.SIGN_CHANGES] = (vertex.sign() != y.sign()).sum()
    statistics[VertexStatistic.DISTANCE] = ((vertex - y) ** 2).sum()
    statistics[VertexStatistic.NORM] = (out**2).sum()
    return vertex, out, statistics


def poisoned(like):
    return torch.full_like(like, torch.nan)


def close(found, expected, dtype, scale=1.0):
    torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_vertex_step_is_what_the_formulas_say(length, dtype, share):
    y, g, a = problem(length, dtype)
    _, expected, statistics = by_the_book(y, g, a, share)
    out = poisoned(y)
    found = box.box_vertex_step(out, y, g, a, SLOPE, OFFSET, share)
    close(out, expected, dtype, scale=4e-3)
    assert found.dtype == torch.float64
    # products of float32 vectors are rounded once, and the 0.1 % of the box that bfloat16 rounds away is not in their sums
    torch.testing.assert_close(found, statistics, rtol=1e-6, atol=1e-15)
    assert torch.equal(found[VertexStatistic.SIGN_CHANGES], statistics[VertexStatistic.SIGN_CHANGES])


@pytest.mark.parametrize("length", LENGTHS)
def test_gap_is_the_statistics_of_no_step(length):
    y, g, a = problem(length, torch.float32)
    out = poisoned(y)
    gap, step = box.box_gap(y, g, a, SLOPE, OFFSET), box.box_vertex_step(out, y, g, a, SLOPE, OFFSET, 0.0)
    assert torch.equal(gap[: VertexStatistic.NORM], step[: VertexStatistic.NORM])
    assert gap[VertexStatistic.NORM].item() == pytest.approx((y.double() ** 2).sum().item(), rel=1e-6)


def test_full_share_lands_on_the_vertex_and_a_zero_gradient_stays():
    y, g, a = problem(1000, torch.float32)
    out = poisoned(y)
    box.box_vertex_step(out, y, g, a, SLOPE, OFFSET, 1.0)
    width = a.abs() * torch.tensor(SLOPE) + torch.tensor(OFFSET)
    assert torch.equal(out, torch.where(g == 0, y, width * g.sign()))
    again = poisoned(y)
    statistics = box.box_vertex_step(again, out, g, a, SLOPE, OFFSET, 0.5)
    assert torch.equal(again, out)
    assert statistics[[VertexStatistic.GAP, VertexStatistic.SIGN_CHANGES, VertexStatistic.DISTANCE]].tolist() == [0, 0, 0]


@given(share=st.floats(0, 1, width=32), seed=st.integers(0, 99), extreme=st.sampled_from([1e-30, 1.0, 1e30]))
@settings(deadline=None)
def test_no_rounding_leaves_the_box(share, seed, extreme):
    y, g, a = problem(500, torch.float32, seed=seed)
    y, a = y * extreme, a * extreme
    slope, offset = torch.tensor(SLOPE), torch.tensor(OFFSET * extreme)
    width = a.abs() * slope + offset
    y = y.clamp(-width, width)
    out = poisoned(y)
    box.box_vertex_step(out, y, g, a, slope, offset, share)
    assert (out.abs() <= width).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_linear_step_is_what_the_formulas_say(length, dtype):
    _, g, a = problem(length, dtype)
    b = SLOPE * a.double().abs() + OFFSET
    slopes = b * g.double()
    expected = 0.15 * b * (slopes / (2 * slopes.abs().mean())).clamp(-1, 1)
    out = poisoned(g)
    total = box.box_linear_step(out, g, a, SLOPE, OFFSET, 0.15)
    if length > 1:
        close(out, expected, dtype, scale=4e-3)
    torch.testing.assert_close(total, slopes.abs().sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-30])
def test_linear_step_of_a_vanishing_gradient_is_finite_and_zero_where_it_is_zero(size):
    g = size * torch.tensor([1.0, 0.0, -1.0])
    out = poisoned(g)
    box.box_linear_step(out, g, torch.ones(3), 0.0, 0.5, 1.0)
    assert out.isfinite().all()
    assert (out.abs() <= 0.5).all()
    assert out[1] == 0
    assert torch.equal(out.sign(), g.mul(0.5).sign())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("momentum", [None, 0.75])
def test_projected_step_is_what_the_formulas_say(length, dtype, signed, momentum):
    y, g, a = problem(length, dtype)
    previous = None if momentum is None else problem(length, dtype, seed=1)[0]
    step = 0.3 if signed else 2e4  # in half widths, and per gradient in half widths
    out = poisoned(y)
    found = box.box_projected_step(out, y, previous, g, a, SLOPE, OFFSET, step, momentum or 1.0, signed=signed)

    b, y, g = SLOPE * a.double().abs() + OFFSET, y.double(), g.double()
    expected = (y + step * (b * g.sign() if signed else b**2 * g)).clamp(-b, b)
    if previous is not None:
        expected = (y + momentum * (expected - y) + (1 - momentum) * (y - previous.double())).clamp(-b, b)
    close(out, expected, dtype, scale=4e-3)
    if dtype is not torch.bfloat16:  # whose result is rounded after the statistics are taken
        expected = out.double()
    way = expected - y
    terms = torch.zeros(4, len(y), dtype=torch.float64)
    terms[ProjectedStatistic.ASCENT] = way * g
    terms[ProjectedStatistic.DISTANCE] = way**2
    terms[ProjectedStatistic.DISTANCE_IN_BOX] = (way / b) ** 2
    terms[ProjectedStatistic.NORM] = expected**2
    allowed = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 1e-5}[dtype]
    if length == 1 and dtype is torch.bfloat16:
        return  # a point at the bound with a zero gradient: the way is what rounding makes of it
    assert ((found - terms.sum(1)).abs() <= allowed * terms.abs().sum(1)).all()


def test_projected_step_of_any_length_is_the_vertex_step():
    y, g, a = problem(1000, torch.float32)
    vertex, far, plain = poisoned(y), poisoned(y), poisoned(y)
    box.box_vertex_step(vertex, y, g, a, SLOPE, OFFSET, 1.0)
    box.box_projected_step(far, y, None, g, a, SLOPE, OFFSET, 1e9, signed=False)
    assert torch.equal(far, vertex)
    box.box_projected_step(plain, y, torch.randn_like(y), g, a, SLOPE, OFFSET, 3.0, 1.0, signed=True)
    assert torch.equal(plain, vertex)  # with momentum 1, the point before does not matter


def test_coordinates_of_width_zero_stay_and_count_nothing():
    anchor = torch.tensor([0.0, 0.25])
    y, g = torch.tensor([0.0, 0.1]), torch.ones(2)
    out = poisoned(y)
    found = box.box_projected_step(out, y, None, g, anchor, 1.0, 0.0, 1e3, signed=False)
    assert out.tolist() == [0.0, 0.25]
    assert found[ProjectedStatistic.DISTANCE_IN_BOX].item() == pytest.approx((0.15 / 0.25) ** 2, rel=1e-6)
    found = box.box_secant(y, out, g, 3 * g, anchor, 1.0, 0.0)
    assert found[SecantStatistic.DISTANCE_IN_BOX].item() == pytest.approx((0.15 / 0.25) ** 2, rel=1e-6)


@pytest.mark.parametrize("length", LENGTHS)
def test_secant_of_a_quadratic(length):
    """f = ½ Σ cᵢ eᵢ² with cᵢ = 3 / bᵢ² has the curvature 3 along every step, in half widths."""
    (start, g, a), end = problem(length, torch.float64), problem(length, torch.float64, seed=1)[0]
    b = SLOPE * a.abs() + OFFSET
    found = box.box_secant(start, end, g, g + 3.0 * (end - start) / b**2, a, SLOPE, OFFSET)
    assert found[SecantStatistic.DISTANCE_IN_BOX].item() == pytest.approx((((end - start) / b) ** 2).sum().item(), rel=1e-12)
    assert found[SecantStatistic.CURVATURE].item() == pytest.approx(3 * found[0].item(), rel=1e-9)


def test_a_step_may_be_written_over_the_point_it_begins_at():
    y, g, a = problem(PIECE + 3, torch.float32)
    previous = problem(PIECE + 3, torch.float32, seed=1)[0]
    out, over = poisoned(y), y.clone()
    assert torch.equal(
        box.box_vertex_step(out, y, g, a, SLOPE, OFFSET, 0.4), box.box_vertex_step(over, over, g, a, SLOPE, OFFSET, 0.4)
    )
    assert torch.equal(out, over)
    out, over = poisoned(y), previous.clone()
    box.box_projected_step(out, y, previous, g, a, SLOPE, OFFSET, 0.2, 0.75, signed=True)
    box.box_projected_step(over, y, over, g, a, SLOPE, OFFSET, 0.2, 0.75, signed=True)
    assert torch.equal(out, over)


def test_a_gradient_that_is_not_finite_is_seen_in_the_statistics():
    y, g, a = problem(100, torch.float32)
    g[3], g[4] = torch.nan, torch.inf
    out = poisoned(y)
    found = box.box_vertex_step(out, y, g, a, SLOPE, OFFSET, 1.0)
    assert not found[VertexStatistic.GAP].isfinite()
    assert out.isfinite().all()


def test_scalars_may_be_tensors_of_another_dtype():
    y, g, a = problem(100, torch.float32)
    out, same = poisoned(y), poisoned(y)
    box.box_vertex_step(out, y, g, a, SLOPE, OFFSET, 0.4)
    box.box_vertex_step(same, y, g, a, *(torch.tensor([x], dtype=torch.float64) for x in (SLOPE, OFFSET, 0.4)))
    assert torch.equal(out, same)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: x[:-1], "gradient must be like out"),
        (lambda x: x.double(), "gradient must be like out"),
        (lambda x: x.repeat_interleave(2)[::2], "contiguous"),
        (lambda x: x[:, None], "contiguous floating-point vector"),
        (lambda x: x.long(), "floating-point"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(wrong, message):
    y, g, a = problem(10, torch.float32)
    with pytest.raises(ValueError, match=message):
        box.box_vertex_step(poisoned(y), y, wrong(g), a, SLOPE, OFFSET, 1.0)


def test_a_scalar_of_several_elements_is_refused():
    y, g, a = problem(10, torch.float32)
    with pytest.raises(ValueError, match="one element"):
        box.box_gap(y, g, a, torch.ones(2), OFFSET)


def arguments(name: str, length: int, dtype: torch.dtype):
    """Of the operator of that name, with a poisoned output."""
    y, g, a = problem(length, dtype)
    before, other = problem(length, dtype, seed=1)[:2]
    bounds = [vectors.scalar(x, y) for x in (SLOPE, OFFSET)]
    numbers = [vectors.scalar(x, y) for x in (0.3, 0.75)]
    return {
        "box_vertex_step": (poisoned(y), y, g, a, *bounds, numbers[0]),
        "box_gap": (y, g, a, *bounds),
        "box_linear_step": (poisoned(y), g, a, *bounds, numbers[0]),
        "box_projected_step": (poisoned(y), y, before, g, a, *bounds, *numbers, True),
        "box_projected_step without momentum": (
            poisoned(y),
            y,
            None,
            g,
            a,
            *bounds,
            vectors.scalar(2e4, y),
            numbers[1],
            False,
        ),
        "box_secant": (before, y, other, g, a, *bounds),
    }[name]


NAMES = ["box_vertex_step", "box_gap", "box_linear_step", "box_projected_step", "box_secant"]
NAMES.append("box_projected_step without momentum")


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


@pytest.mark.parametrize("name", NAMES)
def test_torch_compile_keeps_the_operator_whole(name):
    run = operation(name)
    eager, compiled = arguments(name, 100, torch.float32), arguments(name, 100, torch.float32)
    expected = run(*eager)
    found = torch.compile(lambda *args: run(*args), backend="aot_eager", fullgraph=True)(*compiled)
    assert torch.equal(found, expected)
    assert torch.equal(eager[0], compiled[0])


# in Triton's interpreter: outputs bit for bit, except where they depend on a sum, which is added up in another order


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("blocks", [0, 0.001, 1, 3])
@pytest.mark.parametrize("name", NAMES)
def case_kernel_equals_reference(name, blocks, dtype):
    from sharpness_plugins.kernels import blocks as blocking

    size = blocking.size(torch.empty(0, dtype=dtype))
    length = int(blocks * size) + 5
    first, second = arguments(name, length, dtype), arguments(name, length, dtype)
    expected = operation(name).reference(*first)
    found = operation(name)(*second)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    if dtype is torch.bfloat16:  # there the interpreter cuts the last bits off where a GPU rounds to nearest
        torch.testing.assert_close(second[0], first[0], rtol=2**-7, atol=0)
    elif name == "box_linear_step":
        torch.testing.assert_close(second[0], first[0], rtol=4 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).tiny)
    else:
        assert torch.equal(second[0], first[0])
    assert not second[0].isnan().any()


@pytest.mark.parametrize("name", NAMES)
def case_nothing_beyond_the_end_is_written(name):
    """The output is the middle of a longer vector, at an address that is no multiple of 16 bytes."""
    args = list(arguments(name, 4099, torch.float32))
    whole = torch.full((4099 + 64,), 7.0)
    if operation(name).overload._schema.arguments[0].is_write:
        args[0] = whole[3:-61]
    operation(name)(*args)
    assert (whole[:3] == 7).all()
    assert (whole[-61:] == 7).all()


def case_an_empty_vector():
    empty = torch.empty(0)
    assert box.box_vertex_step(empty, empty, empty, empty, SLOPE, OFFSET, 1.0).tolist() == [0.0] * 5
    assert box.box_linear_step(empty, empty, empty, SLOPE, OFFSET, 1.0).item() == 0
    box.box_gap(torch.zeros(1), torch.zeros(1), torch.zeros(1), SLOPE, OFFSET)  # something is started


def case_edges_of_a_gradient():
    """Zero, subnormal, infinite, NaN: as the reference."""
    values = [0.0, -0.0, 1e-45, -1e-45, 1e38, torch.inf, -torch.inf, torch.nan]
    y, g, a = torch.full((8,), 1e-4), torch.tensor(values), torch.ones(8)
    out, expected = poisoned(y), poisoned(y)
    box.box_vertex_step(out, y, g, a, SLOPE, OFFSET, 1.0)
    scalars = [torch.tensor(x) for x in (SLOPE, OFFSET, 1.0)]
    operation("box_vertex_step").reference(expected, y, g, a, *scalars)
    assert torch.equal(out, expected)
    for size in (0.0, 1e-44, 1e-30):
        g = size * torch.tensor([1.0, 0.0, -1.0])
        out, expected = poisoned(g), poisoned(g)
        box.box_linear_step(out, g, torch.ones(3), 0.0, 0.5, 1.0)
        operation("box_linear_step").reference(expected, g, torch.ones(3), *map(torch.tensor, (0.0, 0.5, 1.0)))
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=0)
        assert out[1] == 0


@harness.needs_triton
def test_the_interpreter_agrees():
    assert harness.run_in_interpreter(__file__) >= 4 * 4 * len(NAMES)


# what the kernels compile to

KERNELS = {  # vectors read and written by a whole block
    "vertex_kernel": (3, 1),
    "slope_kernel": (2, 0),
    "linear_kernel": (2, 1),
    "projected_kernel": (4, 1),
    "secant_kernel": (5, 0),
}


@harness.needs_triton
@pytest.mark.parametrize("architecture", harness.ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_spill_nothing_and_read_128_bits_at_once(name, dtype, architecture):
    from sharpness_plugins.kernels import blocks, box_triton

    kernel = getattr(box_triton, name)
    element, number = harness.TYPES[dtype], harness.TYPES[vectors.arithmetic_dtype(dtype)]
    scalars = ("slope", "offset", "share", "fraction", "step_length", "momentum")
    types = {"length": "i64", "num_partials": "i32", "partials": "*fp64", "total": "*fp64"}
    signature = {arg: types.get(arg, f"*{number if arg in scalars else element}") for arg in kernel.arg_names}
    like = torch.empty(0, dtype=dtype)
    constants = {
        "BLOCK": blocks.size(like),
        "dtype": blocks.dtype_of(like),
        "WRITE": True,
        "SIGNED": False,
        "MOMENTUM": True,
        "MAX_PARTIALS": blocks.MAX_PARTIALS,
        "LARGEST": torch.finfo(vectors.arithmetic_dtype(dtype)).max,
    }
    found = harness.compile_for(kernel, architecture, signature, constants)
    found.assert_sound()
    read, written = KERNELS[name]
    wide = harness.wide_accesses(constants["BLOCK"], dtype)
    assert (found.ptx_loads[128], found.ptx_stores[128]) == (read * wide, written * wide)
    if (architecture, dtype) == (90, torch.float32):
        assert (found.loads[128], found.stores[128], found.spilled) == (read * wide, written * wide, 0)
        if name in ("vertex_kernel", "slope_kernel"):  # the others divide, which takes fused steps
            assert found.fused == 0
