"""Training to a matched loss, and the demo, on settings that take seconds."""

import csv
import json
import math
import os
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch

from sharpness_plugins.experiments.comparison import BatchSizeComparison
from sharpness_plugins.experiments.data import as_split, digits_noisy_split, digits_split
from sharpness_plugins.experiments.demo import DemoSettings, run_demo
from sharpness_plugins.experiments.networks import noisy_digits_network, relu_mlp
from sharpness_plugins.experiments.paired import Paired, mean_and_spread, pair
from sharpness_plugins.experiments.recipes import Network, Recipe
from sharpness_plugins.experiments.training import Evaluation, Run, Training, evaluate, seeded, train_to_loss
from sharpness_plugins.metrics import EpsilonBox, HessianTopK
from sharpness_plugins.report import Kind, MetricResult, SharpnessReport, Status

TINY = DemoSettings(
    seeds=1, batch_sizes=(100, 10), widths=(64, 32, 10), num_train=100, target_loss=0.5, warm_epochs=2, max_epochs=300
)


@pytest.fixture(scope="module")
def demo():
    events = []
    before = torch.get_rng_state(), torch.get_num_threads()
    result = run_demo(TINY, metrics=[EpsilonBox(), HessianTopK(k=1)], listener=events.append)
    untouched = torch.equal(torch.get_rng_state(), before[0]) and torch.get_num_threads() == before[1]
    return result, events, untouched


# --- networks and data


def test_initial_weights_are_those_of_manual_seed_and_the_callers_generator_is_not_moved():
    torch.manual_seed(123)
    before = torch.get_rng_state()
    model = relu_mlp((5, 4, 3), seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        expected = [torch.nn.Linear(5, 4), torch.nn.Linear(4, 3)]
    assert torch.equal(model[0].weight, expected[0].weight)
    assert torch.equal(model[2].bias, expected[1].bias)
    assert [type(module).__name__ for module in model] == ["Linear", "ReLU", "Linear"]


def test_digits_are_split_without_overlap_by_the_seed():
    split, same, other = digits_split(0), digits_split(0), digits_split(1)
    assert (len(split.train), len(split.test)) == (500, 1297)
    assert torch.equal(split.train.inputs, same.train.inputs)
    assert not torch.equal(split.train.inputs, other.train.inputs)
    rows = torch.cat([split.train.inputs, split.test.inputs])
    everything = torch.cat([other.train.inputs, other.test.inputs])
    assert torch.equal(rows.sum(0), everything.sum(0))  # each digit once: sums of sixteenths are exact
    assert (rows.min(), rows.max()) == (0, 1)


def test_noisy_digits_are_those_of_the_recipe():
    split, clean = digits_noisy_split(7), digits_noisy_split(7, wrong_share=0.0)
    pixels, digits = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
    order = np.random.RandomState(1007).permutation(len(digits))
    for samples, chosen in ((clean.train, order[:800]), (clean.test, order[-800:])):
        assert torch.equal(samples.inputs, torch.tensor(pixels[chosen] / 16, dtype=torch.float32))
        assert samples.labels.tolist() == digits[chosen].tolist()
    assert torch.equal(split.train.inputs, clean.train.inputs)
    assert torch.equal(split.test.labels, clean.test.labels)
    assert (split.train.labels != clean.train.labels).sum() == 80  # a shift from 1 to 9 changes every chosen label
    assert set(split.train.labels.tolist()) == set(range(10))
    assert torch.equal(split.train.labels, digits_noisy_split(7).train.labels)
    assert not torch.equal(split.train.labels, digits_noisy_split(8).train.labels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_train": 1000}, "together at most 1797, got 1000 and 800"),
        ({"num_test": 0}, "at least 1"),
        ({"wrong_share": 1.5}, "between 0 and 1, got 1.5"),
    ],
)
def test_impossible_noisy_splits_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        digits_noisy_split(0, **changes)


def test_the_network_of_the_noisy_digits_has_unit_variance_and_no_bias():
    model = noisy_digits_network(3)
    assert sum(p.numel() for p in model.parameters()) == 26122
    for layer in (model[0], model[2], model[4]):
        bound = math.sqrt(3 / layer.in_features)
        assert 0.98 * bound < layer.weight.abs().max() <= bound
        assert layer.weight.var().item() == pytest.approx(1 / layer.in_features, rel=0.1)
        assert not layer.bias.any()


