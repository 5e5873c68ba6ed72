"""The record of the reproduction: a complete example, as the report reads it."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest

from keskar2017_example import example_record
from sharpness_plugins.experiments.keskar2017 import record as model
from sharpness_plugins.experiments.keskar2017.findings import top_eigenvalue
from sharpness_plugins.experiments.keskar2017.record import STUDIES, Record, box
from sharpness_plugins.experiments.paired import mean_and_spread


def test_json_round_trip_keeps_every_field_and_is_stable():
    record = example_record()
    text = record.to_json()
    again = Record.from_json(text)
    assert again.to_json() == text
    assert again.networks("matched_loss", "large")[1] == record.networks("matched_loss", "large")[1]
    assert again.studies == record.studies
    assert again.curves == record.curves


def test_what_is_not_finite_is_null_in_the_file_and_nan_here():
    record = Record.from_json(example_record().to_json())
    point = next(t for t in record.trajectories if t.purpose == "warm_start").points[0]
    assert math.isnan(point.sharpness)
    assert "NaN" not in example_record().to_json()


def test_example_has_every_study_of_the_data_model():
    assert set(example_record().studies) == set(STUDIES)


def test_a_network_is_found_by_study_and_role_and_paired_by_seed():
    record = example_record()
    paired = record.paired("matched_loss", box("full", 1e-3, "ours"))
    assert paired is not None
    assert paired.seed_ratios == pytest.approx([8.0, 8.0])
    accuracies = record.paired("matched_loss", model.test_accuracy)
    assert accuracies is not None
    assert accuracies.mean_difference == pytest.approx(-0.01)
    assert [network.seed for network in record.networks("matched_loss", "small")] == [0, 1]


def test_ratio_of_epsilons_and_counts():
    network = example_record().networks("matched_loss", "small")[0]
    assert network.box_ratio("full", "ours") == pytest.approx(4.0)
    assert math.isnan(network.box_ratio("full", "published"))  # it found no rise at all
    assert network.curvature.count_above(0.5) == pytest.approx(10)
    assert network.curvature.share_within(1e-3) == pytest.approx(0.9)
    assert network.cone.random_share == 0
    assert network.cone.top_share == 0.5
    # ½ λ 0.47² of 1.0018 is 1 % from λ = 0.0907 on: the nodes at 0.1 and at 1
    assert network.steep_dimensions == pytest.approx(1000 * (0.09 + 0.01))


@pytest.mark.parametrize("change", [{"schema_version": 0}, {"all_networks": [{"seed": 1}]}])
def test_another_or_damaged_file_is_refused(change):
    data = json.loads(example_record().to_json()) | change
    with pytest.raises(ValueError, match="record"):
        Record.from_dict(data)


def test_unknown_study_and_role_are_named():
    with pytest.raises(ValueError, match="matched_loss"):
        example_record().networks("matched", "small")
    with pytest.raises(ValueError, match="small, large"):
        example_record().networks("matched_loss", "medium")


RECORDED = Path(__file__).parent.parent / "benchmarks" / "keskar2017"


def test_the_recorded_run_holds_what_the_readme_says_of_it():
    record = Record.read(RECORDED)
    sharp = box("full", 1e-3, "ours")
    assert record.seeds == (0, 1, 2, 3, 4)
    matched = record.paired("matched_loss", sharp)
    assert min(matched.seed_ratios) >= 3
    assert record.paired("matched_loss", model.test_accuracy).count(-1) == 5
    assert all(network.ended for network in record.all_networks)
    roles = ["cold", "5", "12", "25", "50"]
    for seed in range(5):
        along = [record.values("warm_start", role, sharp)[seed] for role in roles]
        assert along == sorted(along, reverse=True)
    means = {role: statistics.fmean(record.values("warm_start", role, model.test_accuracy)) for role in (*roles, "small")}
    assert [means[role] for role in roles] == sorted(means[role] for role in roles)
    assert means["50"] >= means["small"]
    readme = (RECORDED.parent.parent / "README.md").read_text(encoding="utf-8")
    for study in ("protocol", "matched_loss"):
        for quantity in (sharp, box("subspace", 1e-3, "ours"), top_eigenvalue):
            paired = record.paired(study, quantity)
            assert f"{mean_and_spread(paired.other)}         x {paired.ratio:.3g} " in readme


def test_ends_of_the_recorded_lines_are_the_recorded_networks():
    record = Record.read(RECORDED)
    for curve in record.curves:
        for alpha, role in ((0.0, "small"), (1.0, "large")):
            network, place = record.networks(curve.study, role)[0], curve.alphas.index(alpha)
            assert curve.train[place].loss == pytest.approx(network.train.loss, abs=1e-6)
            assert curve.test[place].loss == pytest.approx(network.test.loss, abs=1e-6)
