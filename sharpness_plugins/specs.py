"""What a plugin offers: specs, functions as metrics, and the settings of both. Imports no torch."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from operator import attrgetter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from .errors import did_you_mean
from .report import Kind, MetricResult, Status

if TYPE_CHECKING:
    import torch

    from .objective import Objective

__all__ = [
    "FAULTS",
    "INVARIANCES",
    "KINDS",
    "SPEC",
    "CouplingSpec",
    "FunctionMetric",
    "Metric",
    "MetricSpec",
    "OptimizerSpec",
    "ScheduleSpec",
    "SignalSpec",
    "Spec",
    "cause",
    "check_settings",
    "definition",
    "factory_settings",
    "is_loading",
    "loading",
    "maker",
    "metric_invariances",
    "metric_name",
    "metric_settings",
    "spec_of",
    "works_on_shards",
]

_POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD
_POSITIONAL_ONLY = inspect.Parameter.POSITIONAL_ONLY
SPEC = "__sharpness_metric__"  # where a decorated metric keeps its spec

INVARIANCES: Mapping[str, str] = MappingProxyType(
    {
        "layer_rescaling": "a ReLU layer times a factor, and the next one's weights over it, change nothing (Dinh et al.)",
        "neuron_permutation": "the neurons of a hidden layer in another order change nothing",
        "batch_norm_scaling": "weights before a BatchNorm in batch mode times a factor change nothing",
        "loss_scaling": "the loss times a factor multiplies the number by it",
        "loss_invariance": "the loss times a factor changes nothing",
    }
)
"""What a metric may claim by its attribute ``invariances``; ``testing.check_metric`` tries each on networks."""

# What a plugin may raise without stopping the others. A module that calls sys.exit() on import is one; Ctrl-C is not.
FAULTS = (Exception, SystemExit)


def cause(error: BaseException) -> str:
    """``ValueError: what it says``, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


_LOADING: ContextVar[bool] = ContextVar("loading", default=False)


def is_loading() -> bool:
    """Whether plugin code is being imported: what ``@metric`` meets now is that plugin's, not the user's session's."""
    return _LOADING.get()


@contextmanager
def loading() -> Iterator[None]:
    """Plugin code is imported in this block."""
    token = _LOADING.set(True)
    try:
        yield
    finally:
        _LOADING.reset(token)


class Metric(Protocol):
    """Anything callable like this; a frozen dataclass, as a rule, whose fields are its settings.

    It may say what leaves its number as it is by an attribute ``invariances``, a set of names out of ``INVARIANCES``;
    ``sharpness_plugins.testing.check_metric`` asks for it, and checks it along with everything else that users rely on.

    An attribute ``works_on_shards = True`` says that it can measure a model whose weights do not fit on one device
    (``objective.layout.is_whole`` is False). Each rank then has its shard of ``objective.origin`` and of all vectors, of
    which some ranks may have nothing: sums, norms, the dimension and random vectors must come from ``objective.layout``, and
    what is decided must depend on those alone, so that all ranks go the same way. Without it, it fails there, by name.
    """

    def __call__(self, objective: Objective, rng: torch.Generator) -> MetricResult: ...


@dataclass(frozen=True)
class Spec:
    """What a plugin offers: a name, and how to get the thing when somebody asks for it. Abstract: see its kinds.

    Attributes:
        kind: what sort of thing it is, as the word for it in messages.
        hook: the hook that yields specs of this kind.
        uses: what a thing of this kind is asked for, so that a factory that makes something else is told at once.
        name: an identifier; a metric's is the key in the report.
        factory: called with the settings, returns the thing. Written as ``"package.module:attribute"`` it is imported
            on first use, so that listing stays fast.
        summary: one line for ``sharpness list``.
    """

    kind: ClassVar[str]
    hook: ClassVar[str]
    uses: ClassVar[str] = "__call__"

    name: str
    factory: str | Callable[..., Any]
    summary: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"the name of a {self.kind} is a string; got {self.name!r}")
        if not self.name.isidentifier():
            raise ValueError(
                f"{self.kind} name {self.name!r} is not an identifier: use letters, digits and underscores only"
            )
        if isinstance(self.factory, str):
            module, colon, attribute = self.factory.partition(":")
            if not colon or not all(part.isidentifier() for part in (*module.split("."), *attribute.split("."))):
                raise ValueError(
                    f"factory of {self.kind} {self.name!r} must look like 'package.module:attribute'; got {self.factory!r}"
                )
        elif not callable(self.factory):
            raise TypeError(
                f"factory of {self.kind} {self.name!r} must be callable or 'package.module:attribute'; got {self.factory!r}"
            )

    def load(self) -> Callable[..., Any]:
        """The factory itself, imported if need be.

        Raises:
            ImportError: the dotted string leads nowhere, or its module does not import.
        """
        if not isinstance(self.factory, str):
            return self.factory
        module, _, attribute = self.factory.partition(":")
        try:
            with loading():
                found = attrgetter(attribute)(importlib.import_module(module))
        except FAULTS as error:
            raise ImportError(f"{self.kind} {self.name!r} cannot be loaded from {self.factory!r}: {cause(error)}") from error
        if isinstance(found, FunctionMetric):
            return found.with_settings
        if not callable(found):
            raise ImportError(
                f"{self.kind} {self.name!r} cannot be loaded from {self.factory!r}: that is {found!r}, not callable"
            )
        factory: Callable[..., Any] = found
        return factory


