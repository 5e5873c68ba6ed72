"""Random text, batches, orders and checkpoints: what is documented happens, and nothing else."""

from __future__ import annotations

import io
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

import fuzzing
from fuzzing import QUICK
from sharpness_plugins import (
    DuplicateNameError,
    LossRuleError,
    MetricSpec,
    UnknownNameError,
    available_metrics,
    get_metric,
    get_schedule,
)
from sharpness_plugins.batches import Batch, count_samples, map_tensors, rows_of, tensors_of, thinned
from sharpness_plugins.cli import CommandError, load_checkpoint
from sharpness_plugins.losses import resolve_loss
from sharpness_plugins.registry import fresh_registry, schedule_factories
from sharpness_plugins.samplers import ResizableBatchSampler
from sharpness_plugins.schedules import Duration, Plan, parse_schedule
from sharpness_plugins.testing import check_schedule
from sharpness_plugins.texts import name_and_settings

# --- text

PIECES = st.sampled_from(
    [
        *(
            "0:",
            "256",
            " ",
            "40ep",
            "1e9",
            "K",
            "tokens",
            "double(",
            "cap(",
            ")",
            ",",
            "every=",
            "'10ep'",
            "[",
            "{",
            "*",
            "-",
        ),
        *("9" * 5000, "(" * 300, "-" * 3000 + "1", "__import__('os')", "lambda: 0", "\x00", "²", "max(1, 2)", "fixed(1)"),
        *("f'{1}'", ":", "=", "ü"),
    ]
)
TEXTS = st.text(max_size=20) | st.lists(PIECES, max_size=8).map("".join)


@QUICK
@given(TEXTS)
def test_any_text_is_a_schedule_or_refused_in_words(text):
    try:
        schedule = parse_schedule(text)
    except (ValueError, TypeError) as error:
        assert str(error)
    else:
        assert parse_schedule(repr(schedule), schedule_factories()) == schedule
        assert schedule.initial().batch_size >= 1


TIMES = st.sampled_from(["1ep", "0.25ep", "10 steps", "300", "5K tokens"])
SIZES = st.integers(1, 40)
LEAVES = st.one_of(
    st.builds("fixed({})".format, SIZES),
    st.builds(lambda a, b, at: f"warm_start({a}, {a + b}, {at!r})", SIZES, SIZES, TIMES),
    st.builds(lambda a, b, every: f"double({a}, {every!r}, {a + b})", SIZES, SIZES, TIMES),
    st.builds(lambda a, b: f"from_learning_rate({a}, {a + b}, smallest_change=1.5)", SIZES, SIZES),
    st.builds(lambda a, b, wait: f"noise_scale({a}, {a + b}, min_wait={wait!r})", SIZES, SIZES, TIMES),
    st.builds(lambda a, b: f"sharpness_switch({a}, {a + b}, deadline='90 steps', every='2 steps', window=1)", SIZES, SIZES),
)
SCHEDULE_TEXTS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds("max({}, {})".format, inner, inner),
        st.builds("min({}, {})".format, inner, inner),
        st.builds("cap({}, {})".format, inner, SIZES),
        st.builds("hold({}, {})".format, inner, st.integers(1, 20)),
        st.builds("monotone({})".format, inner),
        st.builds("then({}, {!r}, {})".format, inner, TIMES, inner),
    ),
    max_leaves=4,
)


@fuzzing.settings(QUICK, max_examples=12)
@given(SCHEDULE_TEXTS)
def test_schedules_of_schedules_conform(text):
    try:
        schedule = parse_schedule(text)
    except ValueError as error:  # rules or cadences that disagree, which is said
        assert "want different learning-rate rules" in str(error) or "use one unit" in str(error)
        return
    assert check_schedule(schedule).passed


@QUICK
@given(TEXTS)
def test_any_text_is_a_duration_or_refused_in_words(text):
    try:
        duration = Duration.parse(text)
    except ValueError as error:
        assert "is not a duration" in str(error)
    else:
        assert Duration.parse(str(duration)) == duration


SETTINGS = st.lists(
    st.sampled_from(["epsilon_box", ":", "k", "=", ",", "5e-4", "(1, 2)", "[", "]", "{", "}", "None", "'", '"', "{[]: 1}"])
    | PIECES,
    max_size=9,
).map("".join)


@QUICK
@given(SETTINGS)
def test_any_text_is_a_name_with_settings_or_refused_in_words(text):
    try:
        name, settings = name_and_settings(text)
    except ValueError as error:
        assert "is not KEY=VALUE" in str(error)
    else:
        assert name == name.strip()
        assert all(key.isidentifier() for key in settings)


PLAIN = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text("abc, )(]'\"\\", max_size=4),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text("ab"), inner, max_size=2),
    ),
    max_leaves=5,
)


@QUICK
@given(st.dictionaries(st.sampled_from(["k", "tolerance", "starts"]), PLAIN, max_size=3))
def test_settings_come_back_from_the_text_that_python_writes_of_them(settings):
    text = "some_metric:" + ",".join(f"{key}={value!r}" for key, value in settings.items())
    assert name_and_settings(text) == (("some_metric", settings) if settings else ("some_metric:", {}))


