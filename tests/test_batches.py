"""What a loader may be, and that every pass sees the same samples and leaves the loader as it was."""

import dataclasses
import random
import types
import warnings
from collections import OrderedDict, UserDict, namedtuple

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Subset, TensorDataset

from oracles import preserved_rng
from sharpness_plugins import memory
from sharpness_plugins.batches import count_samples, map_tensors, tensors_of
from sharpness_plugins.errors import LoaderError, MeasurementWarning
from sharpness_plugins.memory import MemoryBudget
from sharpness_plugins.source import BatchSource

CPU = torch.device("cpu")
Pair = namedtuple("Pair", "x y")


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    y: torch.Tensor
    note: str = "kept"
    derived: int = dataclasses.field(init=False, default=3)

    def __post_init__(self):
        if not isinstance(self.x, torch.Tensor):
            raise TypeError("not built anew from anything else")


class Graph:
    """A batch of its own kind: it knows how to move, in place."""

    def __init__(self, x, num_graphs=None):
        self.x = x
        if num_graphs is not None:
            self.num_graphs = num_graphs
        self.device = None

    def to(self, device):
        self.device = device
        self.x = self.x.to(device)
        return self


def loaded(loader, **settings):
    source = BatchSource(loader, device=CPU, **settings)
    with preserved_rng(CPU, source.holders):
        source.load()
    return source


def read(source):
    with preserved_rng(CPU, source.holders):
        return list(source)


def values(source):
    """All numbers of a pass, in order."""
    return torch.cat([t.reshape(-1) for batch in read(source) for t in tensors_of(batch.data)]).tolist()


def numbered(num_samples=10):
    return TensorDataset(torch.arange(float(num_samples)), torch.arange(num_samples))


# ---------------------------------------------------------------- trees


def trees():
    from transformers import BatchEncoding

    x, y = torch.arange(6.0).view(3, 2), torch.arange(3)
    return [
        (x, y),
        [x, y],
        {"x": x, "y": y},
        OrderedDict(x=x, y=y),
        UserDict(x=x, y=y),
        types.MappingProxyType({"x": x, "y": y}),
        BatchEncoding({"x": x, "y": y}),
        Pair(x, y),
        Frozen(x, y),
        ((x, {"more": [x]}), y),
        (x, None, "text", 3, y),
        ([], {}, x, y),
    ]


@pytest.mark.parametrize("tree", trees(), ids=lambda tree: type(tree).__name__)
def test_a_tree_keeps_its_kind_and_its_other_leaves(tree):
    before = [tensor.clone() for tensor in tensors_of(tree)]
    doubled = map_tensors(tree, lambda tensor: 2 * tensor)
    if not isinstance(tree, types.MappingProxyType):  # which cannot be copied
        assert type(doubled) is type(tree)
    assert all(torch.equal(2 * a, b) for a, b in zip(before, tensors_of(doubled), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(tree), strict=True))
    assert count_samples(tree) == 3
    source = loaded([tree])
    assert source.num_samples == 3
    assert [b.num_samples for b in read(source)] == [3]


def test_other_leaves_are_kept_as_they_are():
    assert map_tensors((torch.ones(1), None, "text", 3.5), torch.neg)[1:] == (None, "text", 3.5)
    assert map_tensors(Frozen(torch.ones(1), torch.ones(1), "mine"), torch.neg).note == "mine"


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        ((torch.zeros(7, 4, 3), torch.zeros(4)), 4),  # time-major inputs: the targets tell
        ({"labels": torch.zeros(4), "priors": torch.zeros(9)}, 4),
        ({"x": torch.zeros(4, 2), "label": None}, 4),
        ((torch.zeros(4, 2), torch.tensor(1.0)), 4),
        (torch.tensor(1.0), None),
        ("text", None),
        (None, None),
        (torch.zeros(0, 3), 0),
        (Graph(torch.zeros(12, 3), num_graphs=4), 4),
        (Graph(torch.zeros(12, 3)), 12),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else type(value).__name__,
)
def test_number_of_samples(batch, count):
    assert count_samples(batch) == count


# ---------------------------------------------------------------- what is no loader


def generator():
    yield torch.zeros(2)


