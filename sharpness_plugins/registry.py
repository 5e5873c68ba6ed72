"""What plugins offer, by kind and name, and the hooks that they implement. Importing it, and listing, imports no torch."""

from __future__ import annotations

import importlib
import inspect
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, overload

import pluggy

from .errors import DuplicateNameError, PluginWarning, SharpnessError, UnknownNameError, did_you_mean
from .plugin_loading import (
    DISABLE,
    PROJECT,
    HookTable,
    PluginRecord,
    Source,
    builtin_source,
    installed_sources,
    is_strict,
    load_plugin,
    normalized,
)
from .report import SharpnessReport
from .specs import (
    FAULTS,
    KINDS,
    SPEC,
    CouplingSpec,
    FunctionMetric,
    Metric,
    MetricSpec,
    OptimizerSpec,
    ScheduleSpec,
    SignalSpec,
    Spec,
    cause,
    check_settings,
    definition,
    factory_settings,
    is_loading,
    loading,
    maker,
    metric_name,
    metric_settings,
)

if TYPE_CHECKING:
    from torch import nn

    from .controller import BatchChange
    from .coupling import CouplingRule
    from .losses import LossFn
    from .optimizers import Rule
    from .schedules import BatchSchedule, Signal
    from .signals import SignalContext

__all__ = [
    "KINDS",
    "CouplingSpec",
    "FunctionMetric",
    "Hooks",
    "Metric",
    "MetricSpec",
    "Offer",
    "OptimizerSpec",
    "PluginRecord",
    "Registry",
    "ScheduleSpec",
    "SignalSpec",
    "available",
    "available_couplings",
    "available_metrics",
    "available_optimizers",
    "available_schedules",
    "available_signals",
    "call_hook",
    "first_answer",
    "fresh_registry",
    "get_coupling",
    "get_metric",
    "get_rule",
    "get_schedule",
    "get_signal",
    "hookimpl",
    "hookspec",
    "is_strict",
    "metric",
    "metric_name",
    "metric_provenance",
    "metric_settings",
    "plugins",
    "schedule_factories",
]

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

BUILTIN = "sharpness_plugins.builtin"

T = TypeVar("T")