@dataclass(frozen=True)
class MetricSpec(Spec):
    """A metric: its factory returns a ``Metric``."""

    kind = "metric"
    hook = "sharpness_metrics"


@dataclass(frozen=True)
class ScheduleSpec(Spec):
    """A batch-size schedule: its factory returns a ``schedules.BatchSchedule``."""

    kind = "schedule"
    hook = "sharpness_batch_schedules"


@dataclass(frozen=True)
class SignalSpec(Spec):
    """What schedules may look at: its factory returns a function of a ``SignalContext`` that returns a ``Signal``."""

    kind = "signal"
    hook = "sharpness_signals"


@dataclass(frozen=True)
class CouplingSpec(Spec):
    """How the learning rate follows the batch size: its factory returns a function ``(kappa, signals) -> Multipliers``."""

    kind = "coupling"
    hook = "sharpness_lr_couplings"


@dataclass(frozen=True)
class OptimizerSpec(Spec):
    """How a sharpness-aware optimizer makes its gradient: its factory returns an ``optimizers.Rule``."""

    kind = "optimizer"
    hook = "sharpness_optimizers"
    uses = "combine"


KINDS: tuple[type[Spec], ...] = (MetricSpec, ScheduleSpec, SignalSpec, CouplingSpec, OptimizerSpec)


@dataclass(frozen=True, repr=False)
class FunctionMetric:
    """A function ``(objective, rng, *, setting=default)`` as a metric; made by ``@metric``.

    Attributes:
        settings: all of them; those not given have the function's defaults.
        invariances: names out of ``INVARIANCES``; None where nothing is said of them.
        works_on_shards: see ``Metric``.
    """

    function: Callable[..., Any]
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    name: str = ""
    invariances: frozenset[str] | None = None
    works_on_shards: bool = False

    def __post_init__(self) -> None:
        name = self.name or self.function.__name__
        defaults = _function_settings(name, self.function)
        check_settings(f"metric {name!r}", self.settings, defaults)
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "settings", MappingProxyType({**defaults, **self.settings}))

    def with_settings(self, /, **settings: Any) -> FunctionMetric:
        """The same metric with these settings changed."""
        return replace(self, settings={**self.settings, **settings})

    def __call__(self, objective: Objective, rng: torch.Generator) -> MetricResult:
        wants_rng = "rng" in inspect.signature(self.function).parameters
        returned = self.function(objective, **({"rng": rng} if wants_rng else {}), **self.settings)
        if isinstance(returned, MetricResult):
            return returned
        # An estimate, because nothing is known of how the function got it: "exact" would be a claim of ours.
        return MetricResult(_number(returned, self.name), status=Status(Kind.ESTIMATE, f"value as returned by {self.name}"))

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={value!r}' for key, value in self.settings.items())})"

    def __reduce__(self) -> tuple[Any, ...]:
        # Under its own name the module now holds this object, so pickle cannot find the bare function there.
        module, qualname = self.function.__module__, self.function.__qualname__
        holder = _find(module, qualname)
        if isinstance(holder, FunctionMetric) and holder.function is self.function:
            return _unpickled, (module, qualname, dict(self.settings))
        said = (self.invariances, self.works_on_shards)
        return FunctionMetric, (self.function, dict(self.settings), self.name, *said)


def _unpickled(module: str, qualname: str, settings: Mapping[str, Any]) -> FunctionMetric:
    found: FunctionMetric = attrgetter(qualname)(importlib.import_module(module))
    return found.with_settings(**settings)


def _find(module: str, qualname: str) -> object | None:
    """What a loaded module holds under a dotted name; imports nothing."""
    try:
        found: object = attrgetter(qualname)(sys.modules[module])
    except (KeyError, AttributeError):
        return None
    return found


def _number(returned: Any, name: str) -> float:
    try:
        if isinstance(returned, str):  # float("0.5") would accept it
            raise TypeError("it is a string")
        return float(returned.detach() if hasattr(returned, "detach") else returned)
    except (TypeError, ValueError, RuntimeError) as error:
        got = f"{type(returned).__name__}: {cause(error)}"
        raise TypeError(f"metric {name!r} must return one number or a MetricResult, but it returned a {got}") from error


