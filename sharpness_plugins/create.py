"""Sharpness-aware optimizers from what a configuration file says."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .errors import UnknownNameError, did_you_mean
from .optimizers import SharpnessAware
from .registry import get_rule
from .texts import name_and_settings

__all__ = ["create_optimizer"]

_OF_THE_CORE = ("rho", "m", "interval", "perturb", "replay_rng", "seed")


def create_optimizer(
    params: nn.Module | Iterable[Tensor] | Iterable[dict[str, Any]],
    rule: str = "sam",
    base: str | Callable[..., Optimizer] = "sgd",
    *,
    process_group: Any = None,
    scaler: Any = None,
    **settings: Any,
) -> SharpnessAware:
    """A ``SharpnessAware`` optimizer by names::

        create_optimizer(model, "gsam:rho=0.1,alpha=0.3", base="adamw", lr=1e-3, weight_decay=0.1)

    Args:
        params: a model, whose parameters that require gradients are trained, or what torch's optimizers take.
        rule: a name that ``sharpness list`` shows, and its settings; among them ``rho``, ``m``, ``interval``, ``perturb``,
            ``replay_rng`` and ``seed`` of ``SharpnessAware``.
        base: a class of ``torch.optim`` in any case, or what makes an optimizer from the parameters and ``settings``.
        process_group, scaler: as for ``SharpnessAware``.
        settings: of ``base``.
    Raises:
        UnknownNameError: there is no such rule or base.
        TypeError, ValueError: settings that do not fit.
    """
    name, given = name_and_settings(rule)
    core = {key: given.pop(key) for key in _OF_THE_CORE if key in given}
    made = get_rule(name, **given)
    model = params if isinstance(params, nn.Module) else None
    trained = params if model is None else [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = (_of_torch(base) if isinstance(base, str) else base)(trained, **settings)
    return SharpnessAware(optimizer, made, model=model, process_group=process_group, scaler=scaler, **core)


def _of_torch(name: str) -> Callable[..., Optimizer]:
    known: dict[str, Callable[..., Optimizer]] = {
        key.lower(): found
        for key, found in vars(torch.optim).items()
        if isinstance(found, type) and issubclass(found, Optimizer) and found is not Optimizer
    }
    if name.lower() not in known:
        raise UnknownNameError(
            f"torch.optim has no optimizer {name!r}.{did_you_mean(name.lower(), known)} Available: "
            f"{', '.join(sorted(known))}. Others are passed as a class or a function."
        )
    return known[name.lower()]
