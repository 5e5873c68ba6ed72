"""What ranks must have in common before their numbers can be added up: weights, loss, and batches that may be cut."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from . import sampling
from .batches import Batch, rows_of
from .distributed import Ranks
from .errors import LossRuleError, RanksApartError
from .evaluation import Evaluator
from .losses import LossRule
from .space import ParameterSpace

__all__ = ["is_sum_of_pieces", "on_rule", "on_weights"]

_SAME = {torch.float32: 1e-5, torch.float64: 1e-9}


def on_weights(space: ParameterSpace, ranks: Ranks) -> list[str]:
    """The same weights on every rank, or an error; buffers that differ become those of rank 0, with a note.

    Running statistics of BatchNorm differ between the ranks of DistributedDataParallel, which sends rank 0's round before
    each step.

    Raises:
        RanksApartError: other parameters on another rank.
    """
    if ranks.is_alone:
        return []
    with ranks.sharing("looking at the weights"):
        names = list(zip(space.names, map(tuple, space.shapes), strict=True))
        weights = [_sums(space.origin)] if space.layout.is_whole else []  # shards differ
        weights += [*(_sums(space.constant(name)) for name in space.constants)]
        buffers = {name: _sums(buffer) for name, buffer in space.buffers.items()}
        replicas = {name: (place, _sums(held)) for name, (place, held) in space.replicas.items()}
    found = ranks.gather((names, weights, buffers, replicas))
    if any(other[0] != names for other in found):
        raise RanksApartError(
            "the ranks perturb different parameters: their models or selections differ. Pass ranks='alone' to measure each "
            "model by itself."
        )
    if any(other[1] != found[0][1] for other in found) or _differ([other[3] for other in found]):
        raise RanksApartError(
            "the ranks hold models with different weights. Pass ranks='alone' to measure each by itself; or bring rank 0's "
            "weights to all of them first, as DistributedDataParallel does."
        )
    different = [name for name in buffers if any(other[2].get(name) != found[0][2].get(name) for other in found)]
    if not different:
        return []
    space.set_buffers(ranks.of(0, {name: space.buffers[name].cpu() for name in different}))
    many = f"{len(different)} buffers (such as {different[0]!r})"
    return [f"{many} differ between the ranks, and those of rank {ranks.members[0]} were used"]


def on_rule(rule: LossRule | None, ranks: Ranks) -> LossRule:
    """The rule of the ranks that have data, which must all find the same one.

    Raises:
        LossRuleError: they found different ones.
    """
    own = None if rule is None else _told(rule)
    found = [told for told in ranks.gather(own) if told is not None]
    if any(told != found[0] for told in found):
        losses = "; ".join(sorted({told[0] for told in found}))
        raise LossRuleError(f"the ranks find different losses for their data: {losses}. Pass loss_fn or criterion.")
    if rule is not None:
        return rule
    description, axis, fallback = found[0]
    return LossRule(description, _of_nothing, axis, None if fallback is None else LossRule(fallback, _of_nothing))


def is_sum_of_pieces(evaluator: Evaluator, batch: Batch, count: int, seed: int, ranks: Ranks) -> bool:
    """Whether the mean loss of a batch is that of its pieces, at the trained weights and at others nearby.

    Args:
        ranks: those that evaluate together.
    """
    origin, size = evaluator.space.origin, batch.num_samples
    if size is None:
        return False
    noise = evaluator.space.layout.normal(sampling.generator_for(seed, "pieces"), origin)
    evaluator.sizes[batch.position] = size
    with contextlib.suppress(Exception), torch.enable_grad(), ranks.sharing("comparing pieces with the whole"):
        for point in (origin, origin + 0.1 * (origin.abs() + 0.1) * noise):
            loss, weight = evaluator.value(point, batch)
            pieces = []
            for i in range(count):
                begin, end = i * size // count, (i + 1) * size // count
                if end > begin:
                    data = rows_of(batch.data, slice(begin, end), size)
                    pieces.append(evaluator.value(point, batch._replace(data=data, num_samples=end - begin)))
            losses, weights = (torch.stack(column) for column in zip(*pieces, strict=True))
            mean = (torch.where(weights > 0, losses, 0.0) * weights).sum() / weights.sum()
            tolerance = _SAME[origin.dtype] * (loss.abs() + 1e-3)
            if not bool((mean - loss).abs() <= tolerance) or not torch.allclose(weights.sum(), weight, rtol=1e-9):
                return False
        return True
    return False


def _differ(replicas: list[dict[str, tuple[tuple[int, ...], tuple[float, float]]]]) -> bool:
    """Whether two ranks hold other numbers in the same place."""
    known: dict[tuple[str, tuple[int, ...]], tuple[float, float]] = {}
    return any(known.setdefault((name, place), sums) != sums for told in replicas for name, (place, sums) in told.items())


def _told(rule: LossRule) -> tuple[str, int | None, str | None]:
    return rule.description, rule.class_axis, None if rule.fallback is None else rule.fallback.description


def _of_nothing(model: Any, batch: Any) -> Any:
    raise AssertionError("this rank has no data, so it has no loss to compute")


def _sums(tensor: Tensor) -> tuple[float, float]:
    """The same bits give the same sums."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    flat = tensor.detach().reshape(-1).to(torch.float64)
    weights = torch.arange(1, flat.numel() + 1, dtype=torch.float64, device=flat.device).sin()
    return flat.sum().item(), (flat * weights).sum().item()
