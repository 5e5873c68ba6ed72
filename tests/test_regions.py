"""The box, and the subspace of signs against the dense matrix that it never builds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sharpness_plugins import sampling
from sharpness_plugins.regions import Box, SignSubspace
from sharpness_plugins.space import ParameterSpace

KEY = 0x0123456789ABCDEF
numbers = st.floats(-1e6, 1e6, width=32)


@st.composite
def boxes_and_points(draw):
    dim = draw(st.integers(1, 6))
    half_width = draw(st.lists(st.floats(0, 1e3, width=32), min_size=dim, max_size=dim))
    points = draw(st.lists(st.lists(numbers, min_size=dim, max_size=dim), min_size=2, max_size=2))
    return Box(torch.tensor(half_width, dtype=torch.float64)), *torch.tensor(points, dtype=torch.float64)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(boxes_and_points())
def test_projection_is_the_nearest_point_and_never_moves_points_apart(case):
    box, x, y = case
    p, q = box.project(x), box.project(y)
    assert box.contains(p)
    assert torch.equal(box.project(p), p)
    assert (p - q).norm() <= (x - y).norm() * (1 + 1e-12)
    assert ((x - p) @ (q - p)) <= 1e-9 * (1 + (x - p).norm() * (q - p).norm())  # no point of the box is nearer
    assert box.contains(x) == torch.equal(p, x)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(boxes_and_points())
def test_vertex_maximizes_every_linear_function(case):
    box, gradient, point = case
    vertex = box.ascent_vertex(gradient)
    assert box.contains(vertex)
    assert (gradient @ vertex).item() == pytest.approx((box.half_width * gradient.abs()).sum().item())
    assert gradient @ vertex >= gradient @ box.project(point) - 1e-6
    assert torch.equal(vertex[gradient == 0], torch.zeros_like(vertex[gradient == 0]))


def test_share_at_the_bound_counts_both_sides():
    box = Box(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert box.share_at_bound(torch.tensor([1.0, -2.0, 1.5, 0.0])) == 0.5


@pytest.mark.parametrize("half_width", [[-1.0], [float("nan")], [float("inf")], [[1.0]], 1.0])
def test_half_widths_that_are_none_are_refused(half_width):
    with pytest.raises(ValueError, match="half_width"):
        Box(torch.tensor(half_width))


# ---------------------------------------------------------------- the subspace


class Parts(nn.Module):
    def __init__(self, *sizes, dtype=torch.float64):
        super().__init__()
        self.parts = nn.ParameterList(torch.zeros(size, dtype=dtype) for size in sizes)


def subspace_of(model, num_columns, *, key=KEY, scale=1.0, select=None):
    return SignSubspace(ParameterSpace(model, select), num_columns, key, scale=scale)


def dense(subspace):
    """A, column by column: by lifting the unit vectors."""
    unit = torch.eye(subspace.num_columns, dtype=torch.float64)
    return torch.stack([subspace.lift(column) for column in unit], dim=1)


def sign(element, column, ordinal, key=KEY):
    """One entry of A from one Philox call on plain integers: bit ``column % 32`` of word ``column // 32 % 4``."""
    words = sampling.philox((element % 2**32, element >> 32, column // 128, ordinal), key)
    return 1.0 if int(words[column // 32 % 4]) >> (column % 32) & 1 else -1.0


@pytest.mark.parametrize("num_columns", [1, 7, 8, 13, 100, 128, 130, 257])
def test_columns_are_the_bits_of_philox(num_columns):
    sizes = (3, 1, 5)
    matrix = dense(subspace_of(Parts(*sizes), num_columns))
    expected = [
        [sign(element, column, ordinal) for column in range(num_columns)]
        for ordinal, size in enumerate(sizes)
        for element in range(size)
    ]
    assert torch.equal(matrix, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("num_columns", [3, 8, 100, 130])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_products_equal_those_with_the_dense_matrix(num_columns, scale):
    generator = torch.Generator().manual_seed(0)
    subspace = subspace_of(Parts(150, 61), num_columns, scale=scale)
    matrix = dense(subspace)
    assert set(matrix.unique().tolist()) == {-scale, scale}
    y = torch.randn(num_columns, generator=generator, dtype=torch.float64)
    g = torch.randn(211, generator=generator, dtype=torch.float64)
    exact = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(subspace.lift(y), matrix @ y, **exact)
    torch.testing.assert_close(subspace.restrict(g), matrix.T @ g, **exact)
    assert torch.equal(subspace.gram(), matrix.T @ matrix / scale**2)
    torch.testing.assert_close(subspace.coordinates(g), torch.linalg.pinv(matrix) @ g, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(subspace.coordinates(matrix @ y), y, rtol=1e-9, atol=1e-9)
    assert subspace.norm_of(y) == pytest.approx((matrix @ y).norm().item(), rel=1e-12)


@pytest.mark.parametrize("size", [65535, 65536, 65537, 2 * 65536 + 3])
def test_chunk_boundaries_are_invisible(size):
    subspace = subspace_of(Parts(10, size), 9)
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(9, generator=generator, dtype=torch.float64)
    g = torch.randn(size + 10, generator=generator, dtype=torch.float64)
    lifted, restricted = subspace.lift(y), subspace.restrict(g)
    assert (lifted @ g).item() == pytest.approx((y @ restricted).item(), rel=1e-10)
    edges = [0, 9, 10, 65535, 65536, 65537, 65545, 65546, size + 9]
    for row in [edge for edge in edges if edge < size + 10]:
        ordinal, element = (0, row) if row < 10 else (1, row - 10)
        expected = sum(sign(element, column, ordinal) * y[column].item() for column in range(9))
        assert lifted[row].item() == pytest.approx(expected, rel=1e-12)
    columns = torch.stack([subspace.lift(unit) for unit in torch.eye(9, dtype=torch.float64)])
    torch.testing.assert_close(restricted, columns @ g, rtol=1e-10, atol=1e-10)
    assert torch.equal(subspace.gram(), columns @ columns.T)


def test_restriction_on_an_accelerator_is_the_same_sum(monkeypatch):
    subspace = subspace_of(Parts(70_000), 21, scale=0.5)
    g = torch.randn(70_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    on_cpu = subspace.restrict(g)
    monkeypatch.setattr(subspace, "_device", torch.device("cuda"))  # where the look-up is not deterministic
    torch.testing.assert_close(subspace.restrict(g), on_cpu, rtol=1e-12, atol=1e-10)


def test_signs_do_not_change_when_other_parameters_are_frozen_or_left_out():
    whole = dense(subspace_of(Parts(4, 6, 5), 20))
    frozen = Parts(4, 6, 5)
    frozen.parts[0].requires_grad_(False)
    assert torch.equal(dense(subspace_of(frozen, 20)), whole[4:])
    assert torch.equal(dense(subspace_of(Parts(4, 6, 5), 20, select="parts.2")), whole[10:])
    assert torch.equal(dense(subspace_of(Parts(4, 6, 5), 20, select="parts.[02]")), torch.cat([whole[:4], whole[10:]]))


def test_more_columns_or_another_dtype_leave_the_first_columns_as_they_are():
    few = dense(subspace_of(Parts(40), 5))
    assert torch.equal(dense(subspace_of(Parts(40), 140))[:, :5], few)
    single = subspace_of(Parts(40, dtype=torch.float32), 5)
    assert single.lift(torch.ones(5)).dtype == torch.float32
    assert torch.equal(dense(single).double(), few)


def test_signs_look_random():
    dim, num_columns = 20_000, 136
    gram = subspace_of(Parts(dim), num_columns).gram()
    assert torch.equal(gram.diagonal(), torch.full((num_columns,), float(dim), dtype=torch.float64))
    correlation = (gram - torch.diag(gram.diagonal())) / dim**0.5
    off = correlation[~torch.eye(num_columns, dtype=torch.bool)]
    assert off.abs().max() < 5.5  # about 9 000 pairs of standard normals
    assert off.var().item() == pytest.approx(1, abs=0.1)
    ones = subspace_of(Parts(dim), num_columns).restrict(torch.ones(dim, dtype=torch.float64)) / dim**0.5
    assert ones.abs().max() < 4.5
    assert ones.var().item() == pytest.approx(1, abs=0.4)


def test_draws_differ_by_key():
    one, other = (dense(subspace_of(Parts(500), 8, key=key)) for key in (KEY, KEY + 1))
    assert abs((one * other).mean().item()) < 4 / 4000**0.5


def test_more_columns_than_parameters_have_no_coordinates():
    subspace = subspace_of(Parts(4), 5)
    with pytest.raises(ValueError, match="5 dimensions does not fit into 4 parameters"):
        subspace.coordinates(torch.ones(4, dtype=torch.float64))
    with pytest.raises(ValueError, match="at least one column"):
        subspace_of(Parts(4), 0)


def test_dependent_columns_get_the_pseudo_inverse():
    key = next(k for k in range(100) if torch.linalg.matrix_rank(dense(subspace_of(Parts(3), 3, key=k))) == 2)
    subspace, x = subspace_of(Parts(3), 3, key=key), torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(subspace.coordinates(x), torch.linalg.pinv(dense(subspace)) @ x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(1,), (5,), (4, 1), ()])
def test_vectors_of_another_shape_are_refused(shape):
    subspace = subspace_of(Parts(4), 3)
    with pytest.raises(ValueError, match="expected a vector"):
        subspace.lift(torch.ones(shape))
    with pytest.raises(ValueError, match="expected a vector"):
        subspace.restrict(torch.ones(shape))
