from sharpness_plugins.registry import MetricSpec, hookimpl


@hookimpl
def sharpness_metrics():
    yield MetricSpec("good_loss", "sp_duplicate:Other")
    yield MetricSpec("epsilon_box", "sp_duplicate:Other")


class Other:
    def __call__(self, objective, rng):
        return 7.0
