"""Where the inner maximisation starts: points that lead to different local maxima, the most promising first."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .. import sampling
from ..krylov import LanczosRequest
from ..lanczos import lanczos
from ..maximizers import Parked, park, unpark
from ..objective import Objective
from ..regions import Box

__all__ = ["Tried", "eigenvector_request", "eigenvector_starts", "random_starts", "sketch_size", "targeted_starts"]

Starts = Iterator[tuple[str, Tensor]]

_SMALL = 1000  # dimensions
_FEWEST = 64  # samples
_PAIRS = 6


def random_starts(box: Box, rng: torch.Generator) -> Starts:
    """Random vertices of the box, without end; in few dimensions points inside it.

    Measured on dense quadratics with all vertices known, points inside find more in few dimensions (.98 and .85 of the
    maximum, mean and worst, at 16 gradients) than vertices (.97 and .72), which are more often stationary.
    """
    dim = box.layout.length(box.anchor)
    while True:
        direction = box.layout.uniform(rng, box.anchor)
        if dim <= _SMALL:
            yield "random point", box.half_width.mul(direction)
        else:
            yield "random vertex", box.ascent_vertex(direction)


def eigenvector_request(count: int, dim: int) -> LanczosRequest:
    """What finds leading eigenvectors well enough to start from."""
    return LanczosRequest(k=min(count, dim), tolerance=0.1, num_matvecs=20 + 8 * count, keep_basis=True)


def eigenvector_starts(objective: Objective, box: Box, rng: torch.Generator, count: int) -> Starts:
    """The vertices nearest in direction to the ``count`` leading eigenvectors of the Hessian, both ways.

    Cost: the Hessian-vector products of a Lanczos run to a tolerance of .1, about ``4 count + 10``.
    """
    if count < 1:
        return
    request = eigenvector_request(count, objective.dim)
    with objective.session():
        layout = objective.layout
        start = layout.normal(rng, objective.origin)
        run = lanczos(objective.hvp, start, request, generator=rng, memory=objective.memory, layout=layout)
    vectors = run.vectors
    assert vectors is not None
    for position, vector in enumerate(vectors):
        for sign, side in ((1, "+"), (-1, "-")):
            yield f"eigenvector {side}{position + 1}", box.ascent_vertex(sign * vector.to(box.anchor))


def sketch_size(num_samples: int, num_targets: int) -> int:
    """Samples to take output gradients on: as many as make them cost about 2.5 gradients together, 64 to 1024."""
    return min(max(math.ceil(2.5 * num_samples / _num_gradients(num_targets)), _FEWEST), 1024) if num_samples else 1024


def _num_gradients(num_targets: int) -> int:
    """Of the outputs, one by one and in pairs."""
    return num_targets + min(num_targets * (num_targets - 1), _PAIRS)


def _affordable(num_targets: int, share: float) -> int:
    """At most so many, and no more than cost three gradients on a sketch of this share of the data."""
    return max((n for n in range(1, num_targets + 1) if _num_gradients(n) * share <= 3), default=1)


class Tried:
    """Points whose loss was looked at, and the best of them: all there is where no solver has begun.

    Attributes:
        point: kept as signs; None before the first.
    """

    def __init__(self) -> None:
        self.count, self.name, self.value = 0, "", -math.inf
        self.point: Parked | None = None

    def add(self, name: str, value: float, point: Parked) -> None:
        self.count += 1
        if value > self.value:
            self.name, self.value, self.point = name, value, point


def targeted_starts(
    objective: Objective,
    box: Box,
    rng: torch.Generator,
    max_targets: int,
    max_samples: int | None = None,
    tried: Tried | None = None,
) -> Starts:
    """Vertices that raise or lower the mean of one output of the model, or raise one against another.

    On classifiers local maxima are indexed by the class that gets inflated. First come the pairs of outputs, raised the one
    and lowered the other, then single ones, each in the order of the loss at their vertices; pairs are made of the three
    best raised and the two best lowered. Measured on the 21 tuning networks of ``benchmarks/inner_maximisation``, the best
    two pairs alone lead to .989 of the best known maximum, two random vertices to .89.

    The directions are gradients at the origin on a sketch of ``max_samples`` samples (None: ``sketch_size``), which do as
    well as those on all (measured with 128 of 500). The losses are of all the data: on well-trained networks few samples
    make most of the rise, and a quarter of the data finds the best class in 57 % of the cases. Of many classes the most
    probable are tried; for many outputs that are no classes random directions of the output.

    Args:
        tried: told of every vertex.
    Cost: with ten targets 16 gradients of the sketch and 26 forward passes.
    """
    tried = Tried() if tried is None else tried
    if not max_targets:
        return
    small = objective.sketch(max_samples or _FEWEST)
    probabilities = small.probabilities()
    if probabilities is None:
        return
    count = _affordable(max_targets, small.share)
    targets = _targets(probabilities, count, rng, has_classes=objective.has_classes)
    sketch = objective.sketch(max_samples or sketch_size(objective.num_samples, len(targets)))
    single = [_Candidates(objective, box, tried), _Candidates(objective, box, tried)]
    for name, direction in targets.items():
        gradient = sketch.gradient(direction)
        if gradient is None:
            return
        single[0].add(f"{name} raised", name, gradient)
        single[1].add(f"{name} lowered", name, gradient.neg_())
    pairs = _Candidates(objective, box, tried)
    for up, down in itertools.product(single[0].best(3), single[1].best(2)):
        if up.target != down.target:
            gradient = sketch.gradient(targets[up.target] - targets[down.target])
            if gradient is not None:
                pairs.add(f"{up.target} raised against {down.target}", up.target, gradient)
    ranked = [pairs.best(4), single[0].best(2), single[1].best(2)]
    order = [ranked[0][:2], ranked[1][:1], ranked[2][:1], ranked[0][2:3], ranked[1][1:], ranked[2][1:], ranked[0][3:]]
    for candidate in itertools.chain.from_iterable(order):
        yield candidate.name, unpark(candidate.point, box)


def _targets(probabilities: Tensor, count: int, rng: torch.Generator, *, has_classes: bool) -> dict[str, Tensor]:
    """Directions of the output by name."""
    num_outputs = len(probabilities)
    if not has_classes and num_outputs > count:
        signs = sampling.uniform(count * num_outputs, rng, probabilities).sign().view(count, num_outputs)
        return {f"random output {i}": row for i, row in enumerate(signs)}
    chosen = probabilities.topk(min(count, num_outputs)).indices.sort().values.tolist()
    rows = torch.nn.functional.one_hot(torch.tensor(chosen), num_outputs).to(probabilities)
    kind = "class" if has_classes else "output"
    return {f"{kind} {k}": row for k, row in zip(chosen, rows, strict=True)}


class _Candidate:
    def __init__(self, name: str, target: str, value: float, point: Parked) -> None:
        self.name, self.target, self.value, self.point = name, target, value, point


class _Candidates:
    """Vertices and the loss there, kept as signs."""

    def __init__(self, objective: Objective, box: Box, tried: Tried) -> None:
        self._objective, self._box, self._tried = objective, box, tried
        self._all: list[_Candidate] = []

    def add(self, name: str, target: str, gradient: Tensor) -> None:
        vertex = self._box.ascent_vertex(gradient)
        value = self._objective.value(vertex)
        if math.isfinite(value):
            point = park(vertex, self._box)
            self._all.append(_Candidate(name, target, value, point))
            self._tried.add(name, value, point)

    def best(self, count: int) -> list[_Candidate]:
        return sorted(self._all, key=lambda candidate: -candidate.value)[:count]
