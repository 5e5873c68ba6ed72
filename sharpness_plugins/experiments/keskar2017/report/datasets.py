"""The numbers behind every table and figure, tidy: one row per observation, units in the header, as exact as the record."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ...files import csv_text
from ...training import Evaluation
from ..record import Condition, Record, TrainedNetwork
from .published import PAPER
from .reading import MOVED, Reading, count_above, share_within
from .verdicts import Claim

__all__ = ["Dataset", "all_datasets"]

Row = Sequence[object]
NETWORK_HEAD = ("study", "role", "seed", "batch_size [samples]", "warm_epochs", "remedy")
EVALUATION_HEAD = ("train_loss [nats]", "train_accuracy [share]", "test_loss [nats]", "test_accuracy [share]")


@dataclass(frozen=True)
class Dataset:
    """A CSV file: ``data/<name>.csv``."""

    name: str
    title: str
    head: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def csv(self) -> str:
        """Floats as ``repr`` writes them, so they come back exactly; ``nan`` is not finite, and empty is not there."""
        return csv_text(self.head, self.rows)


def all_datasets(reading: Reading, found: Sequence[Claim]) -> list[Dataset]:
    """Those that have a row; a figure's or a table's bears its name."""
    record = reading.record
    every = [
        Dataset(
            "agreement",
            "every claim of the paper with its rule, what was found, and whether it agrees",
            ("key", "where", "paper", "here", "agrees", "reason", "rule"),
            tuple((c.key, c.where, c.paper, c.here, str(c.agrees), c.reason, c.rule) for c in found),
        ),
        _of_networks("networks", "every trained network", reading, _summary_head, _summary),
        _of_networks("table2", "Table 2: accuracies", reading, EVALUATION_HEAD, lambda n: [_evaluations(n.train, n.test)]),
        _boxes("table3", "Table 3: sharpness in full space, by every solver", reading, "full"),
        _boxes("table4", "Table 4: sharpness in random subspaces, by every solver", reading, "subspace"),
        _published(),
        *(_curves(record, kind) for kind in ("straight", "curved")),
        _of_networks(
            "figure4", "Figure 4: batch sizes", reading, _SHARP_HEAD, _sharp, ("batch_sizes", "batch_sizes_matched")
        ),
        _of_networks("figure5", "Figure 5: the warm start", reading, _SHARP_HEAD, _sharp, ("warm_start",)),
        _trajectories(record, "figure5_small_batch", "Figure 5: the small-batch run on its way", "warm_start"),
        _trajectories(record, "figure6", "Figure 6: sharpness against loss", "sharpness_against_loss"),
        _of_networks(
            "eigenvalues",
            "largest eigenvalues of the Hessian",
            reading,
            ("rank", "eigenvalue [nats per squared weight]", "residual [nats per squared weight]", "converged"),
            _eigenvalues,
            once=True,
        ),
        _of_networks(
            "density",
            "smoothed spectral density",
            reading,
            (
                "eigenvalue [nats per squared weight]",
                "density [share per nats per squared weight]",
                "standard_error",
                "width [nats per squared weight]",
            ),
            _density,
            once=True,
        ),
        _of_networks("quadrature", "quadrature of the spectral density", reading, _NODE_HEAD, _nodes, once=True),
        _of_networks(
            "counts",
            "eigenvalues counted",
            reading,
            ("threshold_large", "above_it [number]", "threshold_near_zero", "within_it [share]", "dim"),
            lambda n: _counts(n, record),
            once=True,
        ),
        _of_networks(
            "cone",
            "rises of the loss along directions",
            reading,
            ("direction", "number", "rise [%]", "radius [norm of weights]", "steep_from [%]"),
            _rises,
            once=True,
        ),
        _of_networks(
            "distances",
            "distances from the initial weights",
            reading,
            ("distance [norm of weights]",),
            lambda n: [(n.distance,)],
        ),
        _of_networks("remedies", "remedies", reading, _SHARP_HEAD, _sharp, ("remedies",)),
        _of_networks(
            "controls", "the same comparison with something else held equal", reading, _SHARP_HEAD, _sharp, _CONTROLS
        ),
    ]
    return [dataset for dataset in every if dataset.rows]


_CONTROLS = ("protocol", "matched_loss", "equal_updates", "sqrt_rate", "linear_rate")
_NODE_HEAD = ("node [nats per squared weight]", "weight [share]", "dim")
_SHARP_HEAD = ("steps", "warm_steps", "ended", *EVALUATION_HEAD, "epsilon", "solver", "full_space [%]", "subspace [%]")
_summary_head = (
    *("learning_rate", "ending", "problem", "epochs", "steps", "samples", "warm_steps", "ended", "epoch_loss [nats]"),
    *EVALUATION_HEAD,
    "distance [norm of weights]",
)


def _of_networks(
    name: str,
    title: str,
    reading: Reading,
    head: tuple[str, ...],
    rows: Callable[[TrainedNetwork], Sequence[Row] | Iterator[Row]],
    studies: Sequence[str] | None = None,
    *,
    once: bool = False,
) -> Dataset:
    """Rows of every network of every study and role, or of each only ``once``, under the first study that has it."""
    told: list[Row] = []
    seen: set[tuple[int, Condition]] = set()
    for study in studies or reading.record.studies:
        for role in reading.roles(study):
            for network in reading.networks(study, role):
                condition = network.condition
                if once and (network.seed, condition) in seen:
                    continue
                seen.add((network.seed, condition))
                of = (study, role, network.seed, condition.recipe.batch_size, condition.recipe.warm_epochs, condition.remedy)
                told += [(*of, *row) for row in rows(network)]
    return Dataset(name, title, (*NETWORK_HEAD, *head), tuple(told))


def _evaluations(train: Evaluation, test: Evaluation) -> Row:
    return (train.loss, train.accuracy, test.loss, test.accuracy)


def _summary(n: TrainedNetwork) -> list[Row]:
    c = n.condition
    how = (c.learning_rate, c.ending, c.problem, n.epochs, n.steps, n.samples, n.warm_steps, n.ended, n.epoch_loss)
    return [(*how, *_evaluations(n.train, n.test), n.distance)]


def _sharp(n: TrainedNetwork) -> list[Row]:
    """By ε and solver; one row without them where nothing was measured."""
    base = (n.steps, n.warm_steps, n.ended, *_evaluations(n.train, n.test))
    keys = dict.fromkeys((box.epsilon, box.solver) for box in n.boxes)
    rows: list[Row] = []
    for epsilon, solver in keys:
        found = [n.box(space, epsilon, solver) for space in ("full", "subspace")]
        values = [math.nan if value is None or value.kind not in MOVED else value.value for value in found]
        rows.append((*base, epsilon, solver, *values))
    return rows or [(*base, "", "", math.nan, math.nan)]


def _boxes(name: str, title: str, reading: Reading, space: str) -> Dataset:
    """As the record has them: with the numbers of solvers that never moved, and what kind of number each is."""
    head = ("epsilon", "solver", "sharpness [%]", "standard_error [%]", "kind", "gradients")
    return _of_networks(
        name,
        title,
        reading,
        head,
        lambda n: [
            (b.epsilon, b.solver, b.value, "" if b.standard_error is None else b.standard_error, b.kind, b.gradients)
            for b in n.boxes
            if b.space == space
        ],
    )


def _published() -> Dataset:
    rows: list[Row] = []
    for known in PAPER:
        for size, place in (("small", 0), ("large", 1)):
            for what, cells in (("train_accuracy [%]", known.train), ("test_accuracy [%]", known.test)):
                rows.append((known.name, known.data, size, "Table 2", what, "", cells[place].mean, cells[place].deviation))
            for table, space in (("Table 3", "full"), ("Table 4", "subspace")):
                for epsilon in (1e-3, 5e-4):
                    cell = known.boxes(space, epsilon)[place]
                    rows.append(
                        (known.name, known.data, size, table, f"{space} sharpness [%]", epsilon, cell.mean, cell.deviation)
                    )
    head = ("network", "data", "role", "where", "quantity", "epsilon", "mean", "standard_deviation")
    return Dataset("paper", "what the paper published (arXiv 1609.04836)", head, tuple(rows))


def _curves(record: Record, kind: str) -> Dataset:
    rows = [
        (curve.study, curve.seed, alpha, *_evaluations(train, test))
        for curve in record.curves
        if curve.kind == kind
        for alpha, train, test in zip(curve.alphas, curve.train, curve.test, strict=False)
    ]
    head = ("study", "seed", "alpha", *EVALUATION_HEAD)
    return Dataset(f"figure3_{kind}", f"Figure 3, {kind}: between the two minima", head, tuple(rows))


def _trajectories(record: Record, name: str, title: str, purpose: str) -> Dataset:
    rows = [
        (t.role, t.problem, t.batch_size, t.seed, p.epochs, p.steps, *_evaluations(p.train, p.test), p.distance, p.sharpness)
        for t in record.trajectories
        if t.purpose == purpose
        for p in t.points
    ]
    head = ("role", "problem", "batch_size [samples]", "seed", "epochs", "steps", *EVALUATION_HEAD)
    return Dataset(name, title, (*head, "distance [norm of weights]", "full_space sharpness, epsilon 1e-3 [%]"), tuple(rows))


def _eigenvalues(n: TrainedNetwork) -> Iterator[Row]:
    if n.curvature is not None:
        for rank, (value, residual) in enumerate(zip(n.curvature.eigenvalues, n.curvature.residuals, strict=False), start=1):
            yield (rank, value, residual, n.curvature.converged)


def _density(n: TrainedNetwork) -> Iterator[Row]:
    c = n.curvature
    if c is not None:
        for place, density, error in zip(c.grid, c.density, c.density_error, strict=False):
            yield (place, density, error, c.width)


def _nodes(n: TrainedNetwork) -> Iterator[Row]:
    if n.curvature is not None:
        for node, weight in zip(n.curvature.nodes, n.curvature.weights, strict=False):
            yield (node, weight, n.curvature.dim)


def _counts(n: TrainedNetwork, record: Record) -> Iterator[Row]:
    if n.curvature is not None:
        large, near_zero = record.large_eigenvalue, record.near_zero
        yield (large, count_above(large)(n), near_zero, share_within(near_zero)(n), n.curvature.dim)


def _rises(n: TrainedNetwork) -> Iterator[Row]:
    if n.cone is not None:
        for kind, rises in (("random", n.cone.random_rises), ("eigenvector", n.cone.top_rises)):
            for number, rise in enumerate(rises, start=1):
                yield (kind, number, rise, n.cone.radius, n.cone.steep)
