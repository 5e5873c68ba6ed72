"""From entry points to specs and hook implementations, so that a broken plugin costs only itself. Imports no torch.

Why not ``PluginManager.load_setuptools_entrypoints``: it stops at the first plugin that fails to import, silently skips
a second distribution that uses a taken entry-point name, and leaves a misspelt hook to be found by nobody.
"""

from __future__ import annotations

import inspect
import os
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pluggy

from .errors import did_you_mean
from .specs import FAULTS, KINDS, Spec, cause, definition, spec_of

__all__ = [
    "DISABLE",
    "PROJECT",
    "HookTable",
    "Loaded",
    "PluginRecord",
    "Source",
    "builtin_source",
    "installed_sources",
    "is_strict",
    "load_plugin",
    "normalized",
]

PROJECT = "sharpness_plugins"  # pluggy's project name and the entry-point group
DISABLE = "SHARPNESS_PLUGINS_DISABLE"
STRICT = "SHARPNESS_PLUGINS_STRICT"


def is_strict() -> bool:
    """Whether a faulty plugin is an error: for the CI of plugin authors."""
    return os.environ.get(STRICT, "0") not in ("", "0")


def normalized(distribution: str) -> str:
    """The spelling in which packaging compares names: ``Acme_Tools`` is ``acme-tools``."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


@dataclass(frozen=True)
class Source:
    """An entry point and where it comes from.

    Attributes:
        switch: what the disabling variable must name to reach this plugin and no other.
    """

    entry_point: EntryPoint
    distribution: str
    version: str
    switch: str

    @property
    def name(self) -> str:
        return self.entry_point.name

    @property
    def is_disabled(self) -> bool:
        named = {entry.strip() for entry in os.environ.get(DISABLE, "").split(",")}
        return self.name in named or normalized(self.distribution) in {normalized(entry) for entry in named}

    def complaint(self, what: str) -> str:
        """The sentence for the user: which plugin, what happened, how to be rid of it."""
        who = f"sharpness plugin {self.name!r} from {self.distribution} {self.version}"
        return f"{who} {what}. Disable it with {DISABLE}={self.switch}"


def builtin_source(module: str) -> Source:
    """The plugin of this package itself, which takes the same path as everybody else's."""
    try:
        own_version = version("sharpness-plugins")
    except PackageNotFoundError:  # a source tree on the path, not installed
        own_version = "unknown"
    return Source(EntryPoint("builtin", module, PROJECT), "sharpness-plugins", own_version, "builtin")


def installed_sources() -> list[Source]:
    """Every entry point of the group, sorted by distribution and name: on disk their order differs between machines."""
    points = [(*_distribution(point), point) for point in entry_points(group=PROJECT)]
    points.sort(key=lambda found: (found[0], found[2].name, found[2].value))
    users = Counter(point.name for _, _, point in points)
    return [
        Source(point, distribution, its_version, point.name if users[point.name] == 1 else distribution)
        for distribution, its_version, point in points
    ]


def _distribution(point: EntryPoint) -> tuple[str, str]:
    try:
        found: Any = point.dist
        return found.name or "unknown", found.version or "unknown"
    except Exception:  # METADATA damaged or missing, which some Pythons answer with None; the plugin itself may be well
        return "unknown", "unknown"


class HookTable:
    """Implementations of hooks, each registered and called on its own.

    pluggy drops all of a plugin when one of its hooks is wrong, and stops a call at the first implementation that
    raises. Here every implementation is a pluggy plugin by itself.

    Args:
        hooks: the class whose methods are the hook specifications.
    """

    def __init__(self, hooks: type) -> None:
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(hooks)
        self.names = [name for name in dir(hooks) if self._manager.parse_hookspec_opts(hooks, name) is not None]

    def add(self, plugin: object, owner: Source) -> tuple[list[str], list[str]]:
        """Take the hook implementations of ``plugin``: their names, and a sentence for each that cannot work."""
        taken: list[str] = []
        problems: list[str] = []
        # A module's own names only: its __dir__ may offer lazy ones, and to look at those is to import them.
        for attribute in list(vars(plugin)) if isinstance(plugin, ModuleType) else dir(plugin):
            try:
                options = self._manager.parse_hookimpl_opts(plugin, attribute)
                function: Any = getattr(plugin, attribute) if options is not None or attribute in self.names else None
            except FAULTS:  # a property: older pluggy evaluates them
                continue
            if options is None:
                if callable(function):
                    problems.append(f"{attribute} is not marked with @hookimpl and is never called")
                continue
            hook = options.get("specname") or attribute
            problem = self._register(hook, attribute, function, owner, options)
            if problem is None:
                taken.append(hook)
            elif not options.get("optionalhook"):
                problems.append(problem)
        return taken, problems

    def _register(
        self, hook: str, attribute: str, function: Callable[..., Any], owner: Source, options: Mapping[str, Any]
    ) -> str | None:
        if hook not in self.names:
            return f"there is no hook {hook!r}.{did_you_mean(hook, self.names)} Hooks: {', '.join(self.names)}"
        if options.get("wrapper") or options.get("hookwrapper"):
            return f"{hook} is a hook wrapper, which is not supported, because hooks are called one by one"
        single = SimpleNamespace(owner=owner, **{attribute: function})
        if self._manager.parse_hookimpl_opts(single, attribute) is None:
            return f"{attribute} has @hookimpl above @staticmethod or @classmethod; put it beneath"
        try:
            self._manager.register(single)
        except pluggy.PluginValidationError:
            if self._manager.is_registered(single):  # before pluggy 1.7 a failed registration leaves a part behind
                self._manager.unregister(single)
            declared = ", ".join(inspect.signature(function).parameters)
            offered = ", ".join(self._arguments(hook)) or "none"
            return f"{hook}({declared}) does not fit its hook, which may ask for these arguments: {offered}"
        return None

    def _arguments(self, hook: str) -> tuple[str, ...]:
        spec = getattr(self._manager.hook, hook).spec
        return tuple(spec.argnames)

    def calls(self, hook: str, arguments: Mapping[str, object]) -> Iterator[tuple[Source, Callable[[], Any]]]:
        """One call without arguments per implementation, in pluggy's order: the last plugin first, built-ins last.

        Raises:
            TypeError: ``arguments`` are not those of the hook.
        """
        expected = self._arguments(hook)
        if set(expected) != set(arguments):
            raise TypeError(f"{hook} is called with {', '.join(expected) or 'no arguments'}; got {', '.join(arguments)}")
        for implementation in reversed(getattr(self._manager.hook, hook).get_hookimpls()):
            values = [arguments[name] for name in implementation.argnames]
            yield implementation.plugin.owner, partial(implementation.function, *values)


