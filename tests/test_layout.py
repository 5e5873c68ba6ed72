"""Vectors in shards over the ranks: the numbers of whole vectors, few collectives, no rank that waits for another in vain.

Groups of gloo processes run the checks of ``layout_checks``; the oracle is the same on whole vectors, or a closed form.
"""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import layout_checks
import rank_checks
import shard_checks
from rank_checks import of
from sharpness_plugins import MetricResult, PluginWarning, measure_sharpness, metric
from sharpness_plugins import measure as measure_module
from sharpness_plugins.distributed import Ranks
from sharpness_plugins.krylov_pass import KrylovNeed, KrylovPass
from sharpness_plugins.layout import Shards
from sharpness_plugins.metrics import EpsilonBox, HessianTopK, HessianTrace
from sharpness_plugins.objective import Objective
from sharpness_plugins.operators import Curvature
from sharpness_plugins.specs import works_on_shards

SIZES = [2, 4]
SHARDS_ON_CPU = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 7)

Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Found]:
    """What each rank found, by the number of ranks."""
    names = {
        size: [name for name in layout_checks.CHECKS if name != "real" or (SHARDS_ON_CPU and size == 2)] for size in SIZES
    }
    folder = tmp_path_factory.mktemp("layout")
    return rank_checks.found_by(folder, names, checks="layout_checks", timeout=100, patience=240)


def far_apart(found: Any, limit: float, path: str = "") -> dict[str, float]:
    """The differences above the limit, by what differs."""
    if isinstance(found, dict):
        parts = [far_apart(value, limit, f"{path}/{key}") for key, value in found.items()]
    elif isinstance(found, list):
        parts = [far_apart(value, limit, f"{path}/{i}") for i, value in enumerate(found)]
    else:
        return {} if abs(found) <= limit else {path: found}
    return {key: value for part in parts for key, value in part.items()}


# ---------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("size", SIZES)
def test_draws_are_those_of_the_whole_vector(told, size):
    for answer in of(told, size, "draws"):
        assert len(answer) == 8
        assert all(answer.values())


@pytest.mark.parametrize("size", SIZES)
def test_sums_and_dimensions_are_those_of_the_whole_vector(told, size):
    for answer in of(told, size, "sums"):
        assert answer.pop("largest") == 0
        assert answer.pop("nowhere else") == 0
        assert not far_apart(answer, 1e-13)


@pytest.mark.parametrize("name", ["blocks", "operators"])
@pytest.mark.parametrize("size", SIZES)
def test_blocks_of_shards_are_blocks_of_the_whole(told, size, name):
    """Lengths, products and draws; one block is empty, and one rank has nothing."""
    for answer in of(told, size, name):
        assert len(answer) == 5
        assert not far_apart(answer, 1e-13)


