"""Models whose weights are spread over ranks (FSDP, DeepSpeed), which are refused by name."""

from __future__ import annotations

from torch import nn

__all__ = ["refuse_sharded", "sharded_by"]

_ENGINES = {"FullyShardedDataParallel": "FSDP", "FSDPModule": "FSDP", "DeepSpeedEngine": "DeepSpeed"}


def refuse_sharded(model: nn.Module, what: str) -> None:
    """
    Args:
        what: cannot work, as the subject of the sentence.
    Raises:
        ValueError: ``model``, or a part of it, is sharded.
    """
    if (engine := sharded_by(model)) is not None:
        raise ValueError(sentence(engine, what))


def sentence(engine: str, what: str) -> str:
    return (
        f"{what} does not work with {engine}, under which every rank holds a part of the weights. Train in one process or "
        "with DistributedDataParallel"
    )


def sharded_by(model: nn.Module) -> str | None:
    """By the names of classes, so that nothing is imported to ask; None where weights are whole."""
    for module in model.modules():
        for kind in type(module).__mro__:
            if kind.__name__ in _ENGINES:
                return _ENGINES[kind.__name__]
    if any(kind.__name__ == "DTensor" for parameter in model.parameters() for kind in type(parameter.data).__mro__):
        return "sharded parameters (DTensor)"
    return None
