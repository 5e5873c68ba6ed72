"""Philox against Random123's answers and a twin in plain integers; keyed streams; states put back."""

import random

import numpy as np
import pytest
import torch

from oracles import preserved_rng
from sharpness_plugins import sampling

ONES = 0xFFFFFFFF


def plain_philox(counter, key):
    """Philox4x32-10 in unbounded Python integers, written from the paper's description."""
    words, keys = list(counter), [key % 2**32, key // 2**32]
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * words[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * words[2], 2**32)
        words = [high1 ^ words[1] ^ keys[0], low1, high0 ^ words[3] ^ keys[1], low0]
        keys = [(keys[0] + 0x9E3779B9) % 2**32, (keys[1] + 0xBB67AE85) % 2**32]
    return words


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((ONES,) * 4, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0_A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
@pytest.mark.parametrize("as_tensors", [False, True])
def test_philox_gives_the_known_answers_of_random123(counter, key, expected, as_tensors):
    given = tuple(torch.tensor([word]) for word in counter) if as_tensors else counter
    words = sampling.philox(given, key)
    assert " ".join(f"{int(word):08x}" for word in words) == expected


def test_philox_equals_its_twin_in_plain_integers():
    draw = random.Random(0)
    for _ in range(20):
        key = draw.getrandbits(64)
        columns = [[draw.getrandbits(32) for _ in range(16)] for _ in range(2)]
        block, ordinal = draw.getrandbits(32), draw.getrandbits(32)
        words = sampling.philox((*map(torch.tensor, columns), block, ordinal), key)
        got = torch.stack([torch.as_tensor(word) for word in words], dim=1).tolist()
        assert got == [plain_philox((*pair, block, ordinal), key) for pair in zip(*columns, strict=True)]


def test_keys_differ_by_seed_and_by_every_name_on_the_path():
    paths = [(0,), (1,), (-1,), (0, "a"), (0, "b"), (0, "a", 1), (0, "a", "1"), (0, "ab"), (0, "a", "b"), (0, "a, 'b'")]
    assert len({sampling.key_for(*path) for path in paths}) == len(paths)
    assert all(0 <= sampling.key_for(*path) < 2**64 for path in paths)


def test_a_generator_depends_on_its_names_alone():
    first = torch.rand(3, generator=sampling.generator_for(3, "epsilon_box"))
    torch.rand(1)
    sampling.generator_for(3, "another")
    assert torch.equal(first, torch.rand(3, generator=sampling.generator_for(3, "epsilon_box")))
    assert not torch.equal(first, torch.rand(3, generator=sampling.generator_for(4, "epsilon_box")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probes_have_the_moments_of_their_distributions(dtype):
    like, dim = torch.zeros(1, dtype=dtype), 100_000
    box = sampling.uniform(dim, sampling.generator_for(0, "uniform"), like)
    assert box.dtype == dtype
    assert -1 <= box.min() < -0.99
    assert 0.99 < box.max() < 1
    assert abs(box.mean().item()) < 4 / (3 * dim) ** 0.5
    assert abs(box.square().mean().item() - 1 / 3) < 4 * (4 / 45 / dim) ** 0.5
    gauss = sampling.normal(dim, sampling.generator_for(0, "normal"), like)
    assert gauss.dtype == dtype
    assert abs(gauss.mean().item()) < 4 / dim**0.5
    assert abs(gauss.var().item() - 1) < 4 * (2 / dim) ** 0.5
    assert abs(gauss.pow(4).mean().item() - 3) < 4 * (96 / dim) ** 0.5


def drawn():
    return torch.rand(2).tolist(), np.random.rand(2).tolist(), [random.random(), random.gauss(0, 1)]  # noqa: NPY002


def test_global_seed_fixes_what_data_sets_draw_from():
    with preserved_rng(torch.device("cpu")):
        sampling.seed_global(2**63 - 1)
        first = drawn()
        sampling.seed_global(2**63 - 1)
        assert drawn() == first
        sampling.seed_global(5)
        assert drawn() != first


class Holder:
    def __init__(self):
        self.torch = torch.Generator().manual_seed(1)
        self.numpy = np.random.default_rng(1)
        self.legacy = np.random.RandomState(1)
        self.python = random.Random(1)
        self.shared = self.torch

    def drawn(self):
        return [
            torch.rand(2, generator=self.torch).tolist(),
            self.numpy.random(2).tolist(),
            self.legacy.rand(2).tolist(),
            self.python.random(),
        ]


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_random_states_are_as_before_whatever_happens_inside(error):
    def use(act):
        holder, slotted = Holder(), object()
        holder.drawn()
        with preserved_rng(torch.device("cpu")):
            sampling.seed_global(7)
            np.random.normal()  # noqa: NPY002 - leaves half a pair of normals in the legacy state
            if act:
                try:
                    with preserved_rng(torch.device("cpu"), [holder, slotted]):
                        drawn(), holder.drawn(), sampling.seed_global(9)
                        if error is not None:
                            raise error
                except (RuntimeError, KeyboardInterrupt):
                    pass
            return drawn(), np.random.normal(), holder.drawn()  # noqa: NPY002

    assert use(act=True) == use(act=False)


def test_an_offset_gives_every_kind_of_generator_another_fixed_stream():
    holder = Holder()
    holder.drawn()
    states = sampling.generator_states([holder, holder])
    assert len(states) == 4
    streams = []
    for offset in (0, 1, 1, 0):
        sampling.set_generator_states(states, offset=offset)
        streams.append(holder.drawn())
    assert streams[0] == streams[3]
    assert streams[1] == streams[2]
    assert all(a != b for a, b in zip(streams[0], streams[1], strict=True))
