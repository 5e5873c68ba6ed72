from sharpness_plugins.registry import MetricSpec, hookimpl


@hookimpl
def sharpness_metrics():
    yield "sp_wrong_types:Metric"
    yield MetricSpec("among_wrong_types", "sp_wrong_types:Metric")
    yield None
    yield MetricSpec("among_wrong_types", "sp_wrong_types:Another")
