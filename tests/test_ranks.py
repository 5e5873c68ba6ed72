"""Measuring on several ranks: the numbers of one process, the same report everywhere, and failures that all ranks share.

Groups of gloo processes run the checks of ``rank_checks``, one group for many checks; the oracle is one process on all data.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import rank_checks
from rank_checks import of
from sharpness_plugins import measure_sharpness
from sharpness_plugins.distributed import Ranks
from sharpness_plugins.krylov import LanczosRequest
from sharpness_plugins.lanczos import lanczos
from sharpness_plugins.metrics import HessianTrace, SpectralDensity
from sharpness_plugins.objective import Objective

ON_FOUR = (
    "evaluations",
    "metrics",
    "first_samples",
    "batch_statistics",
    "losses_that_have_no_pieces",
    "work",
    "wrong_guesses",
    "fully_sharded",
    "shared_basis",
)
SIZES = [2, 4]
TRAINS_SHARDS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 7)

Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Found]:
    """What each rank found, by the number of ranks."""
    names = {2: list(rank_checks.CHECKS), 4: list(ON_FOUR)}
    return rank_checks.found_by(tmp_path_factory.mktemp("ranks"), names, patience=240)


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(
        torch.tensor(found, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-13
    )


# ---------------------------------------------------------------------- the same numbers


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return rank_checks.evaluated(Objective(rank_checks.network(), rank_checks.whole(), criterion=rank_checks.CRITERION))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("loader", list(rank_checks.loaders(0, 2)))
def test_every_evaluation_is_that_of_one_process(told, alone, size, loader):
    """Losses with weights and ignored targets, gradients, Hessian, Gauss–Newton and Fisher products, sketches."""
    for answer in of(told, size, "evaluations"):
        close(answer[loader]["numbers"], alone["numbers"])
        for found, expected in zip(answer[loader]["vectors"], alone["vectors"], strict=True):
            close(found, expected)


@pytest.mark.parametrize("size", SIZES)
def test_what_the_loaders_hold_is_found_out(told, size):
    answer = of(told, size, "evaluations")[0]
    assert {name: found["read"] for name, found in answer.items()} == {
        "own parts": "own data",
        "a list": "same data",
        "one batch": "same data",
        "a shuffled loader": "same data",
        "a padded sampler": "own data",
        "an order of each rank": "same data",
    }
    assert answer["a list"]["batches"] == 5
    assert answer["one batch"]["batches"] == 1


@pytest.mark.parametrize("size", SIZES)
def test_every_metric_is_that_of_one_process_and_every_rank_has_the_same_report(told, size):
    answers = of(told, size, "metrics")
    report = measure_sharpness(rank_checks.network(), rank_checks.whole(), rank_checks.METRICS)
    assert all(answer == answers[0] for answer in answers)  # seconds and sentences included
    for key, found in answers[0]["results"].items():
        expected = report[key]
        assert found["value"] == pytest.approx(expected.value, rel=1e-10), key
        assert found["status"]["kind"] == str(expected.status.kind)
        if expected.standard_error is not None:
            assert found["standard_error"] == pytest.approx(expected.standard_error, rel=1e-8), key
    assert answers[0]["provenance"]["ranks"] == size
    assert answers[0]["provenance"]["ranks_read"] == "own data"
    assert answers[0]["provenance"]["num_samples"] == rank_checks.NUM_SAMPLES


@pytest.mark.parametrize("size", SIZES)
def test_the_first_samples_are_those_of_all_ranks(told, size):
    first = Objective(rank_checks.network(), rank_checks.whole(20), max_samples=30).loss
    order = list(rank_checks.padded(0, 1).sampler)[:30]  # the order of the sampler on one rank
    inputs, targets = rank_checks.data()
    sampled = Objective(rank_checks.network(), [(inputs[order], targets[order])]).loss
    one, three = (Objective(rank_checks.network(), [(inputs[:most], targets[:most])]).loss for most in (1, 3))
    for answer in of(told, size, "first_samples"):
        close(answer, [30, first] * 3 + [30, sampled, 1, one, 3, three])


@pytest.mark.parametrize("size", SIZES)
def test_batch_norm_has_the_statistics_of_one_process(told, size):
    """Whole batches are dealt out where BatchNorm looks at them, and running statistics are rank 0's."""
    expected = []
    for loader in (rank_checks.whole(18), rank_checks.whole()):
        objective = Objective(rank_checks.network(norm=True), loader, batch_norm="batch")
        expected += [objective.loss, objective.value_and_grad()[1].norm().item()]
    expected.append(Objective(rank_checks.network(norm=True), rank_checks.whole(18)).loss)
    for rank, answer in enumerate(of(told, size, "batch_statistics")):
        close(answer["loss"], expected)
        assert "'1.running_mean') differ between the ranks" in answer["notes"][0]
        assert answer["left"] == rank  # the model's own stay


