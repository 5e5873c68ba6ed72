"""Models of ``fully_shard`` whose gathered weights do not fit: everything on shards, and the numbers of one process.

Groups of gloo processes run the checks of ``shard_checks``; the oracle is one process with a plain model and all data.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import rank_checks
import shard_checks
from rank_checks import F64, of
from sharpness_plugins.objective import Objective

pytestmark = pytest.mark.skipif(
    tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 7),
    reason="torch 2.6 runs fully_shard on accelerators only",
)

SIZES = [2, 4]
ON_FOUR = ["evaluations", "failures"]

Found = dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each rank found, by the number of ranks."""
    names = {2: [name for name in shard_checks.CHECKS if name != "death"], 4: ON_FOUR}
    return rank_checks.found_by(tmp_path_factory.mktemp("shards"), names, checks="shard_checks", timeout=100, patience=300)


def close(found: Any, expected: Any, *, rtol: float = 1e-10) -> None:
    found, expected = (torch.tensor(numbers, dtype=F64) for numbers in (found, expected))
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * expected.abs().max().item())


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """What ``shard_checks.evaluated`` gives."""
    close(found["numbers"], expected["numbers"])
    assert len(found["vectors"]) == len(expected["vectors"])
    for vector, other in zip(found["vectors"], expected["vectors"], strict=True):
        close(vector, other)
    if "differences" in found:  # which have the error of their step
        close(found["differences"], expected["vectors"][3], rtol=1e-6)


@pytest.mark.parametrize(("size", "name"), [(size, name) for size in SIZES for name in shard_checks.EVALUATED[size]])
def test_everything_on_shards_is_what_one_process_finds(told, size, name):
    alone = Objective(shard_checks.plain(name), rank_checks.whole(), criterion=rank_checks.CRITERION)
    expected = shard_checks.evaluated(alone)
    for answer in of(told, size, "evaluations"):
        for found in (found for key, found in answer.items() if key.startswith(f"{name}, ")):
            same(found, expected)
            assert found["mode"] == "double backward"
            assert found["check"].startswith("uᵀHv = vᵀHu, and central differences of the gradient agree to ")


def test_methods_that_gather_weights_do_not_in_a_measurement_of_gathered_ones(told):
    alone = Objective(shard_checks.plain("views and methods"), rank_checks.whole(), criterion=rank_checks.CRITERION)
    for answer in of(told, 2, "methods_of_gathered_weights"):
        same(answer, shard_checks.evaluated(alone))
        assert answer["is there"]


@pytest.mark.parametrize("loader", shard_checks.LOADERS)
def test_selected_parameters_and_any_loader(told, loader):
    alone = Objective(
        shard_checks.plain("blocks"), rank_checks.whole(), criterion=rank_checks.CRITERION, select=["2.*", "0.weight"]
    )
    expected = shard_checks.evaluated(alone)
    for answer in of(told, 2, "other_loaders"):
        assert answer[loader]["names"] == alone.space.names
        same(answer[loader], expected)


def test_batches_and_parts_of_batches_without_a_target(told):
    inputs, targets = rank_checks.data()
    targets[:30] = 1
    alone = Objective(shard_checks.plain("blocks"), [(inputs, targets)], criterion=rank_checks.CRITERION)
    expected = shard_checks.evaluated(alone)
    for answer in of(told, 2, "weightless"):
        same(answer, expected)


def test_memory_that_runs_out_on_one_rank_halves_the_parts_of_all(told):
    alone = Objective(shard_checks.plain("blocks"), rank_checks.whole(), criterion=rank_checks.CRITERION)
    expected = shard_checks.evaluated(alone)
    for answer in of(told, 2, "out_of_memory"):
        for backward in ("False", "True"):
            same(answer[backward], expected)
            assert "memory ran out, and batches were evaluated in parts of 22 samples or fewer" in answer[backward]["notes"]
        assert "(A single sample does not fit." in answer["no way"]


def test_memory_that_runs_out_on_a_rank_without_data(told):
    for answer in of(told, 2, "out_of_memory_while_lending"):
        assert answer["2"] == "nothing"
        assert "memory ran out, and batches were evaluated in parts of 11 samples or fewer" in answer["notes"]
        assert "out of memory, by a test (A single sample does not fit." in answer["20"]
        assert abs(answer["2, then"]) < 1e-14
        assert abs(answer["20, then"]) < 1e-14


def test_what_would_be_another_function_in_shards_is_refused_by_name(told):
    for answer in of(told, 2, "refusals"):
        assert "the weight '2.first.weight' lies in shards, and is read outside of the forward pass" in answer["penalty"]
        assert "the model writes to its weight 'head.weight' while it computes" in answer["writing"]
        assert answer["different"].startswith("RanksApartError: the ranks hold models with different weights")


