"""What a measurement returns: cost, one result per metric, and the report that prints as a table."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

from .errors import did_you_mean, missing_dependency
from .schema import ANY, check, read_json

if TYPE_CHECKING:
    import pandas

__all__ = ["Cost", "Kind", "MetricResult", "SharpnessReport", "Status"]

SCHEMA_VERSION = 1


class Kind(str, Enum):
    """What a number is. The text is what the table shows."""

    EXACT = "exact"
    CONVERGED = "converged"
    ESTIMATE = "estimate"
    LOWER_BOUND = "lower bound"
    NOT_CONVERGED = "not converged"
    INTERRUPTED = "interrupted"
    NOT_MEASURED = "not measured"
    FAILED = "failed"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Status:
    """What a number is, and the sentence that the user reads about how it was obtained."""

    kind: Kind
    message: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}" if self.message else str(self.kind)


@dataclass(frozen=True)
class Cost:
    """Work done, in full-data equivalents: a gradient on half of the samples counts one half.

    Attributes:
        values: evaluations of the mean loss alone.
        gradients: evaluations of its gradient (and, with it, the loss).
        hvps: Hessian-vector products.
        passes: sweeps over the data; products with several vectors in one sweep share it.
        seconds: wall time.
    """

    values: float = 0.0
    gradients: float = 0.0
    hvps: float = 0.0
    passes: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def __sub__(self, other: Cost) -> Cost:
        return Cost(**{f.name: getattr(self, f.name) - getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True)
class MetricResult:
    """One metric's number, and how it was obtained.

    Attributes:
        value: the number; NaN where the metric failed or was not measured.
        standard_error: of an estimate; None where the number is not one.
        status: what the number is, with a sentence.
        details: everything else, JSON-like (numbers, strings, lists, mappings).
        cost: filled in by ``measure_sharpness``.
    """

    value: float
    standard_error: float | None = None
    status: Status = field(default_factory=lambda: Status(Kind.ESTIMATE))
    details: Mapping[str, Any] = field(default_factory=dict)
    cost: Cost | None = None

    def with_cost(self, cost: Cost) -> MetricResult:
        return replace(self, cost=cost)

    @classmethod
    def failed(cls, message: str) -> MetricResult:
        return cls(value=math.nan, status=Status(Kind.FAILED, message))

    @classmethod
    def not_measured(cls, message: str) -> MetricResult:
        return cls(value=math.nan, status=Status(Kind.NOT_MEASURED, message))

    def interrupted(self, reason: str) -> MetricResult:
        """What a metric had when it was stopped; the message says what kind of number it is."""
        said = f"stopped {reason}, and this is what it had, {self.status.kind}"
        message = f"{said}: {self.status.message}" if self.status.message else said
        return replace(self, status=Status(Kind.INTERRUPTED, message))


@dataclass(frozen=True)
class SharpnessReport(Mapping[str, MetricResult]):
    """The results of one measurement: a mapping from key to ``MetricResult`` that prints as a table.

    Attributes:
        results: one entry per metric, in the order asked for.
        loss: mean loss at the trained weights.
        provenance: data, loss rule, parameters, precision, seed, versions, notes: what the numbers depend on.
        cost: of the whole measurement, with loading and checking the data.
    """

    results: Mapping[str, MetricResult]
    loss: float
    provenance: Mapping[str, Any] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)

    def __getitem__(self, key: str) -> MetricResult:
        try:
            return self.results[key]
        except KeyError:
            known = ", ".join(map(repr, self.results)) or "none"
            raise KeyError(f"no result {key!r}.{did_you_mean(key, self.results)} Results: {known}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    @property
    def stopped(self) -> str | None:
        """Why the measurement ended before all metrics were measured, such as "by Ctrl-C"; None where it did not."""
        return self.provenance.get("stopped")

    @property
    def notes(self) -> list[str]:
        """Sentences about this measurement that a reader of the numbers must know."""
        return list(self.provenance.get("notes") or ())

    def __str__(self) -> str:
        title, notes = _printable(self._title()), [_printable(sentence) for sentence in self._sentences()]
        rows = [[_printable(cell) for cell in row] for row in self._rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        left = {0, 3}  # the metric's name and what the number is; the rest are numbers
        lines = [
            "  ".join(
                cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        rule = "-" * max(map(len, lines))
        return "\n".join([title, "", lines[0].rstrip(), rule, *(line.rstrip() for line in lines[1:]), "", *notes])

    def __repr__(self) -> str:
        values = ", ".join(f"{key}={result.value:.4g}" for key, result in self.results.items())
        return f"<SharpnessReport {values}; loss={self.loss:.4g}>"

    def _repr_html_(self) -> str:
        head, *body = self._rows()
        cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        table = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body)
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self._sentences())
        title = html.escape(self._title())
        return f"<p>{title}</p><table><thead><tr>{cells}</tr></thead><tbody>{table}</tbody></table><ul>{notes}</ul>"

    def _title(self) -> str:
        p = {key: value for key, value in self.provenance.items() if value is not None}
        if "num_samples" not in p:
            return f"Loss {self.loss:.6g}"
        data = f"{p['num_samples']:,} samples" + (f" on {p['ranks']} ranks" if p.get("ranks", 1) > 1 else "")
        return (
            f"Sharpness of {p.get('model', 'the model')}: {p.get('dim', 0):,} parameters, {data}, "
            f"mean loss {self.loss:.6g} ({p.get('loss_rule', 'loss rule unknown')})"
        )

    def _rows(self) -> list[list[str]]:
        rows = [["metric", "value", "std. error", "what it is", "gradients", "HVPs", "passes", "seconds"]]
        for key, result in self.results.items():
            error = "-" if result.standard_error is None else f"±{result.standard_error:.2g}"
            cost = ["-"] * 4
            if result.cost is not None:
                c = result.cost
                cost = [f"{c.gradients:.4g}", f"{c.hvps:.4g}", f"{c.passes:.4g}", f"{c.seconds:.3g}"]
            rows.append([key, f"{result.value:.5g}", error, str(result.status.kind), *cost])
        return rows

    def _sentences(self) -> list[str]:
        said = [f"{key}: {result.status.message}" for key, result in self.results.items() if result.status.message]
        return said + [f"note: {note}" for note in self.notes]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts; NaN and infinities become None."""
        return {
            "schema_version": SCHEMA_VERSION,
            "loss": _plain(self.loss),
            "cost": _plain(self.cost),
            "provenance": _plain(self.provenance),
            "results": {key: _plain(result) for key, result in self.results.items()},
        }

    def to_json(self, *, indent: int | None = 2) -> str:
        """Strict JSON (no NaN); ``from_json`` reads it back."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SharpnessReport:
        """The inverse of ``to_dict``; numbers that were not finite come back as NaN.

        Raises:
            ValueError: ``data`` is not a report, or was written by a newer version of this library.
        """
        version = data.get("schema_version") if isinstance(data, Mapping) else None
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise ValueError("this is not a sharpness report: it has no 'schema_version'. Write one with report.to_json().")
        if version > SCHEMA_VERSION:
            raise ValueError(
                f"this report has schema version {version}, and this version of sharpness_plugins reads up to "
                f"{SCHEMA_VERSION}. Upgrade with: pip install -U sharpness-plugins"
            )
        try:
            check(data, _SHAPE, "the report")
            check({key: data["provenance"].get(key) for key in _PROVENANCE}, _PROVENANCE, "the report.provenance")
            results = {key: _result_from(entry, f"the report.results.{key}") for key, entry in data["results"].items()}
        except ValueError as error:
            raise ValueError(f"this sharpness report is damaged: {error}") from error
        return cls(results, _number(data["loss"]), dict(data["provenance"]), _cost_from(data["cost"]))

    @classmethod
    def from_json(cls, text: str) -> SharpnessReport:
        """The inverse of ``to_json``. Text from elsewhere is safe to read: nothing in it is run.

        Raises:
            ValueError: see ``from_dict``; or ``text`` is not strict JSON, larger than 64 MiB, or nested too deep.
        """
        return cls.from_dict(read_json(text, "a sharpness report"))

    def to_frame(self) -> pandas.DataFrame:
        """One row per metric; needs pandas."""
        pd = missing_dependency("pandas", extra=None, purpose="SharpnessReport.to_frame")
        rows = []
        for key, result in self.results.items():
            cost = result.cost or Cost(*[math.nan] * len(fields(Cost)))
            rows.append(
                {
                    "metric": key,
                    "value": result.value,
                    "standard_error": math.nan if result.standard_error is None else result.standard_error,
                    "kind": str(result.status.kind),
                    "status": result.status.message,
                    **{f.name: getattr(cost, f.name) for f in fields(Cost)},
                }
            )
        columns = ["metric", "value", "standard_error", "kind", "status", *(f.name for f in fields(Cost))]
        frame: pandas.DataFrame = pd.DataFrame(rows, columns=columns).set_index("metric")
        return frame


def _printable(text: str) -> str:
    """Without what would move the cursor of a terminal: control characters of a report from elsewhere, escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in text)


