"""Starts of the inner maximisation, and the sketch of the data that they are chosen on."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import oracles
from sharpness_plugins import sampling
from sharpness_plugins.maximizers import MultiStart
from sharpness_plugins.metrics import EpsilonBox, starts
from sharpness_plugins.objective import Objective
from sharpness_plugins.regions import Box

F64 = torch.float64


def mean_outputs(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Rows: the gradient of every mean output, by plain autograd."""
    parameters = list(model.parameters())
    means = model(inputs).flatten(1).mean(0)
    rows = [torch.autograd.grad(mean, parameters, retain_graph=True) for mean in means]
    return torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])


@pytest.mark.parametrize("sizes", [(20,), (7, 7, 6), (12, 8)])
def test_a_sketch_of_everything_has_the_gradients_of_all_outputs(sizes):
    task = oracles.small_classifier()
    objective = Objective(task.model, task.loader(*sizes))
    sketch = objective.sketch(100)
    assert sketch.share == 1
    direction = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    expected = 20 * (direction @ mean_outputs(task.model, task.inputs))
    assert torch.allclose(sketch.gradient(direction), expected, rtol=1e-10, atol=1e-12)
    probabilities = task.model(task.inputs).softmax(1).sum(0)
    assert torch.allclose(sketch.probabilities(), probabilities, rtol=1e-10)


def numbers_objective(size: int, **settings) -> Objective:
    """The output is its input, 0 to 63: the gradient of the mean output tells which samples were seen."""
    inputs = torch.arange(64.0, dtype=F64)[:, None]
    model = nn.Linear(1, 1, bias=False).double()
    return Objective(model, list(inputs.split(size)), loss_fn=lambda m, batch: m(batch).mean(), **settings)


@pytest.mark.parametrize("size", [64, 8, 1])
def test_a_sketch_takes_samples_from_all_over_the_data(size):
    sketch = numbers_objective(size).sketch(8)
    assert sketch.share == pytest.approx(8 / 64)
    mean = sketch.gradient(torch.ones(1)).item() / 8
    assert abs(mean - 31.5) < 8  # the first eight have mean 3.5


def test_a_sketch_takes_the_same_samples_in_any_order_and_batching_kept_or_not():
    """Powers of two: their sum tells which they are."""
    numbers = 2.0 ** torch.arange(40, dtype=F64)[:, None]
    found = []
    for order, size in ((range(40), 40), (range(39, -1, -1), 7), (range(40), 1)):
        for cache in (None, 0):
            loader = list(numbers[list(order)].split(size))
            model = nn.Linear(1, 1, bias=False).double()
            objective = Objective(model, loader, loss_fn=lambda m, batch: m(batch).mean(), cache_bytes=cache)
            found.append(objective.sketch(11).gradient(torch.ones(1)).item())
    assert len(set(found)) == 1
    assert bin(int(found[0])).count("1") == 11


def test_a_sketch_costs_its_share():
    task = oracles.small_classifier()
    objective = Objective(task.model, task.loader(10, 10))
    before = objective.cost
    sketch = objective.sketch(5)
    sketch.gradient(torch.ones(3, dtype=F64))
    sketch.probabilities()
    spent = objective.cost - before
    assert (spent.values, spent.gradients, spent.passes) == pytest.approx((sketch.share, sketch.share, 2 * sketch.share))
    assert 0.2 <= sketch.share <= 0.3


def test_a_sketch_of_a_checkpointed_model_differentiates_the_right_weights():
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(checkpoint(lambda y: torch.tanh(self.inner(y)), x, use_reentrant=False))

    torch.manual_seed(0)
    model = Checkpointed().double()
    inputs = torch.randn(6, 4, dtype=F64)
    objective = Objective(model, [(inputs, torch.tensor([0, 1, 2, 0, 1, 2]))])
    found = objective.sketch(6).gradient(torch.tensor([0.0, 1.0, 0.0]))
    assert torch.allclose(found, 6 * mean_outputs(model, inputs)[1], rtol=1e-10)


def test_outputs_that_are_no_scores_have_no_sketch():
    objective = oracles.objective_of(lambda w: (w**2).sum(), torch.ones(3))
    assert objective.sketch(4).probabilities() is None
    assert list(starts.targeted_starts(objective, Box(torch.ones(3)), sampling.generator_for(0, "x"), 10, 64)) == []
    with pytest.raises(ValueError, match="max_samples must be at least 1, got 0"):
        objective.sketch(0)


def test_targeted_starts_are_the_vertices_of_output_gradients_in_the_order_of_their_loss():
    task = oracles.small_classifier(num_samples=400)
    objective = Objective(task.model, task.loader(400))
    box = Box.keskar(objective.origin, 0.05)
    found = dict(starts.targeted_starts(objective, box, sampling.generator_for(0, "x"), 10, 100))
    sketch = objective.sketch(100)
    rows = [sketch.gradient(one) / 100 for one in torch.eye(3, dtype=F64)]  # the order is that of the whole loss
    expected = {f"class {k} raised": row for k, row in enumerate(rows)}
    expected |= {f"class {k} lowered": -row for k, row in enumerate(rows)}
    expected |= {f"class {i} raised against class {j}": rows[i] - rows[j] for i, j in itertools.permutations(range(3), 2)}
    for name, point in found.items():
        assert torch.equal(point, box.ascent_vertex(expected[name])), name
    values = {name: objective.value(point) for name, point in found.items()}
    for kind in ("against", "raised", "lowered"):
        ranked = [v for name, v in values.items() if (name.endswith(kind) or (kind == "against" and kind in name))]
        assert ranked == sorted(ranked, reverse=True)
    first = next(iter(found))
    assert "against" in first
    best_raised = max(objective.value(box.ascent_vertex(row)) for row in rows)
    assert max(v for name, v in values.items() if name.endswith("raised")) == best_raised


