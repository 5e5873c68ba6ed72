"""Resizable batches: every sample once, at the scheduled size, whatever prepares them; and resume after any of them."""

from __future__ import annotations

import itertools
import json
import multiprocessing

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

from sharpness_plugins.errors import LoaderError
from sharpness_plugins.samplers import AccumulatingLoader, MicroBatch, ResizableBatchSampler, ResizableLoader
from sharpness_plugins.schedules import Plan


class Numbers(Dataset):
    """Sample ``i`` is ``i``, so that a batch tells its indices."""

    def __init__(self, num_samples):
        self.num_samples = num_samples

    def __len__(self):
        return self.num_samples

    def __getitem__(self, index):
        return index


class Stream(IterableDataset):
    """``num_samples`` numbers, shared out to the workers; an epoch shifts them by 1000."""

    def __init__(self, num_samples):
        self.num_samples = num_samples
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        return (1000 * self.epoch + number for number in range(first, self.num_samples, step))


def order_of(num_samples, *, seed=0, epoch=0, **settings):
    """The order of an epoch, as batches of one tell it."""
    sampler = ResizableBatchSampler(num_samples, 1, seed=seed, **settings)
    sampler.set_epoch(epoch)
    return [index for indices in sampler for index in indices]


def delivered(loader, changes=None, *, count=0):
    """``(indices, micro-batch)`` of the rest of an epoch; ``changes[k]`` is applied after ``k`` batches in all."""
    found = []
    for batch in loader:
        found.append((batch.tolist() if isinstance(batch, torch.Tensor) else batch, loader.micro_batch))
        if changes and (plan := changes.get(count + len(found))):
            loader.resize(plan)
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_epoch_is_shared_out_once_in_equally_many_micro_batches(world_size):
    for num_samples, micro, accumulation, drop_last in itertools.product(
        range(world_size, 20), (1, 2, 3), (1, 2, 3), (False, True)
    ):
        plan = Plan(micro, accumulation, world_size)
        if drop_last and plan.batch_size > num_samples:
            continue
        samplers = [
            ResizableBatchSampler(num_samples, plan, shuffle=False, drop_last=drop_last, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        lengths = [len(sampler) for sampler in samplers]
        assert all(sampler.dropped == 0 for sampler in samplers)
        ranks = [[(indices, sampler.micro_batch) for indices in sampler] for sampler in samplers]
        assert [len(parts) for parts in ranks] == lengths
        assert len(set(lengths)) == 1
        groups = [[]]
        for together in zip(*ranks, strict=True):
            assert len({micro_batch.is_last for _, micro_batch in together}) == 1
            assert all(1 <= len(indices) == micro_batch.num_samples <= micro for indices, micro_batch in together)
            groups[-1].extend(together)
            if together[0][1].is_last:
                groups.append([])
        assert groups.pop() == []
        assert len(groups) == samplers[0].steps_per_epoch()
        seen = []
        for group in groups:
            indices = sorted(index for part, _ in group for index in part)
            assert {micro_batch.group_samples for _, micro_batch in group} == {len(indices)}
            assert len(group) <= accumulation * world_size
            seen += indices
        assert seen == list(range(len(seen)))  # in order of the groups, each once
        assert {sampler.dropped for sampler in samplers} == {num_samples - len(seen)}
        assert num_samples - len(seen) < (plan.batch_size if drop_last else world_size)
        assert drop_last or not len(seen) < num_samples or micro == 1 or num_samples % plan.batch_size < world_size


def test_the_last_group_is_split_evenly():
    sizes = [len(indices) for indices in ResizableBatchSampler(17, Plan(4, 3))]
    assert sizes == [4, 4, 4, 2, 3]


def test_a_change_takes_effect_with_the_next_group_and_keeps_the_order():
    sampler = ResizableBatchSampler(50, Plan(2, 3), seed=4)
    found, sizes = [], []
    for indices in sampler:
        found += indices
        sizes.append(len(indices))
        if len(sizes) == 2:
            sampler.resize(7)  # in the middle of a group, which goes on as it began
            sampler.resize(Plan(5, 2))  # and the last word holds
        if len(sizes) == 5:
            sampler.resize(8)
    assert sizes == [2, 2, 2, 5, 5, *[8] * 4, 2]
    assert found == order_of(50, seed=4)


def test_what_is_left_is_counted_at_the_present_size():
    sampler = ResizableBatchSampler(50, Plan(2, 3))
    lengths = [len(sampler)]
    for count, _ in enumerate(sampler, 1):
        if count == 2:
            sampler.resize(10)
        lengths.append(len(sampler))
    assert lengths == [25, 24, 1 + 5, 5, 4, 3, 2, 1, 0]  # 50 = 8 * 6 + 2; 44 = 4 * 10 + 4
    assert len(sampler) == 5  # the next epoch


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(
    ("num_workers", "persistent"), [(0, False), (2, False), (2, True)], ids=["main", "workers", "persistent"]
)
def test_every_batch_has_the_scheduled_size(num_workers, persistent, drop_last):
    """At the start, in the middle, twice. torch alone: late by the prefetched batches, and with ``drop_last`` never."""
    loader = DataLoader(
        Numbers(50), batch_size=4, shuffle=True, num_workers=num_workers, persistent_workers=persistent, drop_last=drop_last
    )
    loader = ResizableLoader(loader, seed=3)
    before, others = torch.get_rng_state(), set(multiprocessing.active_children())
    expected = [  # changes after so many batches; sizes
        ({}, [6] * 8 + [2]),
        ({2: 15}, [6, 6, 15, 15, 8]),
        ({1: 4, 3: Plan(3, 2)}, [15, 4, 4, *[3] * 9]),
    ]
    loader.resize(6)
    for epoch, (changes, sizes) in enumerate(expected):
        found = delivered(loader, changes)
        assert [len(indices) for indices, _ in found] == (sizes[:-1] if drop_last else sizes)
        indices = [index for part, _ in found for index in part]
        assert indices == order_of(50, seed=3, epoch=epoch)[: len(indices)]
        assert loader.sampler.dropped == 50 - len(indices)
    assert torch.equal(torch.get_rng_state(), before)
    del loader
    assert set(multiprocessing.active_children()) <= others


def run(loader, changes, epochs=2):
    return [delivered(loader, changes.get(epoch)) for epoch in range(epochs)]


CHANGES = {0: {2: Plan(2, 3), 3: Plan(4, 1), 7: 6}, 1: {1: Plan(1, 2)}}


def test_resumed_after_any_batch_is_what_it_would_have_been():
    """Through JSON, with changes that were asked for and not yet in effect, and across the end of an epoch."""

    def make():
        return ResizableLoader(DataLoader(Numbers(29), batch_size=5, shuffle=True), Plan(3, 1), seed=7)

    whole = run(make(), CHANGES)
    for epoch, stop in [(epoch, stop) for epoch, part in enumerate(whole) for stop in range(1, len(part) + 1)]:
        first = make()
        for earlier in range(epoch):
            delivered(first, CHANGES[earlier])
        for count, _ in enumerate(first, 1):
            if plan := CHANGES[epoch].get(count):
                first.resize(plan)
            if count == stop:
                break
        saved = json.dumps(first.state_dict())
        assert len(saved) < 300
        again = make()
        again.load_state_dict(json.loads(saved))
        again.set_epoch(epoch)  # as a loop over epochs says it, and changes nothing
        assert delivered(again, CHANGES[epoch], count=stop) == whole[epoch][stop:]
        for later in range(epoch + 1, 2):
            again.set_epoch(later)
            assert delivered(again, CHANGES[later]) == whole[later]


def test_the_state_counts_what_was_delivered_and_not_what_was_prepared():
    def make():
        return ResizableLoader(DataLoader(Numbers(40), batch_size=4, shuffle=True, num_workers=2))

    whole, first = delivered(make()), make()
    for _ in zip(range(3), first, strict=False):  # 4 more are prepared by then
        pass
    again = make()
    again.load_state_dict(first.state_dict())
    assert again.epochs_delivered == 12 / 40
    assert delivered(again) == whole[3:]


def test_another_number_of_ranks_resumes_between_groups():
    first = ResizableBatchSampler(30, Plan(2, 2, 2), world_size=2)
    for count, _ in enumerate(first, 1):
        if count == 3:
            break
    with pytest.raises(ValueError, match="in the middle of a group shared by 2 rank"):
        ResizableBatchSampler(30, 3).load_state_dict(first.state_dict())
    for _ in first:
        break
    again = ResizableBatchSampler(30, 3)
    again.load_state_dict(first.state_dict())
    assert [index for indices in again for index in indices] == order_of(30)[16:]


def test_an_iteration_goes_on_where_delivery_stopped():
    """After a break, and after an exception in the loop's body or in the data."""
    others = set(multiprocessing.active_children())
    loader = ResizableLoader(DataLoader(Numbers(20), batch_size=3, shuffle=True, num_workers=2))
    found = []
    for batch in loader:
        found += batch.tolist()
        break

    def interrupted():
        for batch in loader:
            found.extend(batch.tolist())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert set(multiprocessing.active_children()) <= others
    assert found + [index for indices, _ in delivered(loader) for index in indices] == order_of(20)


def test_a_failing_sample_is_not_counted():
    class Failing(Numbers):
        broken = True

        def __getitem__(self, index):
            if self.broken and index == 5:
                raise OSError("disk")
            return index

    data = Failing(12)
    loader = ResizableLoader(DataLoader(data, batch_size=4))
    with pytest.raises(OSError, match="disk"):
        delivered(loader)
    data.broken = False
    assert [indices for indices, _ in delivered(loader)] == [[4, 5, 6, 7], [8, 9, 10, 11]]


def test_epochs_follow_each_other_and_can_be_set():
    sampler = ResizableBatchSampler(30, 30)
    first, second = list(sampler), list(sampler)
    assert first == [order_of(30, epoch=0)]
    assert second == [order_of(30, epoch=1)]
    assert first != second
    sampler.set_epoch(0)
    assert list(sampler) == first
    sampler.set_epoch(0)  # again, since it has ended
    assert list(sampler) == first
    assert order_of(30, seed=1) != order_of(30, seed=0)
    assert order_of(30, shuffle=False) == list(range(30))


@pytest.mark.parametrize("disturb", [iter, lambda loader: loader.set_epoch(5)], ids=["iterated", "set"])
def test_a_second_iteration_ends_the_first(disturb):
    loader = ResizableLoader(DataLoader(Numbers(9), batch_size=2))
    running = iter(loader)
    next(running)
    if (other := disturb(loader)) is not None:
        next(other)
    with pytest.raises(RuntimeError, match="before this iteration had ended"):
        next(running)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "source",
    [
        lambda seed: WeightedRandomSampler([1.0, 2.0, 3.0, 0.0] * 6, 30, generator=seeded(seed)),
        lambda seed: SubsetRandomSampler(range(3, 40, 2), generator=seeded(seed)),
        lambda seed: RandomSampler(range(25), generator=seeded(seed)),
        lambda seed: RandomSampler(range(25), replacement=True, num_samples=11, generator=seeded(seed)),
    ],
    ids=["weighted", "subset", "shuffled", "replacement"],
)
def test_a_sampler_of_the_users_is_the_source_of_the_order(source):
    def make(seed=1):
        return ResizableLoader(DataLoader(Numbers(40), batch_size=4, sampler=source(seed)))

    def indices(loader):
        return [index for part, _ in delivered(loader) for index in part]

    loader, before = make(), torch.get_rng_state()
    epochs = [indices(loader), indices(loader)]
    assert torch.equal(torch.get_rng_state(), before)
    assert len(epochs[0]) == len(source(0))
    assert set(epochs[0]) <= set(range(40))
    assert epochs[0] != epochs[1]
    torch.manual_seed(123)  # neither the global state nor what was drawn before has a say
    again = make()
    again.set_epoch(1)
    for _ in zip(range(2), again, strict=False):
        pass
    resumed = make()
    resumed.load_state_dict(again.state_dict())
    assert indices(resumed) == epochs[1][8:]
    assert indices(make(seed=2)) != epochs[0]


def test_a_distributed_sampler_gives_rank_and_seed():
    found = []
    for rank in range(2):
        given = DistributedSampler(Numbers(21), num_replicas=2, rank=rank, seed=5)
        loader = ResizableLoader(DataLoader(Numbers(21), batch_size=4, sampler=given))
        assert loader.plan == Plan(4, 1, 2)
        found.append([indices for indices, _ in delivered(loader)])
    together = [index for parts in zip(*found, strict=True) for part in parts for index in part]
    assert together == order_of(21, seed=5)  # unpadded: 4 + 4, 4 + 4, 3 + 2
    assert [len(part) for part in found[1]] == [4, 4, 2]


def test_the_loaders_own_settings_are_kept():
    class Own(DataLoader):
        pass

    def collate(samples):
        return samples

    def set_up(worker):
        pass

    given = Own(
        Numbers(8),
        batch_size=2,
        collate_fn=collate,
        num_workers=1,
        prefetch_factor=3,
        worker_init_fn=set_up,
        timeout=7,
        generator=seeded(1),
        multiprocessing_context="fork",
    )
    kept = ResizableLoader(given)
    assert kept.dataset is given.dataset
    assert type(kept._loader) is Own
    for name in ("collate_fn", "num_workers", "prefetch_factor", "worker_init_fn", "timeout", "generator", "pin_memory"):
        assert getattr(kept._loader, name) is getattr(given, name)
    assert [indices for indices, _ in delivered(kept)] == list(given)  # and the given one still works


class OwnIteration(DataLoader):
    def __iter__(self):
        return super().__iter__()


@pytest.mark.parametrize(
    ("loader", "cause"),
    [
        (lambda: DataLoader(Stream(8), batch_size=2), "iterable data set"),
        (lambda: DataLoader(Numbers(8), batch_sampler=[[0, 1], [2]]), "come from a list"),
        (lambda: DataLoader(Numbers(8), batch_size=None), "the data set itself"),
        (lambda: OwnIteration(Numbers(8)), "a way of its own"),
        (lambda: [1, 2], "a list is no DataLoader"),
    ],
)
def test_loaders_that_cannot_be_resized_are_refused(loader, cause):
    with pytest.raises(LoaderError, match=cause):
        ResizableLoader(loader())


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (lambda: ResizableBatchSampler(0, 1), "0 samples"),
        (lambda: ResizableBatchSampler(2, 3, world_size=3), "2 samples cannot be shared out to 3"),
        (lambda: ResizableBatchSampler(9, 4, world_size=3), "a batch of 4 cannot be shared out to 3"),
        (lambda: ResizableBatchSampler(9, 0), "a batch of 0"),
        (lambda: ResizableBatchSampler(9, Plan(2, 1, 2)), "is for 2 rank"),
        (lambda: ResizableBatchSampler(9, 10, drop_last=True), "an epoch would be empty"),
        (lambda: ResizableBatchSampler(9, 3).resize(Plan(1, 1, 3)), "is for 3 rank"),
        (lambda: ResizableBatchSampler(9, 2, rank=1), "rank 1 of 1"),
        (lambda: ResizableBatchSampler(DistributedSampler(Numbers(8), 2, 0), 2), "Pass the number of samples"),
        (lambda: ResizableBatchSampler((i for i in range(3)), 2), "has no length"),
        (lambda: ResizableBatchSampler(9, 2).load_state_dict(ResizableBatchSampler(8, 2).state_dict()), "num_samples = 8"),
    ],
)
def test_what_cannot_be_is_refused_with_the_numbers(make, cause):
    with pytest.raises(ValueError, match=cause):
        make()