def _function_settings(name: str, function: Callable[..., Any]) -> dict[str, Any]:
    """Settings and their defaults, from the signature; TypeError if it is not one of a metric."""
    expected = f"metric {name!r} must be a function of (objective, rng, *, setting=default)"
    parameters = list(inspect.signature(function).parameters.values())
    if not parameters or parameters[0].kind not in (_POSITIONAL_ONLY, _POSITIONAL):
        raise TypeError(f"{expected}: it takes no objective")
    others = parameters[1:]
    for parameter in others:
        if parameter.kind not in (parameter.KEYWORD_ONLY, _POSITIONAL):
            raise TypeError(f"{expected}: {str(parameter)!r} is not a setting with a name")
        if parameter.name != "rng" and parameter.default is parameter.empty:
            raise TypeError(f"{expected}: {parameter.name!r} has no default")
    return {parameter.name: parameter.default for parameter in others if parameter.name != "rng"}


def factory_settings(factory: Callable[..., Any]) -> dict[str, Any] | None:
    """Settings and their defaults (``Parameter.empty`` for a required one); None where the signature does not say."""
    function_metric = getattr(factory, "__self__", None)
    if isinstance(function_metric, FunctionMetric):
        return dict(function_metric.settings)
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return None
    if any(parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) for parameter in parameters.values()):
        return None
    settings = {parameter.name: parameter.default for parameter in parameters.values()}
    for one in fields(factory) if is_dataclass(factory) else ():
        if one.name in settings and one.default_factory is not MISSING:
            settings[one.name] = one.default_factory()  # the signature shows a placeholder
    return settings


def check_settings(owner: str, given: Iterable[str], known: Mapping[str, Any]) -> None:
    """TypeError unless all of ``given`` are settings of ``owner`` ("metric 'x'") and none that it needs is missing."""
    empty = inspect.Parameter.empty
    shown = ", ".join(key if default is empty else f"{key}={default!r}" for key, default in known.items()) or "none"
    for key in given:
        if key not in known:
            raise TypeError(f"{owner} has no setting {key!r}.{did_you_mean(key, known)} Settings: {shown}")
    if missing := [key for key, default in known.items() if default is empty and key not in given]:
        raise TypeError(f"{owner} needs {', '.join(missing)}. Settings: {shown}")


def spec_of(value: Any) -> Spec | None:
    """The spec that an object is or carries. By type, as ``getattr`` may wake a lazy module attribute or a proxy."""
    kind = type(value)
    if issubclass(kind, type) or kind is FunctionMetric:
        value = vars(value).get(SPEC)  # a class's own, not its base's
    return value if issubclass(type(value), Spec) else None


def maker(spec: Spec) -> object | None:
    """The class or function behind a spec; None for a dotted string whose module is not loaded."""
    found: object = spec.factory
    if isinstance(found, str):
        found = _find(*found.split(":"))
    elif isinstance(bound := getattr(found, "__self__", None), FunctionMetric):  # its with_settings
        found = bound
    return found.function if isinstance(found, FunctionMetric) else found


def definition(spec: Spec) -> tuple[str, str, str]:
    """Kind, name, and where it is defined. Specs that agree in it are one: re-exported, reloaded, a cell run again."""
    made = maker(spec)
    module, qualname = getattr(made, "__module__", None), getattr(made, "__qualname__", None)
    if module == "__main__":  # in a notebook the latest metric of a name counts, also if its function was renamed
        return spec.kind, spec.name, "__main__"
    if module is None or qualname is None:
        return spec.kind, spec.name, spec.factory if isinstance(spec.factory, str) else f"{id(spec.factory)}"
    return spec.kind, spec.name, f"{module}:{qualname}"


def metric_name(metric: object) -> str:
    """Its ``name``, a function's name, or its class's in snake_case."""
    name = getattr(metric, "name", None)
    if isinstance(name, str) and name:
        return name
    if inspect.isroutine(metric):
        return str(metric.__name__)
    cls = metric if isinstance(metric, type) else type(metric)
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__).lower()


def metric_invariances(metric: object) -> frozenset[str] | None:
    """What the metric claims by its attribute ``invariances``; None where it says nothing.

    Raises:
        TypeError: that is no set of names. ValueError: a name is not one of ``INVARIANCES``.
    """
    claimed = getattr(metric, "invariances", None)
    if claimed is None:
        return None
    if isinstance(claimed, str) or not isinstance(claimed, Iterable) or not all(isinstance(name, str) for name in claimed):
        raise TypeError(f"invariances must be a set of names such as {{'neuron_permutation'}}, got {claimed!r}")
    for name in claimed:
        if name not in INVARIANCES:
            raise ValueError(
                f"{name!r} is no invariance.{did_you_mean(name, INVARIANCES)} There are {', '.join(INVARIANCES)}"
            )
    return frozenset(claimed)


def works_on_shards(metric: object) -> bool:
    """Whether the metric says that it can measure where vectors lie in shards; see ``Metric``."""
    return getattr(metric, "works_on_shards", False) is True


def metric_settings(metric: object) -> dict[str, Any]:
    """A metric's settings, also those left at their defaults; empty where they are unknown."""
    if isinstance(metric, FunctionMetric):
        return dict(metric.settings)
    if is_dataclass(metric) and not isinstance(metric, type):
        return {one.name: getattr(metric, one.name) for one in fields(metric) if one.init}
    return {}
