from sharpness_plugins.registry import MetricSpec, hookimpl


@hookimpl
def sharpness_measure_end(raport):
    raise AssertionError("cannot be called")


@hookimpl
def sharpness_metrics():
    return [MetricSpec("beside_wrong_argument", "sp_wrong_argument:unused")]