def test_a_rank_that_is_alone_with_its_model_talks_to_nobody(told):
    for rank, answer in enumerate(of(told, 2, "ranks_of_their_own")):
        inputs, targets = (tensor[30 * rank : 30 * rank + 30] for tensor in rank_checks.data())
        alone = Objective(shard_checks.plain("blocks"), [(inputs, targets)], select="3.*")
        product = alone.hvp(torch.linspace(-1, 1, alone.dim, dtype=F64))
        for loss, gradient, along in answer:
            close(loss, alone.loss)
            close(gradient, alone.value_and_grad()[1].tolist())
            close(along, product.tolist())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("how", ["forward", "backward"])
@pytest.mark.parametrize("work", ["gradient", "product"])
def test_a_failure_in_the_middle_of_one_rank_ends_all_and_the_next_evaluation_works(told, size, work, how):
    sentence = {"forward": "it fails in the middle", "backward": "it fails on the way back"}[how]
    for rank, answer in enumerate(of(told, size, "failures")):
        expected = "other ValueError: " if rank == 1 else "RemoteFailureError: rank 1 failed: ValueError: "
        assert answer[f"{work}, {how}"] == expected + sentence
        assert answer[f"after {work}, {how}"] == answer["before"]
        assert all(answer["as before"])


def test_a_loader_that_raises_on_one_rank(told):
    answers = of(told, 2, "a_loader_that_breaks")
    assert answers[1] == "other OSError: the disk is gone"
    assert answers[0] == "RemoteFailureError: rank 1 failed: OSError: the disk is gone"


def test_ranks_whose_models_go_different_ways_do_not_wait_for_each_other(told):
    for answer in of(told, 2, "different_ways"):
        assert answer.startswith(
            "RanksApartError: the ranks went different ways: rank 0 asked for the weights of module 1; "
        )


def test_second_derivatives_are_exact_or_differences_that_say_their_error(told):
    expected = {}
    for name, middle in (("tanh", torch.nn.Tanh()), ("relu", torch.nn.ReLU())):
        alone = Objective(shard_checks.between(middle), rank_checks.whole())
        expected[name] = alone.hvp(torch.linspace(-1, 1, alone.dim, dtype=F64)).tolist()
    for answer in of(told, 2, "second_derivatives"):
        for name in ("exact", "kinks, exact"):
            assert answer[name]["mode"] == "double backward"
            close(answer[name]["product"], expected["relu" if "kinks" in name else "tanh"])
        for name in ("once", "differences"):
            assert answer[name]["mode"] == "central differences"
            close(answer[name]["product"], expected["tanh"], rtol=1e-7)
            assert answer[name]["check"].startswith("differences with a quarter of the step agree to ")
            told_error = float(answer[name]["check"].split("agree to ")[1].split(",")[0])
            assert 0 < told_error < 1e-6
        assert "; double backward does not work: " in answer["once"]["check"]
        assert answer["once, exact asked for"]["error"].startswith(
            "SecondDerivativeError: double backward does not work on this model: "
        )
        assert "has a wrong second derivative: differences of gradients are " in answer["wrong"]["error"]
        assert "kinks" in answer["kinks, differences"]["error"]
        assert answer["retained"]["error"].startswith("other ValueError: hvp='retained double backward' needs whole weights")


def test_the_gathered_weights_of_a_few_modules_are_all_that_lives_at_a_time(told):
    for answer in of(told, 2, "memory"):
        few = answer["root"] + 2 * answer["block"]
        assert few < 0.5 * answer["whole"]
        for name in ("value", "gradient", "product"):
            assert answer[f"{name}, 0"][0] <= few * 1.1  # of what ranks get equal parts of
            assert answer[f"{name}, {2**40}"][0] <= 1.1 * answer["whole"] + few
        # each module's weights once, and its gradients once; without room to hold them, the weights twice
        assert answer[f"value, {2**40}"][1] * 2 == answer[f"gradient, {2**40}"][1]
        assert answer["gradient, 0"][1] > answer[f"gradient, {2**40}"][1]
        assert answer["vectors"] <= 8 * (answer["whole"] / 2 + 8 * 100)
    assert told[2][0]["memory"][f"gradient, {2**40}"][0] >= 0.9 * told[2][0]["memory"]["whole"]  # where there are data


def test_training_goes_on_as_if_nothing_had_been_measured(told):
    answers = of(told, 2, "training")
    for answer in answers:
        assert answer["same"]
        assert answer["values"] == answers[0]["values"] or math.isnan(answer["values"]["fails"][0])
        assert answer["values"]["fails"][1] == "rank 1 failed: ValueError: on this rank"
        assert answer["values"]["first"][0] > 0


def test_a_plan_says_what_cannot_be_measured_in_shards(told):
    for answer in of(told, 2, "plan"):
        assert "random_subspace needs whole vectors of weights, and will fail" in answer["notes"]
        assert answer["none"] == 0 < answer["hvps"]


def test_a_rank_that_dies_in_the_middle_takes_the_others_down(tmp_path):
    processes = rank_checks.start(2, tmp_path / "death", ["death"], checks="shard_checks", timeout=15)
    for process in processes:
        process.join(timeout=120)
    assert processes[1].exitcode == -9
    found = (tmp_path / "death" / "0.json").read_text()
    assert "LostRankError: the group of ranks broke while " in found
