"""The warm-start experiment: against plain torch where it trains, on scripted numbers where it speaks, on real digits."""

import csv
import io
import json
import math
import sys
import warnings
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

from sharpness_plugins.errors import MeasurementWarning
from sharpness_plugins.experiments import warm_start_curve
from sharpness_plugins.experiments.curve import Iterate, SeedRuns, WarmStartCurve, WarmStartSettings
from sharpness_plugins.experiments.data import Samples, Split, digits_noisy_split
from sharpness_plugins.experiments.match import Match, train_to_match
from sharpness_plugins.experiments.networks import noisy_digits_network, relu_mlp
from sharpness_plugins.experiments.recipes import Network, Recipe
from sharpness_plugins.experiments.training import Evaluation, Run, Training, evaluate
from sharpness_plugins.experiments.warm_start import WarmStartInterrupted, run_warm_start
from sharpness_plugins.metrics import EpsilonBox
from sharpness_plugins.report import Kind, MetricResult, SharpnessReport, Status

NUM_TRAIN = 37  # 9 batches of 4 and 2 of 16, each with samples left over


def blobs(seed=0, num_train=NUM_TRAIN, dtype=torch.float32):
    """Three classes around three points of the plane, that overlap a little."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_train + 20) % 3
    centres = torch.tensor([[0.0, 1.5], [1.5, -1.0], [-1.5, -1.0]])
    inputs = (centres[labels] + torch.randn(len(labels), 2, generator=generator)).to(dtype)
    return Split(Samples(inputs[:num_train], labels[:num_train]), Samples(inputs[num_train:], labels[num_train:]))


def network(seed):
    return relu_mlp((2, 8, 3), seed=seed)


@dataclass(frozen=True)
class Weights:
    """A metric that tells which weights it saw; its value is their sum."""

    name: str = "weights"

    def __call__(self, objective, rng):
        return MetricResult(objective.origin.sum().item(), details={"weights": objective.origin.tolist()})


SMALL = {"epochs": [1, 3], "seeds": [4, 5], "match": "steps:5", "metrics": [Weights()]}


def curve_of(model_fn=network, data=blobs, small_batch=4, large_batch=16, **changes):
    settings = {**SMALL, **changes}
    epochs, seeds = settings.pop("epochs"), settings.pop("seeds")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MeasurementWarning)  # on so few samples chance orders small and large
        return warm_start_curve(model_fn, data, small_batch, large_batch, epochs, seeds, **settings)


@pytest.fixture(scope="module")
def curve():
    return curve_of()


def plain(model, samples, *, batch_size, steps, seed, optimizer=None):
    """Full batches only, in nothing but torch."""
    optimizer = (optimizer or (lambda p: torch.optim.Adam(p, lr=1e-3, fused=True)))(model.parameters())
    order, done = torch.Generator().manual_seed(seed), 0
    while done < steps:
        for batch in torch.randperm(len(samples), generator=order).split(batch_size):
            if len(batch) < batch_size or done == steps:
                continue
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(samples.inputs[batch]), samples.labels[batch]).backward()
            optimizer.step()
            done += 1
    return model


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()


def weights_of(trained):
    return trained.report["weights"].details["weights"]


# --- what is trained


def test_epoch_0_is_a_cold_large_batch_run_bit_for_bit(curve):
    for seed, trained in zip((4, 5), curve.networks(0), strict=True):
        split = blobs(seed)
        model = plain(network(seed), split.train, batch_size=16, steps=5, seed=seed)
        assert weights_of(trained) == flat(model)
        assert (trained.train, trained.test) == (evaluate(model, split.train), evaluate(model, split.test))


def test_a_cold_start_does_not_depend_on_the_rest_of_the_curve(curve):
    alone = run_warm_start(WarmStartSettings(2, 16, (0,), (5,), Match("steps", 5)), network, blobs, metrics=[Weights()])
    assert weights_of(alone.networks(0)[0]) == weights_of(curve.networks(0)[1])


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_warm_point_is_the_small_batch_then_the_large_one_with_a_fresh_optimizer(curve, epochs):
    for seed, trained, run in zip((4, 5), curve.networks(epochs), curve.runs, strict=True):
        split = blobs(seed)
        model = plain(network(seed), split.train, batch_size=4, steps=9 * epochs, seed=seed)
        iterate = run.iterates[curve.settings.epochs.index(epochs) - 1]
        assert (iterate.epochs, iterate.test) == (epochs, evaluate(model, split.test))
        model = plain(model, split.train, batch_size=16, steps=5, seed=seed)
        assert weights_of(trained) == flat(model)


def test_the_small_batch_run_goes_to_the_match_although_the_curve_goes_on(curve):
    for seed, run in zip((4, 5), curve.runs, strict=True):
        assert weights_of(run.small) == flat(plain(network(seed), blobs(seed).train, batch_size=4, steps=5, seed=seed))
        assert [iterate.epochs for iterate in run.iterates] == [1, 3]


def test_the_equal_epoch_network_is_the_cold_run_after_as_many_epochs():
    made = run_warm_start(WarmStartSettings(4, 16, (0,), (4,), Match("epochs", 7)), network, blobs, metrics=[Weights()])
    assert weights_of(made.runs[0].equal_epochs) == weights_of(made.networks(0)[0])  # matched in epochs: the same network
    made = run_warm_start(WarmStartSettings(4, 16, (0,), (4,), Match("steps", 20)), network, blobs, metrics=[Weights()])
    equal = made.runs[0].equal_epochs
    assert (equal.epochs, equal.steps) == (2, 4)  # 20 steps of 9 are 2 epochs, and those are 4 large steps
    assert weights_of(equal) == flat(plain(network(4), blobs(4).train, batch_size=16, steps=4, seed=4))


def test_every_optimizer_is_made_anew_for_every_training():
    made, parameters = [], []

    def optimizer(p):
        parameters.append(list(p))
        made.append(torch.optim.SGD(parameters[-1], lr=0.1, momentum=0.9))
        return made[-1]

    trained = run_warm_start(
        WarmStartSettings(4, 16, (0, 2), (4,), Match("steps", 5)), network, blobs, optimizer=optimizer, metrics=[Weights()]
    )
    assert len(made) == 3  # the small-batch run, the cold one, the warm one
    model = network(4)
    for batch_size, steps in ((4, 18), (16, 5)):
        plain(
            model, blobs(4).train, batch_size=batch_size, steps=steps, seed=4,
            optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        )  # fmt: skip
    assert weights_of(trained.networks(2)[0]) == flat(model)


# --- the three currencies


def test_steps_and_samples_are_counted_exactly(curve):
    assert curve.values(0, "steps") == [5, 5]
    assert curve.values(3, "steps") == [27 + 5] * 2
    assert curve.values(3, "samples") == [27 * 4 + 5 * 16] * 2  # samples that are left over are not seen
    assert [(phase.epochs, phase.steps) for phase in curve.networks(3)[0].phases] == [(3, 27), (2, 5)]
    assert [(run.small.steps, run.small.samples) for run in curve.runs] == [(5, 20)] * 2
    assert all(seconds > 0 for seconds in curve.values(1, "seconds"))
    lines = [line.split() for line in str(curve).splitlines()]
    assert next(line for line in lines if line[:2] == ["3", "27"])[:5] == ["3", "27", "5", "32", "188"]
    assert next(line for line in lines if line[:4] == ["batch", "4", "only", "5"])[4:7] == ["0", "5", "20"]


def test_matching_epochs_counts_those_of_the_last_phase():
    made = curve_of(match="epochs:4", seeds=[4])
    assert (made.values(0, "steps"), made.values(3, "steps")) == ([8], [27 + 8])
    assert made.runs[0].small.steps == 36
    assert made.disagreement() == []
    assert "matched in epochs, not in loss" in str(made)


# --- the match


@pytest.mark.parametrize(
    ("text", "kind", "value", "words"),
    [
        ("loss:0.005", "loss", 0.005, "a training loss of 0.005"),
        ("epochs:60", "epochs", 60, "60 epochs"),
        ("steps:1e3", "steps", 1000, "1000 steps"),
    ],
)
def test_match_is_parsed(text, kind, value, words):
    match = Match.parse(text)
    assert (match.kind, match.value, match.words) == (kind, value, words)
    assert Match.parse(str(match)) == match
    assert Match.parse(match) is match


@pytest.mark.parametrize(
    "text", ["", "loss", "loss:", "loss:0", "loss:-1", "loss:nan", "loss:inf", "epochs:1.5", "steps:0", "accuracy:1", "5"]
)
def test_a_match_that_makes_no_sense_is_refused(text):
    with pytest.raises(ValueError, match=r"match must be .* Example"):
        Match.parse(text)


@pytest.mark.parametrize(("check_every", "looks"), [(1, 1), (2, 1), (3, 2), (10, 5)])
def test_the_loss_is_looked_at_after_so_many_steps_at_the_end_of_an_epoch(check_every, looks, monkeypatch):
    samples, checked, losses = blobs().train, [], []

    def spy(model, given):
        assert given is samples
        checked.append(run.epochs)
        losses.append(evaluate(model, given).loss)
        return Evaluation(losses[-1], 0.0)

    monkeypatch.setattr("sharpness_plugins.experiments.match.evaluate", spy)
    run = Run(network(0), samples, batch_size=16, drop_last=True)  # two steps an epoch
    target = 0.9
    end, copies = train_to_match(
        run, Match("loss", target), check_every=check_every, max_steps=10_000, on_epoch=lambda epochs, loss: None
    )
    assert checked == list(range(0, end.training.epochs + 1, looks))
    assert losses[-1] <= target < min(losses[:-1])
    assert end.training.reached_target
    assert evaluate(end.model, samples).loss == losses[-1]
    assert copies == {}


def test_a_network_that_is_there_already_takes_no_step():
    run = Run(network(0), blobs().train, batch_size=16, drop_last=True)
    end, _ = train_to_match(run, Match("loss", 50.0), check_every=1, max_steps=10, on_epoch=lambda *told: None)
    assert end.training == Training(0, 0, 0, 0.0, math.inf, True)
    assert flat(end.model) == flat(network(0))


def test_a_run_that_misses_the_loss_is_marked():
    made = run_warm_start(
        WarmStartSettings(4, 16, (0, 2), (4,), Match("loss", 1e-4), max_steps=30), network, blobs, metrics=[Weights()]
    )
    cold, warm = made.networks(0)[0], made.networks(2)[0]
    assert (cold.steps, warm.steps, made.runs[0].small.steps) == (30, 18 + 30, 36)  # given up at the end of an epoch
    assert not any(trained.reached_target for trained in (cold, warm, made.runs[0].small))
    text = str(made)
    assert "Training loss is NOT matched: 3 of 3 networks did not reach 0.0001 in 30 steps" in text
    starred = [line.split("  ")[0] for line in text.splitlines() if " *  " in line]
    assert starred == ["0 (cold) *", "2 *", "batch 4 only *"] * 2
    assert "* a network did not reach a training loss of 0.0001 in 30 steps" in " ".join(text.split())


# --- what it leaves alone, and what it takes


def test_nothing_of_the_callers_is_touched():
    mine = network(0)
    mine.eval()
    before = flat(mine)
    torch.manual_seed(99)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    twice = [curve_of(lambda seed: mine, data=blobs(0)) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert flat(mine) == before
    assert not mine.training
    assert all(p.grad is None for p in mine.parameters())
    assert [weights_of(n) for n in twice[0].networks(3)] == [weights_of(n) for n in twice[1].networks(3)]


def test_dropout_and_unseeded_weights_are_repeatable():
    def unseeded(seed):
        return nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))

    def trained(state, epochs):
        torch.manual_seed(state)
        settings = WarmStartSettings(4, 16, epochs, (4,), Match("steps", 5))
        return run_warm_start(settings, unseeded, blobs, metrics=[Weights()])

    first, second = trained(1, (0, 3)), trained(2, (0, 1, 3))
    for epochs in (0, 3):
        assert weights_of(first.networks(epochs)[0]) == weights_of(second.networks(epochs)[0])


def test_data_may_be_pairs_of_tensors_in_double_precision_that_are_not_contiguous():
    split = blobs(dtype=torch.float64)
    wide = torch.stack([split.train.inputs, split.train.inputs], dim=2)[:, :, 0]
    assert not wide.is_contiguous()
    pairs = ((wide, split.train.labels), (split.test.inputs, split.test.labels))
    made = curve_of(lambda seed: network(seed).double(), data=pairs, seeds=[4])
    same = curve_of(lambda seed: network(seed).double(), data=split, seeds=[4])
    assert weights_of(made.networks(3)[0]) == weights_of(same.networks(3)[0])


def test_seeds_may_be_counted_and_metrics_come_from_a_generator():
    counted = curve_of(seeds=2, metrics=(metric for metric in [Weights()]))
    listed = curve_of(seeds=np.arange(2), epochs=np.array([1, 3]))
    assert counted.settings == listed.settings
    assert WarmStartCurve.from_json(listed.to_json()).settings == listed.settings
    assert [weights_of(n) for n in counted.networks(3)] == [weights_of(n) for n in listed.networks(3)]


def test_own_data_need_no_optional_package(monkeypatch):
    def version(name):
        if name in ("scikit-learn", "matplotlib"):
            raise PackageNotFoundError(name)
        return "1"

    for package in ("sklearn", "sklearn.datasets", "matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("sharpness_plugins.experiments.files.version", version)
    made = curve_of(epochs=[], seeds=[4])
    assert set(made.versions) == {"python", "sharpness-plugins", "torch", "numpy", "scipy"}
    assert "0 (cold)" in str(made)
    with pytest.raises(ImportError, match=r"sharpness-plugins\[plots\]"):
        made.figure()


def test_a_curve_of_the_cold_start_alone_has_a_figure(tmp_path):
    paths = curve_of(epochs=[], seeds=[4]).write(tmp_path)
    assert [path.name for path in paths] == ["results.json", "results.csv", "table.txt", "warm_start.png"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"small_batch": 16}, "small_batch must be at least 1 and below large_batch, got 16 and 16"),
        ({"small_batch": 0}, "got 0 and 16"),
        ({"large_batch": 38}, "large_batch must be at most the 37 training samples, got 38"),
        ({"epochs": [-1]}, r"whole numbers from 0 on, got \(-1,\)"),
        ({"epochs": [1.5]}, "whole numbers"),
        ({"seeds": []}, "at least one, and each different"),
        ({"seeds": 0}, "at least one, and each different"),
        ({"seeds": [1, 1]}, r"each different, got \(1, 1\)"),
        ({"match": "loss"}, "match must be"),
        ({"check_every": 0}, "at least 1, got 0 and 20000"),
        ({"max_steps": 0}, "at least 1, got 10 and 0"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        curve_of(**changes)


def test_a_diverging_training_is_an_error():
    with pytest.raises(ArithmeticError, match="Lower the learning rate"):
        curve_of(optimizer=lambda p: torch.optim.SGD(p, lr=1e30), match="epochs:50")


def test_a_model_fn_that_gives_no_module_is_refused():
    with pytest.raises(TypeError, match=r"model_fn must return a torch\.nn\.Module, got tuple"):
        curve_of(lambda seed: (1, 2))


def test_the_listener_hears_of_every_network():
    events = []
    curve_of(listener=events.append)
    finished = [event for event in events if event.finished]
    assert [event.network for event in finished] == list(range(1, 11))
    assert {event.num_networks for event in events} == {10}
    assert [event.seed for event in finished] == [4] * 5 + [5] * 5
    cold, warm = Recipe(16), [Recipe(16, 1, 4), Recipe(16, 3, 4)]
    assert [event.recipe for event in finished[:5]] == [Recipe(4), cold, cold, *warm]
    assert any("epoch 3, training loss" in event.text for event in events if not event.finished)


def test_ctrl_c_hands_over_the_seeds_that_are_complete(curve):
    def listener(event):
        if event.seed == 5 and event.finished:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as raised:
        curve_of(listener=listener)
    assert isinstance(raised.value, WarmStartInterrupted)
    (run,) = raised.value.curve.runs
    assert weights_of(run.points[2]) == weights_of(curve.runs[0].points[2])
    assert "one seed" in str(raised.value.curve)


def test_ctrl_c_before_the_first_seed_is_complete_is_plain():
    def listener(event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as raised:
        curve_of(listener=listener)
    assert not isinstance(raised.value, WarmStartInterrupted)


# --- what it says, on scripted numbers


def trained(seed, recipe, accuracy, box, *, loss=0.005, steps=100, reached=True):
    phases = [Training(recipe.warm_epochs, 10 * recipe.warm_epochs, 0, 1.0, 0.5, True)] if recipe.is_warm else []
    phases.append(Training(7, steps, steps * recipe.batch_size, 1.0, 0.5, reached))
    report = SharpnessReport({"epsilon_box": MetricResult(box, status=Status(Kind.LOWER_BOUND))}, loss)
    return Network(seed, recipe, tuple(phases), Evaluation(loss, 1.0), Evaluation(0.3, accuracy), report)


def scripted(*, cold=0.89, warm=0.91, small=0.92, equal=0.90, cold_box=4.0, warm_box=2.0, small_box=1.0, equal_box=3.0,
             early=0.90, noise=(0.0, 0.002, -0.001), match="loss:0.005"):  # fmt: skip
    settings = WarmStartSettings(8, 400, (12,), tuple(range(len(noise))), Match.parse(match))
    runs = []
    for seed, shift in enumerate(noise):
        points = (
            trained(seed, Recipe(400), cold + shift, cold_box * (1 + 10 * shift)),
            trained(seed, Recipe(400, 12, 8), warm + 2 * shift, warm_box),
        )
        equal_epochs = trained(seed, Recipe(400), equal, equal_box, loss=0.4, reached=True)
        iterates = (Iterate(12, Evaluation(0.1, 0.97), Evaluation(0.2, early)),)
        runs.append(SeedRuns(seed, points, trained(seed, Recipe(8), small, small_box, steps=900), equal_epochs, iterates))
    return WarmStartCurve(settings, tuple(runs), {"torch": "2"}, 1.5)


def one(said, *words):
    found = [sentence for sentence in said if all(word in sentence for word in words)]
    assert len(found) == 1, said
    return found[0]


def test_orders_that_agree_are_no_warning():
    made = scripted(small=0.92, cold=0.89, equal=0.90)
    assert made.disagreement() == []
    assert "WARNING" not in str(made)


def test_orders_of_accuracy_that_disagree_are_a_printed_warning():
    made = scripted(small=0.92, cold=0.89, equal=0.95)
    (sentence,) = made.disagreement()
    assert "equal epochs and equal loss disagree on test_accuracy" in sentence
    assert "At a training loss of 0.005, batch 400 is lower by 2.97±0.088 points (3 of 3 seeds) than batch 8" in sentence
    assert "after as many epochs (7), it is higher by 3±0 points (3 of 3 seeds), at a training loss of 0.4" in sentence
    assert "WARNING: equal epochs and equal loss disagree on test_accuracy" in " ".join(str(made).split())


def test_orders_of_sharpness_that_disagree_are_a_printed_warning():
    (sentence,) = scripted(small_box=1.0, cold_box=4.0, equal_box=0.5).disagreement()
    assert "disagree on epsilon_box" in sentence
    assert "points" not in sentence
    assert len(scripted(equal=0.95, equal_box=0.5).disagreement()) == 2


def test_an_order_within_its_standard_error_is_none():
    unsure, sure = scripted(cold=0.919, equal=0.95), scripted(cold=0.918, equal=0.95)
    small = [run.small.test.accuracy for run in sure.runs]
    t = [abs(scipy.stats.ttest_rel(made.values(0, "test_accuracy"), small).statistic) for made in (unsure, sure)]
    assert t[0] < 1 < t[1]
    assert (len(unsure.disagreement()), len(sure.disagreement())) == (0, 1)
    assert len(scripted(cold=0.9195, equal=0.95, noise=(0.0,)).disagreement()) == 1


def test_equal_values_are_no_order():
    assert scripted(small=0.9, equal=0.9).disagreement() == []
    assert scripted(equal_box=math.nan).disagreement() == []


def test_paired_statistics_against_the_cold_start_are_scipys():
    made = scripted()
    for quantity in ("test_accuracy", "epsilon_box"):
        paired = made.paired(12, quantity)
        expected = scipy.stats.ttest_rel(made.values(12, quantity), made.values(0, quantity))
        assert (paired.t, paired.num_seeds) == (pytest.approx(expected.statistic, rel=1e-9), 3)
    row = next(line for line in str(made).splitlines() if line.startswith("12 "))
    accuracy, box = made.paired(12, "test_accuracy"), made.paired(12, "epsilon_box")
    assert f"{100 * accuracy.mean_difference:+.2f}±{100 * accuracy.standard_error:.2f} (3/3)  {accuracy.t:.1f} " in row
    assert row.endswith(f"x {box.ratio:.2g} (3/3)  {box.t:.1f}")


def test_gains_and_losses_are_called_by_their_names():
    said = scripted().sentences()
    assert one(said, "Test accuracy is higher").endswith(
        "cold start by more than a standard error at each of the 1 warm starts: as in the paper's Figure 5."
    )
    assert one(said, "epsilon_box is lower").endswith("as in the paper's Figure 5.")
    unsure = scripted(warm=0.8905, noise=(0.0, 0.002, -0.002)).sentences()  # 0.05 points, and a standard error of 0.12
    assert "by more than a standard error at none of the 1" in one(unsure, "Test accuracy is higher")
    assert "standard error" not in one(scripted(warm=0.8905, noise=(0.0,)).sentences(), "Test accuracy is higher")
    said = scripted(warm=0.88, warm_box=5.0).sentences()
    assert "at none of the 1 warm starts: NOT as in" in one(said, "Test accuracy is higher")
    assert "at none of the 1 warm starts: NOT as in" in one(said, "epsilon_box is lower")


def test_only_the_warm_starts_that_gain_are_named():
    settings = WarmStartSettings(8, 400, (5, 12, 25), (0, 1), Match("loss", 0.005))
    boxes = {0: (4.0, 4.2), 5: (4.1, 4.1), 12: (3.0, 3.1), 25: (2.0, 2.2)}
    runs = [
        SeedRuns(
            seed,
            tuple(trained(seed, settings.recipe(epochs), 0.9, boxes[epochs][seed]) for epochs in boxes),
            trained(seed, Recipe(8), 0.9, 1.0),
            trained(seed, Recipe(400), 0.9, 5.0),
            tuple(Iterate(epochs, Evaluation(0.1, 0.9), Evaluation(0.1, 0.9)) for epochs in (5, 12, 25)),
        )
        for seed in (0, 1)
    ]
    said = one(WarmStartCurve(settings, tuple(runs), {}, 1.0).sentences(), "epsilon_box is lower")
    assert said.endswith("by more than a standard error at 2 of 3 warm starts, after 12 and 25 epochs.")


def test_the_cost_of_a_warm_start_is_said_in_three_currencies():
    said = one(scripted().sentences(), "Cost:")
    steps, samples = 120 + 100, 100 * 400  # against 900 steps of 8; both phases took a second each
    assert f"{steps / 900:.2g} times the steps, {samples / 7200:.2g} times the samples and 2 times the seconds" in said


def test_early_stopping_that_beats_every_recipe_is_said():
    assert "94.0 % after 12 epochs, at a training loss of 0.1; at the match no recipe is above 92.0 %" in one(
        scripted(early=0.94).sentences(), "on its way"
    )
    assert not any("on its way" in sentence for sentence in scripted(early=0.90).sentences())


def test_one_seed_claims_no_spread():
    made = scripted(noise=(0.0,))
    assert one(made.sentences(), "One seed says nothing about the spread")
    assert "±" not in str(made)


def test_a_failed_metric_is_left_out_and_said():
    made = scripted(warm_box=math.nan)
    assert made.paired(12, "epsilon_box") is None
    assert one(made.sentences(), "epsilon_box has no value to compare: nothing can be said")
    assert next(line for line in str(made).splitlines() if line.startswith("12 ")).split()[-3:] == ["-", "-", "-"]
    failed = MetricResult.failed("no luck")
    report = made.runs[0].points[1].report
    object.__setattr__(report, "results", {"epsilon_box": failed})
    assert made.failed
    assert one(made.sentences(), "A metric failed")


def test_unknown_points_and_quantities_are_refused():
    with pytest.raises(ValueError, match=r"no point at 7 epochs\. Points: 0, 12"):
        scripted().values(7, "steps")
    with pytest.raises(ValueError, match=r"no quantity 'test_acuracy'\. Did you mean 'test_accuracy'"):
        scripted().values(12, "test_acuracy")


# --- files


def test_json_round_trip(curve):
    for made in (curve, scripted(), scripted(warm_box=math.nan)):
        again = WarmStartCurve.from_json(made.to_json())
        assert again.to_dict() == made.to_dict()
        assert str(again) == str(made)
        assert again.settings == made.settings
        assert json.loads(made.to_json())["schema_version"] == 1


@pytest.mark.parametrize("text", ["{}", "[]", '{"schema_version": 2, "runs": []}', '{"schema_version": 1}'])
def test_other_json_is_refused(text):
    with pytest.raises(ValueError, match="not a warm-start curve of schema version 1"):
        WarmStartCurve.from_json(text)


def test_csv_has_a_row_per_network():
    made = scripted()
    rows = list(csv.DictReader(io.StringIO(made.to_csv())))
    assert len(rows) == 3 * 4
    assert [(row["warm_epochs"], row["warm_batch"], row["batch_size"], row["ended_by"]) for row in rows[:4]] == [
        ("0", "0", "400", "loss:0.005"),
        ("12", "8", "400", "loss:0.005"),
        ("0", "0", "8", "loss:0.005"),
        ("0", "0", "400", "epochs:7"),
    ]
    assert float(rows[1]["test_accuracy"]) == made.values(12, "test_accuracy")[0]
    assert rows[1]["epsilon_box_status"] == "lower bound"


def test_the_figure_holds_the_curve():
    made = scripted()
    above, below = made.figure().axes
    small, large, alone = above.get_lines()[0], above.get_lines()[3], above.get_lines()[-1]
    assert list(small.get_xdata()) == [12]
    assert list(large.get_ydata()) == pytest.approx([100 * (0.89 + 0.001 / 3), 100 * (0.91 + 0.002 / 3)])
    assert list(alone.get_ydata()) == [92, 92]
    assert list(below.get_lines()[0].get_ydata()) == pytest.approx([4 * (1 + 0.01 / 3), 2])
    with pytest.raises(ValueError, match="no quantity 'hessian'"):
        made.figure("hessian")


# --- recipe A: 800 digits, a tenth of the labels wrong


@pytest.fixture(scope="module")
def recipe_a():
    with pytest.warns(MeasurementWarning, match="equal epochs and equal loss disagree on test_accuracy"):
        return warm_start_curve(
            noisy_digits_network, digits_noisy_split, 8, 400, [0, 12], [10, 11, 12], metrics=[EpsilonBox()]
        )


def test_recipe_a_gains_accuracy_and_loses_sharpness_after_12_warm_epochs(recipe_a):
    assert all(trained.reached_target for run in recipe_a.runs for trained in (*run.points, run.small))
    assert all(trained.train.loss <= 0.005 for run in recipe_a.runs for trained in (*run.points, run.small))
    assert recipe_a.paired(12, "test_accuracy").mean_difference > 0
    assert recipe_a.paired(12, "epsilon_box").ratio < 0.75
    steps = recipe_a.values(12, "steps")
    assert all(1200 < ours < run.small.steps for ours, run in zip(steps, recipe_a.runs, strict=True))
    assert all((ours - 1200) % 10 == 0 for ours in steps)  # two steps an epoch, looked at every five


def test_recipe_a_turns_the_order_of_accuracy_round_at_equal_epochs(recipe_a):
    assert all(run.equal_epochs.epochs == run.small.epochs for run in recipe_a.runs)
    means = [
        sum(networks) / 3
        for networks in zip(
            *([n.test.accuracy for n in (run.points[0], run.small, run.equal_epochs)] for run in recipe_a.runs), strict=True
        )
    ]
    assert means == sorted(means)  # cold below small below the large batch after as many epochs
    assert "WARNING: equal epochs and equal loss disagree on test_accuracy" in " ".join(str(recipe_a).split())