def test_data_are_pairs_of_tensors_or_a_split():
    x, y = torch.zeros(3, 2), torch.tensor([0, 1, 1])
    split = as_split(((x, y), (x[:1], y[:1])))
    assert (split.train.inputs is x, len(split.test)) == (True, 1)
    assert as_split(split) is split


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda x, y: [x], TypeError, "got list"),
        (lambda x, y: x, TypeError, "got Tensor"),
        (lambda x, y: ((x.numpy(), y), (x, y)), TypeError, "training inputs and labels must be tensors, got ndarray"),
        (lambda x, y: ((x, y[:2]), (x, y)), ValueError, "as many training labels as inputs and at least one, got 2 and 3"),
        (lambda x, y: ((x, y), (x[:0], y[:0])), ValueError, "test labels .* at least one, got 0 and 0"),
        (lambda x, y: ((x, y.double()), (x, y)), TypeError, "must be int64 of .* Got torch.float64"),
        (lambda x, y: ((x, y), (x, y.int())), TypeError, "the test labels must be int64 .* Got torch.int32"),
        (lambda x, y: ((x, torch.eye(3).long()), (x, y)), TypeError, r"\(3, 3\)"),
    ],
)
def test_data_of_another_shape_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        as_split(make(torch.zeros(3, 2), torch.tensor([0, 1, 1])))


def test_seeded_gives_the_stream_of_the_seed_and_the_callers_back():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    with seeded(3):
        assert torch.equal(torch.rand(4), expected)
    assert torch.equal(torch.get_rng_state(), before)


# --- training


