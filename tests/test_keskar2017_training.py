"""Trainings of the reproduction: endings, remedies against closed forms, and a pause that leaves no trace."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from sharpness_plugins.experiments.data import Samples, Split
from sharpness_plugins.experiments.keskar2017 import trainings
from sharpness_plugins.experiments.keskar2017.endings import Ending
from sharpness_plugins.experiments.keskar2017.grounds import Ground
from sharpness_plugins.experiments.keskar2017.plan import TrainingPlan, planned
from sharpness_plugins.experiments.keskar2017.remedies import (
    REMEDIES,
    Adversarial,
    Augmentation,
    Conservative,
    SharpnessAware,
    step_for,
)
from sharpness_plugins.experiments.keskar2017.settings import Settings, preset
from sharpness_plugins.experiments.keskar2017.store import Store, key_of
from sharpness_plugins.experiments.recipes import Recipe
from sharpness_plugins.experiments.training import Run, plain_step

CONFIGURATIONS = Path(__file__).parent.parent / "benchmarks" / "keskar2017" / "configurations"

# --- endings


class Watched:
    """As much of a run as an ending looks at."""

    def __init__(self, epochs=0, steps=0, epoch_loss=math.inf):
        self.epochs, self.steps, self.epoch_loss = epochs, steps, epoch_loss


def first_epoch(ending, losses, *, steps_per_epoch=3, check_epochs=1):
    """After how many epochs it comes, in a training with these mean losses, which are also those at the end of each."""
    ending = Ending.parse(ending)
    for epochs in range(len(losses) + 1):
        run = Watched(epochs, epochs * steps_per_epoch, losses[epochs - 1] if epochs else math.inf)
        loss = losses[epochs - 1] if epochs else 9.0
        if ending.reached(run, losses[:epochs], lambda loss=loss: loss, check_epochs=check_epochs):
            return epochs
    return None


FALLING = [1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01]


@pytest.mark.parametrize(
    ("ending", "expected"),
    [
        ("epochs:0", 0),
        ("epochs:4", 4),
        ("steps:7", 3),  # at the end of the epoch in which they are over
        ("epoch_loss:0.1", 5),  # below, not at
        ("loss:0.1", 4),
        ("epoch_loss:0.001", None),
        ("plateau:2", None),
    ],
)
def test_an_ending_comes_at_the_end_of_an_epoch(ending, expected):
    assert first_epoch(ending, FALLING) == expected


def test_a_loss_is_looked_at_every_so_many_epochs():
    assert first_epoch("loss:0.1", FALLING, check_epochs=3) == 6


def test_a_plateau_is_no_gain_in_so_many_epochs():
    assert first_epoch("plateau:3", [1.0, 0.5, 0.49995, 0.6, 0.49992, 0.4]) == 5  # 0.49992 gains less than 1e-4
    assert first_epoch("plateau:3", [1.0, 0.5, 0.6, 0.6, 0.4998, 0.4998]) is None


@pytest.mark.parametrize("text", ["loss", "loss:", "loss:-1", "epochs:1.5", "steps:0", "accuracy:0.9", "plateau:nan"])
def test_an_ending_that_makes_no_sense_is_refused(text):
    with pytest.raises(ValueError, match=r"epoch_loss:0.002"):
        Ending.parse(text)


@pytest.mark.parametrize("text", ["epoch_loss:0.002", "epochs:100", "steps:1000000", "plateau:10", "loss:1e-05"])
def test_an_ending_is_its_text(text):
    assert str(Ending.parse(text)) == text


# --- remedies


class Quadratic(nn.Module):
    """Logits ``(w·x, 0)``, whose cross-entropy has a known gradient."""

    def __init__(self, weights):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(weights, dtype=torch.float64))

    def forward(self, inputs):
        scores = inputs @ self.weights
        return torch.stack([scores, torch.zeros_like(scores)], dim=1)


def problem(seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(12, 3, dtype=torch.float64, generator=generator)
    return Quadratic([0.3, -0.2, 0.5]), inputs, torch.randint(0, 2, (12,), generator=generator)


def gradient(weights, inputs, labels):
    """``mean (σ(w·x) - [y = 0]) x``."""
    return ((inputs @ weights).sigmoid() - (labels == 0).double()) @ inputs / len(labels)


def test_a_conservative_step_comes_to_the_proximal_point():
    """At ``argmin f(w) + λ/2 ‖w - w_k‖²`` the gradient is ``λ (w_k - w)``; far from ``w_k`` where λ is small."""
    for strength in (0.05, 5.0):
        model, inputs, labels = problem()
        before = model.weights.detach().clone()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.15)
        loss = Conservative(strength, iterations=3000)(model, optimizer, inputs, labels)
        after = model.weights.detach()
        torch.testing.assert_close(gradient(after, inputs, labels), strength * (before - after), atol=1e-10, rtol=0)
        assert loss.item() == pytest.approx(functional.cross_entropy(Quadratic(before.tolist())(inputs), labels).item())


def test_conservative_steps_follow_the_recursion():
    """``w ← w - η (∇f(w) + λ (w - w_k))``, so many times."""
    model, inputs, labels = problem()
    start = model.weights.detach().clone()
    Conservative(0.7, iterations=3)(model, torch.optim.SGD(model.parameters(), lr=0.2), inputs, labels)
    expected = start.clone()
    for _ in range(3):
        expected = expected - 0.2 * (gradient(expected, inputs, labels) + 0.7 * (expected - start))
    torch.testing.assert_close(model.weights.detach(), expected)


def test_an_adversarial_step_adds_the_loss_at_the_inputs_moved_uphill():
    model, inputs, labels = problem()
    start = model.weights.detach().clone()
    Adversarial(0.1, share=0.25)(model, torch.optim.SGD(model.parameters(), lr=1.0), inputs, labels)
    slope = ((inputs @ start).sigmoid() - (labels == 0).double())[:, None] * start
    expected = 0.75 * gradient(start, inputs, labels) + 0.25 * gradient(start, inputs + 0.1 * slope.sign(), labels)
    torch.testing.assert_close(start - model.weights.detach(), expected)


def test_a_sharpness_aware_step_takes_the_gradient_uphill():
    model, inputs, labels = problem()
    start = model.weights.detach().clone()
    SharpnessAware(0.3)(model, torch.optim.SGD(model.parameters(), lr=1.0), inputs, labels)
    here = gradient(start, inputs, labels)
    torch.testing.assert_close(start - model.weights.detach(), gradient(start + 0.3 * here / here.norm(), inputs, labels))


def test_without_any_amount_augmentation_changes_nothing_and_moves_by_whole_pixels():
    images = torch.rand(5, 16, generator=torch.Generator().manual_seed(0))
    still = Augmentation((1, 4, 4), degrees=0.0, shear=0.0, shift=0.0)
    torch.testing.assert_close(still.augmented(images), images)
    moving = Augmentation((1, 4, 4), degrees=0.0, shear=0.0, shift=0.25)
    torch.manual_seed(0)
    moved = moving.augmented(images)
    assert moved.shape == images.shape
    assert not torch.allclose(moved, images)
    assert moved.mean() < images.mean()  # what comes in from outside is zero


def test_a_flip_mirrors_about_half_of_the_images():
    images = torch.arange(400.0).reshape(100, 1, 1, 4)
    torch.manual_seed(0)
    seen = Augmentation((1, 1, 4), flips=True, degrees=0.0, shear=0.0, shift=0.0).augmented(images)
    mirrored = [torch.allclose(a, b.flip(-1)) for a, b in zip(seen, images, strict=True)]
    kept = [torch.allclose(a, b) for a, b in zip(seen, images, strict=True)]
    assert sum(mirrored) + sum(kept) == 100
    assert 30 < sum(mirrored) < 70


def test_what_is_no_image_is_not_augmented():
    assert step_for("augmentation", image=None, flips=False) is None
    assert step_for("", image=None, flips=False) is plain_step
    with pytest.raises(ValueError, match="Did you mean 'conservative'"):
        step_for("conservativ", image=None, flips=False)


# --- a pause leaves no trace


def ground(network="small-conv", *, seed=0, num_train=40, settings=None, **changes):
    generator = torch.Generator().manual_seed(7)
    shape = {"C1": (3, 8, 8), "small-conv": (1, 8, 8)}.get(network, (64,))
    halves = [
        Samples(torch.rand(count, *shape, generator=generator), torch.randint(0, 10, (count,), generator=generator))
        for count in (num_train, 10)
    ]
    chosen = settings or dataclasses.replace(preset("digits", network), width=0.1, max_epochs=12, **changes)
    return Ground(network, "digits", seed, chosen, Split(*halves), "f" * 64)


def plan(endings, *, recipe=None, remedy="", start=None, rate=1e-2):
    return TrainingPlan("main", recipe or Recipe(8), rate, remedy, tuple(endings), start)


class Killed(BaseException):
    pass


class Fragile(Store):
    """Kills the process, as it were, right after or right before so many checkpoints were kept."""

    def save(self, kind, key, name, tensors, *, durable=True):
        left = self.folder / "left"
        count = int(left.read_text()) if name == trainings.CHECKPOINT else -1
        if name == trainings.CHECKPOINT:
            left.write_text(str(count - 1))
        if count == 0:
            raise Killed
        super().save(kind, key, name, tensors, durable=durable)


def weights(store, key, ending):
    return store.load("trainings", key, trainings.file_of(ending))


@pytest.mark.parametrize("kills", [[0], [1], [3, 0, 2]])
@pytest.mark.parametrize(("network", "remedy"), [("C1", ""), ("A", "augmentation"), ("small-conv", "sam")])
def test_a_training_that_was_killed_ends_as_if_it_had_not_been(tmp_path, network, remedy, kills):
    """C1 has dropout, and augmentation draws; small-conv has BatchNorm."""
    where = ground(network, num_train=41)  # one sample is left over by batches of 8
    asked = plan(["epochs:2", "epochs:6", "plateau:3", "loss:2"], remedy=remedy)
    whole = Store(tmp_path / "whole")
    key, expected = trainings.train(whole, where, asked, start=None, tell=lambda text: None)
    told = []
    broken = Fragile(tmp_path / "broken")
    broken.folder.mkdir()
    for kill in kills:
        (broken.folder / "left").write_text(str(kill))
        with pytest.raises(Killed):
            trainings.train(broken, where, asked, start=None, tell=told.append)
        torch.manual_seed(123)  # another process has other random numbers
    (broken.folder / "left").write_text("1000")
    again, found = trainings.train(broken, where, asked, start=None, tell=told.append)
    assert again == key
    assert found["stops"] == expected["stops"]
    for ending in asked.endings:
        one, other = weights(whole, key, ending), weights(broken, key, ending)
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert [text for text in told if text.startswith("goes on")] == [
        f"goes on from epoch {epochs}" for epochs in [sum(kills[: i + 1]) for i in range(len(kills))] if epochs
    ]
    assert not (broken.place("trainings", key) / trainings.CHECKPOINT).exists()


def test_a_training_that_is_done_is_not_done_again(tmp_path):
    store, where, asked = Store(tmp_path), ground("A"), plan(["epochs:2"])
    key, found = trainings.train(store, where, asked, start=None, tell=lambda text: None)
    told = []
    again, read = trainings.train(store, where, asked, start=None, tell=told.append)
    assert (again, read["stops"], told) == (key, found["stops"], [])


def test_what_the_numbers_depend_on_is_in_the_key():
    where, asked = ground("C1"), plan(["epochs:2"])
    keys = {key_of(trainings.training_config(where, asked, None))}
    for other_ground, other_plan, start in [
        (ground("C1", seed=1), asked, None),
        (dataclasses.replace(where, checksum="e" * 64), asked, None),
        (ground("C1", batch_norm="running"), asked, None),
        (ground("C1", evaluation_batch=7), asked, None),
        (where, plan(["epochs:3"]), None),
        (where, plan(["epochs:2"], remedy="sam"), None),
        (where, plan(["epochs:2"], rate=0.1), None),
        (where, plan(["epochs:2"], recipe=Recipe(16)), None),
        (where, asked, ("0" * 24, "epochs:1")),
    ]:
        keys.add(key_of(trainings.training_config(other_ground, other_plan, start)))
    assert len(keys) == 10


def test_a_damaged_checkpoint_begins_again(tmp_path):
    where, asked = ground("A"), plan(["epochs:3"])
    key, expected = trainings.train(Store(tmp_path / "whole"), where, asked, start=None, tell=lambda text: None)
    store = Store(tmp_path / "other")
    store.place("trainings", key).mkdir(parents=True)
    (store.place("trainings", key) / trainings.CHECKPOINT).write_bytes(b"PK\x03\x04 cut off")
    assert trainings.train(store, where, asked, start=None, tell=lambda text: None)[1]["stops"] == expected["stops"]


def test_what_does_not_come_is_given_up_and_what_always_comes_is_not(tmp_path):
    where = ground("A", num_train=40)
    asked = plan(["epochs:14", "epoch_loss:1e-09", "plateau:9"], rate=1e-4)
    stops = trainings.train(Store(tmp_path), where, asked, start=None, tell=lambda text: None)[1]["stops"]
    assert [(e, stops[e]["epochs"], stops[e]["ended"]) for e in asked.endings] == [
        ("epochs:14", 14, True),
        ("epoch_loss:1e-09", 12, False),
        ("plateau:9", 12, False),
    ]
    assert stops["epochs:14"]["steps"] == 14 * 5


def test_a_training_that_diverges_keeps_its_last_finite_weights(tmp_path):
    where, asked = ground("A"), plan(["epochs:0", "epochs:9", "loss:0.1"], rate=1e30)
    store = Store(tmp_path)
    key, found = trainings.train(store, where, asked, start=None, tell=lambda text: None)
    assert found["stops"]["epochs:0"]["ended"]
    assert not found["stops"]["epochs:9"]["ended"]
    assert all(torch.isfinite(weight).all() for weight in weights(store, key, "epochs:9").values())


def test_a_training_is_that_of_the_other_experiments(tmp_path):
    """Same initial weights, order and steps as ``Run``: the demo's recipe, to the demo's ending."""
    where = ground("A")
    run = Run(where.model(), where.split.train, batch_size=8, seed=0)
    run.advance(3 * run.steps_per_epoch)
    store = Store(tmp_path)
    key, _ = trainings.train(store, where, plan(["epochs:3"], rate=1e-3), start=None, tell=lambda text: None)
    mine = weights(store, key, "epochs:3")
    assert all(torch.equal(mine[name], value) for name, value in run.model.state_dict().items())


def test_a_warm_start_begins_from_the_small_batchs_weights(tmp_path):
    where, store = ground("A"), Store(tmp_path)
    key, _ = trainings.train(store, where, plan(["epochs:2", "epochs:4"]), start=None, tell=lambda text: None)
    warm = plan(["epochs:0"], recipe=Recipe(20, 2, 8))
    again, _ = trainings.train(store, where, warm, start=(key, "epochs:2"), tell=lambda text: None)
    one, other = weights(store, again, "epochs:0"), weights(store, key, "epochs:2")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_is_kept_between_epochs_only():
    where = ground("A")
    run = Run(where.model(), where.split.train, batch_size=8)
    run.advance(2)
    with pytest.raises(RuntimeError, match="step 2"):
        run.state_dict()


# --- plans and settings


def test_every_network_of_the_studies_is_trained_once_and_every_warm_start_after_its_beginning():
    made = planned(preset(), num_train=500, num_warm=800, augments=True)
    keys = list(made.trainings)
    assert len(keys) == len(set(keys))
    for key, training in made.trainings.items():
        if training.start is not None:
            assert keys.index(training.start.training) < keys.index(key)
            assert training.start.ending in made.trainings[training.start.training].endings
    for roles in made.studies.values():
        for condition in roles.values():
            found = [s for s in made.measurements if s.ending == condition.ending and s.training.recipe == condition.recipe]
            assert found
    assert set(made.studies["remedies"]) == {"small", "none", *REMEDIES}


def test_the_large_batch_is_a_tenth_of_the_training_samples_unless_told():
    made = planned(preset("cifar10"), num_train=50_000, num_warm=50_000, augments=True)
    assert made.studies["protocol"]["large"].recipe == Recipe(5000)
    assert made.studies["linear_rate"]["large"].learning_rate == pytest.approx(1e-3 * 5000 / 256)
    assert made.studies["sqrt_rate"]["large"].learning_rate == pytest.approx(1e-3 * math.sqrt(5000 / 256))
    assert {condition.problem for roles in made.studies.values() for condition in roles.values()} == {"main"}
    with pytest.raises(ValueError, match="256 and 100"):
        planned(dataclasses.replace(preset("cifar10"), small_batch=256), num_train=1000, num_warm=1000, augments=True)


@pytest.mark.parametrize(
    ("num_train", "small", "large"), [(50_000, 256, 5000), (2570, 256, 257), (2000, 12, 200), (20, 2, 4)]
)
def test_of_few_samples_the_small_batch_is_smaller_than_the_papers(num_train, small, large):
    roles = planned(preset("cifar10"), num_train=num_train, num_warm=num_train, augments=True).studies["protocol"]
    assert [roles[role].recipe.batch_size for role in ("small", "large")] == [small, large]


def test_data_that_are_no_images_have_no_augmentation_in_their_plan():
    made = planned(preset("timit"), num_train=10_000, num_warm=10_000, augments=False)
    assert "augmentation" not in made.studies["remedies"]


def test_only_the_studies_asked_for_are_planned():
    chosen = dataclasses.replace(preset(), studies=("sqrt_rate",))
    made = planned(chosen, num_train=500, num_warm=800, augments=True)
    assert list(made.studies) == ["sqrt_rate"]
    assert len(made.trainings) == 2
    assert not made.watched


def test_settings_are_read_back_and_completed_by_their_preset():
    for settings in (preset(), preset("cifar100", quick=True), preset(network="F2")):
        assert Settings.from_dict(settings.to_dict()) == settings
    read = Settings.from_dict({"network": "C4", "warm_start": {"epochs": [2, 4]}})
    assert (read.data, read.warm_start.epochs, read.warm_start.ending) == ("cifar100", (2, 4), "epochs:100")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"netwrok": "C1"}, "Did you mean 'network'"),
        ({"warm_start": {"epoch": [1]}}, "Did you mean 'epochs'"),
        ({"warm_start": [1]}, "mapping"),
        ({"studies": ["protocl"]}, "Did you mean 'protocol'"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "different"),
        ({"matched": "loss"}, "an ending must be"),
        ({"small_batch": 500, "large_batch": 500}, "above the small one"),
        ({"draws": 0}, "draws must be at least 1"),
        ({"data": "digit"}, "Did you mean 'digits'"),
    ],
)
def test_settings_that_make_no_sense_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        Settings.from_dict(given)


@pytest.mark.parametrize("file", sorted(CONFIGURATIONS.glob("*.json")), ids=lambda file: file.stem)
@pytest.mark.parametrize("network", ["F1", "F2", "C1", "C2", "C3", "C4"])
def test_configurations_of_the_paper_make_a_plan_for_each_network(file, network):
    settings = Settings.from_dict({**json.loads(file.read_text()), "network": network})
    made = planned(settings, num_train=50_000, num_warm=50_000, augments=True)
    assert list(made.studies) == list(settings.studies)
    assert made.studies[settings.studies[0]]
    if file.stem == "figure5":
        assert list(made.studies["warm_start"]) == ["small", "cold", *map(str, range(1, 101))]
        assert made.studies["warm_start"]["7"].recipe == Recipe(5000, 7, 256)
