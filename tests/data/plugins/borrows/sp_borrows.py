"""Uses another distribution's metric beside its own; that does not make it the author."""

from sp_good import Rise, loss  # noqa: F401

from sharpness_plugins.registry import metric


@metric("borrows_own")
def own(objective, rng):
    return loss(objective, rng)