class Hooks(Protocol):
    """What a plugin can implement: any of these, marked with ``@hookimpl``, asking for any of the arguments by name.

    A plugin is a module or an object that an entry point of the group ``sharpness_plugins`` names::

        [project.entry-points.sharpness_plugins]
        acme = "acme_tools.plugin"
    """

    @hookspec
    def sharpness_metrics(self) -> Iterable[MetricSpec]:
        """The metrics that this plugin offers. Called when anything is looked up, so keep it free of torch::

            # acme_tools/plugin.py
            from sharpness_plugins import MetricSpec, hookimpl

            @hookimpl
            def sharpness_metrics():
                yield MetricSpec("acme_fisher", "acme_tools.fisher:Fisher", summary="trace of the Fisher matrix")

        where ``acme_tools/fisher.py`` holds a frozen dataclass ``Fisher`` with ``__call__(self, objective, rng)``.
        Its user writes ``measure_sharpness(model, loader, metrics=["acme_fisher"])``.

        An attribute ``invariances = frozenset({"neuron_permutation"})`` of the class says what leaves its number as it is
        (``sharpness_plugins.specs.INVARIANCES``), and ``sharpness_plugins.testing.check_metric(Fisher())`` in a test of the
        plugin holds it to that and to all else that users rely on. ``works_on_shards = True`` says that it can measure
        models whose weights do not fit on one device; ``sharpness_plugins.specs.Metric`` says what that asks of it.
        """

    @hookspec(firstresult=True)
    def sharpness_resolve_loss(self, model: Any, batch: Any, criterion: Any) -> LossFn | None:
        """How the mean loss comes from ``(model, batch)``, or None if this plugin does not know the kind.

        Asked once per measurement, with its first batch. The first plugin that answers wins::

            # acme_tools/plugin.py
            from sharpness_plugins import hookimpl

            def detection_loss(model, batch):
                images, targets = batch
                return sum(model(images, targets).values())

            @hookimpl
            def sharpness_resolve_loss(model, batch):
                return detection_loss if hasattr(model, "roi_heads") else None
        """

    @hookspec(firstresult=True)
    def sharpness_unwrap_model(self, model: Any) -> nn.Module | None:
        """What of ``model`` is measured, or None for all of it: its own modules, without those that are not trained.

        Asked before anything else, with wrappers of compilation and data parallelism off. The first answer wins::

            # acme_tools/plugin.py
            from sharpness_plugins import hookimpl

            @hookimpl
            def sharpness_unwrap_model(model):
                return model.student if type(model).__name__ == "AcmeDistillation" else None
        """

    @hookspec
    def sharpness_measure_end(self, report: SharpnessReport) -> None:
        """A measurement is finished. What a listener raises becomes a warning::

            # acme_tools/plugin.py
            from sharpness_plugins import hookimpl

            @hookimpl
            def sharpness_measure_end(report):
                with open("sharpness.jsonl", "a") as file:
                    file.write(report.to_json(indent=None) + "\\n")

        What a listener returns is ignored.
        """

    @hookspec(firstresult=True)
    def sharpness_open_checkpoint(self, path: str) -> Callable[[str], Mapping[str, Any]] | None:
        """How to measure a checkpoint that describes itself, or None if this plugin does not know the kind.

        ``sharpness measure --checkpoint FILE --data DATA`` asks it. The first answer is called with ``DATA`` and gives
        arguments of ``measure_sharpness``, ``model`` and ``loader`` at least. What it raises is told to the user::

            # acme_tools/plugin.py
            from functools import partial
            from sharpness_plugins import hookimpl

            def open_checkpoint(path, data):
                import torch
                from acme_tools.models import build, images

                saved = torch.load(path, weights_only=True)
                return {"model": build(saved), "loader": images(data)}

            @hookimpl
            def sharpness_open_checkpoint(path):
                return partial(open_checkpoint, path) if path.endswith(".acme") else None
        """

    @hookspec
    def sharpness_batch_schedules(self) -> Iterable[ScheduleSpec]:
        """The batch-size schedules that this plugin offers::

            # acme_tools/plugin.py
            from sharpness_plugins import ScheduleSpec, hookimpl

            @hookimpl
            def sharpness_batch_schedules():
                yield ScheduleSpec("acme_ramp", "acme_tools.ramp:Ramp", summary="linear ramp of the batch size")

        where ``acme_tools/ramp.py`` holds a frozen dataclass ``Ramp`` with the attributes and methods of
        ``sharpness_plugins.schedules.BatchSchedule``. Its user writes ``get_schedule("acme_ramp", until="40ep")``.
        """

    @hookspec
    def sharpness_signals(self) -> Iterable[SignalSpec]:
        """The signals that schedules may look at, beside every metric, which is a signal of its name::

            # acme_tools/plugin.py
            from sharpness_plugins import SignalSpec, hookimpl

            @hookimpl
            def sharpness_signals():
                yield SignalSpec("acme_weight_norm", "acme_tools.norms:WeightNorm", summary="norm of the weights")

        where ``WeightNorm()`` is called with a ``SignalContext`` and returns a ``schedules.Signal``.
        """

    @hookspec
    def sharpness_lr_couplings(self) -> Iterable[CouplingSpec]:
        """How the learning rate may follow the batch size::

            # acme_tools/plugin.py
            from sharpness_plugins import CouplingSpec, hookimpl
            from sharpness_plugins.coupling import Multipliers

            def cube_root():
                return lambda kappa, signals: Multipliers(learning_rate=kappa ** (1 / 3))

            @hookimpl
            def sharpness_lr_couplings():
                yield CouplingSpec("cube_root", cube_root, summary="learning rate times the cube root")

        Its user writes ``BatchController(schedule, optimizer, coupling="cube_root")``.
        """

    @hookspec
    def sharpness_optimizers(self) -> Iterable[OptimizerSpec]:
        """How sharpness-aware optimizers may make their gradient::

            # acme_tools/plugin.py
            from sharpness_plugins import OptimizerSpec, hookimpl

            @hookimpl
            def sharpness_optimizers():
                yield OptimizerSpec("acme_sign", "acme_tools.rules:SignSAM", summary="uphill along signs")

        where ``acme_tools/rules.py`` holds a frozen dataclass ``SignSAM``, a ``sharpness_plugins.optimizers.Rule``.
        Its user writes ``create_optimizer(model, "acme_sign:rho=0.1", base="sgd", lr=0.1)``.
        """

    @hookspec
    def sharpness_before_batch_change(self, change: BatchChange) -> str | None:
        """The batch size is about to change. A reason returned by any plugin is a veto: the old size stays::

            # acme_tools/plugin.py
            from sharpness_plugins import hookimpl

            @hookimpl
            def sharpness_before_batch_change(change):
                return "the cluster is full" if change.new.batch_size > 4096 else None

        Asked on rank 0 only, whose answer holds for all.
        """

    @hookspec
    def sharpness_batch_size_changed(self, change: BatchChange) -> None:
        """The batch size has changed, or was kept by a veto (``change.veto``). Told on every rank::

            # acme_tools/plugin.py
            from sharpness_plugins import hookimpl

            @hookimpl
            def sharpness_batch_size_changed(change):
                print(change)

        What a listener returns is ignored.
        """