def test_a_batch_larger_than_the_data_is_one_group():
    assert list(ResizableBatchSampler(5, Plan(4, 8), shuffle=False)) == [[0, 1], [2, 3, 4]]


def test_as_a_batch_sampler_every_sample_comes_once():
    """Late by what was prefetched, but with ``drop_last`` as well."""
    sampler = ResizableBatchSampler(50, 4, drop_last=True)
    loader, found = DataLoader(Numbers(50), batch_sampler=sampler), []
    for batch in loader:
        found.append(batch.tolist())
        if len(found) == 2:
            sampler.resize(10)
    assert [len(part) for part in found] == [4, 4, 10, 10, 10, 10]
    assert [index for part in found for index in part] == order_of(50)[:48]


def test_iterable_data_grow_by_accumulation():
    loader = AccumulatingLoader(DataLoader(Stream(23), batch_size=3, num_workers=2, persistent_workers=True), Plan(3, 2))
    found = delivered(loader, {1: Plan(3, 3)})  # in the middle of a group: the next one has 3
    assert sorted(index for part, _ in found for index in part) == list(range(23))
    assert [(micro_batch.num_samples, micro_batch.is_last) for _, micro_batch in found] == [
        *[(3, False), (3, True)],
        *[(3, False), (3, False), (3, True)],
        *[(3, False), (3, False), (2, True)],
    ]
    assert {micro_batch.group_samples for _, micro_batch in found} == {None}
    with pytest.raises(ValueError, match="only the accumulation can change"):
        loader.resize(Plan(4, 2))


