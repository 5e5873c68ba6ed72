from sharpness_plugins.registry import metric


@metric("raises_always")
def raises(objective):
    raise ArithmeticError("no")


@metric("returns_nan")
def nan(objective):
    return float("nan")
