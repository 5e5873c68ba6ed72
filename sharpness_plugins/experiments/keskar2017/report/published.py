"""What Keskar et al. (2017) published: the numbers of their tables, as printed there (arXiv 1609.04836)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..record import Record

__all__ = ["DISTANCE_RATIO", "PAPER", "PAPER_URL", "Cell", "Published", "box_ratios", "half_epsilon_ratios", "published_for"]

PAPER_URL = "https://arxiv.org/abs/1609.04836"
DISTANCE_RATIO = (3.0, 10.0)  # of ‖x_s - x₀‖ to ‖x_l - x₀‖, section 2.2


@dataclass(frozen=True)
class Cell:
    """Mean and standard deviation over five trials."""

    mean: float
    deviation: float

    def __str__(self) -> str:
        return f"{self.mean:.2f}±{self.deviation:.2f}"


@dataclass(frozen=True)
class Published:
    """One network of the paper. A tuple of two is (small batch, large batch).

    Attributes:
        data: the name on the command line of what it was trained on.
        train, test: accuracy in percent (Table 2).
        full, subspace: sharpness in percent by ε (Tables 3 and 4).
    """

    name: str
    data: str
    train: tuple[Cell, Cell]
    test: tuple[Cell, Cell]
    full: Mapping[float, tuple[Cell, Cell]]
    subspace: Mapping[float, tuple[Cell, Cell]]

    def boxes(self, space: str, epsilon: float) -> tuple[Cell, Cell]:
        return (self.full if space == "full" else self.subspace)[epsilon]


def _network(name: str, data: str, table2: Sequence[float], table3: Sequence[float], table4: Sequence[float]) -> Published:
    """From rows as printed: mean and deviation in turn, small before large, training (or ε = 1e-3) first."""

    def halves(row: Sequence[float]) -> list[tuple[Cell, Cell]]:
        return [(Cell(row[i], row[i + 1]), Cell(row[i + 2], row[i + 3])) for i in (0, 4)]

    train, test = halves(table2)
    full, subspace = (dict(zip((1e-3, 5e-4), halves(row), strict=True)) for row in (table3, table4))
    return Published(name, data, train, test, full, subspace)


PAPER = (
    _network(
        *("F1", "mnist"),
        (99.66, 0.05, 99.92, 0.01, 98.03, 0.07, 97.81, 0.07),
        (1.23, 0.83, 205.14, 69.52, 0.61, 0.27, 42.90, 17.14),
        (0.11, 0.00, 9.22, 0.56, 0.05, 0.00, 9.17, 0.14),
    ),
    _network(
        *("F2", "timit"),
        (99.99, 0.03, 98.35, 2.08, 64.02, 0.2, 59.45, 1.05),
        (1.39, 0.02, 310.64, 38.46, 0.90, 0.05, 93.15, 6.81),
        (0.29, 0.02, 23.63, 0.54, 0.05, 0.00, 6.28, 0.19),
    ),
    _network(
        *("C1", "cifar10"),
        (99.89, 0.02, 99.66, 0.2, 80.04, 0.12, 77.26, 0.42),
        (28.58, 3.13, 707.23, 43.04, 7.08, 0.88, 227.31, 23.23),
        (2.18, 0.23, 137.25, 21.60, 0.71, 0.15, 29.50, 7.48),
    ),
    _network(
        *("C2", "cifar10"),
        (99.99, 0.04, 99.99, 0.01, 89.24, 0.12, 87.26, 0.07),
        (8.68, 1.32, 925.32, 38.29, 2.07, 0.86, 175.31, 18.28),
        (0.95, 0.34, 25.09, 2.61, 0.31, 0.08, 5.82, 0.52),
    ),
    _network(
        *("C3", "cifar100"),
        (99.56, 0.44, 99.88, 0.30, 49.58, 0.39, 46.45, 0.43),
        (29.85, 5.98, 258.75, 8.96, 8.56, 0.99, 105.11, 13.22),
        (17.02, 2.20, 236.03, 31.26, 4.03, 1.45, 86.96, 27.39),
    ),
    _network(
        *("C4", "cifar100"),
        (99.10, 1.23, 99.57, 1.84, 63.08, 0.5, 57.81, 0.17),
        (12.83, 3.84, 421.84, 36.97, 4.07, 0.87, 109.35, 16.57),
        (6.05, 1.13, 72.99, 10.96, 1.89, 0.33, 19.85, 4.12),
    ),
)


def published_for(record: Record) -> Published | None:
    """The paper's numbers for the record's network, if it is the paper's: by name, on the same data, at full width."""
    main = record.problems.get("main")
    for known in PAPER:
        if main is not None and main.network == known.name and record.settings.get("data") == known.data:
            return known if record.settings.get("width", 1.0) == 1.0 else None
    return None


def box_ratios(space: str, epsilon: float) -> dict[str, float]:
    """Large over small batch, by network."""
    cells = {known.name: known.boxes(space, epsilon) for known in PAPER}
    return {name: large.mean / small.mean for name, (small, large) in cells.items()}


def half_epsilon_ratios(space: str, place: int) -> dict[str, float]:
    """``φ(1e-3) / φ(5e-4)`` by network, of the small (0) or large (1) batch."""
    return {known.name: known.boxes(space, 1e-3)[place].mean / known.boxes(space, 5e-4)[place].mean for known in PAPER}