def _plain(value: Any) -> Any:
    """JSON types for what details may hold, without importing torch or numpy."""
    if isinstance(value, Enum):
        return value.value
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, (Status, Cost, MetricResult)):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (set, frozenset)):
        return [_plain(entry) for entry in sorted(value, key=repr)]
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if hasattr(value, "tolist"):  # tensors, arrays and their scalars
        return _plain(value.tolist())
    return repr(value)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _result_from(entry: Mapping[str, Any], where: str) -> MetricResult:
    kind = entry["status"]["kind"]
    if kind not in list(Kind):
        raise ValueError(f"{where}.status.kind must be one of {', '.join(Kind)}, got {kind!r}")
    return MetricResult(
        value=_number(entry["value"]),
        standard_error=None if entry["standard_error"] is None else float(entry["standard_error"]),
        status=Status(Kind(kind), entry["status"]["message"]),
        details=dict(entry["details"]),
        cost=None if entry["cost"] is None else _cost_from(entry["cost"]),
    )


def _cost_from(entry: Mapping[str, Any]) -> Cost:
    return Cost(**{f.name: _number(entry[f.name]) for f in fields(Cost)})


_COST: dict[Any, Any] = {**{f.name: (float, None) for f in fields(Cost)}, ...: ANY}
_SHAPE = {
    "schema_version": int,
    "loss": (float, None),
    "cost": _COST,
    "provenance": {str: ANY},
    "results": {
        str: {
            "value": (float, None),
            "standard_error": (float, None),
            "status": {"kind": str, "message": str, ...: ANY},
            "details": {str: ANY},
            "cost": (_COST, None),
            ...: ANY,
        }
    },
    ...: ANY,
}
_PROVENANCE = {  # what the table is made from; a report made by hand may lack it
    "model": (str, None),
    "loss_rule": (str, None),
    "num_samples": (int, None),
    "dim": (int, None),
    "notes": ([str], None),
}