@pytest.mark.parametrize("size", SIZES)
def test_every_method_of_a_region_is_that_of_the_whole_one(told, size):
    for answer in of(told, size, "regions"):
        assert len(answer) == (32 if size == 2 else 15)
        assert not far_apart(answer, 1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_what_one_rank_sees_is_refused_on_all(told, size):
    for answer in of(told, size, "region_errors"):
        assert "half_width must hold finite numbers >= 0, got -2 to 1" in answer["half width"]
        assert "to inf" in answer["anchor"]
        assert "weight must be a vector of finite numbers" in answer["weight"]
        assert answer["lbfgsb"].startswith("TypeError: LBFGSB runs SciPy on whole vectors")


@pytest.mark.parametrize("size", SIZES)
def test_every_solver_finds_what_it_finds_on_whole_vectors(told, size):
    """The point, the value, and by which steps; a quotient of small curvatures multiplies the rounding by a few hundred."""
    for answer in of(told, size, "maximizers"):
        assert len(answer) == (39 if size == 2 else 10)
        assert not far_apart(answer, 1e-10)


@pytest.mark.parametrize("size", SIZES)
def test_lanczos_is_that_of_the_whole_operator(told, size):
    """Values, vectors, deflation, and the number of products."""
    exact = spectrum(layout_checks.SMALL_BLOCKS)
    for answer in of(told, size, "lanczos"):
        for name, found in answer.items():
            same = {key: value for key, value in found.items() if key not in ("found", "bytes", "size")}
            assert not far_apart(same, 1e-8 if name == "in half" else 1e-10), name
        largest = torch.tensor(answer["LA"]["found"], dtype=torch.float64)
        torch.testing.assert_close(largest, exact[:3], rtol=1e-4, atol=0)
        every = torch.tensor(answer["whole space"]["found"], dtype=torch.float64)
        torch.testing.assert_close(every, spectrum(layout_checks.TINY_BLOCKS), rtol=0, atol=1e-12)
        if size == 2:
            smallest = torch.tensor(answer["SA"]["found"], dtype=torch.float64)
            torch.testing.assert_close(smallest, exact.flip(0)[:3], rtol=1e-3, atol=0)


def spectrum(blocks: dict[str, int]) -> Tensor:
    objective = layout_checks.Quadratic(layout_checks.WHOLE, blocks)
    matrix = torch.stack([objective.hvp(row) for row in torch.eye(objective.dim, dtype=torch.float64)])
    return torch.linalg.eigvalsh(matrix).flip(0)


@pytest.mark.parametrize("size", SIZES)
def test_each_rank_keeps_its_shard_of_the_basis(told, size):
    for rank, answer in enumerate(of(told, size, "lanczos")):
        for name, found in answer.items():
            cuts = layout_checks.TINY if name == "whole space" else layout_checks.SMALL
            own = sum(stop - start for start, stop in cuts[size][rank])
            assert found["bytes"] == found["size"] * own * (2 if name == "in half" else 8), name


@pytest.mark.parametrize("size", SIZES)
def test_an_invariant_space_is_noticed_on_all_ranks(told, size):
    for answer in of(told, size, "invariant_space"):
        assert answer["shards"] == pytest.approx(answer["whole"], rel=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_the_length_of_what_is_left_is_right_where_little_is_left(told, size):
    for answer in of(told, size, "orthogonal"):
        assert not far_apart(answer, 1e-11)  # with a millionth left, the difference of squares would be off by 1e-3


@pytest.mark.parametrize("size", SIZES)
def test_traces_are_those_of_the_whole_operator(told, size):
    for answer in of(told, size, "traces"):
        assert len(answer) == 8
        assert not far_apart(answer, 1e-10)


@pytest.mark.parametrize("size", SIZES)
def test_every_metric_is_that_of_whole_vectors(told, size):
    for answer in of(told, size, "metrics"):
        assert len(answer) == (17 if size == 2 else 3)
        assert not far_apart(answer, 1e-10)


@pytest.mark.skipif(not SHARDS_ON_CPU, reason="torch 2.6 runs fully_shard on accelerators only")
def test_a_network_in_shards_is_measured_as_in_one_process(told):
    answers = of(told, 2, "real")
    assert all(answer["results"] == answers[0]["results"] for answer in answers)
    refused = ("gauss_newton_topk", "random_subspace", "lbfgsb")
    asked = {key: layout_checks.REAL[key] for key in answers[0]["results"] if key not in refused}
    report = measure_sharpness(shard_checks.plain("blocks"), rank_checks.whole(), asked)
    for key, found in answers[0]["results"].items():
        if key in refused:
            assert found["status"]["kind"] == "failed", key
            assert "shards over the ranks" in found["status"]["message"], key
            continue
        expected = report[key]
        assert found["status"]["kind"] == str(expected.status.kind), (key, found["status"]["message"])
        assert found["value"] == pytest.approx(expected.value, rel=1e-9), key
        if expected.standard_error is not None:
            assert found["standard_error"] == pytest.approx(expected.standard_error, rel=1e-7), key


# ---------------------------------------------------------------------- work and failures


@pytest.mark.parametrize("size", SIZES)
def test_collectives_of_a_step(told, size):
    for answer in of(told, size, "collectives"):
        ones = ("box vertex", "box gap", "box linear", "box projected", "box secant", "ball secant", "plain vertex")
        assert {name: answer[name] for name in ones} == dict.fromkeys(ones, 1)
        nothing = ("box model", "box project", "draw", "rotate", "combine")
        assert {name: answer[name] for name in nothing} == dict.fromkeys(nothing, 0)
        assert (answer["ball vertex"], answer["ellipsoid vertex"]) == (2, 2)  # the norm is needed before the step
        assert (answer["against 3"], answer["against 7"]) == (1, 2)  # four numbers go with the meeting
        # a product here takes one, its inner product with the vector another; what is left is the start: a norm, and the
        # free memory that the ranks tell each other twice, each time after a meeting
        assert answer["run of 20"] - answer["run of 10"] == 10 * (1 + 1 + 2)
        assert answer["run of 10"] == 3 * (1 + 1 + 1) + 7 * (1 + 1 + 2) + 5


@pytest.mark.parametrize("size", SIZES)
def test_a_failure_of_one_rank_ends_all_of_them_with_its_error(told, size):
    for rank, answer in enumerate(of(told, size, "failures")):
        assert len(answer) == 4
        expected = (
            "OSError: the disk is full" if rank == 1 else "RemoteFailureError: rank 1 failed: OSError: the disk is full"
        )
        assert set(answer.values()) == {expected}


# ---------------------------------------------------------------------- which metrics


class InShards(Objective):
    """One rank whose shard is everything."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.layout = Shards(Ranks(), self.dim, [(0, self.dim)])


@pytest.fixture
def in_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_module, "Objective", InShards)


class Silent:
    """Of a third party, from a Krylov run that the others could share, and it says nothing of shards."""

    name = "silent_top"
    invariances: ClassVar[frozenset[str]] = frozenset()

    def krylov_need(self) -> KrylovNeed:
        return KrylovNeed(Curvature(), HessianTopK(k=4).krylov_need().request)

    def from_krylov(self, shared: KrylovPass) -> MetricResult:
        raise AssertionError("it was measured")

    def __call__(self, objective: Objective, rng: torch.Generator) -> MetricResult:
        raise AssertionError("it was called")


@pytest.mark.usefixtures("in_shards")
def test_a_metric_that_does_not_say_so_is_refused_by_name_and_the_others_are_measured():
    asked = ["random_subspace", Silent(), "gauss_newton_topk", HessianTopK(k=2), HessianTrace(), EpsilonBox()]
    with pytest.warns(PluginWarning, match="lie in shards"):
        report = measure_sharpness(rank_checks.network(), rank_checks.whole(), asked)
    for name in ("random_subspace", "silent_top", "gauss_newton_topk"):
        assert str(report[name].status.kind) == "failed"
        assert f"{name} needs whole vectors of weights" in report[name].status.message
        assert "perturb fewer parameters (select=...)" in report[name].status.message
    assert report["hessian_topk"].details["run_shared_with"] == ["hessian_trace"]
    assert "read" in report["hessian_trace"].status.message


def test_one_rank_with_everything_in_its_shard_measures_what_one_process_does(monkeypatch):
    asked = ["hessian_topk", "hessian_trace", "spectral_density", "hessian_bottom", "adaptive_topk", "epsilon_box"]
    expected = measure_sharpness(rank_checks.network(), rank_checks.whole(), asked)
    monkeypatch.setattr(measure_module, "Objective", InShards)
    report = measure_sharpness(rank_checks.network(), rank_checks.whole(), asked)
    for name in asked:
        assert report[name].status.kind == expected[name].status.kind
        assert report[name].value == pytest.approx(expected[name].value, rel=1e-10), name


@pytest.mark.usefixtures("in_shards")
def test_a_function_says_that_it_works_on_shards():
    @metric("layout_norm", works_on_shards=True)
    def layout_norm(objective):
        return objective.layout.norm(objective.origin)

    @metric("layout_sum")
    def layout_sum(objective):
        return objective.origin.sum()

    assert works_on_shards(layout_norm)
    assert works_on_shards(layout_norm.with_settings())
    assert not works_on_shards(layout_sum)
    with pytest.warns(PluginWarning, match="layout_sum needs whole vectors"):
        report = measure_sharpness(rank_checks.network(), rank_checks.whole(), [layout_norm, layout_sum])
    norm = torch.cat([p.detach().flatten() for p in rank_checks.network().parameters()]).norm()
    assert report["layout_norm"].value == pytest.approx(norm.item(), rel=1e-12)
    with pytest.raises(TypeError, match="a class says it by an attribute"):
        metric("layout_class", works_on_shards=True)(Silent)
