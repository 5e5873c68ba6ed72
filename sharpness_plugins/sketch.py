"""The model on a few of the samples: the mean outputs there, and which way they go, at little cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from .batches import Batch
from .distributed import Ranks
from .evaluation import Evaluator
from .losses import logits_of
from .micro_batches import MicroBatches, Part
from .rounds import Rounds

__all__ = ["Sketch"]


class Sketch:
    """Evaluations of a model on a few samples, made by ``Objective.sketch``; each costs ``share`` of a whole one.

    Attributes:
        share: of all samples.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        batches: Sequence[Batch],
        share: float,
        ranks: Ranks,
        *,
        rounds: Rounds,
        parts: MicroBatches,
        lend: Callable[[Tensor], Tensor],
        session: Callable[[], AbstractContextManager[None]],
        spend: Callable[[str, float], None],
    ) -> None:
        self._evaluator, self._batches, self.share, self._ranks = evaluator, batches, share, ranks
        self._rounds, self._parts, self._lend = rounds, parts, lend
        self._session, self._spend = session, spend
        self._origin = evaluator.space.origin

    def probabilities(self) -> Tensor | None:
        """Mean softmax of the outputs, shape ``(num_outputs,)``; None where the model's output is not a tensor of scores."""
        sums: list[Tensor | None] = []
        with self._session(), torch.no_grad(), self._ranks.sharing("mean outputs"):
            for lent, entry in self._each(self._origin, lambda scores: scores.softmax(1).sum(0)):
                if not lent:
                    sums.append(None if entry is None else entry.cpu())
        every = [entry for part in self._ranks.gather(sums) for entry in part]
        known = [entry for entry in every if entry is not None]
        if len(known) < len(every) or len({entry.shape for entry in known}) != 1:
            return None
        self._spend("values", self.share)
        return torch.stack(known).sum(0).to(self._origin.device)

    def gradient(self, direction: Tensor) -> Tensor | None:
        """Gradient of ``<direction, mean output>`` at the origin, shape ``(dim,)``; None where it does not exist.

        Args:
            direction: shape ``(num_outputs,)``.
        """
        gradient = torch.zeros_like(self._origin)
        with self._session(), self._ranks.sharing("a gradient of the outputs", (direction,)) as shared:
            leaf = self._origin.clone().requires_grad_()

            def differentiated(scores: Tensor) -> Tensor | None:
                along = scores.sum(0) @ direction.to(scores)
                return torch.autograd.grad(along, leaf, allow_unused=True)[0] if along.requires_grad else None

            missing = 0
            for lent, found in self._each(leaf, differentiated):
                missing += found is None and not lent
                if found is not None:
                    gradient += found
            shared.numbers = [missing]
            shared.vector = gradient if self._evaluator.space.layout.is_whole else None  # shards are added up already
        if shared.numbers[0]:
            return None
        self._spend("gradients", self.share)
        return gradient if shared.vector is None else shared.vector

    def _each(self, flat: Tensor, use: Callable[[Tensor], Tensor | None]) -> Iterator[tuple[bool, Tensor | None]]:
        """``use`` of the scores of every part of every batch; and of data that only other ranks have, what they add here."""

        def work(part: Part) -> tuple[bool, Tensor | None]:
            self._evaluator.seed(part.batch.position)
            return False, self._with_scores(flat, part.batch, use)

        return self._rounds.each(self._batches, self._parts, work, lend=lambda: (True, self._lend(flat)))

    def _with_scores(self, flat: Tensor, batch: Batch, use: Callable[[Tensor], Tensor | None]) -> Tensor | None:
        """``use`` of the model's output on the batch as rows of scores, shape ``(positions, outputs)``."""
        seen: list[Any] = []
        handle = self._evaluator.module.register_forward_hook(lambda module, args, output: seen.append(output))
        # as many as the whole batch: outputs count whether their targets are ignored or not
        whole = batch._replace(num_samples=self._evaluator.sizes.get(batch.position))
        try:
            return self._evaluator.loss(flat, whole, lambda loss, weight: self._used(seen, use))
        finally:
            handle.remove()

    def _used(self, seen: list[Any], use: Callable[[Tensor], Tensor | None]) -> Tensor | None:
        try:
            scores = logits_of(seen[-1], "sketch")
        except (TypeError, IndexError):  # no tensor of scores, or the model itself was never called
            return None
        if not scores.is_floating_point() or scores.ndim < 2:
            return None
        rule = self._evaluator.rule
        axis = None if rule is None else rule.class_axis
        if axis is None:
            return use(scores.flatten(1))
        return use(scores.movedim(axis, -1).reshape(-1, scores.shape[axis]))
