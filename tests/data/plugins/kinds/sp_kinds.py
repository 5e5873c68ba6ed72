from dataclasses import dataclass

from sharpness_plugins.registry import MetricSpec, hookimpl, metric


class Plugin:
    name = "by_class"

    @hookimpl
    def sharpness_metrics(self):
        return [MetricSpec(self.name, "sp_kinds:Frozen")]

    @property
    def sharpness_measure_end(self):
        raise RuntimeError("a property is not a hook")


class Other(Plugin):
    name = "by_instance"


instance = Other()
SPEC = MetricSpec("by_spec", "sp_kinds:Frozen")


@metric("by_function")
def function(objective):
    return 1.0


@metric("by_metric_class")
@dataclass(frozen=True)
class Frozen:
    def __call__(self, objective, rng):
        return 2.0


class NeedsArguments:
    def __init__(self, settings):
        self.settings = settings
