"""Products with ``Jᵀ S J``: Gauss–Newton and empirical Fisher matrices, ``S`` living on the outputs of the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .batches import Batch, map_tensors, thinned
from .errors import LossRuleError
from .evaluation import Evaluator, WeightlessError
from .losses import logits_of
from .memory import is_out_of_memory
from .micro_batches import Part
from .objective import Objective
from .steps import step

__all__ = ["OutputProducts"]

EMPIRICAL_FISHER = "empirical_fisher"
FORWARD, REVERSE = "forward mode", "double backward of the outputs"

_PROBED = 8  # samples
_CHUNK = 2**20  # elements of the outputs that are in float64 at a time
_AGREEMENT = {torch.float32: 1e-4, torch.float64: 1e-8}

_SEPARATE = (
    "Gauss–Newton and Fisher matrices need a loss that is computed from the model's output: pass criterion=..., or a "
    "loss_fn that calls the model it is given."
)


class _Done(Exception):
    """The model has told what was wanted, and the loss after it need not be computed."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer


@dataclass
class _Seen:
    """What one evaluation of the model gave: outputs, their tangents, and the stand-ins that the loss was given."""

    outputs: list[Tensor] = field(default_factory=list)
    tangents: list[Tensor] = field(default_factory=list)
    inputs_of_loss: list[Tensor] = field(default_factory=list)


