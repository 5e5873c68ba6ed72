"""The report as a table, a dict, JSON, a data frame and HTML."""

import json
import math
import pickle
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from sharpness_plugins.report import Cost, Kind, MetricResult, SharpnessReport, Status


def report_of(**changes):
    results = {
        "epsilon_box": MetricResult(
            12.3456789,
            status=Status(Kind.LOWER_BOUND, "best of 2 starts"),
            details={"epsilon": 1e-3, "values": [1.0, 2.0]},
            cost=Cost(values=1, gradients=24, hvps=0, passes=25, seconds=1.25),
        ),
        "a_metric_with_a_rather_long_name": MetricResult(-1.5e-7, standard_error=2.5e-8),
        "broken": MetricResult.failed("ValueError: <no> luck"),
    }
    provenance = {
        "model": "Net",
        "dim": 12345,
        "num_samples": 678,
        "loss_rule": "cross-entropy",
        "notes": ["the weights were bf16"],
    }
    settings = {"results": results, "loss": 0.25, "provenance": provenance, "cost": Cost(3, 30, 2, 35, 4.5)}
    return SharpnessReport(**{**settings, **changes})


def test_costs_add_and_subtract_term_by_term():
    a, b = Cost(1, 2, 3, 4, 5), Cost(10, 20, 30, 40, 50)
    assert a + b == Cost(11, 22, 33, 44, 55)
    assert (a + b) - b == a


def test_a_report_is_a_mapping():
    report = report_of()
    assert isinstance(report, Mapping)
    assert list(report) == list(report.keys()) == ["epsilon_box", "a_metric_with_a_rather_long_name", "broken"]
    assert len(report) == 3
    assert "broken" in report
    assert "unbroken" not in report
    assert dict(report)["epsilon_box"] is report["epsilon_box"] is next(iter(report.values()))
    assert report.get("unbroken") is None
    assert report["epsilon_box"].value == 12.3456789
    assert math.isnan(report["broken"].value)


@pytest.mark.parametrize(
    ("key", "says"),
    [("epsilon_bax", "no result 'epsilon_bax'. Did you mean 'epsilon_box'"), ("zzz", "Results: 'epsilon_box'"), (0, "0")],
)
def test_a_missing_key_names_the_nearest(key, says):
    with pytest.raises(KeyError, match=says):
        report_of()[key]


def test_table_has_every_number_in_columns():
    lines = str(report_of()).splitlines()
    assert lines[0] == "Sharpness of Net: 12,345 parameters, 678 samples, mean loss 0.25 (cross-entropy)"
    head, rule, *rows = lines[2:7]
    assert set(rule) == {"-"}
    names = re.split(r"  +", head)
    assert names == ["metric", "value", "std. error", "what it is", "gradients", "HVPs", "passes", "seconds"]
    cells = [re.split(r"  +", row) for row in rows]
    assert cells == [
        ["epsilon_box", "12.346", "-", "lower bound", "24", "0", "25", "1.25"],
        ["a_metric_with_a_rather_long_name", "-1.5e-07", "±2.5e-08", "estimate", "-", "-", "-", "-"],
        ["broken", "nan", "-", "failed", "-", "-", "-", "-"],
    ]
    assert len({len(line) for line in [head, rule, *rows]}) == 1
    ends = {name: head.index(name) + len(name) for name in names}
    for row, texts in zip(rows, cells, strict=True):
        assert row.startswith(texts[0])
        assert row.index(texts[3]) == head.index("what it is")
        for column in (1, 2, 4, 5, 6, 7):  # numbers end where their heading ends
            end = ends[names[column]]
            assert row[:end].endswith(texts[column])
            assert row[end : end + 1] in ("", " ")
    assert lines[8:] == [
        "epsilon_box: best of 2 starts",
        "broken: ValueError: <no> luck",
        "note: the weights were bf16",
    ]


def test_a_report_without_results_still_prints():
    empty = SharpnessReport({}, 1.5)
    assert str(empty).startswith("Loss 1.5\n")
    assert "what it is" in str(empty)
    assert len(empty.to_frame()) == 0
    assert "gradients" in empty.to_frame().columns


def test_repr_is_one_short_line():
    assert repr(report_of()).startswith("<SharpnessReport epsilon_box=12.35, ")
    assert "\n" not in repr(report_of())


def test_html_escapes_what_users_wrote():
    report = report_of(provenance={"model": "<b>", "num_samples": 1, "notes": ["a & b"]})
    page = report._repr_html_()
    assert "<b>" not in page
    assert "&lt;b&gt;" in page
    assert "&lt;no&gt; luck" in page
    assert "a &amp; b" in page
    assert page.count("<tr>") == 4
    assert page.count("<td>") == 3 * 8


