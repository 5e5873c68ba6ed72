"""Dinh's rescaling, and that the README of the reproduction shows what its records hold."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from keskar2017_example import example_record
from keskar2017_page import Page
from sharpness_plugins.experiments.data import digits_split
from sharpness_plugins.experiments.keskar2017.findings import top_eigenvalue
from sharpness_plugins.experiments.keskar2017.record import Record, box
from sharpness_plugins.experiments.keskar2017.record import test_accuracy as accuracy
from sharpness_plugins.experiments.keskar2017.report.agreement import claims
from sharpness_plugins.experiments.keskar2017.report.datasets import all_datasets
from sharpness_plugins.experiments.keskar2017.report.figures import all_drawings
from sharpness_plugins.experiments.keskar2017.report.reading import Reading
from sharpness_plugins.experiments.networks import relu_mlp

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
NAME = "benchmarks_under_test"


def load(module: str) -> ModuleType:
    """By its path: another package on this machine may be called ``benchmarks``."""
    if NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(NAME, BENCHMARKS / "__init__.py")
        assert spec is not None
        sys.modules[NAME] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{NAME}.keskar2017.{module}")


rescaling, command = load("rescaling"), load("__main__")


@pytest.mark.parametrize("alpha", [0.1, 10.0])
def test_rescaling_leaves_the_function_and_what_is_scaled_by_the_weights_and_moves_the_rest(alpha):
    split = digits_split(0, num_train=60)
    split = type(split)(*(type(half)(half.inputs.double(), half.labels) for half in (split.train, split.test)))
    model = relu_mlp((64, 12, 12, 10), seed=0).double().eval()
    before, after = rescaling.measured(model, split, (1.0, alpha))
    assert after["logits_moved"] < 1e-14
    assert after["loss"] == pytest.approx(before["loss"], rel=1e-13)
    assert after["test_accuracy"] == before["test_accuracy"]
    assert after["adaptive_topk"] == pytest.approx(before["adaptive_topk"], rel=1e-2)
    for key in ("hessian_topk", "epsilon_box"):
        assert after[key] != pytest.approx(before[key], rel=0.2)
    assert torch.equal(rescaling.rescaled(model, 1.0)[0].weight, model[0].weight)


def test_rescaling_by_a_negative_number_is_refused():
    with pytest.raises(ValueError, match="positive"):
        rescaling.rescaled(relu_mlp((4, 3, 2), seed=0), -1.0)


def test_the_readme_shows_what_the_records_hold():
    """After a new run: ``python -m benchmarks.keskar2017 --write``."""
    readme = (BENCHMARKS / "keskar2017" / "README.md").read_text(encoding="utf-8")
    assert command.updated(readme) == readme
    rows = json.loads((BENCHMARKS / "keskar2017" / "rescaling.json").read_text(encoding="utf-8"))["rows"]
    by_alpha = {row["alpha"]: row for row in rows}
    assert all(row["logits_moved"] < 1e-14 for row in rows)
    assert by_alpha[0.1]["adaptive_topk"] == pytest.approx(by_alpha[10.0]["adaptive_topk"], rel=1e-3)
    assert min(by_alpha[alpha]["epsilon_box"] / by_alpha[1.0]["epsilon_box"] for alpha in (0.1, 10.0)) > 20


def test_tables_of_a_record_are_put_between_the_markers(tmp_path):
    record = example_record()
    (tmp_path / "record.json").write_text(record.to_json(), encoding="utf-8")
    (tmp_path / "rescaling.json").write_text((BENCHMARKS / "keskar2017" / "rescaling.json").read_text())
    markers = "a\n<!-- rescaling -->\n<!-- end of rescaling -->\n<!-- results -->\nstale text\n<!-- end of results -->\nc\n"
    readme = command.updated(markers, tmp_path)
    assert "stale text" not in readme
    assert readme.endswith("<!-- end of results -->\nc\n")
    assert command.updated(readme, tmp_path) == readme
    for part in (
        record.command,
        record.sentences[0],
        "| paper, F1 |",
        "| here, equal training loss: our solver | 60.0±28.3 |",
    ):
        assert part in readme
    with pytest.raises(ValueError, match="markers"):
        command.updated("nothing here", tmp_path)


def test_the_recorded_report_is_that_of_the_recorded_run():
    """Its data, and the verdicts in its page; after a new run: ``python -m benchmarks.keskar2017 --write``."""
    folder = BENCHMARKS / "keskar2017"
    reading = Reading(Record.read(folder))
    found = claims(reading)
    datasets = all_datasets(reading, found)
    assert {path.stem for path in (folder / "data").iterdir()} == {dataset.name for dataset in datasets}
    for dataset in datasets:
        assert (folder / "data" / f"{dataset.name}.csv").read_text(encoding="utf-8") == dataset.csv, dataset.name
    assert {path.stem for path in (folder / "figures").iterdir()} == {drawing.name for drawing in all_drawings(reading)}
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    rows = {element.attributes["id"]: element.text for element in page.elements("tr") if "id" in element.attributes}
    for claim in found:
        text = rows[f"claim-{claim.key}"]
        assert all(part in text for part in (claim.paper, claim.here, str(claim.agrees), claim.reason, claim.rule))


def test_the_readmes_words_are_what_the_record_says():
    """Where it draws a conclusion without a number."""
    record = Record.read(BENCHMARKS / "keskar2017")
    sharp = box("full", 1e-3, "ours")
    ratios = {study: record.paired(study, sharp).ratio for study in ("matched_loss", "sqrt_rate", "linear_rate")}
    gaps = {study: record.paired(study, accuracy).mean_difference for study in ratios}
    assert ratios["sqrt_rate"] < 2 < 8 < ratios["matched_loss"]
    assert gaps["sqrt_rate"] < 0.8 * gaps["matched_loss"] < 0
    assert ratios["linear_rate"] < 0.1
    assert gaps["linear_rate"] < 3 * gaps["matched_loss"]
    assert record.paired("equal_updates", sharp).count(1) == record.paired("equal_updates", top_eigenvalue).count(-1) == 5
    augmented = record.paired("remedies", accuracy, reference="none", other="augmentation")
    assert augmented.count(1) == 5
    assert record.paired("remedies", sharp, other="augmentation").ratio > 8
    rows = json.loads((BENCHMARKS / "keskar2017" / "rescaling.json").read_text(encoding="utf-8"))["rows"]
    by_alpha = {row["alpha"]: row["epsilon_box"] for row in rows}
    assert min(by_alpha[0.1], by_alpha[10.0]) / by_alpha[1.0] > ratios["matched_loss"]
