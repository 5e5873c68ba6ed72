"""SAM by other libraries, where they are at hand, with the two calls that both have: ``first_step``, ``second_step``.

pytorch_optimizer is on PyPI. davda54/sam is one file and no package: ``DAVDA54_SAM`` names it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["PEERS", "available", "step"]

PEERS = ("davda54", "pytorch_optimizer")


def _davda54() -> Any:
    spec = importlib.util.spec_from_file_location("davda54_sam", os.environ["DAVDA54_SAM"])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SAM


def _pytorch_optimizer() -> Any:
    from pytorch_optimizer import SAM

    return SAM


def available() -> dict[str, Callable[..., Any]]:
    """From a name to ``SAM(parameters, base class, rho=..., **settings of the base)``, for the peers that can be had."""
    found: dict[str, Callable[..., Any]] = {}
    if os.path.isfile(os.environ.get("DAVDA54_SAM", "")):
        found["davda54"] = _davda54()
    if importlib.util.find_spec("pytorch_optimizer") is not None:
        found["pytorch_optimizer"] = _pytorch_optimizer()
    return found


def step(optimizer: Any, evaluate: Callable[[], Any]) -> None:
    """As both document it. ``evaluate`` computes the loss and its gradients."""
    evaluate()
    optimizer.first_step(zero_grad=True)
    evaluate()
    optimizer.second_step(zero_grad=True)


def sgd(peer: Callable[..., Any], parameters: Iterable[Tensor], *, rho: float = 0.05, **settings: Any) -> Any:
    return peer(list(parameters), torch.optim.SGD, rho=rho, **settings)