class _Decorator(Protocol):
    @overload
    def __call__(self, target: type[T], /) -> type[T]: ...  # type: ignore[overload-overlap]  # a class is callable, too
    @overload
    def __call__(self, target: Callable[..., Any], /) -> FunctionMetric: ...


def metric(
    name: str, *, summary: str | None = None, invariances: Iterable[str] | None = None, works_on_shards: bool = False
) -> _Decorator:
    """Make a metric of a function or of a frozen dataclass, and register it under ``name``::

        @metric("gradient_norm")
        def gradient_norm(objective, *, order=2.0):
            \"\"\"Norm of the gradient at the trained weights.\"\"\"
            return objective.value_and_grad()[1].norm(order)

        measure_sharpness(model, loader, metrics=["gradient_norm", gradient_norm.with_settings(order=1.0)])

    A function takes ``objective``, ``rng`` (a ``torch.Generator``) if it wants one, and settings that have defaults; it
    returns a number or a ``MetricResult``, and becomes a ``FunctionMetric``. A dataclass is called as
    ``instance(objective, rng)`` and stays what it is. Defining it again, as in a notebook cell, replaces it. An entry
    point that names the module offers all metrics in it.

    Args:
        summary: defaults to the first line of the docstring.
        invariances: of a function, what leaves its number as it is, names out of ``specs.INVARIANCES``; a class says it by
            an attribute. ``testing.check_metric`` checks it.
        works_on_shards: of a function, whether it can measure where vectors lie in shards, see ``specs.Metric``; a class
            says it by an attribute.
    """
    if not isinstance(name, str):
        raise TypeError('write @metric("a_name"), with the name of the metric')
    claimed = None if invariances is None else frozenset(invariances)

    def decorate(target: Any) -> Any:
        if claimed is not None and isinstance(target, type):
            raise TypeError(f"metric {name!r}: a class says its invariances by an attribute, invariances = {claimed}")
        if works_on_shards and isinstance(target, type):
            raise TypeError(f"metric {name!r}: a class says it by an attribute, works_on_shards = True")
        made = _named_class(target, name) if isinstance(target, type) else FunctionMetric(target, name=name)
        if claimed is not None:
            made = replace(made, invariances=claimed)
        if works_on_shards:
            made = replace(made, works_on_shards=True)
        spec = MetricSpec(
            name,
            made.with_settings if isinstance(made, FunctionMetric) else made,
            _first_line(target) if summary is None else summary,
        )
        (type if isinstance(made, type) else object).__setattr__(made, SPEC, spec)  # a FunctionMetric is frozen
        if not is_loading():  # else the loader takes it, and knows the distribution
            _registry.register(spec)
        return made

    return decorate


def _named_class(cls: Any, name: str) -> Any:
    if "__dataclass_fields__" not in vars(cls) or not cls.__dataclass_params__.frozen:
        # Also the wrong order of decorators: @dataclass(slots=True) above @metric would replace the class registered.
        raise TypeError(
            f"metric {name!r}: put @metric above @dataclass(frozen=True); {cls.__name__} is not a frozen dataclass"
        )
    if "name" in cls.__dataclass_fields__:
        raise TypeError(f"metric {name!r}: {cls.__name__} has a field 'name', which is the place of the metric's name")
    cls.name = name
    return cls


