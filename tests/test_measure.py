"""The front door: names, keys, seeds, failures, provenance."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import oracles
import sharpness_plugins
from sharpness_plugins import (
    DuplicateNameError,
    Kind,
    MetricResult,
    PluginWarning,
    SharpnessReport,
    Status,
    UnknownNameError,
    available_metrics,
    get_metric,
    measure_sharpness,
    metric,
)
from sharpness_plugins.metrics import EpsilonBox, HessianTopK, RandomSubspace
from sharpness_plugins.registry import fresh_registry


@pytest.fixture(autouse=True)
def _own_registry():
    with fresh_registry():
        yield


@pytest.fixture
def problem():
    return oracles.small_classifier(torch.float32)


def values(report: SharpnessReport) -> dict[str, float]:
    return {key: result.value for key, result in report.items()}


def test_the_bare_call_measures_the_three_built_ins(problem):
    report = measure_sharpness(problem.model, problem.loader(7, 13))
    assert list(report) == ["epsilon_box", "random_subspace", "hessian_topk"]
    assert report.loss == pytest.approx(nn.functional.cross_entropy(problem.model(problem.inputs), problem.targets).item())
    assert report["epsilon_box"].status.kind is Kind.LOWER_BOUND
    assert report["random_subspace"].standard_error > 0
    assert report["hessian_topk"].value == report["hessian_topk"].details["eigenvalues"][0]
    for result in report.results.values():
        assert result.value > 0
        assert result.status.message
        assert result.cost.passes > 0
        assert result.cost.seconds > 0
    text = str(report)
    assert "cross-entropy on integer targets" in text
    for key in report:
        assert key in text


def test_costs_are_told_apart_and_add_up(problem):
    report = measure_sharpness(problem.model, problem.loader())
    box, subspace, top = (report[key].cost for key in report)
    assert (box.hvps, subspace.hvps) == (0, 0)
    assert box.gradients == report["epsilon_box"].details["gradients_in_solver"] + 1  # of the one class that was tried
    assert box.values == 3  # its probability, and the vertices that raise and lower it
    assert 0 < top.gradients < 5  # what products were tried on
    assert subspace.gradients == sum(s["gradients_in_solver"] for s in report["random_subspace"].details["solver"])
    assert top.hvps == report["hessian_topk"].details["num_matvecs"]
    assert report.cost.passes == pytest.approx(1 + sum(result.cost.passes for result in report.results.values()))


def test_same_seed_same_numbers_and_another_metric_changes_none(problem):
    alone = measure_sharpness(problem.model, problem.loader(), "random_subspace", seed=3)
    among = measure_sharpness(problem.model, problem.loader(), ["hessian_topk", "epsilon_box", "random_subspace"], seed=3)
    other = measure_sharpness(problem.model, problem.loader(), "random_subspace", seed=4)
    assert alone["random_subspace"].value == among["random_subspace"].value != other["random_subspace"].value


def test_the_global_seed_does_not_matter(problem):
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(values(measure_sharpness(problem.model, problem.loader())))
    assert found[0] == found[1]


@pytest.mark.parametrize("sizes", [(5, 5, 5, 5), (1, 19), (13, 7)])
def test_any_batching_gives_the_same_numbers(sizes):
    problem = oracles.small_classifier()
    whole = values(measure_sharpness(problem.model, problem.loader()))
    assert values(measure_sharpness(problem.model, problem.loader(*sizes))) == pytest.approx(whole, rel=1e-9)


def test_cached_and_streamed_batches_give_the_same_numbers(problem):
    data = torch.utils.data.TensorDataset(problem.inputs, problem.targets)
    loader = torch.utils.data.DataLoader(data, batch_size=6, shuffle=True)
    cached = measure_sharpness(problem.model, loader)
    streamed = measure_sharpness(problem.model, loader, cache_bytes=0)
    assert values(cached) == values(streamed)
    assert cached.provenance["batches"] == "cached on cpu"
    assert streamed.provenance["batches"] == "read anew at every pass"


def test_metrics_by_every_way_of_naming_them(problem):
    def keys(metrics):
        return list(measure_sharpness(problem.model, problem.loader(), metrics))

    assert keys("hessian_topk") == ["hessian_topk"]
    assert keys(HessianTopK(k=1)) == ["hessian_topk"]
    assert keys(HessianTopK) == ["hessian_topk"]
    assert keys(["builtin:hessian_topk", EpsilonBox()]) == ["hessian_topk", "epsilon_box"]
    assert keys({"top one": HessianTopK(k=1), "box": "epsilon_box"}) == ["top one", "box"]


def test_two_instances_of_one_metric_get_keys_that_tell_their_settings(problem):
    metrics = [EpsilonBox(1e-3), EpsilonBox(5e-4), HessianTopK(k=1), RandomSubspace(dim=3), RandomSubspace(dim=3)]
    report = measure_sharpness(problem.model, problem.loader(), metrics)
    assert list(report) == [
        "epsilon_box(epsilon=0.001)",
        "epsilon_box(epsilon=0.0005)",
        "hessian_topk",
        "random_subspace",
        "random_subspace#2",
    ]
    assert report["epsilon_box(epsilon=0.001)"].value > report["epsilon_box(epsilon=0.0005)"].value
    # the two share their random starts, so that they can be compared
    assert report["random_subspace"].value == report["random_subspace#2"].value
    with pytest.raises(KeyError, match="epsilon_box"):
        report["epsilon_box"]


def test_a_function_is_a_metric_at_once(problem):
    @metric("weight_norm")
    def weight_norm(objective, *, power=2.0):
        return objective.origin.norm(p=power)

    report = measure_sharpness(problem.model, problem.loader(), ["weight_norm", get_metric("weight_norm", power=1.0)])
    norms = [problem.flat_weights().norm(p=p).item() for p in (2.0, 1.0)]
    assert list(values(report).values()) == pytest.approx(norms)
    assert list(report) == ["weight_norm(power=2)", "weight_norm(power=1)"]
    assert "weight_norm" in available_metrics()


def test_a_frozen_dataclass_is_a_metric_without_any_base_class(problem):
    @dataclass(frozen=True)
    class GradientNorm:
        order: float = 2.0

        def __call__(self, objective, rng):
            return MetricResult(
                objective.value_and_grad()[1].norm(p=self.order).item(), status=Status(Kind.EXACT, "by hand")
            )

    report = measure_sharpness(problem.model, problem.loader(), [GradientNorm()])
    assert list(report) == ["gradient_norm"]
    assert report["gradient_norm"].cost.gradients == 1


class Raises:
    def __call__(self, objective, rng):
        raise RuntimeError("on purpose")


class NotANumber:
    def __call__(self, objective, rng):
        return MetricResult(float("nan"))


class WrongType:
    def __call__(self, objective, rng):
        return "sharp"


@pytest.mark.parametrize(
    ("bad", "said"),
    [(Raises(), "RuntimeError: on purpose"), (NotANumber(), "value is nan"), (WrongType(), "returned a str")],
)
def test_a_metric_that_fails_is_in_the_report_and_the_others_are_measured(problem, bad, said):
    with pytest.warns(PluginWarning, match=said):
        report = measure_sharpness(problem.model, problem.loader(), [bad, "hessian_topk"])
    failed, fine = report.results.values()
    assert failed.status.kind is Kind.FAILED
    assert said in failed.status.message
    assert fine.status.kind is Kind.CONVERGED
    assert json.loads(report.to_json())["results"][next(iter(report))]["value"] is None
    assert "failed" in str(report)


def test_strict_mode_raises(problem, monkeypatch):
    monkeypatch.setenv("SHARPNESS_PLUGINS_STRICT", "1")
    with pytest.raises(RuntimeError, match="on purpose"):
        measure_sharpness(problem.model, problem.loader(), [Raises()])


def test_ctrl_c_in_a_metric_stops_everything(problem):
    class Interrupted:
        def __call__(self, objective, rng):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_sharpness(problem.model, problem.loader(), [Interrupted()])


@pytest.mark.parametrize(
    ("metrics", "error", "match"),
    [
        ("epsilon_bx", UnknownNameError, "Did you mean 'epsilon_box'"),
        ([], ValueError, "nothing to measure"),
        ([3], TypeError, "callable as metric"),
    ],
)
def test_bad_metrics_are_refused_before_the_data_is_read(problem, metrics, error, match):
    class Untouched(list):
        def __iter__(self):
            raise AssertionError("the loader was read")

    with pytest.raises(error, match=match):
        measure_sharpness(problem.model, Untouched(), metrics)


def test_a_plugin_that_takes_a_built_in_name_does_not_change_the_default(problem):
    @metric("epsilon_box")
    def epsilon_box(objective, rng):
        return 0.0

    with pytest.raises(DuplicateNameError):
        measure_sharpness(problem.model, problem.loader(), "epsilon_box")
    assert measure_sharpness(problem.model, problem.loader())["epsilon_box"].value > 0


def test_the_report_tells_how_its_numbers_came_about_and_reloads(problem):
    report = measure_sharpness(problem.model, problem.loader(8, 12), seed=5, batch_norm="batch", select="2.*")
    p = report.provenance
    assert (p["seed"], p["num_samples"], p["num_batches"], p["dim"], p["batch_norm"]) == (5, 20, 2, 21, "batch")
    assert p["metrics"]["epsilon_box"]["plugin"] == "builtin"
    assert p["metrics"]["epsilon_box"]["settings"]["epsilon"] == 1e-3
    assert p["versions"]["torch"] == torch.__version__
    assert p["hvp_mode"] == report["hessian_topk"].details["hvp_mode"] == "retained double backward"
    again = SharpnessReport.from_json(report.to_json())
    assert values(again) == values(report)
    assert str(again) == str(report)
    assert again.to_json() == report.to_json()


def test_progress_goes_to_the_callable_and_ends(problem):
    events = []
    measure_sharpness(problem.model, problem.loader(10, 10), ["epsilon_box", "hessian_topk"], progress=events.append)
    assert list(dict.fromkeys(event.metric for event in events)) == ["epsilon_box", "hessian_topk", None]
    box = [event for event in events if event.metric == "epsilon_box"]
    assert box[0].passes < box[-1].passes
    assert 0.5 * box[-1].expected_passes < box[-1].passes <= box[-1].expected_passes
    assert box[-1].seconds > 0


def test_nothing_is_printed_where_nobody_looks(problem, capsys):
    measure_sharpness(problem.model, problem.loader())
    assert capsys.readouterr() == ("", "")


def test_a_shuffling_loader_with_drop_last_is_said():
    problem = oracles.small_classifier(torch.float32)
    data = torch.utils.data.TensorDataset(problem.inputs, problem.targets)
    loader = torch.utils.data.DataLoader(data, batch_size=6, shuffle=True, drop_last=True)
    with pytest.warns(sharpness_plugins.MeasurementWarning, match="other data on another pass"):
        report = measure_sharpness(problem.model, loader, "epsilon_box")
    assert any("another pass" in note for note in report.notes)
    assert "note: the loader" in str(report)


def test_a_float64_model_is_measured_in_float64():
    problem = oracles.small_classifier()
    report = measure_sharpness(problem.model, problem.loader(), "hessian_topk")
    assert report.provenance["dtype"] == "float64"


def test_a_single_sample_and_tiny_models_work():
    model = nn.Linear(1, 2, bias=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = measure_sharpness(
            model, [(torch.ones(1, 1), torch.tensor([0]))], ["epsilon_box", "random_subspace", HessianTopK(k=1)]
        )
    assert report["hessian_topk"].status.kind is Kind.CONVERGED
