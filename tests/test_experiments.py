"""Training to a matched loss, and the demo, on settings that take seconds."""

import csv
import json
import math
import os

import pytest
import torch

from sharpness_plugins.experiments.comparison import BatchSizeComparison, Network, mean_and_spread
from sharpness_plugins.experiments.data import digits_split
from sharpness_plugins.experiments.demo import DemoSettings, run_demo
from sharpness_plugins.experiments.networks import relu_mlp
from sharpness_plugins.experiments.training import Evaluation, Training, evaluate, train_to_loss
from sharpness_plugins.metrics import EpsilonBox, HessianTopK
from sharpness_plugins.report import Kind, MetricResult, SharpnessReport, Status

TINY = DemoSettings(seeds=1, batch_sizes=(100, 10), widths=(64, 32, 10), num_train=100, target_loss=0.5, max_epochs=300)


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


# --- training


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
    assert training.updates == training.epochs * 7  # ceil(100 / 16): the ragged batch counts


def test_training_says_when_the_target_was_not_reached():
    _, _, training = train(100, max_epochs=3)
    assert not training.reached_target
    assert (training.epochs, training.updates) == (3, 3)
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
            training = Training(5, 10, 0.001 if reached or not large else 0.5, reached or not large)
            made.append(Network(seed, batch_size, training, Evaluation(0.001, 1.0), test, SharpnessReport(results, 0.001)))
    return made


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
    worst = next(i for i, network in enumerate(made) if network.batch_size == 500)
    made[worst] = Network(0, 500, made[worst].training, made[worst].train, Evaluation(0.2, 0.96), made[worst].report)
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


# --- the demo


def test_demo_measures_every_network_and_leaves_no_trace(demo):
    result, events, untouched = demo
    assert untouched
    assert [(network.seed, network.batch_size) for network in result.networks] == [(0, 10), (0, 100)]
    assert all(network.training.reached_target for network in result.networks)
    for network in result.networks:
        assert list(network.report) == ["epsilon_box", "hessian_topk"]
        assert network.report.loss == pytest.approx(network.train.loss, abs=1e-6)  # measured on the training samples
        assert network.report["epsilon_box"].value > 0
    assert [event.network for event in events if event.finished] == [1, 2]
    assert any("passes over the data" in event.text for event in events)
    assert not result.failed


def test_ends_of_the_alpha_plot_are_the_networks(demo):
    result, _, _ = demo
    curve = result.alpha
    assert (curve.small_batch, curve.large_batch) == (10, 100)
    assert (len(curve.alphas), curve.alphas[0], curve.alphas[-1]) == (25, -1, 2)
    for alpha, network in zip((0, 1), result.networks, strict=True):
        at = curve.alphas.index(alpha)
        assert curve.train[at].loss == pytest.approx(network.report.loss, abs=1e-6)
        assert curve.test[at] == network.test
    assert len({point.loss for point in curve.train}) == 25


def test_demo_is_repeatable(demo):
    again = run_demo(TINY, metrics=[EpsilonBox(), HessianTopK(k=1)])
    assert again.to_csv() == demo[0].to_csv()


def test_both_batch_sizes_start_from_the_same_weights(monkeypatch):
    started = []

    def spy(model, samples, **settings):
        started.append(torch.cat([p.detach().flatten() for p in model.parameters()]).clone())
        return train_to_loss(model, samples, **settings)

    monkeypatch.setattr("sharpness_plugins.experiments.demo.train_to_loss", spy)
    run_demo(DemoSettings(2, (50, 100), widths=(64, 4, 10), num_train=100, max_epochs=1), metrics=[HessianTopK(k=1)])
    assert torch.equal(started[0], started[1])
    assert not torch.equal(started[0], started[2])


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
    assert [int(row["batch_size"]) for row in rows] == [10, 100]
    assert float(rows[0]["hessian_topk"]) == result.networks[0].report["hessian_topk"].value
    assert rows[0]["epsilon_box_status"] == "lower bound"
    assert (folder / "table.txt").read_text() == f"{result}\n"
    for name in ("alpha_plot.png", "sharpness_vs_batch_size.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_a_failed_write_leaves_the_old_file(demo, tmp_path, monkeypatch):
    (tmp_path / "results.json").write_text("old")

    def no_space(self, content):
        with open(self, "wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", no_space)
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
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DemoSettings(**settings)