@pytest.mark.parametrize("num_samples", [1, 12, 13])
def test_the_tail_of_a_stream_is_a_smaller_group(num_samples):
    loader = AccumulatingLoader(DataLoader(Stream(num_samples), batch_size=2), Plan(2, 3))
    ends = [micro_batch.is_last for _, micro_batch in delivered(loader)]
    assert ends == [number % 3 == 2 or number == len(ends) - 1 for number in range(-(-num_samples // 2))]


def test_a_stream_resumes_after_any_batch():
    def make():
        return AccumulatingLoader(DataLoader(Stream(17), batch_size=2), Plan(2, 2))

    changes = {0: {3: Plan(2, 3)}, 1: {2: Plan(2, 1)}}
    whole = run(make(), changes)
    assert whole[1][0][0] == [1000, 1001]  # the data set was told the epoch
    for stop in range(1, len(whole[0]) + 1):
        first = make()
        for count, _ in enumerate(first, 1):
            if plan := changes[0].get(count):
                first.resize(plan)
            if count == stop:
                break
        again = make()
        again.load_state_dict(json.loads(json.dumps(first.state_dict())))
        again.set_epoch(0)
        assert delivered(again, changes[0], count=stop) == whole[0][stop:]
        assert delivered(again, changes[1]) == whole[1]


def test_any_iterable_of_batches_accumulates_and_counts_what_it_is_told():
    batches = [{"labels": torch.zeros(size)} for size in (4, 4, 1)]
    loader = AccumulatingLoader(batches, Plan(4, 2), count=lambda batch: 10.0 * len(batch["labels"]))
    assert [loader.micro_batch for _ in loader] == [
        MicroBatch(40.0, None, False),
        MicroBatch(40.0, None, True),
        MicroBatch(10.0, None, True),
    ]
    with pytest.raises(LoaderError, match="no batch at all"):
        delivered(AccumulatingLoader([], Plan(4, 2)))
    with pytest.raises(LoaderError, match="iterated only once"):
        AccumulatingLoader(iter(batches), Plan(4, 2))
    with pytest.raises(LoaderError, match="pass count="):
        delivered(AccumulatingLoader(["text"], Plan(4, 2)))


def test_a_stream_ends_on_every_rank_when_one_has_no_more():
    asked = []

    def all_ranks(mine):
        asked.append(mine)
        return mine and len(asked) <= 2  # the other rank has two groups

    loader = AccumulatingLoader([torch.zeros(2)] * 9, Plan(2, 3), all_ranks=all_ranks)
    assert len(delivered(loader)) == 6
    assert asked == [True] * 3


def test_batches_of_tensors_are_what_the_loader_collates():
    x, y = torch.randn(10, 3), torch.arange(10)
    loader = ResizableLoader(DataLoader(TensorDataset(x, y), batch_sampler=BatchSampler(RandomSampler(x), 4, False)))
    for inputs, targets in loader:
        assert torch.equal(inputs, x[targets])
