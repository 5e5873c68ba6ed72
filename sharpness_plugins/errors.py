"""Error classes, warnings, and the one helper for optional packages."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType

__all__ = [
    "DuplicateNameError",
    "LoaderError",
    "LossRuleError",
    "LostRankError",
    "MeasurementStopped",
    "MeasurementWarning",
    "NonFiniteLossError",
    "PluginWarning",
    "RanksApartError",
    "RemoteFailureError",
    "SecondDerivativeError",
    "SharpnessError",
    "StateFileError",
    "UnknownNameError",
    "did_you_mean",
    "missing_dependency",
]


class SharpnessError(Exception):
    """Base class of the errors that this library defines."""


class LoaderError(SharpnessError, ValueError):
    """The loader cannot be measured on: it is empty, one-shot, or changes its length."""


class LossRuleError(SharpnessError, TypeError):
    """No rule says how a loss comes from this model and batch."""


class NonFiniteLossError(SharpnessError, ArithmeticError):
    """The loss at the trained weights is NaN or infinite."""


class SecondDerivativeError(SharpnessError, RuntimeError):
    """No exact mode of differentiation gives a Hessian-vector product of this model."""


class RemoteFailureError(SharpnessError, RuntimeError):
    """Another rank failed; the message is its own."""


class RanksApartError(SharpnessError, RuntimeError):
    """The ranks do not measure the same: other weights, metrics, evaluations or points."""


class LostRankError(SharpnessError, RuntimeError):
    """A rank is gone or does not come, and the group with it."""


class UnknownNameError(SharpnessError, LookupError):
    """No plugin offers this name."""


class DuplicateNameError(SharpnessError, LookupError):
    """Several plugins offer this name, so it does not say which one is meant."""


class StateFileError(SharpnessError, ValueError):
    """The file is no state of this measurement: another one's, damaged, in use, or no such file at all."""


class MeasurementStopped(BaseException):
    """Raised by an evaluation of the objective when the measurement is to stop, by Ctrl-C or by the clock.

    Like KeyboardInterrupt no ``Exception``, so that nothing holds it up by accident. A metric may catch it and return what
    it has; every further evaluation raises it again. What it returns is marked as interrupted.
    """


class PluginWarning(UserWarning):
    """A plugin, or one of its metrics, failed and was left out; the rest works."""


class MeasurementWarning(UserWarning):
    """The number can be misread unless the user knows what the message says."""


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for the nearest known name, or an empty string."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def missing_dependency(package: str, *, extra: str | None, purpose: str) -> ModuleType:
    """Import an optional ``package``, or raise an ImportError that says what to install.

    Args:
        package: the import name, possibly dotted.
        extra: the extra of ``sharpness-plugins`` that brings it, or None to name the package itself.
        purpose: what needs it, as the subject of the error's sentence.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        root = package.partition(".")[0]
        if error.name is not None and error.name.partition(".")[0] != root:
            raise  # the package is there, but one of its own imports is not
        install = f'"sharpness-plugins[{extra}]"' if extra else root
        raise ImportError(
            f"{purpose} needs {root}, which is not installed. Install it with: pip install {install}"
        ) from error
