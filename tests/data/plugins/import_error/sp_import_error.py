from sharpness_plugins.registry import metric


@metric("import_error_loss")
def loss(objective):
    return objective.value()


import sp_core_that_is_not_there  # noqa: E402, F401
