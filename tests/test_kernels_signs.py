"""Products with signs: against the dense matrix in float64, any shard against the whole, the interpreter, machine code."""

from __future__ import annotations

import pytest
import torch

import kernel_harness as harness
from sharpness_plugins import sampling
from sharpness_plugins.kernels import dispatch, signs
from sharpness_plugins.kernels.philox import BLOCK, segment_table, signed_key
from sharpness_plugins.kernels.signs import num_bytes, sign_gram, sign_lift, sign_pack, sign_restrict
from sharpness_plugins.kernels.vectors import arithmetic_dtype

KEY = 0xF123456789ABCDEF  # negative as a signed integer
PANEL, PIECE, WIDE = 2**20, 2**15, 2**16
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
COLUMNS = [1, 8, 9, 16, 100, 128, 130]
SOME = ([0, 3, 4, 5], [5000, 7, 1, 4100], [0, 2**32 - 3, 0, 9])  # a shard that begins at element 9, one that crosses 2^32


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dense(ordinals, numels, firsts, columns, key=KEY):
    """A in float64, from the counters as they are defined: no segments, no chunks, no packing."""
    blocks = []
    for ordinal, numel, first in zip(ordinals, numels, firsts, strict=True):
        element = torch.arange(first, first + numel)
        words = [
            torch.as_tensor(word)
            for stream in range(-(-columns // 128))
            for word in sampling.philox((element % 2**32, element // 2**32, stream, ordinal), key)
        ]
        bits = [words[column // 32] >> column % 32 & 1 for column in range(columns)]
        blocks.append(torch.stack([bit.double() * 2 - 1 for bit in bits], dim=1))
    return torch.cat(blocks)


def packed_signs(segments, length, columns, key=KEY):
    packed = torch.full((num_bytes(columns) * length,), 0x5A, dtype=torch.uint8)
    sign_pack(packed, segments, key, columns)
    return packed


def lifted(coefficients, segments, length, dtype=torch.float64, **options):
    out = torch.full((length,), torch.nan, dtype=dtype)
    sign_lift(out, coefficients, segments, KEY, **options)
    return out


# against the dense matrix


@pytest.mark.parametrize("columns", [*COLUMNS, 300])
@pytest.mark.parametrize("regenerate", [False, True])
def test_products_are_those_with_the_dense_matrix(columns, regenerate):
    matrix, segments, length = dense(*SOME, columns), segment_table(*SOME), sum(SOME[1])
    packed = None if regenerate else packed_signs(segments, length, columns)
    x, y, g = random(length), random(columns, seed=1), random(length, seed=2)
    exact = {"rtol": 1e-12, "atol": 1e-11}
    torch.testing.assert_close(lifted(y, segments, length, packed=packed), matrix @ y, **exact)
    torch.testing.assert_close(lifted(y, segments, length, origin=x, packed=packed), x + matrix @ y, **exact)
    torch.testing.assert_close(sign_restrict(g, segments, KEY, columns, packed=packed), matrix.T @ g, **exact)
    assert torch.equal(sign_gram(length, segments, KEY, columns, packed=packed), matrix.T @ matrix)


@pytest.mark.parametrize("length", [1, PIECE, WIDE - 1, WIDE, WIDE + PIECE + 1, PANEL + 1])
@pytest.mark.parametrize("columns", [9, 20])
def test_no_edge_of_a_chunk_is_seen(length, columns):
    shape = ([2, 7], [length // 3, length - length // 3], [0, 0])
    matrix, segments = dense(*shape, columns), segment_table(*shape)
    packed = packed_signs(segments, length, columns)
    y, g = random(columns), random(length)
    exact = {"rtol": 1e-12, "atol": 1e-10}
    torch.testing.assert_close(lifted(y, segments, length, packed=packed), matrix @ y, **exact)
    torch.testing.assert_close(sign_restrict(g, segments, KEY, columns, packed=packed), matrix.T @ g, **exact)
    assert torch.equal(sign_gram(length, segments, KEY, columns, packed=packed), matrix.T @ matrix)


@pytest.mark.parametrize("length", [3000, WIDE + 11])  # with tables of 8 and of 16 bits
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [3, 100])
def test_lift_in_other_dtypes_is_rounded_to_them_once(columns, dtype, length):
    matrix, segments = dense([1], [length], [0], columns), segment_table([1], [length])
    x, y = random(length, dtype=dtype), random(columns, seed=1)
    found = lifted(y, segments, length, dtype, origin=x)
    assert found.dtype == dtype
    slack = torch.finfo(dtype).eps / 2 + (0 if dtype == torch.float64 else 1e-7)
    bound = slack * (x.double().abs() + (matrix @ y).abs()) + 3 * torch.finfo(arithmetic_dtype(dtype)).eps * y.abs().sum()
    assert ((found.double() - x.double() - matrix @ y).abs() <= bound).all()


@pytest.mark.parametrize("length", [WIDE - 1, WIDE, 2 * PANEL + 17])
@pytest.mark.parametrize("mean", [0.0, 1.0])  # gradients of one sign cancel almost wholly
def test_restriction_of_float32_keeps_six_digits(length, mean):
    segments, columns = segment_table([0], [length]), 17
    g = (random(length) + mean).float()
    exact = sign_restrict(g.double(), segments, KEY, columns)
    found = sign_restrict(g, segments, KEY, columns)
    assert found.dtype == torch.float64
    assert (found - exact).norm() <= 1e-6 * exact.norm()
    assert torch.equal(sign_restrict(g, segments, KEY, columns), found)


def test_sums_for_accelerators_are_the_same_sums():
    """There nothing is added into bins, which is not deterministic, but products are."""
    segments, g = segment_table(*SOME), random(sum(SOME[1]))
    rows = signs._codes(None, segments, slice(0, len(g)), signed_key(KEY), 100, 0)
    found = torch.cat([signs._sums_by_product(row, g) for row in rows])[:100]
    torch.testing.assert_close(found, sign_restrict(g, segments, KEY, 100), rtol=1e-12, atol=1e-11)


# shards


def shards(ordinals, numels, cuts):
    """(start, stop, table) of the pieces of a flat vector between the cuts."""
    starts = torch.tensor([0, *numels]).cumsum(0).tolist()
    for start, stop in zip([0, *cuts], [*cuts, starts[-1]], strict=True):
        parts = [
            (ordinal, min(stop, last) - max(start, begin), max(start - begin, 0))
            for ordinal, begin, last in zip(ordinals, starts, starts[1:], strict=False)
            if max(start, begin) < min(stop, last)
        ]
        yield (
            start,
            stop,
            segment_table(*(list(column) for column in zip(*parts, strict=True))) if parts else segment_table([], []),
        )


@pytest.mark.parametrize("regenerate", [False, True])
@pytest.mark.parametrize("cuts", [[1], [40_000, 40_000, 40_001], [65_536, 70_000, 70_003, 70_100]], ids=str)
def test_every_sharding_gives_the_same_signs(cuts, regenerate):
    ordinals, numels, columns = [0, 2, 5], [70_000, 3, 30_000], 100
    length, whole = sum(numels), segment_table(ordinals, numels)
    x, y, g = random(length).float(), random(columns, seed=1), random(length, seed=2)
    expected = lifted(y, whole, length, torch.float32, origin=x)
    pieces, sums, gram = [], torch.zeros(columns, dtype=torch.float64), torch.zeros(columns, columns, dtype=torch.float64)
    for start, stop, table in shards(ordinals, numels, cuts):
        packed = None if regenerate else packed_signs(table, stop - start, columns)
        pieces.append(lifted(y, table, stop - start, torch.float32, origin=x[start:stop], packed=packed))
        sums += sign_restrict(g[start:stop], table, KEY, columns, packed=packed)
        gram += sign_gram(stop - start, table, KEY, columns, packed=packed)
    assert torch.equal(torch.cat(pieces), expected)
    torch.testing.assert_close(sums, sign_restrict(g, whole, KEY, columns), rtol=1e-13, atol=1e-11)
    assert torch.equal(gram, sign_gram(length, whole, KEY, columns))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("length", [5000, WIDE + 7])
def test_signs_drawn_again_give_the_same_bits_as_packed_ones(length, columns, dtype):
    segments = segment_table([4, 1], [length - 10, 10], [3, 0])
    packed = packed_signs(segments, length, columns)
    x, y, g = random(length, dtype=dtype), random(columns), random(length, seed=1, dtype=dtype)
    again, kept = (lifted(y, segments, length, dtype, origin=x, packed=p) for p in (None, packed))
    assert torch.equal(again, kept)
    again, kept = (sign_restrict(g, segments, KEY, columns, packed=p) for p in (None, packed))
    assert torch.equal(again, kept)


# the rest


def test_gram_does_not_depend_on_the_precision_of_products():
    shape = ([0], [6000], [0])
    matrix = dense(*shape, 40)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")  # products in bfloat16, where the processor has them
        assert torch.equal(sign_gram(6000, segment_table(*shape), KEY, 40), matrix.T @ matrix)
    finally:
        torch.set_float32_matmul_precision(before)


def test_lift_may_write_into_its_origin():
    segments, y = segment_table([0], [5000]), random(10)
    x = random(5000, dtype=torch.float32)
    expected = lifted(y, segments, 5000, torch.float32, origin=x)
    sign_lift(x, y, segments, KEY, origin=x)
    assert torch.equal(x, expected)


def test_what_is_not_finite_reaches_the_result():
    segments, g = segment_table([0], [100]), torch.ones(100)
    g[3] = torch.inf
    assert torch.equal(sign_restrict(g, segments, KEY, 12), dense([0], [100], [0], 12)[3] * torch.inf)
    g[3] = torch.nan
    assert sign_restrict(g, segments, KEY, 12).isnan().all()
    assert lifted(torch.tensor([1.0, torch.nan]), segments, 100).isnan().all()


def test_an_empty_shard_has_products():
    empty = segment_table([3], [0])
    assert empty.shape == (5, 0)
    assert len(lifted(random(3), empty, 0)) == 0
    assert sign_restrict(torch.empty(0), empty, KEY, 3).tolist() == [0.0] * 3
    assert not sign_gram(0, empty, KEY, 3).any()
    assert len(packed_signs(empty, 0, 3)) == 0


@pytest.mark.parametrize(
    ("ordinals", "numels", "firsts", "message"),
    [
        ([0], [1, 2], None, "differ in length"),
        ([-1], [1], None, "no segment"),
        ([2**32], [1], None, "no segment"),
        ([0], [-1], None, "no segment"),
        ([0], [1], [-1], "no segment"),
    ],
)
def test_segments_that_are_none_are_refused(ordinals, numels, firsts, message):
    with pytest.raises(ValueError, match=message):
        segment_table(ordinals, numels, firsts)


def test_arguments_that_do_not_fit_are_refused():
    segments, y, g = segment_table([0], [10]), torch.ones(3), torch.ones(10)
    packed = packed_signs(segments, 10, 3)
    with pytest.raises(ValueError, match="describe 10 elements, but the vectors have 9"):
        sign_restrict(g[:9], segments, KEY, 3)
    with pytest.raises(ValueError, match="segment_table"):
        sign_restrict(g, segments.T.contiguous(), KEY, 3)
    with pytest.raises(ValueError, match="segment_table"):
        sign_restrict(g, segments.int(), KEY, 3)
    with pytest.raises(ValueError, match="contiguous"):
        sign_restrict(torch.ones(20)[::2], segments, KEY, 3)
    with pytest.raises(ValueError, match="at least one column"):
        sign_restrict(g, segments, KEY, 0)
    with pytest.raises(ValueError, match="coefficients must be a vector"):
        sign_lift(g, torch.ones(3, 1), segments, KEY)
    with pytest.raises(ValueError, match="origin must be like out"):
        sign_lift(g, y, segments, KEY, origin=g.double())
    for wrong in (packed[:-1], packed.int(), torch.zeros(21, dtype=torch.uint8)[1:], packed.view(1, -1)):
        with pytest.raises(ValueError, match="packed must be"):
            sign_restrict(g, segments, KEY, 9, packed=wrong)


@pytest.mark.parametrize("regenerate", [False, True])
def test_the_operators_are_registered_as_torch_wants_them(regenerate):
    segments, x, y = segment_table([0, 1], [20, 5]), random(25, dtype=torch.float32), random(12)
    packed = packed_signs(segments, 25, 12)
    kept = None if regenerate else packed
    torch.library.opcheck(dispatch.operation("sign_pack").overload, (packed, segments, 5, 12))
    torch.library.opcheck(dispatch.operation("sign_lift").overload, (torch.empty(25), x, y, kept, segments, 5))
    torch.library.opcheck(dispatch.operation("sign_lift").overload, (torch.empty(25), None, y, kept, segments, 5))
    torch.library.opcheck(dispatch.operation("sign_restrict").overload, (x, kept, segments, 5, 12))


# in Triton's interpreter

INTERPRETED = [(1, torch.float32), (25, torch.float32), (130, torch.float32), (19, torch.float64), (19, torch.bfloat16)]

if harness.INTERPRETED:
    import triton
    import triton.language as tl

    from sharpness_plugins.kernels.philox_triton import philox

    @triton.jit
    def words_of(out, counters, key, COUNT: tl.constexpr):
        at = tl.arange(0, COUNT)
        c0, c1, c2, c3 = (tl.load(counters + i * COUNT + at).to(tl.uint32) for i in (0, 1, 2, 3))
        w0, w1, w2, w3 = philox(c0, c1, c2, c3, tl.load(key))
        tl.store(out + at, w0.to(tl.int64))
        tl.store(out + COUNT + at, w1.to(tl.int64))
        tl.store(out + 2 * COUNT + at, w2.to(tl.int64))
        tl.store(out + 3 * COUNT + at, w3.to(tl.int64))


def triton_words(counters, key):
    """Words of Philox, shape ``(4, count)``, for counters of that shape."""
    out = torch.empty_like(counters)
    dispatch.launch(words_of, 1, out, counters, torch.tensor([signed_key(key)]), COUNT=counters.shape[1])
    return out


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 4, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0_A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def case_philox_gives_the_known_answers_of_random123(counter, key, expected):
    found = triton_words(torch.tensor(counter)[:, None], key)
    assert " ".join(f"{word:08x}" for word in found[:, 0].tolist()) == expected


def case_philox_equals_that_of_plain_torch():
    counters = torch.randint(2**32, (4, 1024), generator=torch.Generator().manual_seed(0))
    assert torch.equal(triton_words(counters, KEY), torch.stack(sampling.philox(tuple(counters), KEY)))


def arguments(name, columns, regenerate, dtype):
    """Equal arguments of an operator whatever it does to them; outputs are poisoned."""
    shape = ([5, 3], [4500, 7], [9, 2**32 - 3]) if dtype == torch.float64 else SOME  # float64 takes twice as many programs
    segments, length = segment_table(*shape), sum(shape[1])
    packed = None if regenerate else torch.zeros(num_bytes(columns) * length, dtype=torch.uint8)
    if packed is not None:
        dispatch.operation("sign_pack").reference(packed, segments, signed_key(KEY), columns)
    x = random(length, dtype=dtype)
    if name == "sign_pack":
        return torch.full((num_bytes(columns) * length,), 0x5A, dtype=torch.uint8), segments, signed_key(KEY), columns
    if name == "sign_restrict":
        return x, packed, segments, signed_key(KEY), columns
    origin = x if columns % 2 else None
    return torch.full_like(x, torch.nan), origin, random(columns, seed=1), packed, segments, signed_key(KEY)


@pytest.mark.parametrize("columns", COLUMNS)
def case_kernel_packs_the_same_bits(columns):
    first, second = (arguments("sign_pack", columns, True, torch.float32) for _ in range(2))
    dispatch.operation("sign_pack").reference(*first)
    dispatch.operation("sign_pack")(*second)
    assert torch.equal(first[0], second[0])


@pytest.mark.parametrize("regenerate", [False, True])
@pytest.mark.parametrize(("columns", "dtype"), INTERPRETED, ids=str)
@pytest.mark.parametrize("name", ["sign_lift", "sign_restrict"])
def case_kernel_equals_reference(name, columns, regenerate, dtype):
    first, second = (arguments(name, columns, regenerate, dtype) for _ in range(2))
    expected, found = dispatch.operation(name).reference(*first), dispatch.operation(name)(*second)
    rounding = torch.finfo(arithmetic_dtype(dtype)).eps
    if name == "sign_restrict":
        exact = dispatch.operation(name).reference(first[0].double(), *first[1:])
        assert (found - exact).norm() <= max(1e-6 if dtype != torch.float64 else 1e-14, rounding) * exact.norm()
        if columns == 25:
            assert torch.equal(dispatch.operation(name)(*second), found)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
        return
    # the columns are added up in another order; to bfloat16 the interpreter cuts where a GPU rounds to nearest
    one_unit = 2**-7 if dtype == torch.bfloat16 else 2 * rounding
    torch.testing.assert_close(second[0], first[0], rtol=one_unit, atol=rounding * first[2].abs().sum().item())


def case_nothing_beyond_the_segments_is_written():
    segments, length, columns = segment_table(*SOME), sum(SOME[1]), 20
    whole = torch.full((length + 40,), 7.0)
    sign_lift(whole[3:-37], random(columns), segments, KEY)
    assert (whole[:3] == 7).all()
    assert (whole[-37:] == 7).all()
    assert torch.equal(whole[3:-37], lifted(random(columns), segments, length, torch.float32))
    buffer = torch.full((num_bytes(columns) * length + 40,), 7, dtype=torch.uint8)
    sign_pack(buffer[2:-38], segments, KEY, columns)
    assert (buffer[:2] == 7).all()
    assert (buffer[-38:] == 7).all()


def case_an_empty_shard():
    empty = segment_table([], [])
    sign_lift(torch.empty(0), torch.ones(3), empty, KEY)
    assert sign_restrict(torch.empty(0), empty, KEY, 3).tolist() == [0.0] * 3
    sign_restrict(torch.ones(1), segment_table([0], [1]), KEY, 3)  # something is started


@harness.needs_triton
def test_the_interpreter_agrees():
    assert harness.run_in_interpreter(__file__) == 3 + 1 + len(COLUMNS) + 2 * 2 * len(INTERPRETED) + 2


# what the kernels compile to


@harness.needs_triton
@pytest.mark.parametrize("architecture", harness.ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("regenerate", [False, True])
@pytest.mark.parametrize("name", ["lift_kernel", "restrict_kernel", "pack_kernel"])
def test_kernels_spill_nothing_and_read_every_element_once(name, regenerate, dtype, architecture):
    from sharpness_plugins.kernels import blocks, philox_triton, signs_triton

    if name == "pack_kernel" and (regenerate or dtype != torch.float32):
        return  # knows neither
    kernel = getattr(signs_triton, name)
    element, number = harness.TYPES[dtype], harness.TYPES[arithmetic_dtype(dtype)]
    types = {"segments": "*i64", "num_segments": "i32", "length": "i64", "key": "i64", "packed": "*u8"}
    types |= {"coefficients": f"*{number}", "sums": f"*{number}", "out": f"*{element}"}
    part = signs_triton.LIFTED_BYTES if name == "lift_kernel" else signs_triton.RESTRICTED_BYTES
    size = part // arithmetic_dtype(dtype).itemsize
    num_warps = size // 256 if name == "lift_kernel" else 8
    elements = (BLOCK if name == "pack_kernel" else size) // (32 * num_warps)  # of a thread
    constants = {
        "NUM_BYTES": 13,
        "SIZE": size,
        "MOVED": True,
        "PACKED": not regenerate,
        "BLOCK": BLOCK,
        "SEARCHED": philox_triton.SEARCHED,
        "dtype": blocks.dtype_of(torch.empty(0, dtype=dtype)),
    }
    signature = {arg: types.get(arg, f"*{element}") for arg in kernel.arg_names}
    constants = {arg: value for arg, value in constants.items() if arg in kernel.arg_names}
    found = harness.compile_for(kernel, architecture, signature, constants, num_warps=num_warps)
    assert (found.stack_bytes, found.spilled, found.fused) == (0, 0, 0), found
    assert found.registers < 255, found
    if name == "pack_kernel":
        assert (found.stores[8], found.stores[16]) == (elements, elements)
    elif not regenerate:  # bytes of the last code, 16-bit codes, and two bytes of bfloat16
        assert found.loads[8] == elements
        assert found.loads[16] == elements * (2 if dtype == torch.bfloat16 else 1)
    else:
        assert found.loads[8] == 0