def _first_line(target: Any) -> str:
    text = inspect.cleandoc(target.__doc__ or "")
    generated = isinstance(target, type) and text.startswith(f"{target.__name__}(")  # by @dataclass: the signature
    return "" if generated else text.partition("\n")[0]


@dataclass(frozen=True)
class Offer:
    """A spec and who offers it. ``distribution`` is empty for one registered in this process, by no entry point."""

    spec: Spec
    plugin: str
    distribution: str = ""
    version: str = ""

    def __str__(self) -> str:
        where = f"{self.distribution} {self.version}" if self.distribution else "this process"
        return f"{self.plugin!r} ({where})"


class Registry:
    """Built-ins and entry points, read on first use, and what ``@metric`` registered meanwhile.

    The functions of this module use one for the whole process; ``fresh_registry`` puts another in its place.
    """

    def __init__(self) -> None:
        self._session: dict[tuple[str, str, str], Spec] = {}
        self._lock = threading.RLock()
        self._table: HookTable | None = None
        self._records: list[PluginRecord] = []
        self._offers: list[Offer] = []

    def register(self, spec: Spec) -> None:
        """Offer something in this process. Takes no lock: it runs inside imports, which another thread may wait for."""
        self._session[definition(spec)] = spec

    def plugins(self) -> list[PluginRecord]:
        self._hooks()
        return list(self._records)

    def offers(self, kind: type[Spec]) -> dict[str, list[Offer]]:
        """By name; several offers mean several different things."""
        self._hooks()
        found: dict[tuple[str, str, str], Offer] = {}
        for offer in self._offers:
            found.setdefault(definition(offer.spec), offer)
        for key, spec in list(self._session.items()):
            plugin = str(getattr(maker(spec), "__module__", "session"))
            found[key] = replace(found[key], spec=spec) if key in found else Offer(spec, plugin)
        by_name: dict[str, list[Offer]] = {}
        for offer in found.values():
            if isinstance(offer.spec, kind):
                by_name.setdefault(offer.spec.name, []).append(offer)
        return by_name

    def available(self, kind: type[Spec], pattern: str) -> dict[str, Offer]:
        keyed = {
            name if len(offers) == 1 else _qualified(offer, offers): offer
            for name, offers in self.offers(kind).items()
            for offer in offers
        }
        return {
            key: keyed[key]
            for key in sorted(keyed)
            if fnmatchcase(keyed[key].spec.name, pattern) or fnmatchcase(key, pattern)
        }

    def find(self, kind: type[Spec], name: str) -> Offer:
        """The one offer of ``name`` or ``plugin:name``; a distribution's name does instead of the plugin's."""
        offers = self.offers(kind)
        plugin, _, plain = name.rpartition(":")
        found = offers.get(plain, [])
        if plugin:
            found = [o for o in found if plugin == o.plugin or normalized(plugin) == normalized(o.distribution)]
        if not found:
            known = list(self.available(kind, "*"))
            if plugin:
                known += [f"{offer.plugin}:{key}" for key, several in offers.items() for offer in several]
            absent = [f"{record.name!r} ({record.status})" for record in self._records if record.status != "loaded"]
            raise UnknownNameError(
                f"no {kind.kind} {name!r}.{did_you_mean(name, known)} "
                f"Available: {', '.join(self.available(kind, '*')) or 'none'}."
                + (f" Plugins not in use: {', '.join(absent)}." if absent else "")
            )
        if len(found) > 1:
            choices = {_qualified(offer, found) for offer in found}
            ask = f"Ask for {' or '.join(map(repr, sorted(choices)))}" if len(choices) == len(found) else "Rename one"
            raise DuplicateNameError(
                f"{kind.kind} {name!r} is offered by plugins {' and '.join(map(str, found))}. "
                f"{ask}, or switch a plugin off with {DISABLE}=NAME"
            )
        return found[0]

    def get(self, kind: type[Spec], name: str, settings: Mapping[str, Any]) -> Any:
        """The thing of this kind and name, made with these settings."""
        offer = self.find(kind, name)
        try:
            factory = offer.spec.load()
        except ImportError as error:
            raise ImportError(f"{error} (plugin {offer})") from error
        known = factory_settings(factory)
        if known is not None:
            check_settings(f"{kind.kind} {offer.spec.name!r}", settings, known)
        made = factory(**settings)
        if not (callable(made) if kind.uses == "__call__" else callable(getattr(made, kind.uses, None))):
            lacks = "cannot be called" if kind.uses == "__call__" else f"has no {kind.uses}()"
            raise TypeError(f"{kind.kind} {name!r} of plugin {offer} is {made!r}, which {lacks}")
        return made

    def provenance(self, metric: object) -> Offer | None:
        made_by = metric.function if isinstance(metric, FunctionMetric) else type(metric)
        mine = [o for several in self.offers(MetricSpec).values() for o in several if maker(o.spec) is made_by]
        name = metric_name(metric)
        return next((offer for offer in mine if offer.spec.name == name), mine[0] if mine else None)

    def answers(self, hook: str, arguments: Mapping[str, object]) -> Iterator[tuple[str, Any]]:
        """Lazily, each implementation's plugin and answer, without those that raise."""
        for source, call in self._hooks().calls(hook, arguments):
            try:
                answer = call()
            except FAULTS as error:
                self._warn([_fault(source, f"failed in {hook}: {cause(error)}", error)])
            else:
                yield source.name, answer

    def _hooks(self) -> HookTable:
        with self._lock:
            if self._table is not None:
                return self._table
            # Set before any plugin loads: one that looks up a metric on import sees what there is by then.
            self._table = HookTable(Hooks)
            try:
                faults = self._load_all(self._table)
            except BaseException:  # strict mode, or Ctrl-C: the next use starts again
                self._table, self._records, self._offers = None, [], []
                raise
            table = self._table
        self._warn(faults)  # only now, as a filter may turn the first into an exception
        return table

    def _load_all(self, table: HookTable) -> list[str]:
        """Fills the records and offers; returns one sentence per faulty plugin."""
        faults: list[str] = []
        sources = [builtin_source(BUILTIN)]
        try:
            sources += installed_sources()
        except Exception as error:  # one damaged entry_points.txt hides those of all distributions
            if is_strict():
                raise
            faults.append(f"no sharpness plugin is in use, as the installed entry points cannot be read: {cause(error)}")
        for source in sources:
            with loading():
                record, specs, raised = load_plugin(source, table)
            self._records.append(record)
            self._offers += [Offer(spec, source.name, source.distribution, source.version) for spec in specs]
            if record.error:
                what = "works only in part" if record.status == "loaded" else "did not load and is skipped"
                faults.append(_fault(source, f"{what}: {record.error}", raised))
        return faults

    @staticmethod
    def _warn(faults: Iterable[str]) -> None:
        for sentence in faults:
            warnings.warn(sentence, PluginWarning, stacklevel=2)


