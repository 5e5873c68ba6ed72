"""What the reproduction of Keskar et al. (2017) found: frozen numbers, as ``record.json`` in the folder of results.

``Record`` holds every trained network once, with all that was measured on it, and studies (``STUDIES``) that say which
networks are to be compared: ``record.networks("matched_loss", "large")`` are those of one role in order of the seeds, and
``record.paired("matched_loss", box("full", 1e-3, "ours"))`` compares two roles seed by seed. Curves and trajectories
are beside them. A study that was not asked for is absent, a measurement that was not made is None or an empty tuple, and
what is not finite is NaN here and null in the file.

The file holds no times, host names or paths: the same settings on the same machine give the same bytes, also after a kill.
Layout of the folder: ``record.json`` (this), ``timings.json`` (seconds by unit of work, not part of the record) and
``store/`` (weights and measurements by content key, re-used by the next run).
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ...errors import did_you_mean
from ..paired import Paired, pair
from ..recipes import Recipe
from ..training import Evaluation

__all__ = [
    "BoxValue",
    "Cone",
    "Condition",
    "Curvature",
    "Curve",
    "Problem",
    "Quantity",
    "Record",
    "STUDIES",
    "TrainedNetwork",
    "Trajectory",
    "TrajectoryPoint",
    "box",
    "test_accuracy",
    "train_accuracy",
    "train_loss",
]

SCHEMA_VERSION = 1
EPSILONS = (1e-3, 5e-4)
SPACES = ("full", "subspace")
SOLVERS = {  # name in the record -> what the report may call it
    "published": "SciPy's L-BFGS-B as the paper calls it",
    "lbfgsb": "SciPy's L-BFGS-B, scaled so that its ten iterations run",
    "ours": "several starts and sign steps, 24 gradients",
}
STUDIES = {  # name -> what its networks have in common, with the roles in it
    "protocol": "the paper's: until the loss ceases to improve; roles small, large",
    "matched_loss": "the same training loss; roles small, large",
    "equal_updates": "the same number of steps; roles small, large",
    "linear_rate": "the same training loss, the large batch's learning rate scaled by B/b; roles small, large",
    "sqrt_rate": "the same training loss, the large batch's learning rate scaled by sqrt(B/b); roles small, large",
    "batch_sizes": "the same number of epochs; one role per batch size, as text, ascending (Figure 4)",
    "batch_sizes_matched": "the same training loss; one role per batch size, as text, ascending",
    "warm_start": "the same training loss; roles small, cold, and one per number of warm epochs, as text (Figure 5)",
    "remedies": "the same training loss; roles small, none (the large batch), and augmentation, conservative, adversarial, "
    "sam, all with the large batch",
}


@dataclass(frozen=True)
class Problem:
    """A network and data.

    Attributes:
        network: name on the command line, such as "C1"; ``description`` says what it is.
        batch_norm: "batch" (statistics of the batch at hand, in tests, too), "running" or "none".
        dim: number of weights.
        data: where they come from; ``checksum`` is the SHA-256 of the tensors of the first seed's split.
    """

    network: str
    description: str
    batch_norm: str
    dim: int
    data: str
    checksum: str
    num_train: int
    num_test: int
    num_classes: int


@dataclass(frozen=True)
class Condition:
    """How a network was trained, apart from the seed.

    Attributes:
        problem: key in ``Record.problems``: "main", or "warm_start" where Figure 5 has data of its own.
        recipe: batch sizes; ``recipe.warm_epochs`` of ``recipe.warm_batch`` come first in a warm start.
        ending: "plateau:10" (no better by 1e-4 in ten epochs), "epoch_loss:0.002" (mean over an epoch, while the weights
            move), "loss:0.005" (of the whole training set), "epochs:100" or "steps:3100", of the last phase.
        remedy: "", "augmentation", "conservative", "adversarial" or "sam".
    """

    problem: str
    recipe: Recipe
    learning_rate: float
    ending: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.recipe}{f' with {self.remedy}' if self.remedy else ''}, lr {self.learning_rate:g}, to {self.ending}"


@dataclass(frozen=True)
class BoxValue:
    """Metric 2.1, in percent, by one solver.

    Attributes:
        space: "full", or "subspace" (mean over draws of 100 random columns, with its standard error).
        solver: a key of ``SOLVERS``.
        kind: of ``report.Kind``, as text: "lower bound", "estimate", "not converged" (the solver never moved), "failed".
        message: how it was obtained, for a reader.
        gradients: that it took.
    """

    space: str
    epsilon: float
    solver: str
    value: float
    standard_error: float | None
    kind: str
    message: str
    gradients: float


@dataclass(frozen=True)
class Curvature:
    """The Hessian's spectrum: the top, and a quadrature of the whole.

    Attributes:
        eigenvalues: the largest, descending, each with its residual; ``converged`` where all residuals are small.
        nodes, weights: a quadrature of the spectral density; the weights add up to 1.
        grid, density, density_error: the same, smoothed with Gaussians of ``width``, per unit of eigenvalue.
        dim: number of eigenvalues.
    """

    eigenvalues: tuple[float, ...]
    residuals: tuple[float, ...]
    converged: bool
    nodes: tuple[float, ...]
    weights: tuple[float, ...]
    grid: tuple[float, ...]
    density: tuple[float, ...]
    density_error: tuple[float, ...]
    width: float
    dim: int

    def count_above(self, threshold: float) -> float:
        """Estimated number of eigenvalues above ``threshold``."""
        return self.dim * sum(w for node, w in zip(self.nodes, self.weights, strict=True) if node > threshold)

    def share_within(self, threshold: float) -> float:
        """Estimated share of eigenvalues of magnitude at most ``threshold``."""
        return sum(w for node, w in zip(self.nodes, self.weights, strict=True) if abs(node) <= threshold)


@dataclass(frozen=True)
class Cone:
    """Along which directions the loss rises steeply, if one moves as far as to a corner of the ε-box of 1e-3.

    Rises are ``100 (f(w + r d) - f(w)) / (1 + f(w))``, in percent, for unit vectors ``d``, the larger of both signs.

    Attributes:
        radius: r.
        random_rises: along random directions.
        top_rises: along the leading eigenvectors of the Hessian, descending by eigenvalue.
        steep: from how many percent on a rise counts as steep.
    """

    radius: float
    random_rises: tuple[float, ...]
    top_rises: tuple[float, ...]
    steep: float

    @property
    def random_share(self) -> float:
        """Share of the random directions along which the loss rises steeply."""
        return _share(self.random_rises, self.steep)

    @property
    def top_share(self) -> float:
        """Share of the dimensions of the top subspace along which the loss rises steeply."""
        return _share(self.top_rises, self.steep)


def _share(rises: Sequence[float], steep: float) -> float:
    return sum(rise >= steep for rise in rises) / len(rises) if rises else math.nan


@dataclass(frozen=True)
class TrainedNetwork:
    """One trained network and all that was measured on it.

    Attributes:
        epochs, steps, samples: of the last phase; ``warm_steps`` before it.
        epoch_loss: mean over the last epoch, while the weights moved.
        ended: whether it came to its ending, or was given up.
        train, test: mean loss and accuracy with the final weights.
        distance: ``‖w - w₀‖`` from the initial weights of the seed, the same ones for every condition of a problem.
        boxes: Metric 2.1 by space, ε and solver.
    """

    seed: int
    condition: Condition
    epochs: int
    steps: int
    samples: int
    warm_steps: int
    epoch_loss: float
    ended: bool
    train: Evaluation
    test: Evaluation
    distance: float
    boxes: tuple[BoxValue, ...] = ()
    curvature: Curvature | None = None
    cone: Cone | None = None

    def box(self, space: str, epsilon: float, solver: str) -> BoxValue | None:
        for found in self.boxes:
            if (found.space, found.epsilon, found.solver) == (space, epsilon, solver):
                return found
        return None

    @property
    def steep_dimensions(self) -> float:
        """Estimated number of eigenvectors of the Hessian along which ``cone.radius`` costs ``cone.steep`` percent, if the
        loss is quadratic that far; NaN where no spectrum or cone was measured."""
        if self.curvature is None or not self.curvature.nodes or self.cone is None:
            return math.nan
        return self.curvature.count_above(2 * self.cone.steep / 100 * (1 + self.train.loss) / self.cone.radius**2)

    def box_ratio(self, space: str, solver: str) -> float:
        """``φ(ε) / φ(ε/2)``: 4 for a quadratic loss, 2 where the gradient dominates, 1 where the solver failed; or NaN."""
        whole, half = (self.box(space, epsilon, solver) for epsilon in EPSILONS)
        return whole.value / half.value if whole is not None and half is not None and half.value > 0 else math.nan


@dataclass(frozen=True)
class Curve:
    """Loss and accuracy on a line through two minima: the paper's Figure 3, and the curved one.

    Attributes:
        kind: "straight" (``α x_l + (1-α) x_s``) or "curved" (``sin(απ/2) x_l + cos(απ/2) x_s``).
        study: whose small (α = 0) and large (α = 1) networks of ``seed`` are the ends.
    """

    kind: str
    study: str
    seed: int
    alphas: tuple[float, ...]
    train: tuple[Evaluation, ...]
    test: tuple[Evaluation, ...]


@dataclass(frozen=True)
class TrajectoryPoint:
    """A network on its way; ``sharpness`` is ε-box sharpness at 1e-3 in full space by our solver, NaN where not measured."""

    epochs: int
    steps: int
    train: Evaluation
    test: Evaluation
    distance: float
    sharpness: float


@dataclass(frozen=True)
class Trajectory:
    """One training watched: Figure 6, and the small-batch run of Figure 5's upper panel.

    Attributes:
        purpose: "sharpness_against_loss" or "warm_start".
        role: "small" or "large".
    """

    purpose: str
    role: str
    problem: str
    batch_size: int
    seed: int
    points: tuple[TrajectoryPoint, ...]


Quantity = Callable[[TrainedNetwork], float]


def box(space: str, epsilon: float, solver: str) -> Quantity:
    """The metric's value; NaN where it was not measured."""

    def quantity(network: TrainedNetwork) -> float:
        found = network.box(space, epsilon, solver)
        return math.nan if found is None else found.value

    return quantity