# --- names

ODD_NAMES = st.text(max_size=12) | st.sampled_from(["epsilon_box", "builtin:epsilon_box", ":", "builtin:", "*", "["])


@QUICK
@given(ODD_NAMES)
def test_any_name_is_offered_or_unknown(name):
    for get in (get_metric, get_schedule):
        try:
            get(name)
        except (UnknownNameError, DuplicateNameError) as error:
            assert repr(name) in str(error)
        except TypeError as error:  # a schedule without its settings
            assert "needs" in str(error)
    assert isinstance(available_metrics(name), dict)


@QUICK
@given(st.text(max_size=12))
def test_a_name_of_a_plugin_is_an_identifier_or_refused_and_then_found(name):
    with fresh_registry() as registry:
        try:
            spec = MetricSpec(name, lambda: print)
        except ValueError as error:
            assert "is not an identifier" in str(error)
            assert not name.isidentifier()
            return
        assert name.isidentifier()
        registry.register(spec)
        assert name in available_metrics()
        assert get_metric(name) is print


@QUICK
@given(st.text(max_size=30), st.text(max_size=30))
def test_what_the_environment_says_of_plugins_breaks_nothing(disabled, strict):
    assume("\x00" not in disabled + strict and not any(0xD800 <= ord(c) < 0xE000 for c in disabled + strict))
    with pytest.MonkeyPatch.context() as patch, fresh_registry():
        patch.setenv("SHARPNESS_PLUGINS_DISABLE", disabled)
        patch.setenv("SHARPNESS_PLUGINS_STRICT", strict)
        expected = "builtin" not in disabled and "sharpness" not in disabled
        assert ("epsilon_box" in available_metrics()) or not expected


# --- batches

Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Record:
    x: Any
    note: Any = "kept"


@st.composite
def batches(draw: Any, rows: int) -> Any:
    """Trees of tensors of so many rows, and of other things."""

    def tensor(shape: tuple[int, ...]) -> torch.Tensor:
        kind = draw(st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool]))
        return torch.arange(torch.Size(shape).numel()).reshape(shape).to(kind)

    def tree(depth: int) -> Any:
        kinds = [
            "tensor",
            "tensor",
            "scalar",
            "text",
            "none",
            "number",
            "list",
            "tuple",
            "dict",
            "pair",
            "record",
            "ordered",
        ]
        kind = draw(st.sampled_from(kinds[: 6 if depth == 0 else None]))
        if kind == "tensor":
            return tensor((rows, *draw(st.lists(st.integers(0, 3), max_size=2))))
        if kind in ("scalar", "text", "none", "number"):
            return {"scalar": torch.tensor(2.0), "text": ["a"] * rows, "none": None, "number": 3}[kind]
        entries = [tree(depth - 1) for _ in range(draw(st.integers(1, 3)))]
        if kind in ("dict", "ordered"):
            keys = draw(st.permutations(["labels", "x", "y"]))
            return (dict if kind == "dict" else OrderedDict)(zip(keys, entries, strict=False))
        if kind == "pair":
            return Pair(entries[0], entries[-1])
        return Record(entries[0]) if kind == "record" else (list if kind == "list" else tuple)(entries)

    return tree(2)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return type(one) is type(other) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return type(one) is type(other) and list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Record):
        return same(one.x, other.x) and one.note == other.note
    return bool(one == other)


@QUICK
@given(st.data())
def test_parts_of_a_batch_together_are_the_batch(data):
    rows = data.draw(st.integers(2, 7))
    batch = data.draw(batches(rows))
    copied = map_tensors(batch, torch.clone)
    assert same(copied, batch)
    assert all(one is not other for one, other in zip(tensors_of(copied), tensors_of(batch), strict=True))
    count = count_samples(batch)
    with_rows = [tensor for tensor in tensors_of(batch) if tensor.ndim]
    assert count == (rows if with_rows else None)
    cut = data.draw(st.integers(0, rows))
    parts = [tensors_of(rows_of(batch, piece, rows)) for piece in (slice(cut), slice(cut, None))]
    for whole, first, second in zip(tensors_of(batch), *parts, strict=True):
        if whole.ndim:
            assert torch.equal(torch.cat([first, second]), whole)
        else:
            assert first is second is whole
    few = thinned(Batch(0, batch, count), cut)
    assert few.num_samples is None or 1 <= few.num_samples <= max(cut, 1) or few.num_samples == rows <= cut
    assert count_samples(few.data) == few.num_samples


