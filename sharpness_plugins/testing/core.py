"""What a conformance suite finds: a verdict on each property, and one error with all that are violated."""

from __future__ import annotations

import ast
import builtins
import pickle
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Any

__all__ = ["ConformanceError", "ConformanceReport", "Finding", "Suite", "Verdict", "Violation", "from_repr", "pickled"]


class Verdict(str, Enum):
    """What became of a property. The text is what the table shows."""

    HELD = "held"
    VIOLATED = "VIOLATED"
    NOT_APPLICABLE = "not applicable"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Finding:
    """One property of the suite, and what was found, with numbers where there are any."""

    property: str
    verdict: Verdict
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.verdict}: {self.property}" + (f": {self.detail}" if self.detail else "")


@dataclass(frozen=True)
class ConformanceReport:
    """What a suite checked, in its order. Prints as one line per property."""

    subject: str
    findings: tuple[Finding, ...]

    @property
    def violated(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.verdict is Verdict.VIOLATED)

    @property
    def passed(self) -> bool:
        return not self.violated

    def __getitem__(self, name: str) -> Finding:
        """The finding on the property of this name."""
        for finding in self.findings:
            if finding.property == name:
                return finding
        raise KeyError(f"no property {name!r} was checked. Checked were: {', '.join(f.property for f in self.findings)}")

    def __str__(self) -> str:
        count = len(self.violated)
        head = "conforms" if not count else f"violates {count} propert{'y' if count == 1 else 'ies'}"
        return "\n".join([f"{self.subject} {head}", *(f"  {finding}" for finding in self.findings)])


class ConformanceError(AssertionError):
    """A plugin does not do what users rely on; lists every violated property.

    Attributes:
        report: all that was checked, also what held and what did not apply.
    """

    def __init__(self, report: ConformanceReport) -> None:
        self.report = report
        broken = "".join(f"\n  {finding}" for finding in report.violated)
        super().__init__(f"{report.subject} violates {len(report.violated)} of {len(report.findings)} properties:{broken}")


class Violation(Exception):
    """Raised inside a check: what is wrong, as a clause."""


class NotApplicable(Exception):
    """Raised inside a check: why the property says nothing here."""


class Suite:
    """Runs checks one after the other, so that one violation hides no other."""

    def __init__(self, subject: str, skip: Mapping[str, str]) -> None:
        self._subject, self._skip = subject, dict(skip)
        self._findings: list[Finding] = []

    def check(self, name: str, run: Callable[[], str | None]) -> None:
        """``run`` returns a detail, or raises ``Violation`` or ``NotApplicable``."""
        if name in self._skip:
            self._add(name, Verdict.NOT_APPLICABLE, f"left out: {self._skip.pop(name)}")
            return
        try:
            self._add(name, Verdict.HELD, run() or "")
        except Violation as violation:
            self._add(name, Verdict.VIOLATED, str(violation))
        except NotApplicable as reason:
            self._add(name, Verdict.NOT_APPLICABLE, str(reason))
        except Exception as error:  # what a plugin raises where nothing should be raised
            self._add(name, Verdict.VIOLATED, f"raised {told(error)}")

    def __getitem__(self, name: str) -> Verdict:
        return next(finding.verdict for finding in self._findings if finding.property == name)

    def _add(self, name: str, verdict: Verdict, detail: str) -> None:
        self._findings.append(Finding(name, verdict, detail))

    def finish(self) -> ConformanceReport:
        """The report.

        Raises:
            ConformanceError: something is violated. ValueError: ``skip`` names a property that is none.
        """
        if self._skip:
            known = ", ".join(finding.property for finding in self._findings)
            raise ValueError(
                f"skip names {', '.join(map(repr, self._skip))}, which this suite does not check. It checks {known}"
            )
        report = ConformanceReport(self._subject, tuple(self._findings))
        if not report.passed:
            raise ConformanceError(report)
        return report


def told(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else f"a {type(error).__name__} without a message"


def pickled(value: Any) -> Any:
    """Through pickle and back.

    Raises:
        Violation: it cannot be pickled or read back, as worker processes and checkpoints need.
    """
    try:
        return pickle.loads(pickle.dumps(value))
    except Exception as error:
        raise Violation(f"pickle fails with {told(error)}") from error


def from_repr(value: Any, known: Mapping[str, Any]) -> Any:
    """What the ``repr`` of a setting says, in the names of its own parts and of ``known``.

    Raises:
        Violation: the text is not an expression that makes the thing again.
    """
    text = repr(value)
    names = {**_names_of(value), "inf": float("inf"), "nan": float("nan"), **known}
    try:
        tree = ast.parse(text, mode="eval")
        return eval(compile(tree, "<repr>", "eval"), {"__builtins__": {}, **_harmless(), **names})
    except Exception as error:
        raise Violation(f"its repr {shortened(text)} cannot be read back: {told(error)}") from error


def _harmless() -> dict[str, Any]:
    return {
        name: getattr(builtins, name) for name in ("frozenset", "set", "tuple", "list", "dict", "range", "slice", "complex")
    }


def _names_of(value: Any) -> dict[str, Any]:
    """Names of the classes of a setting and of what is in it, and of functions among them."""
    found: dict[str, Any] = {}
    pending, seen = [value], set()
    while pending:
        one = pending.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        kind = type(one)
        found[kind.__name__] = kind
        if is_dataclass(one) and not isinstance(one, type):
            pending += [getattr(one, field.name) for field in fields(one)]
        elif isinstance(one, Mapping):
            pending += [*one.keys(), *one.values()]
        elif isinstance(one, (list, tuple, set, frozenset)):
            pending += one
        elif hasattr(one, "__dict__") and kind.__module__ in sys.modules and not isinstance(one, type):
            pending += vars(one).values()
    return found


def shortened(text: str, most: int = 120) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(names))) or "none"
