"""The subspace of signs against the dense matrix that it never builds."""

import pytest
import torch
from torch import nn

from sharpness_plugins import sampling
from sharpness_plugins.space import ParameterSpace
from sharpness_plugins.subspace import SignSubspace

KEY = 0x0123456789ABCDEF


class Parts(nn.Module):
    def __init__(self, *sizes, dtype=torch.float64):
        super().__init__()
        self.parts = nn.ParameterList(torch.zeros(size, dtype=dtype) for size in sizes)


def subspace_of(model, num_columns, *, key=KEY, select=None, **options):
    return SignSubspace(ParameterSpace(model, select), num_columns, key, **options)


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


KNOWN = {  # the first 130 columns of an element as bits, for KEY
    (0, 0): 0x27A84FFF914A7A020C58CB04BB850222E,
    (0, 65535): 0x223F7E4170A6A358AA7B8874F6231BA3B,
    (0, 69999): 0x37EB662D542D529A2F1F5432B5FC29E2C,
    (1, 2): 0x041FFE08DF2DD0908C50A03B2E7D8478B,
    (2, 499): 0x27DF6D604A37AC7DB2E4CE24CB3F85C3D,
}


@pytest.mark.parametrize("regenerate", [False, True])
def test_signs_are_known(regenerate):
    sizes = (70_000, 3, 500)
    subspace = subspace_of(Parts(*sizes), 130, regenerate=regenerate)
    rows = {sum(sizes[:ordinal]) + element: code for (ordinal, element), code in KNOWN.items()}
    for column in (0, 1, 15, 16, 100, 127, 128, 129):
        lifted = subspace.lift(torch.eye(130)[column])
        assert {row: lifted[row].item() for row in rows} == {
            row: 1.0 if code >> column & 1 else -1.0 for row, code in rows.items()
        }
    gram = subspace.gram()
    assert (gram[3, 128].item(), gram[0, 1].item(), gram.sum().item()) == (-393, -83, 9179832)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_columns", [5, 100, 130])
def test_signs_drawn_again_give_the_same_numbers_bit_for_bit(num_columns, dtype):
    model = Parts(66_000, 7, 1, dtype=dtype)
    kept, again = (subspace_of(model, num_columns, scale=0.3, regenerate=choice) for choice in (False, True))
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(num_columns, generator=generator)
    g = torch.randn(kept.dim, generator=generator).to(dtype)
    assert torch.equal(kept.lift(y), again.lift(y))
    assert torch.equal(kept.lift(y, g), again.lift(y, g))
    assert torch.equal(kept.restrict(g), again.restrict(g))
    assert torch.equal(kept.gram(), again.gram())
    assert torch.equal(kept.coordinates(g), again.coordinates(g))


def test_lift_starts_from_an_origin():
    subspace = subspace_of(Parts(150, 61), 9, scale=0.25)
    generator = torch.Generator().manual_seed(0)
    y, x = torch.randn(9, generator=generator), torch.randn(211, generator=generator, dtype=torch.float64)
    before = x.clone()
    torch.testing.assert_close(subspace.lift(y, x), x + dense(subspace) @ y.double(), rtol=1e-12, atol=1e-12)
    assert torch.equal(x, before)
    assert torch.equal(subspace.lift(torch.zeros(9), x), x)


def test_gram_is_computed_once_and_cannot_be_spoilt(monkeypatch):
    subspace = subspace_of(Parts(40), 5)
    expected = subspace.gram()
    monkeypatch.setattr("sharpness_plugins.subspace.sign_gram", None)
    subspace.gram().zero_()
    assert torch.equal(subspace.gram(), expected)
    subspace.coordinates(torch.ones(40))


def test_vectors_may_be_strided_and_of_another_dtype():
    subspace = subspace_of(Parts(40), 5)
    wide = torch.randn(80, generator=torch.Generator().manual_seed(0))
    expected = dense(subspace).T @ wide[::2].double()
    torch.testing.assert_close(subspace.restrict(wide[::2]), expected, rtol=1e-12, atol=1e-12)
    y = torch.ones(10)[::2].half()
    assert torch.equal(subspace.lift(y), dense(subspace).sum(dim=1))


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
    with pytest.raises(ValueError, match="expected a vector"):
        subspace.lift(torch.ones(3), torch.ones(shape))
