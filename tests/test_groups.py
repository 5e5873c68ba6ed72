"""Groups of ranks other than the default one, at the same time: the numbers of one process on a group's own data."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import group_checks
import rank_checks
from group_checks import LINES, METRICS, batches, line_of, network
from rank_checks import CRITERION
from sharpness_plugins import RanksOf, measure_sharpness
from sharpness_plugins.objective import Objective


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of four ranks found."""
    folder = tmp_path_factory.mktemp("groups") / "four"
    processes = rank_checks.start(4, folder, list(group_checks.CHECKS), checks="group_checks")
    for process in processes:
        process.join(timeout=240)
    assert [process.exitcode for process in processes] == [0] * 4
    return rank_checks.results(folder, 4)


def of(told: list[dict[str, Any]], name: str) -> list[Any]:
    answers = [rank[name] for rank in told]
    for answer in answers:
        assert not (isinstance(answer, dict) and "error" in answer), answer["error"]
    return answers


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(
        torch.tensor(found, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-13
    )


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    close(found["numbers"], expected["numbers"])
    for vector, other in zip(found["vectors"], expected["vectors"], strict=True):
        close(vector, other)


def alone(line: int) -> Objective:
    return Objective(network(line), batches(line), criterion=CRITERION)


def test_two_groups_measure_two_models_at_the_same_time(told):
    """Losses, gradients, Hessian, Gauss–Newton and Fisher products, sketches, in groups whose ranks descend."""
    expected = [rank_checks.evaluated(alone(line)) for line in (0, 1)]
    for rank, answer in enumerate(of(told, "objectives")):
        members = LINES[line_of(rank)]
        assert answer.pop("order") == (members if answer.pop("as given") else sorted(members))
        assert {name: found["read"] for name, found in answer.items()} == {
            "group": "same data",
            "own data": "own data",
            "mesh": "same data",
        }
        for found in answer.values():
            assert found["size"] == 2
            same(found, expected[line_of(rank)])


def test_each_group_has_its_own_report(told):
    answers = of(told, "reports")
    for line, members in enumerate(LINES):
        expected = measure_sharpness(network(line), batches(line), dict(list(METRICS.items())[line:]))
        first, second = (answers[member]["report"] for member in members)
        assert first == second
        assert list(first["results"]) == list(expected.results)
        for key, result in expected.results.items():
            assert first["results"][key]["value"] == pytest.approx(result.value, rel=1e-10), key
        if line == 0:
            close(first["results"]["topk"]["details"]["eigenvalues"], expected["topk"].details["eigenvalues"])
        assert first["provenance"]["ranks"] == answers[members[0]]["plan"] == 2
        assert first["provenance"]["num_samples"] == (40, 50)[line]


def test_what_fails_on_one_rank_stays_in_its_group(told):
    for rank, answer in enumerate(of(told, "failures")):
        line = line_of(rank)
        value = measure_sharpness(network(line), batches(line), "hessian_topk")["hessian_topk"].value
        assert answer["value"] == pytest.approx(value, rel=1e-8)
        for member in LINES[line]:
            assert f"rank {member} asked for a loss at a point of its own" in answer["messages"]["elsewhere"]
        if line == 0:
            assert answer["messages"]["fails"] == "rank 1 failed: KeyError: 'boom 1'"
            assert answer["warnings"] == 2
            assert answer["loader"].endswith("OSError: disk gone")
        else:
            assert "boom" not in answer["messages"]["fails"]
            assert answer["warnings"] == 1
            assert answer["loader"] == "nothing"


def test_a_process_outside_of_the_group_is_told(told):
    for rank, answer in enumerate(of(told, "outsiders")):
        for how in ("group", "mesh", "with its data"):
            if rank == 3:
                assert answer[how].startswith("ValueError: ranks is a group that this process (rank 3) is not in.")
            else:
                assert answer[how] == "nothing"
        assert answer["square"].startswith("ValueError: ranks is a device mesh of 2 dimensions")
        assert "('rows', 'columns')" in answer["square"]
        assert answer["nonsense"].startswith("ValueError: ranks must be one of ('auto'")
        assert answer["alone in it"].startswith("ValueError: how must be one of")


def test_a_model_is_measured_by_those_that_hold_it(told):
    """All pieces must come together in the group; copies of them elsewhere (the rows of a hybrid mesh) need not."""
    expected = [rank_checks.evaluated(alone(line)) for line in (0, 1)]
    for rank, answer in enumerate(of(told, "shards")):
        line = rank // 2
        same(answer["of row"], expected[line])
        copied = Objective(network(0), batches(line), criterion=CRITERION)
        close(answer["hybrid"], [copied.loss, *copied.hvp(rank_checks.vectors(copied)[1]).tolist()])
        row = [0, 1] if line == 0 else [2, 3]
        missing = [2, 3] if line == 0 else [0, 1]
        refusal = "ValueError: the weights are sharded over the ranks, so "
        assert answer["of all"].startswith(f"{refusal}ranks {row} cannot measure them without ranks {missing}")
        other = row[1 - rank % 2]
        across = [rank % 2, rank % 2 + 2]
        assert answer["across"].startswith(f"{refusal}ranks {across} cannot measure them without ranks [{other}]")
        assert answer["alone"].startswith(f"{refusal}ranks='alone' cannot measure them without ranks")
        close(answer["by itself"], alone(line).loss)


def test_a_group_needs_torch_distributed():
    with pytest.raises(ValueError, match=r"where torch\.distributed was not started"):
        measure_sharpness(network(0), batches(0), ranks=RanksOf(None))  # type: ignore[arg-type]