@pytest.mark.parametrize(
    ("loader", "says"),
    [
        (
            generator(),
            r"iterated only once \(got a generator\).*Pass a DataLoader, or list\(loader\) if it fits in memory\.",
        ),
        (iter([torch.zeros(2)]), r"only once \(got a list_iterator\)"),
        (zip([1], [2], strict=True), r"only once \(got a zip\)"),
        (numbered(), r"data set \(TensorDataset\).*DataLoader\(dataset"),
        ((torch.zeros(4, 2), torch.zeros(4)), "pair of tensors.*\\[\\(x, y\\)\\]"),
        ((np.zeros((4, 2)), np.zeros(4)), "pair of tensors"),
        (torch.zeros(4, 2), "got a Tensor"),
        (np.zeros((4, 2)), "got a ndarray"),
        ({"x": torch.zeros(4)}, "got a dict.*\\[batch\\]"),
        ("text", "got a str"),
        (None, "got a NoneType"),
        (lambda: None, "got a function"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_loader_is_refused_with_what_to_do(loader, says):
    with pytest.raises(LoaderError, match=says):
        BatchSource(loader, device=CPU)


@pytest.mark.parametrize(
    "loader",
    [[], (), DataLoader(TensorDataset(torch.zeros(0, 2))), [torch.zeros(0, 3)]],
    ids=["list", "tuple", "no samples", "an empty batch"],
)
def test_empty_loaders_are_refused(loader):
    with pytest.raises(LoaderError, match="empty"):
        loaded(loader)


@pytest.mark.parametrize("settings", [{"max_samples": 0}, {"max_samples": -1}, {"cache_bytes": -1}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        BatchSource([torch.zeros(2)], device=CPU, **settings)


# ---------------------------------------------------------------- the same samples at every pass


@pytest.mark.parametrize("cache_bytes", [0, None])
def test_shuffling_without_dropping_is_no_change(cache_bytes):
    source = loaded(DataLoader(numbered(), batch_size=3, shuffle=True), cache_bytes=cache_bytes)
    assert source.notes == []
    assert values(source) == values(source)
    assert sorted(values(source)) == sorted([*range(10)] * 2)
    assert (source.num_samples, source.num_batches, source.cached) == (10, 4, cache_bytes is None)


@pytest.mark.parametrize("cache_bytes", [0, None])
def test_shuffling_with_dropping_is_said_and_passes_repeat(cache_bytes):
    with pytest.warns(MeasurementWarning, match=r"other data on another pass.*shuffling with drop_last"):
        source = loaded(DataLoader(numbered(), batch_size=4, shuffle=True, drop_last=True), cache_bytes=cache_bytes)
    (note,) = source.notes
    assert ("the first pass was kept" if cache_bytes is None else "every pass repeats the same random seed") in note
    assert values(source) == values(source)
    assert source.num_samples == 8


class Images(Dataset):
    """Images of which some are flipped, by a random number from the place named."""

    def __init__(self, source):
        self.source = source
        self.images = torch.arange(8 * 12.0).view(8, 1, 3, 4)
        self.transform = types.SimpleNamespace(
            numpy=np.random.default_rng(0),
            torch=torch.Generator().manual_seed(0),
            python=random.Random(0),
            legacy=np.random.RandomState(0),
        )

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index]
        draw = {
            "torch": lambda: torch.rand(()).item(),
            "numpy": np.random.rand,
            "python": random.random,
            "own torch": lambda: torch.rand((), generator=self.transform.torch).item(),
            "own numpy": self.transform.numpy.random,
            "own python": self.transform.python.random,
            "own legacy": self.transform.legacy.rand,
        }[self.source]
        return image.flip(-1) if draw() < 0.5 else image


@pytest.mark.parametrize("cache_bytes", [0, None])
@pytest.mark.parametrize("source", ["torch", "numpy", "python", "own torch", "own numpy", "own python", "own legacy"])
def test_random_flips_are_said_and_passes_repeat(source, cache_bytes):
    with pytest.warns(MeasurementWarning, match="random augmentation"):
        read_twice = loaded(DataLoader(Subset(Images(source), range(8)), batch_size=3), cache_bytes=cache_bytes)
    first = values(read_twice)
    random.random(), torch.rand(1), np.random.rand()  # noqa: NPY002
    assert values(read_twice) == first
    assert len(read_twice.notes) == 1


@pytest.mark.parametrize("source", ["own torch", "own numpy", "own python", "own legacy"])
def test_generators_inside_the_data_set_are_left_in_their_state(source):
    dataset, untouched = Images(source), Images(source)
    dataset[0], untouched[0]
    with pytest.warns(MeasurementWarning):
        values(loaded(DataLoader(Subset(dataset, range(8)), batch_size=3), cache_bytes=0))
    assert torch.equal(torch.stack([*dataset]), torch.stack([*untouched]))


@pytest.mark.parametrize("replacement", [False, True])
def test_a_loader_with_its_own_generator_is_left_in_its_state(replacement):
    def make():
        sampler = RandomSampler(numbered(), replacement=replacement, generator=torch.Generator().manual_seed(4))
        return DataLoader(numbered(), batch_size=3, sampler=sampler, generator=torch.Generator().manual_seed(5))

    measured, untouched = make(), make()
    global_before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MeasurementWarning)  # sampling with replacement gives other samples
        source = loaded(measured, cache_bytes=0)
    assert values(source) == values(source)
    assert torch.equal(torch.get_rng_state(), global_before)
    assert torch.equal(measured.generator.get_state(), untouched.generator.get_state())
    torch.manual_seed(0)
    after = [x.tolist() for x, _ in measured]
    torch.manual_seed(0)
    assert after == [x.tolist() for x, _ in untouched]


def test_missing_values_do_not_hide_a_change():
    class Jumping(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return torch.tensor([float("nan"), float("inf"), torch.rand(()).item()])

    with pytest.warns(MeasurementWarning, match="other data"):
        loaded(DataLoader(Jumping(), batch_size=2))


def test_odd_tensors_can_be_compared_between_passes():
    class Odd:
        def __iter__(self):
            yield (
                torch.ones(2, 3, dtype=torch.complex64),
                torch.zeros(2, 0),
                torch.eye(2).to_sparse(),
                torch.tensor(1.0),
                torch.tensor([True, False]),
                torch.ones(2, 3, dtype=torch.bfloat16),
                torch.full((2,), 2**62),
            )

    assert loaded(Odd()).notes == []
    assert loaded(Odd(), cache_bytes=0).num_samples == 2


def test_large_images_in_another_grouping_are_the_same():
    images = TensorDataset(torch.rand(20, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert loaded(DataLoader(images, batch_size=7, shuffle=True)).notes == []


class Stream(IterableDataset):
    """Samples that are gone once they are read."""

    def __init__(self, num_samples):
        self.samples = iter(torch.arange(float(num_samples)))

    def __iter__(self):
        return self.samples


def test_a_stream_is_kept_on_its_only_pass_and_this_is_said():
    source = loaded(DataLoader(Stream(10), batch_size=4))
    assert source.notes == ["the loader can be read only once; the batches of that pass were kept and used"]
    assert values(source) == [*range(10)] == values(source)


def test_a_stream_that_cannot_be_kept_is_refused():
    with pytest.raises(LoaderError, match=r"3 batches on the first pass and none on the second.*raise cache_bytes"):
        loaded(DataLoader(Stream(10), batch_size=4), cache_bytes=0)


@pytest.mark.parametrize("cache_bytes", [0, None])
def test_a_loader_that_gives_fewer_samples_the_second_time_is_said(cache_bytes):
    class Shrinking:
        size = 9

        def __iter__(self):
            self.size -= 1
            return iter([torch.ones(self.size)])

    with pytest.warns(MeasurementWarning, match="8 samples on the first pass and 7 on another"):
        source = loaded(Shrinking(), cache_bytes=cache_bytes)
    if cache_bytes is None:
        assert len(values(source)) == 8
    else:
        with pytest.warns(MeasurementWarning, match="changes between passes even with the same seed"):
            values(source)


def test_a_loader_that_runs_dry_later_is_an_error():
    class Dry:
        passes = 2

        def __iter__(self):
            self.passes -= 1
            return iter([torch.ones(2)] if self.passes >= 0 else [])

    source = loaded(Dry(), cache_bytes=0)
    with pytest.raises(LoaderError, match="none now"):
        read(source)


def test_a_loader_that_reuses_its_memory_is_cached_in_copies():
    class Reusing:
        def __init__(self):
            self.buffer = torch.empty(2)

        def __iter__(self):
            for position in range(3):
                yield self.buffer.fill_(position)

    assert values(loaded(Reusing())) == [0, 0, 1, 1, 2, 2]


# ---------------------------------------------------------------- workers


FORK = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # Python 3.12 on threads beside workers


@FORK
@pytest.mark.parametrize("persistent", [False, True])
def test_a_training_loop_in_the_middle_of_an_epoch_sees_every_sample_once(persistent):
    training = DataLoader(
        numbered(12), batch_size=2, shuffle=True, num_workers=1, persistent_workers=persistent, prefetch_factor=1
    )
    epoch = iter(training)
    seen = [next(epoch)[0]]
    source = loaded(training, cache_bytes=0)
    assert sorted(values(source)) == sorted([*range(12)] * 2)
    seen.extend(x for x, _ in epoch)
    assert sorted(torch.cat(seen).tolist()) == [*range(12)]
    assert training.persistent_workers is persistent


class Wrapper:
    """A loader around a loader, as prefetchers are."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return ((x + 100,) for x, _ in self.loader)


class Shifting(DataLoader):
    def __iter__(self):
        return ((x + 100,) for x, _ in super().__iter__())


@FORK
@pytest.mark.parametrize("kind", ["wrapper", "subclass"])
def test_wrappers_and_subclasses_keep_what_they_do_with_workers_of_their_own(kind):
    settings = {"batch_size": 2, "num_workers": 1, "persistent_workers": True}
    inner = (Shifting if kind == "subclass" else DataLoader)(numbered(4), **settings)
    training = Wrapper(inner) if kind == "wrapper" else inner
    epoch = iter(training)
    seen = [*next(epoch)]
    assert values(loaded(training, cache_bytes=0)) == [100, 101, 102, 103]
    seen.extend(x for (x,) in epoch)
    assert torch.cat(seen).tolist() == [100, 101, 102, 103]


# ---------------------------------------------------------------- memory, cutting, moving


@pytest.mark.parametrize(("cache_bytes", "cached"), [(0, False), (79, False), (80, True), (81, True)])
def test_the_cache_keeps_all_or_nothing(cache_bytes, cached):
    source = loaded([torch.ones(5), torch.zeros(10), torch.ones(5)], cache_bytes=cache_bytes)
    assert source.cached is cached
    assert values(source) == [1.0] * 5 + [0.0] * 10 + [1.0] * 5


def test_batches_that_move_themselves_count_against_the_cache():
    assert not loaded([Graph(torch.ones(100))], cache_bytes=399).cached
    assert loaded([Graph(torch.ones(100))], cache_bytes=400).cached


def test_the_default_cache_is_a_part_of_the_free_memory():
    free = memory.free_bytes(CPU)
    assert free is None or free > 2**20
    assert 0 < BatchSource([torch.zeros(1)], device=CPU).budget <= 4 * 2**30


@pytest.fixture
def system(tmp_path, monkeypatch):
    """48 million bytes and a few available, no control groups, one rank."""
    (tmp_path / "meminfo").write_text("MemTotal:  64000 kB\nMemFree:     10 kB\nMemAvailable:   48000 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "_OWN_CGROUPS", tmp_path / "own")
    for name in memory._RANKS_HERE:
        monkeypatch.delenv(name, raising=False)
    return tmp_path


AVAILABLE = 48000 * 1024


def test_free_memory_is_what_the_system_calls_available(system):
    assert memory.free_bytes(CPU) == AVAILABLE
    assert memory.free_bytes(torch.device("meta")) is None


def control_group(folder, version: int, limit: object, used: int, cached: int) -> None:
    names = ("memory.max", "memory.current", "inactive_file") if version == 2 else VERSION_ONE
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used - cached}\n{names[2]} {cached}\nslab 7\n")


VERSION_ONE = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
NO_LIMIT = {1: 9223372036854771712, 2: "max"}
OWN = {1: "12:cpuset:/\n5:hugetlb,memory:/docker/abc\n1:name=systemd:/\n", 2: "0::/docker/abc\n"}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ({"docker/abc": (30_000_000, 11_000_000, 1_000_000)}, 20_000_000),
        ({"docker/abc": (90_000_000, 11_000_000, 1_000_000)}, AVAILABLE),  # the host has less
        ({"docker/abc": (None, 11_000_000, 0)}, AVAILABLE),
        ({"docker/abc": (None, 5, 0), "docker": (7_000_000, 2_000_000, 0)}, 5_000_000),  # of the group around it
        ({"": (6_000_000, 2_000_000, 0)}, 4_000_000),  # a container that sees itself at the root
        ({"docker/abc": (6_000_000, 6_500_000, 0)}, 0),
        ({}, AVAILABLE),
    ],
)
def test_free_memory_is_what_the_limit_of_a_container_leaves(system, version, groups, expected):
    (system / "own").write_text(OWN[version])
    root = system / "cgroup" / ("memory" if version == 1 else "")
    for path, (limit, used, cached) in groups.items():
        control_group(root / path, version, NO_LIMIT[version] if limit is None else limit, used, cached)
    control_group(system / "cgroup" / "elsewhere", version, 1, 0, 0)
    assert memory.free_bytes(CPU) == expected


def test_a_host_with_both_versions_has_the_second_beside_the_first(system):
    (system / "own").write_text(OWN[1] + OWN[2])
    control_group(system / "cgroup" / "unified" / "docker" / "abc", 2, 3_000_000, 0, 0)
    control_group(system / "cgroup" / "memory" / "docker" / "abc", 1, 9_000_000, 0, 0)
    assert memory.free_bytes(CPU) == 3_000_000


@pytest.mark.parametrize(
    ("size", "environment", "parts"),
    [
        (1, {"LOCAL_WORLD_SIZE": "4"}, 1),  # left over from who started this process
        (8, {"LOCAL_WORLD_SIZE": "4"}, 4),
        (8, {"SLURM_NTASKS_PER_NODE": "2"}, 2),
        (8, {"LOCAL_WORLD_SIZE": "nonsense", "OMPI_COMM_WORLD_LOCAL_SIZE": "0", "MPI_LOCALNRANKS": "2"}, 2),
        (3, {"LOCAL_WORLD_SIZE": "4"}, 3),
        (3, {}, 3),
    ],
)
def test_free_memory_of_a_host_is_shared_by_the_ranks_on_it(system, monkeypatch, size, environment, parts):
    monkeypatch.setattr(memory.distributed, "world_size", lambda: size)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert memory.free_bytes(CPU) == AVAILABLE // parts
    assert MemoryBudget(None, device=CPU, vector_bytes=1).total == AVAILABLE // parts // 2
    assert MemoryBudget("1MB", device=CPU, vector_bytes=1).total == 1_000_000  # what is asked for is for each rank


@pytest.mark.parametrize("max_samples", [1, 3, 5, 6, 7, 10, 99])
@pytest.mark.parametrize("cache_bytes", [0, None])
def test_max_samples_cuts_inside_a_batch(max_samples, cache_bytes):
    loader = [(torch.arange(3.0), torch.arange(3)), (torch.arange(3.0, 10.0), torch.arange(3, 10))]
    source = loaded(loader, max_samples=max_samples, cache_bytes=cache_bytes)
    batches = read(source)
    assert torch.cat([batch.data[0] for batch in batches]).tolist() == [*range(min(max_samples, 10))]
    assert torch.cat([batch.data[1] for batch in batches]).tolist() == [*range(min(max_samples, 10))]
    assert sum(batch.num_samples for batch in batches) == source.num_samples == min(max_samples, 10)
    assert len(batches) == source.num_batches


def test_cutting_leaves_alone_what_has_no_samples_and_cuts_lists_beside_them():
    batch = {"text": ["a", "b", "c"], "ids": (1, 2, 3), "prior": torch.zeros(5), "x": torch.arange(3), "name": "abc", "k": 1}
    (cut,) = read(loaded([batch], max_samples=2))
    assert cut.data["text"] == ["a", "b"]
    assert cut.data["ids"] == (1, 2)
    assert cut.data["x"].tolist() == [0, 1]
    assert len(cut.data["prior"]) == 5
    assert (cut.data["name"], cut.data["k"]) == ("abc", 1)
    assert len(batch["text"]) == 3
    (pair,) = read(loaded([[torch.zeros(2), torch.ones(2)]], max_samples=1))
    assert [t.tolist() for t in pair.data] == [[0.0], [1.0]]  # a pair of tensors is no list of two samples


def test_max_samples_stops_an_endless_loader():
    class Endless:
        def __iter__(self):
            while True:
                yield torch.ones(3)

    assert loaded(Endless(), max_samples=7).num_samples == 7


def test_batches_without_samples_are_passed_over():
    assert [len(batch.data) for batch in read(loaded([torch.ones(2), torch.ones(0), torch.ones(1)]))] == [2, 1]


@pytest.mark.parametrize("upcast", [True, False])
def test_half_precision_inputs_go_with_the_weights(upcast):
    (batch,) = read(loaded([(torch.ones(2, dtype=torch.float16), torch.ones(2, dtype=torch.int8))], upcast_half=upcast))
    assert batch.data[0].dtype == (torch.float32 if upcast else torch.float16)
    assert batch.data[1].dtype == torch.int8


def test_numpy_arrays_become_tensors_with_contents_of_their_own():
    x = np.arange(6.0).reshape(3, 2)[::-1].astype(">f4")
    y = np.array([1, 0, 1])
    y.flags.writeable = False
    text = np.array(["a", "b", "c"])
    source = loaded([(x, y, text)])
    (batch,) = read(source)
    assert torch.equal(batch.data[0], torch.tensor([[4.0, 5.0], [2.0, 3.0], [0.0, 1.0]]))
    assert torch.equal(batch.data[1], torch.tensor([1, 0, 1]))
    assert batch.data[2] is text
    assert source.num_samples == 3
    batch.data[0].zero_()
    assert x.any()


def test_tensors_made_in_inference_mode_can_carry_gradients():
    with torch.inference_mode():
        x = torch.ones(2)
    (batch,) = read(loaded([x]))
    assert not batch.data.is_inference()


def test_batches_of_their_own_kind_move_themselves_in_copies():
    graph = Graph(torch.ones(4), num_graphs=2)
    source = loaded([graph, (Graph(torch.ones(2)), torch.ones(2))])
    first, second = read(source)
    assert first.data.device == CPU
    assert second.data[0].device == CPU
    assert graph.device is None
    assert source.num_samples == 4


def test_packed_sequences_stay_packed():
    packed = pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])
    (batch,) = read(loaded([(packed, torch.tensor([0, 1]))]))
    assert isinstance(batch.data[0], PackedSequence)
    assert torch.equal(batch.data[0].batch_sizes, packed.batch_sizes)
    assert batch.num_samples == 2


def test_batches_whose_samples_cannot_be_counted_are_said():
    source = loaded([torch.tensor(1.0), torch.tensor(2.0)])
    assert source.num_samples == 0
    assert "all batches weigh the same" in source.notes[0]
    assert loaded([torch.tensor(1.0)]).notes == []


# ---------------------------------------------------------------- odd loaders


class BySubscript:
    """The old protocol of iteration."""

    def __getitem__(self, index):
        return [torch.zeros(2), torch.ones(1)][index]


class Liar:
    def __len__(self):
        return 17

    def __iter__(self):
        return iter([torch.zeros(2), torch.ones(1)])


@pytest.mark.parametrize("loader", [BySubscript(), Liar(), (torch.zeros(2), torch.zeros(2), torch.zeros(2))[:1]])
@pytest.mark.parametrize("cache_bytes", [0, None])
def test_odd_loaders_are_read_to_their_end(loader, cache_bytes):
    source = loaded(loader, cache_bytes=cache_bytes)
    assert source.notes == []
    assert len(values(source)) == source.num_samples == sum(len(batch) for batch in loader)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_pass_restores_the_random_state_and_can_be_repeated(error):
    class Interrupted:
        fails = True

        def __iter__(self):
            yield torch.rand(2)
            if self.fails:
                raise error

    loader = Interrupted()
    before = torch.get_rng_state()
    with pytest.raises(error):
        loaded(loader)
    assert torch.equal(torch.get_rng_state(), before)
    loader.fails = False
    with pytest.warns(MeasurementWarning, match="random augmentation"):
        source = loaded(loader, cache_bytes=0)
    assert values(source) == values(source)