def train_accuracy(network: TrainedNetwork) -> float:
    return network.train.accuracy


def test_accuracy(network: TrainedNetwork) -> float:
    return network.test.accuracy


def train_loss(network: TrainedNetwork) -> float:
    return network.train.loss


@dataclass(frozen=True)
class Record:
    """Everything that was found.

    Attributes:
        settings: of the experiment, as given (``Settings``), JSON types.
        command: that gives this record, without folders.
        versions: of Python and the packages that the numbers depend on, and the device's kind.
        problems: "main", and "warm_start" where Figure 5 has another network and other data.
        studies: study -> role -> condition; roles in the order of ``STUDIES``.
        all_networks: each once, in order of studies, roles and seeds.
        large_eigenvalue, near_zero: thresholds at which the Hessian's eigenvalues are counted, the same for all networks
            of "main": a tenth, and a thousandth, of the mean largest eigenvalue of the small-batch minima at matched loss.
        sentences: what the numbers say: what reproduces, what does not, where controls disagree.
    """

    settings: Mapping[str, Any]
    command: str
    versions: Mapping[str, str]
    problems: Mapping[str, Problem]
    studies: Mapping[str, Mapping[str, Condition]]
    all_networks: tuple[TrainedNetwork, ...]
    curves: tuple[Curve, ...] = ()
    trajectories: tuple[Trajectory, ...] = ()
    large_eigenvalue: float = math.nan
    near_zero: float = math.nan
    sentences: tuple[str, ...] = ()
    schema_version: int = field(default=SCHEMA_VERSION)

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted({network.seed for network in self.all_networks}))

    def roles(self, study: str) -> Mapping[str, Condition]:
        """Raises a ValueError that names the studies there are, where ``study`` was not run."""
        if study not in self.studies:
            known = ", ".join(self.studies) or "none"
            raise ValueError(f"the record has no study {study!r}.{did_you_mean(study, self.studies)} Studies: {known}")
        return self.studies[study]

    def networks(self, study: str, role: str) -> list[TrainedNetwork]:
        """In order of the seeds."""
        roles = self.roles(study)
        if role not in roles:
            raise ValueError(f"study {study!r} has no role {role!r}.{did_you_mean(role, roles)} Roles: {', '.join(roles)}")
        chosen = [network for network in self.all_networks if network.condition == roles[role]]
        return sorted(chosen, key=lambda network: network.seed)

    def values(self, study: str, role: str, quantity: Quantity) -> list[float]:
        return [quantity(network) for network in self.networks(study, role)]

    def paired(self, study: str, quantity: Quantity, *, reference: str = "small", other: str = "large") -> Paired | None:
        """Two roles, seed by seed; None where no seed has both values."""
        return pair(self.values(study, reference, quantity), self.values(study, other, quantity))

    def to_dict(self) -> dict[str, Any]:
        """JSON types only; what is not finite becomes None."""
        plain: dict[str, Any] = _plain(self)
        return plain

    def to_json(self) -> str:
        """Strict JSON (no NaN); ``from_json`` reads it back."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Record:
        """The inverse of ``to_dict``.

        Raises:
            ValueError: ``data`` is not a record, of another version, or damaged.
        """
        if not isinstance(data, Mapping) or data.get("schema_version") != SCHEMA_VERSION or "all_networks" not in data:
            raise ValueError(f"this is not a record of the reproduction of schema version {SCHEMA_VERSION}")
        try:
            record: Record = _from_plain(cls, data)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"this record is damaged: {type(error).__name__}: {error}") from error
        return record

    @classmethod
    def from_json(cls, text: str) -> Record:
        """The inverse of ``to_json``."""
        return cls.from_dict(json.loads(text))

    @classmethod
    def read(cls, folder: Path) -> Record:
        """From ``folder/record.json``."""
        return cls.from_json((folder / "record.json").read_text(encoding="utf-8"))


T = TypeVar("T")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Evaluation):
        return {key: _plain(entry) for key, entry in value._asdict().items()}
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def _from_plain(kind: Any, value: Any) -> Any:
    """The inverse of ``_plain``, by the annotations of the fields."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) or kind is Evaluation:
        hints = typing.get_type_hints(kind)
        return typing.cast("Callable[..., Any]", kind)(
            **{key: _from_plain(hints[key], entry) for key, entry in value.items()}
        )
    if type(None) in arguments:
        return None if value is None else _from_plain(arguments[0], value)
    if origin is tuple:
        return tuple(_from_plain(arguments[0], entry) for entry in value)
    if origin is not None and issubclass(origin, Mapping):
        return {key: _from_plain(arguments[1], entry) for key, entry in value.items()}
    if kind is float:
        return math.nan if value is None else float(value)
    return value