@dataclass(frozen=True)
class PluginRecord:
    """What became of an entry point.

    Attributes:
        status: "loaded" (``error`` then says what of it does not work, if anything), "disabled", or "failed".
        offers: names by kind, "metric" for one.
    """

    name: str
    distribution: str
    version: str
    status: str
    error: str = ""
    hooks: tuple[str, ...] = ()
    offers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


class Loaded(NamedTuple):
    """A plugin's record and specs, and the exception behind ``record.error``, if there was one."""

    record: PluginRecord
    specs: list[Spec]
    error: BaseException | None = None


def load_plugin(source: Source, table: HookTable) -> Loaded:
    """Import a plugin and take its hooks and metrics. What it does wrong is told in the record, never raised."""
    record = PluginRecord(source.name, source.distribution, source.version, "loaded")
    if source.is_disabled:
        return Loaded(replace(record, status="disabled"), [])
    try:
        plugin = source.entry_point.load()
        if isinstance(plugin, type) and spec_of(plugin) is None:
            plugin = plugin()
        own = spec_of(plugin)
        hooks, problems = table.add(plugin, source) if own is None else ([], [])
    except FAULTS as error:
        return Loaded(replace(record, status="failed", error=cause(error)), [], error)
    specs = [own] if own is not None else _marked(plugin) if isinstance(plugin, ModuleType) else []
    raised = None
    for kind in KINDS:
        if kind.hook in hooks:
            yielded, wrong, error_in_hook = _yielded(kind, source, table)
            specs, problems, raised = specs + yielded, problems + wrong, raised or error_in_hook
    by_name: dict[tuple[str, str], Spec] = {}
    for spec in specs:
        if definition(by_name.setdefault((spec.kind, spec.name), spec)) != definition(spec):
            problems.append(f"it offers {spec.kind} {spec.name!r} twice, and the first is used")
    if not hooks and not specs and not problems:
        problems = [f"{source.entry_point.value} has neither a @metric nor a function marked with @hookimpl"]
    is_useful = not problems or specs or set(hooks) - {kind.hook for kind in KINDS}
    status = "loaded" if is_useful else "failed"
    offers: dict[str, tuple[str, ...]] = {}
    for word, name in by_name:
        offers[word] = (*offers.get(word, ()), name)
    record = replace(record, status=status, error="; ".join(problems), hooks=tuple(hooks), offers=offers)
    return Loaded(record, list(by_name.values()), raised)


def _marked(module: ModuleType) -> list[Spec]:
    """The ``@metric`` objects of a module. Those it imported from elsewhere count only if it has none of its own."""
    found = {id(spec): spec for value in vars(module).values() if not isinstance(value, Spec) and (spec := spec_of(value))}
    package = module.__name__.partition(".")[0]
    own = [spec for spec in found.values() if definition(spec)[2].partition(":")[0].partition(".")[0] == package]
    return own or list(found.values())


def _yielded(kind: type[Spec], source: Source, table: HookTable) -> tuple[list[Spec], list[str], BaseException | None]:
    """What the hook of this kind yields in one plugin: the specs, a sentence for all else, and what it raised."""
    specs: list[Spec] = []
    problems: list[str] = []
    for owner, call in table.calls(kind.hook, {}):
        if owner is not source:
            continue
        try:
            for value in call():
                spec = spec_of(value)
                if not isinstance(spec, kind):
                    problems.append(f"{kind.hook} yielded {reprlib.repr(value)}, which is not a {kind.__name__}")
                else:
                    specs.append(spec)
        except FAULTS as error:
            return specs, [*problems, f"{kind.hook} raised {cause(error)}"], error
    return specs, problems, None
