"""Names its metric by a dotted string: listing must not import it."""

from sharpness_plugins.registry import MetricSpec, hookimpl


@hookimpl
def sharpness_metrics():
    return [
        MetricSpec("lazy_fisher", "sp_lazy_metrics:Fisher", "trace of the Fisher matrix"),
        MetricSpec("lazy_loss", "sp_lazy_metrics:loss"),
        MetricSpec("lazy_typo", "sp_lazy_metrics:Fischer"),
        MetricSpec("lazy_broken", "sp_lazy_broken:Fisher"),
        MetricSpec("lazy_number", "sp_lazy_metrics:NUMBER"),
        MetricSpec("lazy_not_a_metric", "sp_lazy_metrics:make_number"),
    ]
