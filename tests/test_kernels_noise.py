"""Noise drawn where it is added: its distribution, its place in any shard, the interpreter, machine code."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch

import kernel_harness as harness
from sharpness_plugins import sampling
from sharpness_plugins.kernels import dispatch
from sharpness_plugins.kernels.noise import perturb_normal, perturb_rademacher
from sharpness_plugins.kernels.philox import BLOCK, segment_table, signed_key
from sharpness_plugins.kernels.vectors import arithmetic_dtype

KEY = 0xF123456789ABCDEF  # negative as a signed integer
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
PERTURB = {"perturb_normal": perturb_normal, "perturb_rademacher": perturb_rademacher}
# segments that begin and end within a group of 4 and of 128, one of them beyond element 2^34
SOME = ([0, 3, 4, 5], [5001, 7, 1, 4100], [0, 2**34 - 3, 0, 9])
PIECE = 2**15


def noise(name, segments, length, *, scale=1.0, dtype=torch.float32, key=KEY, **options):
    out = torch.full((length,), torch.nan, dtype=dtype)
    PERTURB[name](out, scale, segments, key, **options)
    return out


def by_the_book(name, element, ordinal, stream=0, key=KEY):
    """The noise of one element, from one Philox call on plain integers."""
    per_call = {"perturb_normal": 4, "perturb_rademacher": 128}[name]
    call, place = divmod(element, per_call)
    words = [int(word) for word in sampling.philox((call % 2**32, call // 2**32, stream, ordinal), key)]
    if name == "perturb_rademacher":
        return 1.0 if words[place // 32] >> place % 32 & 1 else -1.0
    radius = math.sqrt(-2 * math.log((words[place // 2 * 2] + 0.5) / 2**32))
    angle = 2 * math.pi * ((words[place // 2 * 2 + 1] >> 8) / 2**24 - 1 / 8)  # a quarter begins 45° before its axis
    return radius * (math.sin(angle) if place % 2 else math.cos(angle))


@pytest.mark.parametrize("stream", [0, 2**32 - 1])
@pytest.mark.parametrize("name", PERTURB)
def test_every_element_has_the_noise_of_its_own_counter(name, stream):
    found = noise(name, segment_table(*SOME), sum(SOME[1]), stream=stream).tolist()
    position = 0
    for ordinal, numel, first in zip(*SOME, strict=True):
        for element in {*range(min(numel, 140)), numel // 2, numel - 1}:
            expected = by_the_book(name, first + element, ordinal, stream)
            assert found[position + element] == pytest.approx(expected, abs=2e-6)
        position += numel


def test_normals_are_normal():
    length = 4_000_000
    z = noise("perturb_normal", segment_table([0, 1], [length // 2] * 2), length).double()
    assert z.isfinite().all()
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs(z.pow(power).mean().item() - moment) < 4 * (variance / length) ** 0.5
    assert scipy.stats.kstest(z[::4].numpy(), "norm").pvalue > 1e-3  # each place within a call by itself
    assert scipy.stats.kstest(z[3::4].numpy(), "norm").pvalue > 1e-3
    for limit in (4.0, 4.75):
        expected = length * scipy.stats.norm.sf(limit) * 2
        assert abs((z.abs() > limit).sum().item() - expected) < 5 * expected**0.5


def test_signs_are_the_bits_of_philox_and_as_many():
    length = 128 * 3000 + 5
    s = noise("perturb_rademacher", segment_table([9], [length]), length)
    calls = torch.arange(3001)
    words = torch.stack(sampling.philox((calls, 0, 0, 9), KEY), dim=1)
    bits = (words[:, :, None] >> torch.arange(32) & 1).view(-1)[:length]
    assert (s == 1).sum().item() == bits.sum().item()
    assert torch.equal(s, bits.float() * 2 - 1)
    assert abs(s.sum().item()) < 4 * length**0.5


@pytest.mark.parametrize("name", PERTURB)
def test_draws_of_another_key_stream_parameter_or_element_are_independent(name):
    length = 200_000
    one = noise(name, segment_table([0], [length]), length)
    others = {
        "key": noise(name, segment_table([0], [length]), length, key=KEY + 1),
        "stream": noise(name, segment_table([0], [length]), length, stream=1),
        "parameter": noise(name, segment_table([1], [length]), length),
        "element": noise(name, segment_table([0], [length], [length]), length),
    } | {f"neighbour {lag}": one.roll(lag) for lag in (1, 2, 3, 4, 32, 128)}
    for what, other in others.items():
        assert abs((one * other).mean().item()) < 4.5 / length**0.5, what
        assert abs((one.square() * other.square()).mean().item() - 1) < 4.5 * (8 / length) ** 0.5, what


@pytest.mark.parametrize("name", PERTURB)
@pytest.mark.parametrize("cut", [1, 3, 130, PIECE, 50_001, 70_001])
def test_every_sharding_gives_the_same_noise(cut, name):
    numels = [70_000, 3, 30_000]
    length = sum(numels)
    x = torch.arange(length, dtype=torch.float32)
    whole = noise(name, segment_table([0, 2, 5], numels), length, origin=x, scale=0.3)
    if cut < numels[0]:
        shards = [([0], [cut], [0]), ([0, 2, 5], [numels[0] - cut, 3, 30_000], [cut, 0, 0])]
    else:
        inner = cut - numels[0]
        shards = [([0, 2], [70_000, inner], [0, 0]), ([2, 5], [3 - inner, 30_000], [inner, 0])]
    parts = [
        noise(name, segment_table(*shard), len(origin), origin=origin, scale=0.3)
        for shard, origin in zip(shards, (x[:cut], x[cut:]), strict=True)
    ]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("name", PERTURB)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noise_is_the_same_in_every_dtype_and_scaled_once(name, dtype):
    segments, length = segment_table(*SOME), sum(SOME[1])
    z, x = noise(name, segments, length), torch.linspace(-1, 1, length).to(dtype)
    wide = arithmetic_dtype(dtype)
    scale = torch.tensor(0.3, dtype=wide)
    step = z.to(wide) * scale
    assert torch.equal(noise(name, segments, length, scale=0.3, dtype=dtype), step.to(dtype))
    assert torch.equal(noise(name, segments, length, scale=scale, dtype=dtype), step.to(dtype))
    assert torch.equal(noise(name, segments, length, scale=0.3, dtype=dtype, origin=x), (x.to(wide) + step).to(dtype))
    in_place = x.clone()
    PERTURB[name](in_place, 0.3, segments, KEY, origin=in_place)
    assert torch.equal(in_place, (x.to(wide) + step).to(dtype))


@pytest.mark.parametrize("name", PERTURB)
def test_the_negative_scale_is_the_antithetic_perturbation(name):
    segments, length = segment_table(*SOME), sum(SOME[1])
    assert torch.equal(noise(name, segments, length, scale=-0.3), -noise(name, segments, length, scale=0.3))
    x = torch.linspace(-1, 1, length, dtype=torch.float64)
    up, down = (noise(name, segments, length, scale=s, origin=x, dtype=torch.float64) for s in (0.3, -0.3))
    torch.testing.assert_close((up + down) / 2, x, rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", PERTURB)
def test_arguments_that_do_not_fit_are_refused(name):
    segments, x = segment_table([0], [10]), torch.zeros(10)
    perturb = PERTURB[name]
    with pytest.raises(ValueError, match="describe 10 elements"):
        perturb(torch.zeros(9), 1.0, segments, KEY)
    with pytest.raises(ValueError, match="contiguous"):
        perturb(torch.zeros(20)[::2], 1.0, segments, KEY)
    with pytest.raises(ValueError, match="origin must be like out"):
        perturb(x, 1.0, segments, KEY, origin=x.double())
    with pytest.raises(ValueError, match="32-bit word"):
        perturb(x, 1.0, segments, KEY, stream=2**32)
    with pytest.raises(ValueError, match="one element"):
        perturb(x, torch.ones(2), segments, KEY)
    perturb(torch.empty(0), 1.0, segment_table([], []), KEY)


@pytest.mark.parametrize("name", PERTURB)
def test_the_operators_are_registered_as_torch_wants_them(name):
    segments, x = segment_table([0, 1], [20, 5]), torch.ones(25)
    for origin in (None, x):
        args = (torch.empty(25), origin, torch.tensor(0.5), segments, 3, 7)
        torch.library.opcheck(dispatch.operation(name).overload, args)


# in Triton's interpreter


def arguments(name, dtype, origin):
    length = sum(SOME[1])
    x = torch.linspace(-1, 1, length).to(dtype) if origin else None
    scale = torch.tensor(0.3, dtype=arithmetic_dtype(dtype))
    return torch.full((length,), torch.nan, dtype=dtype), x, scale, segment_table(*SOME), 2**31 + 5, signed_key(KEY)


@pytest.mark.parametrize("origin", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PERTURB)
def case_kernel_equals_reference(name, dtype, origin):
    first, second = (arguments(name, dtype, origin) for _ in range(2))
    dispatch.operation(name).reference(*first)
    dispatch.operation(name)(*second)
    assert not second[0].isnan().any()
    if dtype is torch.bfloat16:  # there the interpreter cuts the last bits off where a GPU rounds to nearest
        torch.testing.assert_close(second[0], first[0], rtol=2**-7, atol=1e-6)
    else:
        assert torch.equal(second[0], first[0])


@pytest.mark.parametrize("name", PERTURB)
def case_nothing_beyond_the_segments_is_written(name):
    whole = torch.full((sum(SOME[1]) + 40,), 7.0)
    PERTURB[name](whole[3:-37], 0.1, segment_table(*SOME), KEY)
    assert (whole[:3] == 7).all()
    assert (whole[-37:] == 7).all()
    assert (whole[3:-37].abs() < 1).all()


@harness.needs_triton
def test_the_interpreter_agrees():
    assert harness.run_in_interpreter(__file__) == len(PERTURB) * (2 * len(DTYPES) + 1)


# what the kernels compile to


@harness.needs_triton
@pytest.mark.parametrize("architecture", harness.ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["normal_kernel", "rademacher_kernel"])
def test_kernels_spill_nothing_and_write_every_element_once(name, dtype, architecture):
    from sharpness_plugins.kernels import blocks, noise_triton, philox_triton

    kernel = getattr(noise_triton, name)
    element, number = harness.TYPES[dtype], harness.TYPES[arithmetic_dtype(dtype)]
    types = {"segments": "*i64", "num_segments": "i32", "stream": "i64", "key": "i64", "scale": f"*{number}"}
    signature = {arg: types.get(arg, f"*{element}") for arg in kernel.arg_names}
    constants = {
        "MOVED": True,
        "BLOCK": BLOCK,
        "SEARCHED": philox_triton.SEARCHED,
        "dtype": blocks.dtype_of(torch.empty(0, dtype=dtype)),
    }
    found = harness.compile_for(kernel, architecture, signature, constants)
    assert (found.stack_bytes, found.spilled) == (0, 0), found
    assert found.registers < 255, found
    assert found.stores[8 * dtype.itemsize] == BLOCK // 256
    assert found.fused <= (24 if name == "normal_kernel" else 0)  # in the roots, which are rounded right; none elsewhere