def _fault(source: Source, what: str, error: BaseException | None) -> str:
    """The sentence of a warning, which in strict mode is raised at once."""
    sentence = source.complaint(what)
    if is_strict():
        raise SharpnessError(sentence) from error  # not ``error`` itself: sys.exit(0) would end a CI run as a success
    return sentence


def _qualified(offer: Offer, rivals: Iterable[Offer]) -> str:
    """``plugin:metric``, or ``distribution:metric`` where several distributions named their plugin alike."""
    shared = sum(rival.plugin == offer.plugin for rival in rivals) > 1
    return f"{offer.distribution if shared and offer.distribution else offer.plugin}:{offer.spec.name}"


_registry = Registry()


@contextmanager
def fresh_registry() -> Iterator[Registry]:
    """A registry of its own inside the block, for tests.

    It reads entry points and environment variables anew, and what is registered inside is forgotten afterwards.
    It takes effect in all threads.
    """
    global _registry
    before, _registry = _registry, Registry()
    importlib.invalidate_caches()
    try:
        yield _registry
    finally:
        _registry = before


def available(kind: type[Spec], pattern: str = "*") -> dict[str, Offer]:
    """What is offered of a kind and has a name that matches, sorted. The keys suit ``get_metric`` and its like:
    ``plugin:name`` where a name is offered twice."""
    return _registry.available(kind, pattern)


