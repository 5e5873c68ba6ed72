from sharpness_plugins.registry import MetricSpec, hookimpl


@hookimpl
def sharpness_metrics():
    yield MetricSpec("before_the_fault", "sp_hook_raises:unused")
    raise RuntimeError("licence server\nis away")