def test_synchronized_batch_norm_is_measured_with_its_running_statistics_only(told):
    objective = Objective(rank_checks.network(norm=True), rank_checks.whole(), criterion=rank_checks.CRITERION)
    expected = rank_checks.evaluated(objective)
    for answer in of(told, 2, "synchronized_statistics"):
        assert answer["kind"] == "SyncBatchNorm"
        assert answer["refused"].startswith("ValueError: batch_norm='batch' with SyncBatchNorm on several ranks: its stat")
        close(answer["numbers"], expected["numbers"])
        for found, vector in zip(answer["vectors"], expected["vectors"], strict=True):
            close(found, vector)


@pytest.mark.parametrize("size", SIZES)
def test_a_batch_whose_pieces_have_another_loss_is_not_cut(told, size):
    objective = Objective(rank_checks.network(), rank_checks.whole(), loss_fn=rank_checks.spread)
    for answer in of(told, size, "losses_that_have_no_pieces"):
        close(answer, [objective.loss, *objective.value_and_grad()[1].tolist()])


@pytest.mark.parametrize("size", SIZES)
def test_the_work_is_divided_and_an_evaluation_is_one_meeting(told, size):
    answers = of(told, size, "work")
    assert sum(answer["seen"] for answer in answers) == rank_checks.NUM_SAMPLES
    assert max(answer["seen"] for answer in answers) <= rank_checks.NUM_SAMPLES / size + 5
    for answer in answers:
        assert answer["value"] == {"all_reduce": 1}
        assert answer["gradient"] == answer["products"] == {"all_reduce": 2}  # and one of the vectors


