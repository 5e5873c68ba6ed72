"""The probe: fixed and seeded, read beside a training loader that does not notice."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, SubsetRandomSampler, TensorDataset

from sharpness_plugins.errors import LoaderError
from sharpness_plugins.probe import probe_batches


class Indexed(Dataset):
    """Entry ``i`` is ``(transform(i), i % 3)``."""

    def __init__(self, num_samples: int = 100, transform=None) -> None:
        self.num_samples, self.transform = num_samples, transform

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int):
        value = torch.tensor(float(index))
        return value if self.transform is None else self.transform(value), index % 3


class Jitter:
    """Augmentation from every source there is: the global generators, and three of its own."""

    def __init__(self) -> None:
        self.torch = torch.Generator().manual_seed(1)
        self.numpy = np.random.default_rng(2)
        self.python = random.Random(3)

    def __call__(self, value):
        noise = float(torch.rand(())) + np.random.rand() + random.random()  # noqa: NPY002
        own = float(torch.rand((), generator=self.torch)) + self.numpy.random() + self.python.random()
        return value + 0.05 * (noise + own)


def values(batches) -> list[float]:
    return [float(value) for batch in batches for value in batch[0]]


def states(jitter: Jitter | None = None):
    own = (
        []
        if jitter is None
        else [jitter.torch.get_state().tolist(), jitter.numpy.bit_generator.state, jitter.python.getstate()]
    )
    numpy = [part.tolist() if hasattr(part, "tolist") else part for part in np.random.get_state()]  # noqa: NPY002
    return [torch.get_rng_state().tolist(), numpy, random.getstate(), *own]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_in_the_middle_of_an_epoch_does_not_notice(num_workers):
    """A second ``iter`` over persistent workers turned these 10 batches into 13."""

    def epoch(probe_at: int | None):
        torch.manual_seed(0)
        loader = DataLoader(
            Indexed(), batch_size=10, shuffle=True, num_workers=num_workers, persistent_workers=num_workers > 0
        )
        seen = []
        for _ in range(2):  # the second epoch's order depends on the random state after the first
            for position, (inputs, _) in enumerate(loader):
                if position == probe_at:
                    assert len(probe_batches(loader, 30)) == 3
                seen.append(inputs.tolist())
        return seen

    with_probe = epoch(3)
    assert len(with_probe) == 20
    assert sorted(value for batch in with_probe[:10] for value in batch) == list(map(float, range(100)))
    assert with_probe == epoch(None)


def test_the_same_seed_gives_the_same_samples_and_another_seed_others():
    loader = DataLoader(Indexed(), batch_size=8, shuffle=True)
    first = values(probe_batches(loader, 40))
    torch.manual_seed(99)
    next(iter(loader))
    assert values(probe_batches(loader, 40)) == first
    assert len(set(first)) == 40
    assert first != sorted(first)  # from all over the data
    assert set(values(probe_batches(loader, 40, seed=1))) != set(first)


@pytest.mark.parametrize(
    ("num_samples", "sizes"), [(20, [8, 8, 4]), (3, [3]), (1, [1]), (100, [8] * 12 + [4]), (500, [8] * 12 + [4])]
)
def test_at_most_so_many_samples_in_batches_of_the_loaders_size(num_samples, sizes):
    batches = probe_batches(DataLoader(Indexed(), batch_size=8), num_samples)
    assert [len(targets) for _, targets in batches] == sizes


def test_batches_of_another_size_hold_the_same_samples():
    loader = DataLoader(Indexed(), batch_size=8)
    wide = probe_batches(loader, 20, batch_size=16)
    assert [len(targets) for _, targets in wide] == [16, 4]
    assert values(wide) == values(probe_batches(loader, 20))


def test_random_augmentation_is_drawn_once_and_no_random_state_moves():
    jitter = Jitter()
    loader = DataLoader(Indexed(transform=jitter), batch_size=10, shuffle=True)
    before = states(jitter)
    batches = probe_batches(loader, 30)
    assert states(jitter) == before
    drawn = values(batches)
    assert values(batches) == drawn
    assert all(value != int(value) for value in drawn)
    next(iter(loader))  # training goes on, and its generators with it
    assert values(probe_batches(loader, 30)) == drawn


def test_a_transform_takes_the_place_of_the_data_sets_own_and_leaves_that_alone():
    dataset = Indexed(transform=Jitter())
    inner = Subset(Subset(dataset, range(50)), range(10, 20))
    loader = DataLoader(inner, batch_size=4, shuffle=True)
    assert sorted(values(probe_batches(loader, 10, transform=lambda value: value + 1000))) == [
        1000.0 + i for i in range(10, 20)
    ]
    assert isinstance(dataset.transform, Jitter)
    with pytest.raises(ValueError, match="TensorDataset has no attribute of that name"):
        probe_batches(DataLoader(TensorDataset(torch.zeros(4, 1))), transform=abs)
    with pytest.raises(ValueError, match="a sequence of batches has none"):
        probe_batches([torch.zeros(4, 1)], transform=abs)


def test_random_states_are_put_back_after_an_exception_and_after_ctrl_c():
    for stop in (KeyboardInterrupt, ValueError):

        def transform(value, stop=stop):
            torch.rand(3)
            raise stop

        before = states()
        with pytest.raises(stop):
            probe_batches(DataLoader(Indexed(transform=transform), batch_size=4))
        assert states() == before


@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_a_sampler_of_some_indices_keeps_to_them(kind):
    loader = DataLoader(Indexed(), batch_size=8, sampler=SubsetRandomSampler(kind(range(30, 60))))  # the rest is validation
    assert sorted(values(probe_batches(loader))) == list(map(float, range(30, 60)))


class Stream(IterableDataset):
    def __init__(self, num_samples: int = 100, batched: bool = False) -> None:
        self.num_samples, self.batched, self.opened = num_samples, batched, 0

    def __iter__(self):
        self.opened += 1
        if self.batched:
            for start in range(0, self.num_samples, 5):
                yield torch.arange(start, start + 5.0), torch.zeros(5, dtype=torch.int64)
        else:
            for index in range(self.num_samples):
                yield torch.tensor(float(index)), index % 3


def test_of_an_iterable_data_set_the_first_samples():
    dataset = Stream()
    batches = probe_batches(DataLoader(dataset, batch_size=10), 25)
    assert values(batches) == list(map(float, range(30)))  # whole batches
    assert dataset.opened == 1


@pytest.mark.parametrize(
    "dataset", [Stream(batched=True), TensorDataset(torch.arange(100.0).view(20, 5), torch.zeros(20, 5).long())]
)
def test_a_data_set_that_gives_whole_batches_is_not_batched_again(dataset):
    loader = DataLoader(dataset, batch_size=None)
    batches = probe_batches(loader, 12)
    assert [tuple(inputs.shape) for inputs, _ in batches] == [(5,)] * 3
    with pytest.raises(ValueError, match="gives batches itself"):
        probe_batches(loader, batch_size=4)


def test_a_batch_sampler_tells_the_size():
    sampler = torch.utils.data.BatchSampler(range(100), batch_size=6, drop_last=False)
    batches = probe_batches(DataLoader(Indexed(), batch_sampler=sampler), 20)
    assert [len(targets) for _, targets in batches] == [6, 6, 6, 2]


def test_a_sequence_of_batches_gives_its_first_ones():
    batches = [(torch.full((8, 2), float(i)), torch.zeros(8).long()) for i in range(10)]
    assert probe_batches(batches, 20) == batches[:3]
    assert probe_batches(tuple(batches), 1) == batches[:1]


def test_the_collate_function_is_the_loaders():
    loader = DataLoader(
        Indexed(), batch_size=4, collate_fn=lambda entries: {"labels": torch.tensor([y for _, y in entries])}
    )
    assert [set(batch) for batch in probe_batches(loader, 8)] == [{"labels"}] * 2


class Once(IterableDataset):
    def __iter__(self):
        return self

    def __next__(self):
        return torch.zeros(2)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (iter([torch.zeros(4)]), "has no data set that could be read beside training"),
        (DataLoader(Once(), batch_size=2), "is a Once, which can be read only once"),
        ([], "holds no sample"),
        (DataLoader(Stream(0), batch_size=2), "holds no sample"),
        ((torch.zeros(4, 2), torch.zeros(4)), r"pair of tensors.*\[\(x, y\)\]"),
    ],
    ids=["generator", "one-shot data set", "empty list", "empty stream", "pair"],
)
def test_what_cannot_be_probed_says_why(loader, message):
    with pytest.raises(LoaderError, match=message):
        probe_batches(loader)


def test_numbers_below_one_are_refused():
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        probe_batches([torch.zeros(4)], 0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        probe_batches(DataLoader(Indexed()), batch_size=0)


class Doubled:
    """Around a DataLoader, as loaders that move or normalize whole batches are."""

    def __init__(self, loader) -> None:
        self.loader = loader

    def __iter__(self):
        for inputs, targets in self.loader:
            yield 2 * inputs + torch.rand(()), targets


def test_what_a_loader_around_a_loader_does_to_batches_is_done_to_the_probe():
    loader = Doubled(DataLoader(Indexed(), batch_size=10))
    plain = values(probe_batches(loader.loader, 20))
    before = torch.get_rng_state()
    found = values(probe_batches(loader, 20))
    assert torch.equal(torch.get_rng_state(), before)
    shifts = [one - 2 * other for one, other in zip(found, plain, strict=True)]
    assert all(0 <= shift < 1 for shift in shifts)
    assert shifts[:10] == pytest.approx([shifts[0]] * 10, abs=1e-4)
    assert found == values(probe_batches(loader, 20))
    assert isinstance(loader.loader, DataLoader)