class OutputProducts:
    """``v -> Jᵀ S J v`` at the trained weights, ``J`` the Jacobian of the outputs; positive semi-definite for convex losses.

    For "gauss_newton" and "fisher", ``S`` is the Hessian of the loss as a function of the outputs: for a cross-entropy of
    labels the closed form ``a (diag p − p pᵀ)`` of every position, in parts of a million numbers, so that a large vocabulary
    costs less than in a gradient (measured, at the peak 5 arrays of the size of the outputs, 8 in the first product; a
    gradient 6, a product with the Hessian 14); otherwise by differentiating. For cross-entropies it is the Fisher matrix, of
    labels as the model would draw them. For "empirical_fisher", ``S`` is ``Σ gᵢ gᵢᵀ / wᵢ`` over rows ``i`` of weight ``wᵢ``
    in the mean: positions of a cross-entropy, otherwise samples.

    ``J v`` by forward mode without a graph, or by double backward where an operation has no forward mode. What is chosen is
    chosen at the first product.

    Attributes:
        how: the sentence that says how products are made; empty before the first.
    Cost: one pass; by forward mode a forward pass with tangents and a gradient: 1.7 gradients, 2.4 measured on a small
        network.
    Source: Schraudolph (2002); Kunstner, Balles and Hennig (2019) on what the empirical Fisher matrix is not.
    """

    def __init__(self, objective: Objective, matrix: str) -> None:
        self._objective, self._matrix = objective, matrix
        self._mode: str | None = None
        self._closed_form: bool | None = None
        self._row_weights: dict[tuple[int, int], Tensor] = {}  # of the cross-entropy, for each part
        self._reason = ""

    @property
    def how(self) -> str:
        if self._mode is None:
            return ""
        if self._matrix == EMPIRICAL_FISHER:
            of_loss = "gradients of positions" if self._closed_form else "gradients of samples"
        else:
            of_loss = "the closed form of cross-entropy" if self._closed_form else "the loss differentiated twice"
        return f"{self._mode}, {of_loss}{self._reason}"

    def __call__(self, vector: Tensor) -> Tensor:
        """One product, shape ``(dim,)``.

        Raises:
            LossRuleError: the loss is not one of the model's output.
        """
        row = self._objective.space.check(vector, "vector")

        def product() -> tuple[Tensor, list[Any]]:
            found = self._objective.sum_over_parts(lambda evaluator, part: self._product(evaluator, row, part), (row,))
            return found, [self._mode, self._closed_form, self._reason]

        found, (self._mode, self._closed_form, self._reason) = step(self._matrix, product, about=row)
        return found

    def _product(self, evaluator: Evaluator, vector: Tensor, part: Part) -> Tensor:
        try:
            if self._mode is None:
                return self._first(evaluator, vector, part)
            return self._by(self._mode, evaluator, vector, part)
        except WeightlessError:
            return torch.zeros_like(vector)

    def _first(self, evaluator: Evaluator, vector: Tensor, part: Part) -> Tensor:
        """Choose between the modes, and between the closed form and differentiating."""
        if self._matrix == "fisher" and not self._objective.has_classes:
            raise LossRuleError(
                "the Fisher matrix with the model's own labels is defined here for a cross-entropy, and the loss is "
                f"{self._objective.loss_rule}. "
                "Use labels='empirical', or gauss_newton_trace, which it is for a squared error."
            )
        if self._closed_form is None:
            self._closed_form = self._is_softmax(evaluator, part.batch)
        try:
            answer = self._by(FORWARD, evaluator, vector, part)
        except (LossRuleError, WeightlessError):
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            answer = self._by(REVERSE, evaluator, vector, part)
            self._mode = REVERSE
            self._reason = f" (no forward mode: {type(error).__name__}: {' '.join(str(error).split())[:120]})"
        else:
            self._mode = FORWARD
        return answer

    def _by(self, mode: str, evaluator: Evaluator, vector: Tensor, part: Part) -> Tensor:
        return (self._forward if mode == FORWARD else self._reverse)(evaluator, vector, part)

    # ------------------------------------------------------------------ the two ways

    def _forward(self, evaluator: Evaluator, vector: Tensor, part: Part) -> Tensor:
        point = evaluator.space.origin
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(point.detach(), vector)  # type: ignore[no-untyped-call]
            seen, cotangents = self._at_outputs(evaluator, dual, part, _unpacked)
        return self._pulled_back(evaluator, part, cotangents, len(seen.outputs))

    def _reverse(self, evaluator: Evaluator, vector: Tensor, part: Part) -> Tensor:
        leaf = evaluator.space.origin.clone().requires_grad_()

        def tangent(output: Tensor) -> tuple[Tensor, Tensor]:
            dummy = torch.zeros_like(output, requires_grad=True)
            (back,) = torch.autograd.grad(output, leaf, dummy, create_graph=True, materialize_grads=True, allow_unused=True)
            if not back.requires_grad:
                return output, torch.zeros_like(output)
            (pushed,) = torch.autograd.grad(
                back, dummy, vector, retain_graph=True, materialize_grads=True, allow_unused=True
            )
            return output, pushed

        _, cotangents = self._at_outputs(evaluator, leaf, part, tangent)
        return self._pulled_back(evaluator, part, cotangents, len(cotangents))

    def _at_outputs(
        self, evaluator: Evaluator, flat: Tensor, part: Part, split: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[_Seen, list[Tensor]]:
        """``S`` times the tangents of the outputs, one array for each output."""
        seen, key = _Seen(), (part.batch.position, part.start)

        def look(output: Tensor) -> Tensor:
            primal, tangent = split(output)
            seen.outputs.append(primal.detach())
            seen.tangents.append(tangent.detach())
            if key in self._row_weights and self._matrix != EMPIRICAL_FISHER:
                raise _Done(None)
            seen.inputs_of_loss.append(primal.detach().requires_grad_())
            return seen.inputs_of_loss[-1]

        def use(share: Tensor, weight: Tensor) -> list[Tensor]:
            _check_separate(share, flat, seen.inputs_of_loss)
            return self._curved(evaluator, share, weight, seen, part)

        cotangents = _evaluated(evaluator, flat, part.batch, look, use)
        if cotangents is None:
            rows, tangent = (_rows(tensor, evaluator) for tensor in (seen.outputs[0], seen.tangents[0]))
            curved = _softmax_curvature(rows, tangent, self._row_weights[key])
            cotangents = [_unrowed(curved, seen.outputs[0], evaluator)]
        return seen, cotangents

    def _pulled_back(self, evaluator: Evaluator, part: Part, cotangents: list[Tensor], count: int) -> Tensor:
        """``Jᵀ`` times the cotangents."""
        leaf = evaluator.space.origin.clone().requires_grad_()
        outputs: list[Tensor] = []

        def look(output: Tensor) -> Tensor:
            outputs.append(output)
            if len(outputs) == count:
                raise _Done(_gradient(outputs, leaf, cotangents))
            return output

        answer: Tensor = _evaluated(evaluator, leaf, part.batch, look, lambda *_: torch.zeros_like(leaf))
        return answer

    # ------------------------------------------------------------------ on the outputs

    def _curved(self, evaluator: Evaluator, share: Tensor, weight: Tensor, seen: _Seen, part: Part) -> list[Tensor]:
        if self._matrix == EMPIRICAL_FISHER:
            return [self._outer(evaluator, share, weight, seen, part)]
        if not self._closed_form:
            return _twice_differentiated(share, seen.inputs_of_loss, seen.tangents)
        (slope,) = torch.autograd.grad(share, seen.inputs_of_loss)
        rows, tangent, slopes = (_rows(t, evaluator) for t in (seen.outputs[0], seen.tangents[0], slope))
        weights = _softmax_weights(rows, slopes)
        self._row_weights[part.batch.position, part.start] = weights
        return [_unrowed(_softmax_curvature(rows, tangent, weights), slope, evaluator)]

    def _outer(self, evaluator: Evaluator, share: Tensor, weight: Tensor, seen: _Seen, part: Part) -> Tensor:
        """``gᵢ (gᵢᵀ uᵢ) / wᵢ`` for each row ``i``."""
        slopes = torch.autograd.grad(share, seen.inputs_of_loss, allow_unused=True)
        used = [i for i, slope in enumerate(slopes) if slope is not None]
        slope = slopes[0]
        if used != [0] or slope is None:
            raise LossRuleError(
                f"the empirical Fisher matrix is defined here for a loss of one output of the model, and this one uses "
                f"{len(used)}. Measure gauss_newton_trace instead."
            )
        if self._closed_form:
            rows, tangent, slopes_of_rows = (_rows(t, evaluator) for t in (seen.outputs[0], seen.tangents[0], slope))
            weights = self._row_weights.get((part.batch.position, part.start))
            if weights is None:
                weights = _softmax_weights(rows, slopes_of_rows)
                self._row_weights[part.batch.position, part.start] = weights
        else:
            tangent, slopes_of_rows = (t.reshape(len(t), -1) for t in (seen.tangents[0], slope))
            weights = (weight / len(slope)).expand(len(slope))
        along = (slopes_of_rows.double() * tangent.double()).sum(dim=1)
        factor = torch.where(weights > 0, along / weights.clamp_min(1e-300), 0.0)
        outer = (slopes_of_rows * factor[:, None]).to(slope)
        return _unrowed(outer, slope, evaluator) if self._closed_form else outer.view_as(slope)

    def _is_softmax(self, evaluator: Evaluator, batch: Batch) -> bool:
        """Whether the loss on the batch is a cross-entropy of labels: the closed form gives what differentiating gives.

        At scores of moderate size: where the model is sure, differentiating twice loses its digits.
        """
        if evaluator.rule is None or evaluator.rule.class_axis is None:
            return False
        seen = _Seen()

        def look(output: Tensor) -> Tensor:
            count = torch.arange(output.numel(), dtype=output.dtype, device=output.device).view_as(output)
            seen.outputs.append(count.sin())
            seen.tangents.append((1.7 * count).cos())
            seen.inputs_of_loss.append(count.sin().requires_grad_())
            return seen.inputs_of_loss[-1]

        def use(share: Tensor, weight: Tensor) -> bool:
            if len(seen.outputs) != 1:
                return False
            (slope,) = torch.autograd.grad(share, seen.inputs_of_loss, retain_graph=True)
            expected = _rows(_twice_differentiated(share, seen.inputs_of_loss, seen.tangents)[0], evaluator)
            rows, tangent, slopes = (_rows(t, evaluator) for t in (seen.outputs[0], seen.tangents[0], slope))
            found = _softmax_curvature(rows, tangent, _softmax_weights(rows, slopes))
            size = expected.double().norm()
            return bool((found - expected).double().norm() <= _AGREEMENT[rows.dtype] * size)

        try:
            return bool(_evaluated(evaluator, evaluator.space.origin, thinned(batch, _PROBED), look, use))
        except WeightlessError:  # every target of these few is ignored
            seen = _Seen()
            return bool(_evaluated(evaluator, evaluator.space.origin, batch, look, use))


def _evaluated(
    evaluator: Evaluator,
    flat: Tensor,
    batch: Batch,
    look: Callable[[Tensor], Tensor],
    use: Callable[[Tensor, Tensor], Any],
) -> Any:
    """``use(the batch's part of the mean loss, its weight)``, the loss being that of what ``look`` makes of the outputs.

    Or what ``look`` raised ``_Done`` with. The outputs are the scores of a cross-entropy, otherwise every real tensor.
    """
    has_classes = evaluator.rule is not None and evaluator.rule.class_axis is not None

    def hook(module: Any, args: Any, output: Any) -> Any:
        scores = logits_of(output, "a Gauss–Newton product") if has_classes else None

        def replaced(tensor: Tensor) -> Tensor:
            is_output = tensor is scores if has_classes else tensor.is_floating_point()
            return look(tensor) if is_output else tensor

        return map_tensors(output, replaced)

    def weighted(loss: Tensor, weight: Tensor) -> Any:
        return use(evaluator.part(loss, weight), weight / evaluator.total_weight)

    handle = evaluator.module.register_forward_hook(hook)
    try:
        return evaluator.loss(flat, batch, weighted)
    except _Done as done:
        return done.answer
    finally:
        handle.remove()


def _unpacked(output: Tensor) -> tuple[Tensor, Tensor]:
    primal, tangent = forward_ad.unpack_dual(output)  # type: ignore[no-untyped-call]
    return primal, torch.zeros_like(primal) if tangent is None else tangent


def _check_separate(share: Tensor, flat: Tensor, inputs_of_loss: list[Tensor]) -> None:
    """Raise where the loss does not come from the outputs, or not from them alone."""
    if not inputs_of_loss:
        raise LossRuleError(f"the loss was computed without a call of the model. {_SEPARATE}")
    if not flat.requires_grad:
        direct = forward_ad.unpack_dual(share).tangent  # type: ignore[no-untyped-call]
    elif share.requires_grad:
        (direct,) = torch.autograd.grad(share, flat, retain_graph=True, allow_unused=True)
    else:
        direct = None
    if direct is not None:
        raise LossRuleError(
            f"the loss depends on the weights beside the model's output (a penalty on them, or a loss inside of the model). "
            f"{_SEPARATE}"
        )
    if not share.requires_grad:
        raise LossRuleError(f"the loss does not depend on the output of the model. {_SEPARATE}")


def _gradient(outputs: list[Tensor], leaf: Tensor, cotangents: list[Tensor]) -> Tensor:
    pairs = [(out, back.to(out)) for out, back in zip(outputs, cotangents, strict=True) if out.requires_grad]
    if not pairs:
        return torch.zeros_like(leaf)
    tensors, backs = zip(*pairs, strict=True)
    (gradient,) = torch.autograd.grad(tensors, leaf, backs, allow_unused=True, materialize_grads=True)
    return gradient


def _twice_differentiated(share: Tensor, inputs: list[Tensor], tangents: list[Tensor]) -> list[Tensor]:
    """Hessian of ``share`` with respect to ``inputs``, times the tangents."""
    slopes = torch.autograd.grad(share, inputs, create_graph=True, allow_unused=True)
    pairs = [(s, t) for s, t in zip(slopes, tangents, strict=True) if s is not None and s.requires_grad]
    if not pairs:  # the loss is linear in the outputs
        return [torch.zeros_like(tensor) for tensor in inputs]
    bent, along = zip(*pairs, strict=True)
    found = torch.autograd.grad(bent, inputs, along, allow_unused=True, materialize_grads=True)
    return list(found)


def _rows(tensor: Tensor, evaluator: Evaluator) -> Tensor:
    """Positions by classes."""
    axis = evaluator.rule.class_axis if evaluator.rule is not None else None
    assert axis is not None  # asked for cross-entropies only
    return tensor.movedim(axis, -1).reshape(-1, tensor.shape[axis])


def _unrowed(rows: Tensor, like: Tensor, evaluator: Evaluator) -> Tensor:
    axis = evaluator.rule.class_axis if evaluator.rule is not None else None
    assert axis is not None
    return rows.view(like.movedim(axis, -1).shape).movedim(-1, axis)


def _softmax_weights(rows: Tensor, slopes: Tensor) -> Tensor:
    """The weight of every position in the loss, shape ``(positions,)``, float64.

    The slope is ``a (p − e_y)``, and so ``a p`` wherever it is positive. Without the difference ``1 − p_y`` nothing is lost
    where the model is sure.
    """
    found = []
    for scores, slope in zip(*_chunks(rows, slopes), strict=True):
        positive = slope > 0
        mass = torch.where(positive, scores.double().softmax(1), 0.0).sum(1)
        total = torch.where(positive, slope, 0.0).sum(1, dtype=torch.float64)
        found.append(torch.where(mass > 0, total / mass.clamp_min(1e-300), 0.0))
    return torch.cat(found)


def _softmax_curvature(rows: Tensor, tangent: Tensor, weights: Tensor) -> Tensor:
    """``a (p ⊙ u − p pᵀu)`` for each position."""
    answer = torch.empty_like(tangent)
    start = 0
    for scores, u in zip(*_chunks(rows, tangent), strict=True):
        stop = start + len(scores)
        p, u = scores.double().softmax(1), u.double()
        u = u - u.gather(1, scores.argmax(1, keepdim=True))  # changes nothing, and loses no digits where p is nearly 1
        answer[start:stop] = weights[start:stop, None] * p * (u - (p * u).sum(1, keepdim=True))
        start = stop
    return answer


def _chunks(*arrays: Tensor) -> list[tuple[Tensor, ...]]:
    length = max(_CHUNK // max(arrays[0].shape[1], 1), 1)
    return [torch.split(array, length) for array in arrays]