@pytest.mark.parametrize("size", SIZES)
def test_a_krylov_basis_is_spread_over_the_ranks(told, size):
    """As eigenvalues, vectors and deflation of one process, in the memory of ``1 / size`` of each vector (57 numbers)."""
    objective = Objective(rank_checks.network(), rank_checks.whole())
    start = torch.ones(objective.dim, dtype=torch.float64)
    metrics = [HessianTrace(method="hutch++"), HessianTrace(method="xtrace"), SpectralDensity()]
    report = measure_sharpness(rank_checks.network(), rank_checks.whole(), metrics)
    for rank, answer in enumerate(of(told, size, "shared_basis")):
        for storage, tolerance in (("full", 1e-9), ("half", 1e-2), ("host", 1e-9))[: 3 if size == 2 else 1]:
            request = LanczosRequest(k=3, max_basis=7, storage=storage, keep_basis=True, check_multiplicity=True)
            with objective.session():
                run = lanczos(objective.hvp, start, request)
            expected = [*run.values.tolist(), *(run.vectors.abs() @ start).tolist(), run.num_matvecs]
            assert answer[storage] == pytest.approx(expected, rel=tolerance)
            assert answer[f"{storage} removed"] == pytest.approx(run.remove(start).tolist(), rel=1e-6 + 20 * tolerance)
            part = len(start) - rank * -(-len(start) // size) if rank == size - 1 else -(-len(start) // size)
            assert answer[f"{storage} bytes"] == part * (2 if storage == "half" else 8)
        expected = [result.value for result in report.results.values()]
        assert answer["metrics"] == pytest.approx(expected[: len(answer["metrics"])], rel=1e-9)
        assert answer["broken"] == "rank 1 failed: OSError: disk gone"


# ---------------------------------------------------------------------- what differs is found


@pytest.mark.parametrize("size", SIZES)
def test_a_wrong_guess_about_the_data_is_found(told, size):
    for rank, answer in enumerate(of(told, size, "wrong_guesses")):
        if size > 2:
            assert "it cannot be told how they share the data" in answer["mixed"]
        else:
            assert "ranks 0 and 1 hold the same samples in different orders" in answer["turned"], rank
        assert answer["not the same"].startswith("LoaderError: ranks='same data', but")
        assert "than once. Use ranks='same data'" in answer["not its own"]
        assert answer["declared"] == answer["declared own"] == "nothing"
        assert answer["empty"].startswith("LoaderError: the loader is empty")
        assert answer["nonsense"].startswith("ValueError: ranks must be one of")


def test_ranks_that_measure_something_else_are_refused(told):
    for rank, answer in enumerate(of(told, 2, "other_models")):
        assert answer["weights"].startswith("RanksApartError: the ranks hold models with different weights")
        assert answer["selection"].startswith("RanksApartError: the ranks perturb different parameters")
        for difference in ("metrics", "seed", "settings"):
            assert answer[difference].startswith("RanksApartError: the ranks must have the same metrics and settings")
        model = rank_checks.network()
        with torch.no_grad():
            model[0].weight[0, 0] += rank
        close(answer["alone"], Objective(model, rank_checks.whole(20)).loss)


# ---------------------------------------------------------------------- failures


def test_a_metric_that_fails_on_one_rank_fails_on_all_and_the_next_is_measured(told):
    answers = of(told, 2, "metrics_that_fail_on_one_rank")
    assert answers[0]["results"] == answers[1]["results"]
    results = answers[0]["results"]
    for where in ("0", "1", "2", "end"):
        assert results[f"fails_{where}"] == ["failed", f"rank 1 failed: KeyError: 'boom {where}'"]
    assert results["swallows"] == ["failed", "rank 1 failed: KeyError: 'swallowed'"]
    assert "rank 0 ended does_more; rank 1 asked for a loss" in results["does_more"][1]
    assert "rank 0 asked for a gradient; rank 1 asked for a loss" in results["does_other"][1]
    assert "at a point of its own" in results["elsewhere"][1]
    assert "rank 0 ended other_value with 0; rank 1 ended other_value with 1" in results["other_value"][1]
    assert results["fails_everywhere"] == ["failed", "ZeroDivisionError: division by zero"]
    assert "perturbation must have shape (57,)" in results["unlike"][1]
    expected = measure_sharpness(rank_checks.network(), rank_checks.whole(), "hessian_topk")
    for answer in answers:
        close([answer["good"], answer["next"]], [expected.loss, expected["hessian_topk"].value])
        assert answer["warnings"] == len(results) - 1


def test_a_loader_or_a_model_that_fails_on_one_rank_fails_on_all(told):
    zero, one = of(told, 2, "loaders_that_fail_on_one_rank")
    assert (zero["first pass"], one["first pass"]) == (
        "RemoteFailureError: rank 1 failed: OSError: disk gone",
        "OSError: disk gone",
    )
    assert zero["later"] == one["later"] == "rank 1 failed: OSError: disk gone"
    close([zero["next"], one["next"]], [Objective(rank_checks.network(), rank_checks.whole()).loss] * 2)
    assert one["of a model"].startswith("RemoteFailureError: rank 0 failed: ValueError: the model has no parameters")
    assert zero["of a loss"].startswith("LossRuleError: the ranks find different losses")


@pytest.mark.parametrize("how", list(rank_checks.DEATHS))
def test_a_rank_that_dies_takes_the_others_with_it(tmp_path, how):
    """By SIGKILL, without a word, by a second Ctrl-C, and by not coming, within the group's timeout of 4 seconds."""
    processes = rank_checks.start(2, tmp_path / "group", [how], timeout=4.0)
    processes[0].join(timeout=60)
    assert processes[0].exitcode == 0
    processes[1].kill()
    processes[1].join()
    (answer,) = rank_checks.results(tmp_path / "group", 1)
    broke = "the group of ranks broke while a loss was shared"
    expected = "rank 1 left the measurement: KeyboardInterrupt" if how == "Ctrl-C twice" else broke
    assert answer[how].startswith(expected)
    assert answer[f"{how} seconds"] < 20
    if how == "stay away":
        assert "or ranks='alone' on the one that does" in answer[how]


# ---------------------------------------------------------------------- training


def test_training_with_the_monitor_is_training_without_it_and_the_probe_is_shared(told):
    answers = of(told, 2, "monitor")
    assert all(answer["same"] for answer in answers)
    assert answers[0]["values"] == answers[1]["values"]
    assert answers[0]["steps"] == answers[1]["steps"] == [1, 4, 8]
    assert answers[0]["timed"] == answers[1]["timed"]
    assert len(answers[0]["timed"]) > 1
    model = rank_checks.network()
    with torch.no_grad():
        for parameter, weights in zip(model.parameters(), answers[0]["at_last"], strict=True):
            parameter.copy_(torch.tensor(weights, dtype=torch.float64))
    top = measure_sharpness(model, rank_checks.whole(), {"top": rank_checks.HessianTopK(k=1)})["top"].value
    assert answers[0]["values"][-1]["top"] == pytest.approx(top, rel=1e-10)


def test_a_schedule_measures_its_signal_on_all_ranks_together(told):
    answers = of(told, 2, "signals")
    assert answers[0] == answers[1]
    assert len({step for _, step, _ in answers[0]["signals"]}) > 1
    assert all(math.isfinite(value) for _, _, value in answers[0]["signals"])


# ---------------------------------------------------------------------- sharded models


@pytest.mark.parametrize("size", SIZES)
def test_a_fully_sharded_model_is_measured_as_the_whole_one(told, size):
    whole = Objective(rank_checks.network(norm=True), rank_checks.whole(), criterion=rank_checks.CRITERION)
    expected = rank_checks.evaluated(whole)
    low = Objective(rank_checks.network().float(), [(x.float(), y) for x, y in rank_checks.whole(20)])
    for answer in of(told, size, "fully_sharded"):
        close(answer["numbers"], expected["numbers"])
        for found, vector in zip(answer["vectors"], expected["vectors"], strict=True):
            close(found, vector)
        assert answer["notes"] == ["measured inside fully_shard, on the wrapped Sequential"]
        # in float32, although it trains in bfloat16
        assert answer["low"] == pytest.approx([low.loss, low.value_and_grad()[1].norm().item()], rel=1e-5)


@pytest.mark.skipif(not TRAINS_SHARDS, reason="torch 2.6 trains fully_shard on accelerators only")
def test_a_fully_sharded_model_trains_on_as_if_it_had_not_been_measured(told):
    answers = of(told, 2, "training_fully_sharded")
    model = rank_checks.network()
    with torch.no_grad():
        for parameter, weights in zip(model.parameters(), answers[0]["weights"], strict=True):
            parameter.copy_(torch.tensor(weights, dtype=torch.float64))
    expected = measure_sharpness(model, rank_checks.whole(), [rank_checks.HessianTopK(k=1)])["hessian_topk"].value
    for answer in answers:
        assert answer["same"]
        assert answer["values"]["hessian_topk"] == pytest.approx(expected, rel=1e-10)
        assert answer["values"]["preconditioned_topk"] == answers[0]["values"]["preconditioned_topk"] > 0
        assert answer["failed"] == "rank 1 failed: KeyError: 'boom 1'"
        # weights that a pass left gathered, in bfloat16, are measured as they are trained, in float32
        assert answer["gathered"] > 0
        assert len(set(answer["losses"])) == 1
        assert answer["gradients"]


def test_other_ways_of_sharding_are_refused_by_name(told):
    for answer in of(told, 2, "other_sharding"):
        assert "parameter '0.weight' is a distributed tensor placed as (Shard(dim=0),)" in answer["tensor parallel"]
        assert answer["FSDP1"].startswith(
            "TypeError: a model inside FullyShardedDataParallel cannot be measured here: shard"
        )
        assert answer["DeepSpeed"].startswith("TypeError: a model inside DeepSpeedEngine cannot be measured here")
        assert answer["alone"].startswith("ValueError: the weights are sharded over the ranks")
        assert answer["pipeline"].startswith("RanksApartError: the ranks perturb different parameters")


SCRIPT = """
import datetime, json, sys, torch
import torch.distributed as dist
import rank_checks
from sharpness_plugins import measure_sharpness
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
torch.set_num_threads(1)
report = measure_sharpness(rank_checks.network(), rank_checks.padded(dist.get_rank(), dist.get_world_size()), "hessian_topk")
if dist.get_rank() == 0:
    print(json.dumps([report.loss, report["hessian_topk"].value]))
dist.barrier()
dist.destroy_process_group()
"""


def test_a_script_under_torchrun_uses_the_group_that_exists(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    told = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    assert told.returncode == 0, told.stderr
    report = measure_sharpness(rank_checks.network(), rank_checks.whole(), "hessian_topk")
    close(json.loads(told.stdout.strip().splitlines()[-1]), [report.loss, report["hessian_topk"].value])


def test_a_process_alone_exchanges_nothing(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", None)
    ranks = Ranks()
    with ranks.sharing("a loss") as shared:
        shared.numbers = [1.0]
    assert shared.numbers == [1.0]
    assert ranks.close("a metric", None) is None