def test_one_output_is_raised_and_lowered():
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    inputs = torch.randn(8, 3, dtype=F64)
    objective = Objective(model, [(inputs, torch.randn(8, 1, dtype=F64))], criterion=nn.MSELoss())
    box = Box.keskar(objective.origin, 0.01)
    found = dict(starts.targeted_starts(objective, box, sampling.generator_for(0, "x"), 10, 64))
    row = mean_outputs(model, inputs)[0]
    assert set(found) == {"output 0 raised", "output 0 lowered"}
    assert torch.equal(found["output 0 raised"], box.ascent_vertex(row))
    assert torch.equal(found["output 0 lowered"], box.ascent_vertex(-row))


def test_many_outputs_that_are_no_classes_are_moved_in_random_directions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 36), nn.Unflatten(1, (4, 9))).double()
    inputs = torch.randn(128, 4, dtype=F64)
    objective = Objective(model, [(inputs, torch.randn(128, 4, 9, dtype=F64))], criterion=nn.MSELoss())
    box = Box.keskar(objective.origin, 0.01)

    def drawn(seed):
        return dict(starts.targeted_starts(objective, box, sampling.generator_for(seed, "x"), 6, 16))

    found = drawn(0)
    assert all("random output" in name for name in found)
    assert len(found) == 8
    assert all(torch.equal(a, b) for a, b in zip(found.values(), drawn(0).values(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(found.values(), drawn(1).values(), strict=True))


def test_few_samples_allow_few_targets():
    """On a sketch of all the data ten classes would cost 16 of the 24 gradients; one is tried, for one gradient."""
    task = oracles.small_classifier()
    objective = Objective(task.model, task.loader(20))
    box = Box.keskar(objective.origin, 0.05)
    before = objective.cost.gradients
    found = dict(starts.targeted_starts(objective, box, sampling.generator_for(0, "x"), 10))
    assert objective.cost.gradients - before == 1
    assert [name.split()[-1] for name in found] == ["raised", "lowered"]


def test_random_starts_are_vertices_in_many_dimensions_and_inside_in_few():
    for dim, inside in ((1000, True), (1001, False)):
        box = Box.keskar(torch.randn(dim, generator=torch.Generator().manual_seed(0)), 0.1)
        (_, first), (_, second) = itertools.islice(starts.random_starts(box, sampling.generator_for(0, "x")), 2)
        assert box.contains(first)
        assert not torch.equal(first, second)
        assert (box.share_at_bound(first) < 0.01) is inside
        assert box.share_at_bound(first) == pytest.approx(0.0 if inside else 1.0, abs=0.01)


def test_eigenvector_starts_point_along_the_leading_eigenvectors():
    matrix = oracles.with_spectrum(torch.tensor([50.0, 20.0, *torch.linspace(0.1, 1, 18)], dtype=F64))
    weights = torch.randn(20, dtype=F64, generator=torch.Generator().manual_seed(0))
    objective = oracles.quadratic(matrix, weights, minimum=weights, offset=0.1)
    box = Box.keskar(objective.origin, 0.01)
    found = dict(starts.eigenvector_starts(objective, box, sampling.generator_for(0, "x"), 2))
    _, vectors = torch.linalg.eigh(matrix)
    assert list(found) == ["eigenvector +1", "eigenvector -1", "eigenvector +2", "eigenvector -2"]
    for name, column in (("1", 19), ("2", 18)):
        vertex = box.ascent_vertex(vectors[:, column])
        pair = (found[f"eigenvector +{name}"], found[f"eigenvector -{name}"])
        assert torch.equal(pair[0], -pair[1])
        cosine = torch.nn.functional.cosine_similarity(pair[0], vertex, dim=0)
        assert abs(cosine) > 0.95  # a small component of an eigenvector may have the other sign
    assert list(starts.eigenvector_starts(objective, box, sampling.generator_for(0, "x"), 0)) == []


@pytest.mark.parametrize("budget", [12, 24])
def test_what_chooses_the_starts_is_part_of_the_budget(budget):
    task = oracles.small_classifier()
    objective = Objective(task.model, task.loader(10, 10))
    result = EpsilonBox(maximizer=MultiStart(max_gradients=budget))(objective, sampling.generator_for(0, "epsilon_box"))
    assert objective.cost.gradients <= budget
    assert result.details["gradients_in_solver"] < objective.cost.gradients


def test_the_metric_tries_eigenvectors_when_asked():
    task = oracles.small_classifier()
    objective = Objective(task.model, task.loader(20))
    result = EpsilonBox(epsilon=0.01, eigenvectors=1)(objective, sampling.generator_for(0, "epsilon_box"))
    assert result.details["start_names"][:2] == ["eigenvector +1", "eigenvector -1"]
    assert objective.cost.hvps > 0


@pytest.mark.parametrize(
    ("num_samples", "num_targets", "size"),
    [(20, 10, 64), (500, 10, 79), (500, 1, 1024), (3000, 3, 834), (100_000, 10, 1024), (0, 10, 1024)],
)
def test_the_sketch_costs_about_as_much_on_any_data(num_samples, num_targets, size):
    assert starts.sketch_size(num_samples, num_targets) == size
