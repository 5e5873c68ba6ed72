from sharpness_plugins.registry import hookimpl, metric


@hookimpl
def sharpness_metrcs():
    return []


@metric("beside_misspelt")
def beside(objective):
    return 0.0