class Sums(nn.Module):
    """Three scores per row of the first tensor in whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, generator=torch.Generator().manual_seed(0)))

    def forward(self, inputs: Any = None, **named: Any) -> Any:
        found = [tensor for tensor in tensors_of((inputs, named)) if tensor.ndim]
        if not found:
            raise LookupError("no rows")
        return found[0].reshape(len(found[0]), -1).float().sum(1, keepdim=True) * self.weight


@QUICK
@given(st.data())
def test_any_batch_has_a_loss_rule_or_is_refused_in_words(data):
    batch = data.draw(batches(data.draw(st.integers(1, 5))))
    model = Sums()
    for more in (
        {},
        {"criterion": nn.CrossEntropyLoss()},
        {"criterion": nn.MSELoss()},
        {"loss_fn": lambda model, batch: model(batch).mean()},
    ):
        try:
            rule = resolve_loss(model, batch, **{"loss_fn": None, "criterion": None, "plugin_rule": None, **more})
        except LossRuleError as error:
            assert len(str(error)) > 20
            continue
        except LookupError as error:
            assert str(error) == "no rows"  # the model's own
            continue
        assert rule.description


# --- orders


@QUICK
@given(st.data())
def test_every_sample_comes_once_whatever_changes_in_between(data):
    """Sizes that change at any group, stops and resumes from JSON, and one to three ranks."""
    world_size = data.draw(st.integers(1, 3))
    num_samples = data.draw(st.integers(world_size, 40))

    def a_plan() -> Plan:
        return Plan(data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3)), world_size)

    first = a_plan()
    changes = {group: a_plan() for group in data.draw(st.sets(st.integers(0, 8), max_size=3))}
    stop = data.draw(st.integers(0, 8))

    def delivered(rank: int) -> tuple[list[int], list[int], ResizableBatchSampler]:
        sampler = ResizableBatchSampler(num_samples, first, seed=1, rank=rank, world_size=world_size)
        seen: list[int] = []
        sizes: list[int] = []
        group = 0
        batches = iter(sampler)
        while True:
            if group in changes:
                sampler.resize(changes[group])
            if group == stop:
                state = sampler.state_dict()
                sampler = ResizableBatchSampler(num_samples, first, seed=5, rank=rank, world_size=world_size)
                sampler.load_state_dict(state)
                batches = iter(sampler)
            part = None
            for part in batches:
                seen += part
                sizes.append(len(part))
                assert 1 <= len(part) <= sampler_limit(sampler)
                if sampler.micro_batch.is_last:
                    break
            if part is None or not sampler.micro_batch.is_last:
                return seen, sizes, sampler
            group += 1
            if sampler.position == num_samples or sampler.dropped:
                return seen, sizes, sampler

    def sampler_limit(sampler: ResizableBatchSampler) -> int:
        return max([first.micro_batch, *(plan.micro_batch for plan in changes.values())])

    found = [delivered(rank) for rank in range(world_size)]
    seen = [index for one, _, _ in found for index in one]
    assert len(set(seen)) == len(seen)
    assert num_samples - len(seen) == found[0][2].dropped < world_size
    assert len({len(sizes) for _, sizes, _ in found}) == 1, "ranks that make another number of backward passes wait for ever"


# --- checkpoints


def a_net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


GOOD = saved(a_net().state_dict())


@st.composite
def damaged_files(draw: Any) -> bytes:
    kind = draw(st.sampled_from(["cut", "bits", "noise", "zip"]))
    if kind == "cut":
        return GOOD[: draw(st.integers(0, len(GOOD) - 1))]
    if kind == "noise":
        return draw(st.binary(max_size=60))
    damaged = bytearray(GOOD)
    for _ in range(draw(st.integers(1, 6))):
        damaged[draw(st.integers(0, len(GOOD) - 1))] = draw(st.integers(0, 255))
    return bytes(damaged) if kind == "bits" else b"PK\x03\x04" + bytes(damaged)


def loaded(tmp_path: Any, content: bytes) -> bool:
    model = a_net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content)
    try:
        load_checkpoint(model, path)
    except CommandError as error:
        assert "checkpoint" in str(error)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        return False
    return True


@QUICK
@given(content=damaged_files())
def test_a_damaged_checkpoint_is_refused_in_words_and_the_model_stays(tmp_path_factory, content):
    loaded(tmp_path_factory.getbasetemp(), content)  # flipped bits of a weight may be a checkpoint, too


ODD_TENSORS = (torch.zeros(3, 2).to_sparse(), torch.zeros(3, 2, dtype=torch.complex64), torch.tensor(1))
TENSORS = st.sampled_from([torch.zeros(3, 2), torch.zeros(3), torch.zeros(()), *ODD_TENSORS])
STATES = st.dictionaries(
    st.sampled_from([*a_net().state_dict(), "module.0.weight", "_orig_mod.0.weight", "state_dict", "model", "x"]),
    st.one_of(
        TENSORS,
        st.integers(),
        st.text(max_size=3),
        st.dictionaries(st.sampled_from(list(a_net().state_dict())), TENSORS, max_size=3),
    ),
    max_size=8,
)


@QUICK
@given(state=STATES | st.lists(TENSORS, max_size=2) | TENSORS)
def test_a_foreign_checkpoint_is_refused_in_words_and_the_model_stays(tmp_path_factory, state):
    loaded(tmp_path_factory.getbasetemp(), saved(state))


def test_a_good_checkpoint_is_loaded(tmp_path):
    assert loaded(tmp_path, GOOD)
