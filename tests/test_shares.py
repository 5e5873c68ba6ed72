"""Every sample on exactly one rank, whatever the loaders are: ranks are threads here, which read one after the other."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from sharpness_plugins.distributed import Ranks
from sharpness_plugins.shares import share_of
from sharpness_plugins.source import BatchSource

READS = threading.Lock()  # the global random states are those of the process


class Group:
    """Ranks that exchange values through memory."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier, self.values = size, threading.Barrier(size, timeout=30), [None] * size

    def run(self, work: Callable[[Ranks], Any]) -> list[Any]:
        answers: list[Any] = [None] * self.size

        def on_rank(rank: int) -> None:
            try:
                answers[rank] = work(ThreadRanks(self, rank))
            except Exception as error:
                answers[rank] = error
                self.barrier.abort()

        threads = [threading.Thread(target=on_rank, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for answer in answers:
            if isinstance(answer, Exception) and not isinstance(answer, threading.BrokenBarrierError):
                raise answer
        return answers


class ThreadRanks(Ranks):
    def __init__(self, group: Group, rank: int) -> None:
        super().__init__("auto", rank, group.size)
        self.group = group

    @contextlib.contextmanager
    def sharing(self, what: str, where: Any = ()) -> Iterator[Any]:
        with READS:
            yield None

    def gather(self, value: Any) -> list[Any]:
        self.group.values[self.rank] = value
        self.group.barrier.wait()
        found = list(self.group.values)
        self.group.barrier.wait()
        return found


class Stream(IterableDataset):
    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        return iter(torch.arange(1.0, self.count + 1)[:, None])


def dataset(count: int) -> TensorDataset:
    return TensorDataset(torch.arange(1.0, count + 1)[:, None])


def a_list(count: int, size: int, rank: int, world: int) -> Any:
    return [(part,) for part in torch.arange(1.0, count + 1)[:, None].split(size)]


def a_loader(count: int, size: int, rank: int, world: int) -> Any:
    return DataLoader(dataset(count), batch_size=size)


def a_stream(count: int, size: int, rank: int, world: int) -> Any:
    return DataLoader(Stream(count), batch_size=size)


def a_padded_sampler(count: int, size: int, rank: int, world: int) -> Any:
    return DataLoader(dataset(count), batch_size=size, sampler=DistributedSampler(dataset(count), world, rank, seed=count))


def orders_of_their_own(count: int, size: int, rank: int, world: int) -> Any:
    order = torch.randperm(count, generator=torch.Generator().manual_seed(rank)).tolist()
    return DataLoader(dataset(count), batch_size=size, sampler=order)


class Wrapper:
    """As timm's PrefetchLoader: what it gives is made of what a loader inside gives."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


def a_wrapper(count: int, size: int, rank: int, world: int) -> Any:
    return Wrapper(a_padded_sampler(count, size, rank, world))


def own_parts(count: int, size: int, rank: int, world: int) -> Any:
    numbers = torch.arange(1.0, count + 1)[:, None]
    cut = [0, *sorted((7 * i) % (count + 1) for i in range(1, world)), count]
    return [(part,) for part in numbers[cut[rank] : cut[rank + 1]].split(size)] if cut[rank] < cut[rank + 1] else []


LOADERS = (a_list, a_loader, a_stream, a_padded_sampler, orders_of_their_own, a_wrapper, own_parts)


def read(make: Callable[..., Any], count: int, size: int, world: int, max_samples: int | None) -> list[list[float]]:
    def work(ranks: Ranks) -> list[float]:
        source = BatchSource(
            make(count, size, ranks.rank, world), device=torch.device("cpu"), max_samples=max_samples, cache_bytes=2**20
        )
        source.share_out(ranks, share_of)
        source.load()
        assert source.num_samples == (count if max_samples is None else min(count, max_samples))
        return [number for batch in source for tensor in batch.data for number in tensor.reshape(-1).tolist()]

    return Group(world).run(work)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(LOADERS), st.integers(2, 40), st.integers(1, 12), st.integers(2, 5))
def test_every_sample_is_read_once(make, count, size, world):
    found = read(make, count, size, world, None)
    assert Counter(number for numbers in found for number in numbers) == Counter(range(1, count + 1))


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from((a_list, a_loader, a_stream)),
    st.integers(2, 40),
    st.integers(1, 12),
    st.integers(2, 5),
    st.integers(1, 40),
)
def test_the_first_samples_are_the_first_of_all(make, count, size, world, most):
    found = read(make, count, size, world, most)
    assert sorted(number for numbers in found for number in numbers) == list(range(1, min(most, count) + 1))


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("make", [a_list, a_loader])
def test_a_loader_of_one_batch_is_shared_evenly(make, world):
    sizes = [len(numbers) for numbers in read(make, 32, 32, world, None)]
    assert max(sizes) - min(sizes) <= 1