def test_json_is_strict_and_comes_back():
    report = report_of()
    text = report.to_json()
    data = json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
    assert data["results"]["broken"]["value"] is None
    again = SharpnessReport.from_json(text)
    assert str(again) == str(report)
    assert again.to_dict() == report.to_dict()
    assert again["epsilon_box"] == report["epsilon_box"]
    assert again.cost == report.cost
    assert again.notes == ["the weights were bf16"]
    assert "\n" not in report.to_json(indent=None)
    assert pickle.loads(pickle.dumps(report)).to_dict() == report.to_dict()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_come_back_as_nan(value):
    result = MetricResult(value, standard_error=value, details={"values": [1.0, value]}, cost=Cost(seconds=value))
    again = SharpnessReport.from_json(SharpnessReport({"m": result}, value).to_json())
    assert math.isnan(again["m"].value)
    assert again["m"].details == {"values": [1.0, None]}
    assert math.isnan(again["m"].cost.seconds)
    assert math.isnan(again.loss)
    assert "nan" in str(again)


def test_details_may_hold_tensors_arrays_and_anything_else():
    details = {
        "tensor": torch.tensor([1.0, math.nan]),
        "scalar": torch.tensor(2),
        "array": np.arange(2),
        "float64": np.float64(0.5),
        "bool": np.bool_(True),
        "true": True,
        "big": 10**30,
        "set": {"b", "a"},
        "tuple": (1, None, Kind.EXACT),
        "path": Path("a"),
        "dtype": torch.float32,
        3: {"nested": Status(Kind.EXACT, "so")},
    }
    plain = SharpnessReport({"m": MetricResult(1.0, details=details)}, 0.0).to_dict()["results"]["m"]["details"]
    assert plain == {
        "tensor": [1.0, None],
        "scalar": 2,
        "array": [0, 1],
        "float64": 0.5,
        "bool": True,
        "true": True,
        "big": 10**30,
        "set": ["a", "b"],
        "tuple": [1, None, "exact"],
        "path": repr(Path("a")),
        "dtype": "torch.float32",
        "3": {"nested": {"kind": "exact", "message": "so"}},
    }
    assert type(plain["float64"]) is float
    json.dumps(plain, allow_nan=False)


@pytest.mark.parametrize("text", ["", "{", "not json", "<html>"])
def test_text_that_is_not_json_is_refused(text):
    with pytest.raises(ValueError, match="not a sharpness report: it is not JSON"):
        SharpnessReport.from_json(text)


@pytest.mark.parametrize("text", ["[]", "3", "null", "{}", '{"schema_version": "1"}', '{"results": {}}'])
def test_foreign_json_is_refused(text):
    with pytest.raises(ValueError, match="not a sharpness report: it has no 'schema_version'"):
        SharpnessReport.from_json(text)


def test_reports_of_a_newer_version_are_refused_with_what_to_do():
    data = {**report_of().to_dict(), "schema_version": 2}
    with pytest.raises(ValueError, match=r"schema version 2.*reads up to 1. Upgrade with: pip install"):
        SharpnessReport.from_dict(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("results"),
        lambda d: d.pop("loss"),
        lambda d: d.update(loss="low"),
        lambda d: d.update(results=[1]),
        lambda d: d.update(cost=None),
        lambda d: d.update(cost={}),
        lambda d: d.update(provenance=None),
        lambda d: d["results"]["epsilon_box"].pop("status"),
        lambda d: d["results"]["epsilon_box"].update(status={"kind": "guess", "message": ""}),
        lambda d: d["results"]["epsilon_box"].update(details=None),
        lambda d: d["results"]["epsilon_box"].update(standard_error="small"),
        lambda d: d["results"].update(epsilon_box=None),
    ],
)
def test_damaged_reports_are_refused(damage):
    data = json.loads(report_of().to_json())
    damage(data)
    with pytest.raises(ValueError, match="this sharpness report is damaged"):
        SharpnessReport.from_dict(data)


def test_data_frame_has_one_row_for_each_metric():
    frame = report_of().to_frame()
    assert list(frame.index) == list(report_of())
    assert frame.loc["epsilon_box", "value"] == 12.3456789
    assert frame.loc["epsilon_box", "gradients"] == 24
    assert frame.loc["epsilon_box", "kind"] == "lower bound"
    assert math.isnan(frame.loc["epsilon_box", "standard_error"])
    assert math.isnan(frame.loc["broken", "seconds"])
    assert frame.loc["broken", "status"] == "ValueError: <no> luck"


def test_without_pandas_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"SharpnessReport.to_frame needs pandas.*pip install pandas"):
        report_of().to_frame()


def test_status_and_kind_read_as_text():
    assert str(Kind.NOT_CONVERGED) == "not converged"
    assert str(Status(Kind.EXACT)) == "exact"
    assert str(Status(Kind.ESTIMATE, "of 5 draws")) == "estimate: of 5 draws"