def plain_adam(model, samples, *, batch_size, steps, seed, drop_last, fused=False):
    """The same training in nothing but torch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=fused)
    order, done = torch.Generator().manual_seed(seed), 0
    while True:
        batches = torch.randperm(len(samples), generator=order).split(batch_size)
        for batch in batches:
            if drop_last and len(batch) < batch_size:
                continue
            if done == steps:
                return model
            loss = torch.nn.functional.cross_entropy(model(samples.inputs[batch]), samples.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1


@pytest.mark.parametrize(("drop_last", "per_epoch"), [(True, 3), (False, 4)])
def test_a_run_that_is_stopped_anywhere_is_plain_torch_bit_for_bit(drop_last, per_epoch):
    samples = digits_split(0, num_train=100).train
    run = Run(relu_mlp((64, 16, 10), seed=0), samples, batch_size=30, seed=5, drop_last=drop_last)
    counted = []
    for steps in (1, 4, 2, 6):  # across the ends of epochs
        run.advance(steps)
        counted.append((run.epochs, run.steps, run.samples_seen, run.steps_to_epoch_end))
    ends = [(steps // per_epoch, steps, per_epoch - steps % per_epoch) for steps in (1, 5, 7, 13)]
    assert [(epochs, steps, left) for epochs, steps, _, left in counted] == ends
    assert counted[-1][2] == (13 * 30 if drop_last else 3 * 100 + 30)
    plain = plain_adam(
        relu_mlp((64, 16, 10), seed=0), samples, batch_size=30, steps=13, seed=5, drop_last=drop_last, fused=True
    )
    for got, expected in zip(run.model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(got, expected)


def test_evaluation_in_chunks_is_that_of_all_samples(monkeypatch):
    samples = digits_split(0, num_train=100).test
    model = relu_mlp((64, 16, 10), seed=0)
    whole = evaluate(model, samples)
    with torch.no_grad():
        logits = model(samples.inputs)
        expected = torch.nn.functional.cross_entropy(logits.double(), samples.labels).item()
    assert whole.loss == pytest.approx(expected, rel=1e-12)
    assert whole.accuracy == (logits.argmax(1) == samples.labels).double().mean().item()
    monkeypatch.setattr("sharpness_plugins.experiments.training.EVALUATION_BATCH", 100)  # 1697 samples: the last has 97
    assert evaluate(model, samples) == pytest.approx(whole, rel=1e-6)


def train(batch_size, **changes):
    split = digits_split(0, num_train=100)
    model = relu_mlp((64, 16, 10), seed=0)
    settings = {"batch_size": batch_size, "target_loss": 1.0, "max_epochs": 100, "seed": 0, **changes}
    return model, split.train, train_to_loss(model, split.train, **settings)


def test_training_stops_in_the_first_epoch_below_the_target():
    history = []
    _, _, training = train(16, on_epoch=lambda epochs, loss: history.append((epochs, loss)))
    assert training.reached_target
    assert history[-1] == (training.epochs, training.epoch_loss)
    assert history[-1][1] < 1.0 <= min(loss for _, loss in history[:-1])
    assert training.steps == training.epochs * 7  # ceil(100 / 16): the ragged batch counts
    assert training.samples == training.epochs * 100


def test_training_says_when_the_target_was_not_reached():
    _, _, training = train(100, max_epochs=3)
    assert not training.reached_target
    assert (training.epochs, training.steps) == (3, 3)
    assert training.epoch_loss >= 1.0


def test_epoch_loss_weighs_samples_not_batches():
    # at learning rate zero the epoch's mean loss must be the loss, although the last batch has 4 samples
    model, samples, training = train(96, learning_rate=0.0, max_epochs=1)
    assert training.epoch_loss == pytest.approx(evaluate(model, samples).loss, rel=1e-6)


def test_training_refuses_impossible_batch_sizes():
    with pytest.raises(ValueError, match="the 100 training samples, got 101"):
        train(101)


def test_diverging_training_is_an_error():
    with pytest.raises(ArithmeticError, match="Lower the learning rate"):
        train(100, learning_rate=1e30)


# --- comparison: sentences follow from the numbers


def networks(box_large, accuracy_large, *, eigenvalue_large=9.0, seeds=3, reached=True):
    made = []
    for seed in range(seeds):
        for batch_size in (16, 500):
            large = batch_size == 500
            results = {
                "epsilon_box": MetricResult(box_large if large else 10.0, status=Status(Kind.LOWER_BOUND)),
                "hessian_topk": MetricResult(eigenvalue_large if large else 3.0, status=Status(Kind.CONVERGED)),
            }
            test = Evaluation(0.2, (accuracy_large if large else 0.95) + 0.001 * seed)
            training = Training(5, 10, 100, 0.5, 0.001 if reached or not large else 0.5, reached or not large)
            report = SharpnessReport(results, 0.001)
            made.append(Network(seed, Recipe(batch_size), (training,), Evaluation(0.001, 1.0), test, report))
    return made


def with_warm_start(made, box, accuracy):
    """The large-batch networks once more, after 5 epochs of batch 16, with values of their own."""
    warm = []
    for network in made:
        if network.recipe == Recipe(500):
            results = {**network.report.results, "epsilon_box": MetricResult(box)}
            warm.append(
                replace(
                    network,
                    recipe=Recipe(500, 5, 16),
                    phases=(Training(5, 160, 2500, 0.1, 0.3, False), Training(4, 4, 2000, 0.1, 0.001, True)),
                    test=Evaluation(0.2, accuracy + 0.001 * network.seed),
                    report=SharpnessReport(results, 0.001),
                )
            )
    return [*made, *warm]


def sentences(*args, **kwargs):
    return BatchSizeComparison(networks(*args, **kwargs), 0.002).sentences()


def one(said, *words):
    found = [sentence for sentence in said if all(word in sentence for word in words)]
    assert len(found) == 1, said
    return found[0]


def test_a_reproduction_is_called_one():
    said = sentences(80.0, 0.93)
    assert one(said, "epsilon_box (").endswith(
        "3 of 3 seeds, 8 times as high on average (seed by seed 8, 8, 8): as in the paper."
    )
    generalization = one(said, "Generalization")
    assert "-2.00 points ± 0.00" in generalization
    assert "lower in 3 of 3 seeds: as in the paper." in generalization
    assert "Training loss is matched: all 6 networks" in one(said, "Training loss")
    assert not any("disagree" in sentence or "One seed" in sentence for sentence in said)
    assert one(said, "correlate", "not a cause")


def test_a_failed_reproduction_is_called_one():
    said = sentences(5.0, 0.97)
    assert "NOT as in the paper" in one(said, "epsilon_box (")
    assert "+2.00 points" in one(said, "Generalization")
    assert "NOT as in the paper" in one(said, "Generalization")
    assert (
        one(said, "disagree")
        == "The metrics disagree: hessian_topk call the large-batch minima sharper, epsilon_box do not."
    )


def test_equal_accuracy_is_not_a_reproduction():
    assert "NOT as in the paper" in one(sentences(80.0, 0.95), "Generalization")


def test_an_order_that_holds_only_on_average_is_said():
    made = networks(80.0, 0.93)
    worst = next(i for i, network in enumerate(made) if network.recipe == Recipe(500))
    made[worst] = replace(made[worst], test=Evaluation(0.2, 0.96))
    said = one(BatchSizeComparison(made, 0.002).sentences(), "Generalization")
    assert "lower in 2 of 3 seeds: as in the paper on average, not in every seed" in said


def test_one_seed_claims_no_spread():
    said = sentences(80.0, 0.93, seeds=1)
    assert one(said, "One seed says nothing about the spread")
    assert "±" not in " ".join(said)
    assert "±" not in BatchSizeComparison(networks(80.0, 0.93, seeds=1), 0.002).table()


def test_unmatched_training_loss_is_said():
    assert "NOT matched: 3 of 6 networks (batch 500)" in one(sentences(80.0, 0.93, reached=False), "Training loss")


def test_a_failed_metric_is_left_out_and_said():
    said = sentences(math.nan, 0.93)
    assert "nothing can be said" in one(said, "epsilon_box (")
    table = BatchSizeComparison(networks(math.nan, 0.93), 0.002).table()
    assert next(line for line in table.splitlines() if line.startswith("epsilon_box")).split()[2:] == ["-", "-", "-"]


def test_a_ratio_of_negative_values_is_not_shown():
    table = BatchSizeComparison(networks(80.0, 0.93, eigenvalue_large=-1.0), 0.002).table()
    row = next(line for line in table.splitlines() if line.startswith("hessian_topk"))
    assert row.split()[3:] == ["-", "0", "of", "3", "seeds"]


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([30.0, 40.0, 35.0], "35.0±5.0"),
        ([276.0, 278.0], "277±1"),
        ([0.00149], "0.00149"),
        ([1e-7, 3e-7], "2.00e-07±1e-07"),
        ([0.0, 0.0], "0.00±0.00"),
        ([math.nan], "-"),
        ([2.0, math.nan], "2.00"),
    ],
)
def test_mean_and_spread(values, shown):
    assert mean_and_spread(values) == shown


# --- a warm start is one more recipe


def test_a_warm_start_is_compared_with_its_large_batch_from_the_start():
    comparison = BatchSizeComparison(with_warm_start(networks(80.0, 0.93), 40.0, 0.94), 0.002)
    assert list(map(str, comparison.recipes)) == ["batch 16", "batch 500", "batch 16 for 5 epochs then batch 500"]
    said = one(comparison.sentences(), "Warm start (batch 16 for 5 epochs then batch 500) against batch 500 from the start")
    assert "test accuracy +1.00 points ± 0.00 (paired standard error), higher in 3 of 3 seeds: as in the paper" in said
    assert "epsilon_box 0.5 times as high, lower in 3 of 3" in said
    assert said.endswith("; 164 steps against 10, and 10 at batch 16.")
    head, _, *rows = comparison.table().splitlines()
    assert head.split("  ")[-1].strip() == "higher at 500"
    assert head.split()[:6] == ["batch", "16", "batch", "500", "warm", "start"]
    box = next(row for row in rows if row.startswith("epsilon_box")).split()
    assert box[1:4] == ["10.0±0.0", "80.0±0.0", "40.0±0.0"]
    assert box[4:] == ["x", "8", "3", "of", "3", "seeds"]  # the large against the small batch, not the warm start
    assert "warm start: batch 16 for 5 epochs then batch 500" in comparison.table()


def test_a_warm_start_that_does_not_help_is_called_one():
    comparison = BatchSizeComparison(with_warm_start(networks(80.0, 0.93), 90.0, 0.92), 0.002)
    said = one(comparison.sentences(), "Warm start (")
    assert "-1.00 points ± 0.00 (paired standard error), higher in 0 of 3 seeds: NOT as in the paper" in said
    assert "epsilon_box 1.1 times as high, lower in 0 of 3" in said


def test_a_warm_start_changes_nothing_that_is_said_of_small_and_large():
    plain = BatchSizeComparison(networks(80.0, 0.93), 0.002).sentences()
    warm = BatchSizeComparison(with_warm_start(networks(80.0, 0.93), 40.0, 0.94), 0.002).sentences()
    for word in ("epsilon_box (", "Generalization"):
        assert one(plain, word).split("; ")[0] == one(warm, word).split("; ")[0]
    assert not any("Warm start" in sentence for sentence in plain)


def test_a_network_is_its_dictionary():
    for network in with_warm_start(networks(80.0, 0.93), 40.0, 0.94):
        unfinished = replace(network, phases=(*network.phases, Training(0, 0, 0, 0.0, math.inf, False)))
        for one_network in (network, unfinished):
            data = json.loads(json.dumps(one_network.to_dict(), allow_nan=False))
            assert Network.from_dict(data) == one_network


def test_a_network_counts_all_its_phases():
    network = with_warm_start(networks(80.0, 0.93), 40.0, 0.94)[-1]
    assert (network.epochs, network.steps, network.samples, network.seconds) == (9, 164, 4500, pytest.approx(0.2))
    assert network.reached_target  # the last phase decides


@pytest.mark.parametrize("wrong", [(0,), (500, 5), (500, 0, 16), (500, -1, 16)])
def test_half_a_warm_start_is_refused(wrong):
    with pytest.raises(ValueError, match=r"warm start needs|must be at least 1"):
        Recipe(*wrong)


@pytest.mark.parametrize("num_seeds", [2, 3, 10])
def test_paired_statistics_are_scipys(num_seeds):
    reference, other = np.random.default_rng(num_seeds).normal(size=(2, num_seeds))
    paired = pair(reference.tolist(), other.tolist())
    expected = scipy.stats.ttest_rel(other, reference)
    assert paired.t == pytest.approx(expected.statistic, rel=1e-12)
    assert paired.num_seeds - 1 == expected.df
    low, high = expected.confidence_interval(0.95)
    assert paired.mean_difference == pytest.approx((low + high) / 2, rel=1e-9)
    half = scipy.stats.t.ppf(0.975, expected.df) * paired.standard_error
    assert half == pytest.approx((high - low) / 2, rel=1e-9)
    assert paired.count(1) == (other > reference).sum()


def test_paired_statistics_claim_nothing_that_they_do_not_know():
    assert pair([math.nan, 1.0], [2.0, math.nan]) is None
    assert pair([1.0, math.nan, 3.0], [2.0, 1.0, 5.0]) == Paired((1.0, 3.0), (2.0, 5.0))
    alone = Paired((1.0,), (2.0,))
    assert (alone.standard_error, alone.t) == (None, None)
    assert Paired((1.0, 2.0), (2.0, 3.0)).t is None  # no spread: t is infinite
    assert Paired((1.0, -1.0), (2.0, 3.0)).ratio is None


# --- the demo


def test_demo_measures_every_network_and_leaves_no_trace(demo):
    result, events, untouched = demo
    assert untouched
    recipes = [Recipe(10), Recipe(100), Recipe(100, 2, 10)]
    assert [(network.seed, network.recipe) for network in result.networks] == [(0, recipe) for recipe in recipes]
    assert all(network.reached_target for network in result.networks)
    for network in result.networks:
        assert list(network.report) == ["epsilon_box", "hessian_topk"]
        assert network.report.loss == pytest.approx(network.train.loss, abs=1e-6)  # measured on the training samples
        assert network.report["epsilon_box"].value > 0
    assert [event.network for event in events if event.finished] == [1, 2, 3]
    assert any("passes over the data" in event.text for event in events)
    assert not result.failed


def test_ends_of_the_alpha_plot_are_the_networks(demo):
    result, _, _ = demo
    curve = result.alpha
    assert (curve.small_batch, curve.large_batch) == (10, 100)
    assert (len(curve.alphas), curve.alphas[0], curve.alphas[-1]) == (25, -1, 2)
    for alpha, network in zip((0, 1), result.networks[:2], strict=True):
        at = curve.alphas.index(alpha)
        assert curve.train[at].loss == pytest.approx(network.report.loss, abs=1e-6)
        assert curve.test[at] == network.test
    assert len({point.loss for point in curve.train}) == 25


def test_demo_is_repeatable(demo):
    again = run_demo(TINY, metrics=[EpsilonBox(), HessianTopK(k=1)])
    for got, expected in zip(again.networks, demo[0].networks, strict=True):
        assert (got.train, got.test, got.steps) == (expected.train, expected.test, expected.steps)
        for key in expected.report:
            assert got.report[key].value == expected.report[key].value


def test_the_warm_start_is_the_small_batch_then_the_large_one_with_a_new_optimizer(demo):
    network = demo[0].networks[-1]
    split = digits_split(0, num_train=100)
    model = plain_adam(
        relu_mlp(TINY.widths, seed=0), split.train, batch_size=10, steps=20, seed=0, drop_last=False
    )  # fmt: skip
    steps = network.phases[1].steps
    model = plain_adam(model, split.train, batch_size=100, steps=steps, seed=0, drop_last=False)
    assert (network.phases[0].epochs, network.phases[0].steps, network.steps) == (2, 20, 20 + steps)
    assert evaluate(model, split.test) == network.test
    assert evaluate(model, split.train) == network.train


def test_every_recipe_starts_from_the_same_weights(monkeypatch):
    started = []

    def spy(model, samples, **settings):
        started.append(torch.cat([p.detach().flatten() for p in model.parameters()]).clone())
        return train_to_loss(model, samples, **settings)

    monkeypatch.setattr("sharpness_plugins.experiments.demo.train_to_loss", spy)
    settings = DemoSettings(2, (50, 100), widths=(64, 4, 10), num_train=100, warm_epochs=1, max_epochs=1)
    run_demo(settings, metrics=[HessianTopK(k=1)])
    first, second = started[:4], started[4:]  # small, large, warm, and the large batch after the warm start
    for weights in first[1:3]:
        assert torch.equal(first[0], weights)
    assert not torch.equal(first[0], first[3])
    assert not torch.equal(first[0], second[0])


def test_the_demo_can_leave_out_the_warm_start():
    settings = DemoSettings(1, (50, 100), widths=(64, 4, 10), num_train=100, warm_epochs=0, max_epochs=1)
    result = run_demo(settings, metrics=[HessianTopK(k=1)])
    assert [network.recipe for network in result.networks] == [Recipe(50), Recipe(100)]
    assert "warm start" not in str(result)


def test_demo_files(demo, tmp_path):
    result, _, _ = demo
    folder = tmp_path / "new" / "folder"
    paths = result.write(folder)
    assert sorted(os.listdir(folder)) == sorted(path.name for path in paths)  # no temporary file is left
    data = json.loads((folder / "results.json").read_text())
    assert (data["schema_version"], data["seeds"], data["settings"]["batch_sizes"]) == (1, [0], [10, 100])
    assert data["versions"]["torch"]
    reread = SharpnessReport.from_dict(data["networks"][1]["report"])
    assert reread["epsilon_box"].value == result.networks[1].report["epsilon_box"].value
    with open(folder / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["batch_size"]), int(row["warm_epochs"])) for row in rows] == [(10, 0), (100, 0), (100, 2)]
    assert float(rows[0]["hessian_topk"]) == result.networks[0].report["hessian_topk"].value
    assert rows[0]["epsilon_box_status"] == "lower bound"
    assert (folder / "table.txt").read_text() == f"{result}\n"
    for name in ("alpha_plot.png", "sharpness_vs_batch_size.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_a_failed_write_leaves_the_old_file(demo, tmp_path, monkeypatch):
    (tmp_path / "results.json").write_text("old")

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        demo[0].write(tmp_path)
    assert os.listdir(tmp_path) == ["results.json"]
    assert (tmp_path / "results.json").read_text() == "old"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": 0}, "at least 1, got 0"),
        ({"batch_sizes": (16, 16)}, "two different"),
        ({"batch_sizes": (16, 501)}, "the 500 training samples"),
        ({"batch_sizes": (0, 16)}, "between 1"),
        ({"warm_epochs": -1}, "warm_epochs 0, got 500 and -1"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DemoSettings(**settings)