def available_metrics(pattern: str = "*") -> dict[str, Offer]:
    """Metrics whose name matches, sorted. The keys suit ``get_metric``: ``plugin:name`` where one is offered twice."""
    return available(MetricSpec, pattern)


def available_schedules(pattern: str = "*") -> dict[str, Offer]:
    """Batch-size schedules whose name matches, sorted."""
    return available(ScheduleSpec, pattern)


def available_signals(pattern: str = "*") -> dict[str, Offer]:
    """Signals whose name matches, sorted. Every metric is a signal, too."""
    return available(SignalSpec, pattern)


def available_couplings(pattern: str = "*") -> dict[str, Offer]:
    """Learning-rate rules whose name matches, sorted."""
    return available(CouplingSpec, pattern)


def available_optimizers(pattern: str = "*") -> dict[str, Offer]:
    """Rules of sharpness-aware optimizers whose name matches, sorted."""
    return available(OptimizerSpec, pattern)


def get_metric(name: str, /, **settings: Any) -> Metric:
    """A metric by name, with these settings.

    Args:
        name: ``"metric"`` or ``"plugin:metric"``; the built-ins are of plugin ``builtin``.
    Raises:
        UnknownNameError: nobody offers it.
        DuplicateNameError: several plugins do.
        TypeError: it has no such setting.
        ImportError: its module does not import.
    """
    found: Metric = _registry.get(MetricSpec, name, settings)
    return found


def get_schedule(name: str, /, **settings: Any) -> BatchSchedule:
    """A batch-size schedule by name, with these settings. Raises as ``get_metric`` does."""
    found: BatchSchedule = _registry.get(ScheduleSpec, name, settings)
    return found


def schedule_factories() -> dict[str, Callable[..., BatchSchedule]]:
    """What makes each schedule, by its name and by that of its class, as its ``repr`` has it, for
    ``schedules.parse_schedule``; nothing is imported before it is called."""

    def made(name: str, /, *values: Any, **settings: Any) -> BatchSchedule:
        found: BatchSchedule = _registry.find(ScheduleSpec, name).spec.load()(*values, **settings)
        return found

    factories: dict[str, Callable[..., BatchSchedule]] = {name: partial(made, name) for name in available_schedules()}
    for name, offer in available_schedules().items():
        factory = offer.spec.factory
        of_class = re.split(r"[:.]", factory)[-1] if isinstance(factory, str) else getattr(factory, "__name__", "")
        if of_class:
            factories.setdefault(of_class, factories[name])
    return factories


def get_signal(name: str, /, **settings: Any) -> Callable[[SignalContext], Signal]:
    """A signal by name, with these settings. Raises as ``get_metric`` does."""
    found: Callable[[SignalContext], Signal] = _registry.get(SignalSpec, name, settings)
    return found


def get_coupling(name: str, /, **settings: Any) -> CouplingRule:
    """A learning-rate rule by name, with these settings. Raises as ``get_metric`` does."""
    found: CouplingRule = _registry.get(CouplingSpec, name, settings)
    return found


def get_rule(name: str, /, **settings: Any) -> Rule:
    """A rule of sharpness-aware optimizers by name, with these settings. Raises as ``get_metric`` does."""
    found: Rule = _registry.get(OptimizerSpec, name, settings)
    return found


def metric_provenance(metric: object) -> tuple[str, str, str] | None:
    """``(plugin, distribution, version)`` that offers this metric's class or function; None if none does.

    The last two are empty for a metric registered in this process. None also for what a factory function made.
    """
    offer = _registry.provenance(metric)
    return (offer.plugin, offer.distribution, offer.version) if offer is not None else None


def plugins() -> list[PluginRecord]:
    """Every plugin found, built-ins first, also those that are disabled or did not load."""
    return _registry.plugins()


def call_hook(hook_name: str, /, **kwargs: object) -> Iterator[tuple[str, Any]]:
    """Call all implementations now; yields each plugin's name and answer. One that raises gives a ``PluginWarning``."""
    return iter(list(_registry.answers(hook_name, kwargs)))


def first_answer(hook_name: str, /, **kwargs: object) -> Any | None:
    """The first answer that is not None; later plugins are not asked."""
    return next((answer for _, answer in _registry.answers(hook_name, kwargs) if answer is not None), None)
