"""Tables as a reader sees them: text in cells, for the page and for Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...paired import Paired, mean_and_spread
from ..record import SOLVERS, STUDIES, Quantity, test_accuracy, train_accuracy, train_loss
from .published import PAPER, Published, published_for
from .reading import (
    MOVED,
    Reading,
    count_above,
    distance,
    finite,
    largest_eigenvalue,
    mean,
    moved_box,
    random_share,
    share_within,
    short,
    steep_share,
    top_share,
)
from .verdicts import Claim

__all__ = ["CONTROLS", "Table", "agreement_table", "all_tables"]

NONE = "–"
CONTROLS = {  # study -> what is held equal
    "protocol": "the paper's protocol",
    "matched_loss": "equal training loss",
    "equal_updates": "equal number of steps",
    "sqrt_rate": "equal loss, rate × √(B/b)",
    "linear_rate": "equal loss, rate × B/b",
}
SOLVER_NAMES = {"published": "the paper's solver", "lbfgsb": "the same, scaled", "ours": "our solver"}
REMEDY_NAMES = {
    "small": "small batch",
    "none": "large batch, no remedy",
    "augmentation": "data augmentation",
    "conservative": "conservative (proximal)",
    "adversarial": "adversarial training",
    "sam": "SAM (not in the paper)",
}


@dataclass(frozen=True)
class Table:
    """Cells of text; the first one of each row is its heading.

    Attributes:
        name: of its CSV file, without the ending.
        notes: below it, a sentence each.
    """

    name: str
    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        lines = [self.head, ("---", *["---:"] * (len(self.head) - 1)), *self.rows]
        body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return "\n\n".join([self.caption, body, *self.notes])


def all_tables(reading: Reading) -> dict[str, Table]:
    """By name; without those that the record has nothing for."""
    makers: tuple[Callable[[Reading], Table | None], ...] = (
        _accuracy,
        lambda reading: _boxes(reading, "full"),
        lambda reading: _boxes(reading, "subspace"),
        _controls,
        _spectrum,
        _cone,
        _distances,
        _remedies,
        _warm_start,
    )
    tables = [maker(reading) for maker in makers]
    return {table.name: table for table in tables if table is not None}


def agreement_table(found: Sequence[Claim]) -> Table:
    rows = tuple(
        (f"{claim.short} ({claim.where})", claim.paper, claim.here, str(claim.agrees), claim.reason) for claim in found
    )
    head = ("", "paper", "here", "agrees?", "why not, or not wholly")
    caption = "What the paper says, what was found here, and whether it agrees"
    return Table("agreement", caption, head, rows, ("The rule of each verdict is in the page and in `data/agreement.csv`.",))


# --- cells


def spread(values: Sequence[float], scale: float = 1.0) -> str:
    """Mean ± sample standard deviation over the seeds that have a finite value."""
    told = mean_and_spread([scale * value for value in values])
    return NONE if told == "-" else told


def percent(values: Sequence[float]) -> str:
    """Shares as mean ± sample standard deviation in percent, with the two digits of the paper."""
    kept = [100 * value for value in finite(values)]
    if not kept:
        return NONE
    return f"{statistics.fmean(kept):.2f}" + (f"±{statistics.stdev(kept):.2f}" if len(kept) > 1 else "")


def points(paired: Paired | None) -> str:
    """Mean paired difference of shares, ± its standard error, in points."""
    if paired is None:
        return NONE
    told = f"{100 * paired.mean_difference:+.2f}"
    return told if paired.standard_error is None else f"{told}±{100 * paired.standard_error:.2f}"


def ratio(paired: Paired | None) -> str:
    """Of the means, and in how many seeds the other is higher."""
    if paired is None or paired.ratio is None:
        return NONE
    return short(paired.ratio) + (f" ({paired.count(1)}/{paired.num_seeds})" if paired.num_seeds > 1 else "")


def _times(numerator: float, denominator: float) -> str:
    return short(numerator / denominator) if denominator > 0 else NONE


def _seeds(reading: Reading) -> str:
    count = len(reading.record.seeds)
    return "one seed" if count == 1 else f"mean ± sample standard deviation over {count} seeds"


# --- Table 2


def _accuracy(reading: Reading) -> Table | None:
    studies = [study for study in CONTROLS if reading.networks(study, "small") or reading.networks(study, "large")]
    if not studies:
        return None
    rows = [_published_accuracy(known) for known in _shown(published_for(reading.record))]
    for study in studies:
        cells = [
            percent(reading.values(study, role, quantity))
            for quantity in (train_accuracy, test_accuracy)
            for role in ("small", "large")
        ]
        rows.append((f"here, {CONTROLS[study]}", *cells, points(reading.paired(study, test_accuracy))))
    head = ("", "train, small [%]", "train, large [%]", "test, small [%]", "test, large [%]", "test, large − small [points]")
    return Table(
        "table2",
        "Table 2: training and test accuracy",
        head,
        tuple(rows),
        (f"Here: {_seeds(reading)}; differences seed by seed, ± standard error. Paper: five trials.",),
    )


def _shown(published: Published | None) -> Sequence[Published]:
    return PAPER if published is None else (published,)


def _published_accuracy(known: Published) -> tuple[str, ...]:
    cells = [str(cell) for cell in (*known.train, *known.test)]
    return (f"paper, {known.name}", *cells, f"{known.test[1].mean - known.test[0].mean:+.2f}")


# --- Tables 3 and 4


def _boxes(reading: Reading, space: str) -> Table | None:
    rows = [_published_boxes(known, space) for known in _shown(published_for(reading.record))]
    measured = 0
    notes = [f"Here: {_seeds(reading)}, ε-box sharpness in percent, over the networks on which the solver moved."]
    for study in ("protocol", "matched_loss"):
        for solver in ("published", "lbfgsb", "ours"):
            networks = [network for role in ("small", "large") for network in reading.networks(study, role)]
            found = [network.box(space, epsilon, solver) for network in networks for epsilon in (1e-3, 5e-4)]
            if not any(found):
                continue
            measured += 1
            rows.append((f"here, {CONTROLS[study]}: {_solver(solver)}", *_box_cells(reading, study, space, solver)))
            stuck = [value for value in found if value is not None and value.kind not in MOVED]
            if stuck:
                notes.append(
                    f"{_solver(solver)}, {CONTROLS[study]}: {len(stuck)} of {len(found)} measurements left out, "
                    "because the "
                    f"solver stopped where it started or failed ({stuck[0].message or stuck[0].kind})."
                )
    if not measured:
        return None
    if space == "full":
        number, where = 3, "the full space"
    else:
        number, where = 4, "random subspaces"
        notes.append(
            "The paper does not say how its random columns were scaled, and the scale moves these numbers: compare "
            "orders only."
        )
    notes.append("Solvers: " + "; ".join(f"{SOLVER_NAMES.get(name, name)}: {text}" for name, text in SOLVERS.items()) + ".")
    notes.append("φ(ε)/φ(ε/2): 4 for a quadratic loss, 2 where the gradient dominates, about 1 where the solver failed.")
    head: tuple[str, ...] = (
        "",
        "small, ε = 1e-3 [%]",
        "large, ε = 1e-3 [%]",
        "large / small",
        "small, ε = 5e-4 [%]",
        "large, ε = 5e-4 [%]",
    )
    head = (*head, "large / small", "φ(ε)/φ(ε/2), small", "φ(ε)/φ(ε/2), large")
    return Table(
        f"table{number}", f"Table {number}: ε-box sharpness (Metric 2.1) in {where}", head, tuple(rows), tuple(notes)
    )


def _solver(name: str) -> str:
    return SOLVER_NAMES.get(name, name)


def _published_boxes(known: Published, space: str) -> tuple[str, ...]:
    cells: list[str] = []
    for epsilon in (1e-3, 5e-4):
        small, large = known.boxes(space, epsilon)
        cells += [str(small), str(large), _times(large.mean, small.mean)]
    whole, half = known.boxes(space, 1e-3), known.boxes(space, 5e-4)
    return (f"paper, {known.name}", *cells, *(_times(whole[place].mean, half[place].mean) for place in (0, 1)))


def _box_cells(reading: Reading, study: str, space: str, solver: str) -> list[str]:
    cells: list[str] = []
    for epsilon in (1e-3, 5e-4):
        quantity = moved_box(space, epsilon, solver)
        cells += [spread(reading.values(study, role, quantity)) for role in ("small", "large")]
        cells.append(ratio(reading.paired(study, quantity)))
    for role in ("small", "large"):
        cells.append(spread([network.box_ratio(space, solver) for network in reading.networks(study, role)]))
    return cells


# --- controls


def _controls(reading: Reading) -> Table | None:
    """The paper's order under each way of holding something equal, with the paper's protocol first."""
    rows = []
    for study, name in CONTROLS.items():
        if not reading.has(study, "small", "large"):
            continue
        losses = [f"{mean(reading.values(study, role, train_loss)):.2g}" for role in ("small", "large")]
        steps = [f"{mean([n.steps for n in reading.networks(study, role)]):.0f}" for role in ("small", "large")]
        ended = [network.ended for role in ("small", "large") for network in reading.networks(study, role)]
        rows.append(
            (
                name if all(ended) else f"{name} ({len(ended) - sum(ended)} of {len(ended)} given up)",
                " / ".join(losses),
                " / ".join(steps),
                points(reading.paired(study, test_accuracy)),
                ratio(reading.paired(study, moved_box("full", 1e-3, "ours"))),
                ratio(reading.paired(study, moved_box("subspace", 1e-3, "ours"))),
                ratio(reading.paired(study, largest_eigenvalue)),
            )
        )
    if not rows:
        return None
    head: tuple[str, ...] = (
        "held equal",
        "training loss [nats], small / large",
        "steps, small / large",
        "test accuracy, large − small [points]",
    )
    head = (*head, "ε-box, large / small", "subspace, large / small", "λmax, large / small")
    notes = (
        "Ratios of the means, with the number of seeds in which the large batch is higher; ε = 1e-3, our solver. "
        "Given up: the loss was not reached, so nothing is matched.",
    )
    return Table("controls", "The same comparison with something else held equal", head, tuple(rows), notes)


# --- spectrum, cone, distances


def _small_and_large(reading: Reading, study: str, lines: Sequence[tuple[str, Quantity, float]]) -> list[tuple[str, ...]]:
    """One row per quantity that has a value: small, large, ratio."""
    rows = []
    for name, quantity, scale in lines:
        values = [reading.values(study, role, quantity) for role in ("small", "large")]
        if any(map(finite, values)):
            rows.append((name, *(spread(each, scale) for each in values), ratio(reading.paired(study, quantity))))
    return rows


def _spectrum(reading: Reading) -> Table | None:
    record = reading.record
    lines: list[tuple[str, Quantity, float]] = [
        ("largest eigenvalue [nats per squared weight]", largest_eigenvalue, 1.0),
        (f"eigenvalues above {record.large_eigenvalue:.3g} [number]", count_above(record.large_eigenvalue), 1.0),
        (f"eigenvalues within ±{record.near_zero:.2g} [%]", share_within(record.near_zero), 100.0),
    ]
    rows = _small_and_large(reading, "matched_loss", lines)
    if not rows:
        return None
    notes = (
        f"At equal training loss; {_seeds(reading)}. Counts are estimates from a quadrature of the spectral density; "
        "the "
        "thresholds are a tenth and a thousandth of the mean largest eigenvalue of the small-batch minima.",
    )
    return Table("counts", "The Hessian at both minima", ("", "small", "large", "large / small"), tuple(rows), notes)


def _cone(reading: Reading) -> Table | None:
    rows = _small_and_large(
        reading,
        "matched_loss",
        [
            ("steep among random directions [%]", random_share, 100.0),
            ("steep among leading eigenvectors [%]", top_share, 100.0),
            ("steep among all dimensions, by the Hessian's spectrum [%]", steep_share, 100.0),
        ],
    )
    if not rows:
        return None
    cones = [n.cone for role in ("small", "large") for n in reading.networks("matched_loss", role) if n.cone is not None]
    steep, tried, top = cones[0].steep, len(cones[0].random_rises), len(cones[0].top_rises)
    notes = (
        f"Steep: the loss rises by at least {steep:g} %, 100 (f(w + r d) − f(w)) / (1 + f(w)), as far out as a "
        "corner of the "
        f"ε-box of 1e-3; {tried} random directions and {top} eigenvectors per network, the larger of both signs.",
    )
    return Table("cone", "Does the minimum resemble a cone?", ("", "small", "large", "large / small"), tuple(rows), notes)


def _distances(reading: Reading) -> Table | None:
    rows = []
    for study, name in CONTROLS.items():
        if reading.networks(study, "small") or reading.networks(study, "large"):
            cells = [spread(reading.values(study, role, distance)) for role in ("small", "large")]
            rows.append((name, *cells, ratio(reading.paired(study, distance, reference="large", other="small"))))
    if not rows:
        return None
    head = ("held equal", "small, ‖w − w₀‖", "large, ‖w − w₀‖", "small / large")
    notes = ("Paper: 3 to 10. Euclidean norm over all weights, from the initial weights that both share.",)
    return Table("distances", "How far training moved the weights", head, tuple(rows), notes)


# --- remedies and the warm start


def _remedies(reading: Reading) -> Table | None:
    rows = []
    quantity = moved_box("full", 1e-3, "ours")
    for role, name in REMEDY_NAMES.items():
        if not reading.has("remedies", role):
            continue
        against = role if role not in ("small", "none") else None
        rows.append(
            (
                name,
                f"{mean(reading.values('remedies', role, train_loss)):.2g}",
                percent(reading.values("remedies", role, test_accuracy)),
                points(reading.paired("remedies", test_accuracy, reference="none", other=role)) if role != "none" else NONE,
                spread(reading.values("remedies", role, quantity)),
                ratio(reading.paired("remedies", quantity, reference="none", other=role)) if against else NONE,
                ratio(reading.paired("remedies", quantity, other=role)) if role != "small" else NONE,
                f"{mean([n.steps for n in reading.networks('remedies', role)]):.0f}",
            )
        )
    if not rows:
        return None
    head: tuple[str, ...] = (
        "",
        "training loss [nats]",
        "test accuracy [%]",
        "against no remedy [points]",
        "ε-box, 1e-3 [%]",
    )
    head = (*head, "/ no remedy", "/ small batch", "steps")
    notes = (f"{STUDIES['remedies'].split(';')[0].capitalize()}; {_seeds(reading)}; our solver.",)
    return Table("remedies", "Remedies for the large batch", head, tuple(rows), notes)


def _warm_start(reading: Reading) -> Table | None:
    quantity = moved_box("full", 1e-3, "ours")
    rows = []
    for epochs, role in [*reading.warm_epochs(), *([(-1, "small")] if reading.has("warm_start", "small") else [])]:
        rows.append(
            (
                {0: "0 (cold)", -1: f"{reading.batch('warm_start', 'small')} only"}.get(epochs, str(epochs)),
                percent(reading.values("warm_start", role, test_accuracy)),
                points(reading.paired("warm_start", test_accuracy, reference="cold", other=role)) if epochs else NONE,
                spread(reading.values("warm_start", role, quantity)),
                ratio(reading.paired("warm_start", quantity, reference="cold", other=role)) if epochs else NONE,
                f"{mean([n.warm_steps + n.steps for n in reading.networks('warm_start', role)]):.0f}",
            )
        )
    if not rows:
        return None
    head = ("warm epochs", "test accuracy [%]", "against cold [points]", "ε-box, 1e-3 [%]", "/ cold", "steps in all")
    notes = (f"{STUDIES['warm_start'].split(';')[0].capitalize()}; {_seeds(reading)}; our solver.",)
    return Table("figure5", "Figure 5 in numbers: small batches first", head, tuple(rows), notes)
