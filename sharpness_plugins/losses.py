"""How a mean loss and its weight come from ``(model, batch)``: typed rules, first match wins.

A rule returns the mean over the batch and the weight of that mean in the mean over all data (the loss's own
denominator: samples, or tokens that are not ignored), so that any batching of the same samples gives the same loss.
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batches import LABEL_KEYS, count_samples
from .errors import LossRuleError

__all__ = ["LossFn", "LossRule", "OtherLossError", "WeightedLoss", "call_model", "logits_of", "resolve_loss", "unwrap"]

LossFn: TypeAlias = Callable[[nn.Module, Any], Any]
"""``(model, batch) ->`` scalar mean over the batch, or a pair ``(mean, weight)`` where samples are not what it is over."""

WeightedLoss = tuple[Tensor, "Tensor | float"]
PluginRule = Callable[[nn.Module, Any, Any], "LossFn | None"]

_FIXES = (
    "Pass loss_fn=lambda model, batch: ... (the scalar mean loss of a batch), "
    "or criterion=torch.nn.CrossEntropyLoss() (or another) with a loader of pairs (inputs, targets)."
)

_OWN_LOSS = "model(**batch).loss, weighted by samples"
_IGNORED = -100  # torch's default ignore_index
_DATA_PARALLEL = ("DataParallel", "DistributedDataParallel", "_FabricModule")
# their mean is over the elements of the output, of which a sample may have more or fewer (padded sequences)
_ELEMENTWISE = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss)


class OtherLossError(LossRuleError):
    """The cross-entropy of a model's logits is not the loss that the model computes."""


@dataclass(frozen=True)
class LossRule:
    """A loss, and the sentence that says where it came from (stored in the result).

    Attributes:
        class_axis: the axis of the model's logits that holds classes; None where the loss is not a cross-entropy.
        fallback: what to use where ``loss_fn`` raises ``OtherLossError``.
    """

    description: str
    loss_fn: Callable[[nn.Module, Any], WeightedLoss]
    class_axis: int | None = None
    fallback: LossRule | None = None


def unwrap(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """The module inside compiled and data-parallel wrappers, and the names of the wrappers taken off."""
    wrappers: list[str] = []
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in _DATA_PARALLEL:
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model, wrappers
        wrappers.append(type(model).__name__)
        model = inner


def resolve_loss(
    model: nn.Module,
    batch: Any,
    *,
    loss_fn: LossFn | None = None,
    criterion: Callable[..., Any] | None = None,
    plugin_rule: PluginRule | None = None,
) -> LossRule:
    """The loss for batches like ``batch``; first match of the rules below.

    1. ``loss_fn(model, batch)``. 2. ``criterion`` with pairs ``(inputs, targets)``. 3. a plugin's rule. 4. a mapping with
    labels: ``model(**batch).loss``. 5. a pair with integer targets, one axis fewer than the output: mean cross-entropy.

    Cross-entropies are computed in float64 on the model's logits. Evaluates the model on ``batch`` where the rule has to
    look at the output, so call it in the mode that the measurement uses.

    Raises:
        LossRuleError: no rule fits; the message shows both fixes.
        ValueError: both ``loss_fn`` and ``criterion`` were given.
    """
    if loss_fn is not None and criterion is not None:
        raise ValueError(
            "got both loss_fn and criterion; pass one of them: loss_fn(model, batch) or criterion(output, targets)"
        )
    for name, given in (("loss_fn", loss_fn), ("criterion", criterion)):
        if given is not None and not callable(given):
            raise TypeError(f"{name} must be callable, got {given!r}. {_FIXES}")
    if isinstance(loss_fn, nn.modules.loss._Loss):
        raise LossRuleError(
            f"loss_fn is called as loss_fn(model, batch), and {_name_of(loss_fn)} compares an output with targets. "
            f"Pass it as criterion={_name_of(loss_fn)}(...)."
        )
    if loss_fn is not None:
        return LossRule(f"loss_fn {_name_of(loss_fn)}", _from_loss_fn(loss_fn))
    if criterion is not None:
        if isinstance(criterion, type):
            raise TypeError(f"criterion is a class; pass an instance: criterion={criterion.__name__}()")
        if not _is_pair(batch):
            raise LossRuleError(
                f"criterion needs batches that are pairs (inputs, targets), but the loader gives {_describe(batch)}. "
                "Pass loss_fn=lambda model, batch: ... instead."
            )
        is_cross_entropy = type(criterion) is nn.CrossEntropyLoss or criterion is F.cross_entropy
        summed = ", its sum divided by its count" if getattr(criterion, "reduction", None) == "sum" else ""
        axis = 1 if is_cross_entropy else None
        return LossRule(f"criterion {_name_of(criterion)}{summed}", _from_criterion(criterion), axis)
    if plugin_rule is not None and (found := plugin_rule(model, batch, criterion)) is not None:
        return LossRule(f"plugin rule {_name_of(found)}", _from_loss_fn(found))
    if isinstance(batch, Mapping) and any(key in batch for key in LABEL_KEYS):
        return _labelled_mapping(model, batch)
    if _is_pair(batch) and isinstance(batch[1], Tensor) and _is_integer(batch[1]):
        return _integer_targets(model, batch)
    raise LossRuleError(f"cannot tell the loss from batches of {_describe(batch)}. {_FIXES}")


def call_model(model: nn.Module, inputs: Any) -> Any:
    """``model(inputs)``, or ``model(*inputs)`` and ``model(**inputs)`` where ``forward`` takes the inputs apart."""
    if isinstance(inputs, Mapping):
        return model(**inputs) if _binds(model, (), inputs) else model(inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs) if _binds(model, inputs, {}) else model(inputs)
    return model(inputs)


def _binds(model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> bool:
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except (TypeError, ValueError):  # ValueError: a compiled forward that tells no signature
        return False
    return True


def _accepts(model: nn.Module, keyword: str) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return keyword in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _is_pair(batch: Any) -> bool:
    return isinstance(batch, (tuple, list)) and len(batch) == 2


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool)


def _name_of(function: Any) -> str:
    if isinstance(function, nn.Module):
        return type(function).__name__
    return getattr(function, "__qualname__", None) or type(function).__name__


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "a mapping with keys " + ", ".join(map(repr, list(value)[:8]))
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}: (" + "; ".join(map(_describe, value[:4])) + ")"
    return f"a {type(value).__name__}"


def _scalar(loss: Any, source: str) -> Tensor:
    if not isinstance(loss, Tensor):
        raise LossRuleError(
            f"{source} returned {_describe(loss)}, but the mean loss of the batch is needed: a tensor with one number."
        )
    if loss.numel() != 1:
        raise LossRuleError(
            f"{source} returned a loss of shape {tuple(loss.shape)}, but the mean over the batch is needed: one number. "
            "Use reduction='mean', or call .mean()."
        )
    if not loss.is_floating_point():
        raise LossRuleError(f"{source} returned {_describe(loss)}, but a loss is a real number that has a gradient.")
    return loss.reshape(())


def _weight(weight: Any, source: str) -> Tensor | float:
    if isinstance(weight, Tensor) and weight.numel() == 1 and not weight.is_complex():
        return weight.detach().reshape(())
    if isinstance(weight, numbers.Real) and 0 <= float(weight) < math.inf:
        return float(weight)
    raise LossRuleError(
        f"{source} returned a pair, which reads as (mean loss, weight), but its second entry is "
        f"{weight if isinstance(weight, numbers.Real) else _describe(weight)}. Return the mean loss alone, or as its weight "
        "the number of samples (or tokens) that the mean is over."
    )


def _from_loss_fn(loss_fn: LossFn) -> Callable[[nn.Module, Any], WeightedLoss]:
    source = f"loss_fn {_name_of(loss_fn)}"

    def weighted(model: nn.Module, batch: Any) -> WeightedLoss:
        answer = loss_fn(model, batch)
        if isinstance(answer, tuple) and len(answer) == 2:
            return _scalar(answer[0], source), _weight(answer[1], source)
        return _scalar(answer, source), float(count_samples(batch) or 1)

    return weighted


def _from_criterion(criterion: Callable[..., Any]) -> Callable[[nn.Module, Any], WeightedLoss]:
    source = f"criterion {_name_of(criterion)}"
    if type(criterion) is nn.CrossEntropyLoss and criterion.reduction in ("mean", "sum"):
        ce = criterion

        def weighted(model: nn.Module, batch: Any) -> WeightedLoss:
            logits = logits_of(call_model(model, batch[0]), source)
            return _cross_entropy(
                logits, batch[1], weight=ce.weight, ignore_index=ce.ignore_index, label_smoothing=ce.label_smoothing
            )

    elif criterion is F.cross_entropy:

        def weighted(model: nn.Module, batch: Any) -> WeightedLoss:
            return _cross_entropy(logits_of(call_model(model, batch[0]), source), batch[1])

    elif type(criterion) is nn.NLLLoss and criterion.reduction in ("mean", "sum"):
        nll = criterion

        def weighted(model: nn.Module, batch: Any) -> WeightedLoss:
            output, targets = logits_of(call_model(model, batch[0]), source), batch[1]
            total = F.nll_loss(output, targets, weight=nll.weight, ignore_index=nll.ignore_index, reduction="sum")
            return _mean_of(total, _target_weight(targets, nll.weight, nll.ignore_index))

    else:
        is_sum = getattr(criterion, "reduction", "mean") == "sum"

        def weighted(model: nn.Module, batch: Any) -> WeightedLoss:
            output = call_model(model, batch[0])
            output = getattr(output, "logits", output)
            if type(criterion) in _ELEMENTWISE and getattr(output, "shape", None) != getattr(batch[1], "shape", None):
                raise LossRuleError(
                    f"{source} compares an output of {_describe(output)} with targets of {_describe(batch[1])}, which would "
                    "be broadcast against each other. Give them one shape: y[:, None], say, or model(x).squeeze(1) in a "
                    "loss_fn."
                )
            loss = _scalar(criterion(output, batch[1]), source)
            count = float(count_samples(batch[1]) or count_samples(batch[0]) or 1)
            if is_sum:
                return loss / count, count
            if type(criterion) in _ELEMENTWISE and isinstance(output, Tensor):
                return loss, float(output.numel())
            return loss, count

    return weighted


def _cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = _IGNORED,
    label_smoothing: float = 0.0,
) -> WeightedLoss:
    """Mean cross-entropy with classes on axis 1, in float64, and the sum of the target weights it was divided by."""
    logits = logits.to(torch.float64)
    if not _is_integer(targets):
        # class probabilities; torch divides by the number of targets, whatever the class weights
        probabilities = targets.to(logits)
        class_weight = None if weight is None else weight.to(logits)
        loss = F.cross_entropy(logits, probabilities, weight=class_weight, label_smoothing=label_smoothing)
        return loss, float(logits.numel() // logits.shape[1 if logits.ndim > 1 else 0])
    targets = targets.long()
    class_weight = None if weight is None else weight.to(logits)
    total = F.cross_entropy(
        logits,
        targets,
        weight=class_weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="sum",
    )
    return _mean_of(total, _target_weight(targets, class_weight, ignore_index))


def _mean_of(total: Tensor, denominator: Tensor) -> WeightedLoss:
    return total / denominator.clamp_min(torch.finfo(torch.float64).tiny), denominator  # 0 where all targets are ignored


def _target_weight(targets: Tensor, class_weight: Tensor | None, ignore_index: int) -> Tensor:
    """What a mean cross-entropy is divided by: the sum of the weights of the targets that are not ignored."""
    valid = targets != ignore_index
    if class_weight is None:
        return valid.sum().to(torch.float64)
    return class_weight.to(targets.device, torch.float64)[torch.where(valid, targets, 0)].mul(valid).sum()


def _entry(output: Any, name: str) -> Any:
    found = getattr(output, name, None)
    return output.get(name) if found is None and isinstance(output, Mapping) else found


def logits_of(output: Any, source: str) -> Tensor:
    """The logits of a model's output: a tensor, ``output.logits``, ``output["logits"]`` or the first entry of a tuple."""
    found = _entry(output, "logits")
    if found is None and isinstance(output, (tuple, list)) and output:
        found = output[0]
    if found is None:
        found = output
    if not isinstance(found, Tensor):
        raise LossRuleError(f"{source} needs logits, but the model returned {_describe(output)}. {_FIXES}")
    return found


def _class_axis(logits: Tensor, targets: Tensor, source: str) -> int:
    """Where the classes are: axis 1, as in torch's losses, or the last one, as in Transformers."""
    if targets.ndim == 0:
        raise LossRuleError(
            f"{source}: the targets are a single number, so the loader seems to give samples and not batches. Wrap the data "
            "in torch.utils.data.DataLoader(data, batch_size=256)."
        )
    if logits.ndim == targets.ndim + 1:
        on_axis_1 = logits.shape[:1] + logits.shape[2:] == targets.shape
        on_last = logits.shape[:-1] == targets.shape
        if on_axis_1 and on_last and logits.ndim > 2 and logits.shape[1] == logits.shape[-1]:
            raise LossRuleError(
                f"{source}: output {tuple(logits.shape)} and targets {tuple(targets.shape)} leave it open which axis holds "
                f"the classes. {_FIXES}"
            )
        if on_axis_1 or on_last:
            axis = 1 if on_axis_1 else logits.ndim - 1
            _check_classes(logits.shape[axis], targets, source)
            return axis
    raise LossRuleError(
        f"{source}: output of shape {tuple(logits.shape)} does not hold one score per class for integer targets of shape "
        f"{tuple(targets.shape)}. {_FIXES}"
    )


def _check_classes(num_classes: int, targets: Tensor, source: str) -> None:
    if num_classes == 1:
        raise LossRuleError(
            f"{source}: the output has one score per sample, of which a cross-entropy is always 0. For two classes, pass "
            "criterion=torch.nn.BCEWithLogitsLoss() with float targets of the output's shape, or a loss_fn."
        )
    if not _are_classes(targets, num_classes):
        raise LossRuleError(
            f"{source}: targets from {targets.min().item()} to {targets.max().item()} do not fit an output of {num_classes} "
            f"classes. To ignore one value, pass criterion=torch.nn.CrossEntropyLoss(ignore_index=...)."
        )


def _are_classes(targets: Tensor, num_classes: int) -> bool:
    return bool(((targets >= 0) & (targets < num_classes) | (targets == _IGNORED)).all())


def _integer_targets(model: nn.Module, batch: Any) -> LossRule:
    source = "cross-entropy on integer targets"
    with torch.no_grad():
        axis = _class_axis(logits_of(call_model(model, batch[0]), source), batch[1], source)

    def weighted(model: nn.Module, batch: Any) -> WeightedLoss:
        logits = logits_of(call_model(model, batch[0]), source)
        return _cross_entropy(logits.movedim(axis, 1), batch[1])

    return LossRule(source, weighted, axis)


def _labelled_mapping(model: nn.Module, batch: Mapping[str, Any]) -> LossRule:
    key = next(key for key in LABEL_KEYS if key in batch)
    parameters = inspect.signature(model.forward).parameters
    takes = key if key in parameters else "labels" if _accepts(model, "labels") else None
    fixed = {name: value for name, value in (("use_cache", False), ("return_dict", True)) if name in parameters}
    if getattr(getattr(model, "config", None), "return_dict", True) is False and _accepts(model, "return_dict"):
        fixed["return_dict"] = True  # Transformers' answers with names

    def arguments(batch: Mapping[str, Any]) -> dict[str, Any]:
        inputs = {name: value for name, value in batch.items() if name != key}
        return {**fixed, **inputs, **({takes: batch[key]} if takes else {})}

    def run(model: nn.Module, batch: Mapping[str, Any]) -> Any:
        return model(**arguments(batch))

    if not _binds(model, (), arguments(batch)):
        raise LossRuleError(
            f"the batch has {key!r}, so model(**batch) was tried, but {type(model).__name__}.forward"
            f"{inspect.signature(model.forward)} does not take {_describe(batch)}. {_FIXES}"
        )
    with torch.no_grad():
        output = run(model, batch)
    labels, loss, logits = batch[key], _entry(output, "loss"), _entry(output, "logits")
    if logits is None and loss is None:
        logits = logits_of(output, f"batches with {key!r}")

    def own_loss(model: nn.Module, batch: Mapping[str, Any]) -> WeightedLoss:
        return _scalar(_entry(run(model, batch), "loss"), "model(**batch).loss"), float(count_samples(batch) or 1)

    if isinstance(logits, Tensor) and isinstance(labels, Tensor) and _is_integer(labels):
        if loss is None:
            source = "model(**batch) and cross-entropy on its logits"
            axis = _class_axis(logits, labels, source)

            def on_logits(model: nn.Module, batch: Mapping[str, Any]) -> WeightedLoss:
                return _cross_entropy(logits_of(run(model, batch), source).movedim(axis, 1), batch[key])

            return LossRule(source, on_logits, axis)
        # The model's own loss is a mean over something it does not tell (samples, tokens, shifted tokens), and its float32
        # mean loses digits: where a plain cross-entropy of its logits reproduces it, that one is used, with its denominator.
        shift = _reproducing_shift(logits, labels, loss)
        if shift is not None:

            def cross_entropy(model: nn.Module, batch: Mapping[str, Any]) -> WeightedLoss:
                output = run(model, batch)
                mean, weight = _sequence_cross_entropy(logits_of(output, "model(**batch)"), batch[key], shift)
                if not torch.is_grad_enabled():  # at evaluations of the value alone, where the comparison costs nothing
                    _check_same(mean, _entry(output, "loss"))
                return mean, weight

            what = "model(**batch).loss, a cross-entropy" + (" of the next token" if shift else "")
            return LossRule(what, cross_entropy, logits.ndim - 1, fallback=LossRule(_OWN_LOSS, own_loss))
    if not isinstance(loss, Tensor):
        raise LossRuleError(
            f"the batch has {key!r}, but model(**batch) gives no loss, and its output does not fit labels of "
            f"{_describe(labels)}. {_FIXES}"
        )

    return LossRule(_OWN_LOSS, own_loss)


def _check_same(mean: Tensor, loss: Any) -> None:
    own = loss.to(mean).reshape(())
    if bool((mean - own).abs() > 1e-4 * mean.abs() + 1e-6) and bool(torch.isfinite(mean - own)):
        raise OtherLossError(
            f"the model's own loss ({own.item():.6g}) is the cross-entropy of its logits at some weights and batches and "
            f"not at others (here {mean.item():.6g}). Pass the loss: loss_fn=lambda model, batch: model(**batch).loss, "
            "or with its weight, (mean, weight)."
        )


def _sequence_cross_entropy(logits: Tensor, labels: Tensor, shift: int) -> WeightedLoss:
    if shift:
        logits, labels = logits[:, :-shift], labels[:, shift:]
    return _cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))


def _reproducing_shift(logits: Tensor, labels: Tensor, loss: Any) -> int | None:
    """By how many positions the labels are shifted where a cross-entropy of the logits gives ``loss``; None if none does."""
    if not (isinstance(loss, Tensor) and loss.numel() == 1):
        return None
    if logits.shape[:-1] != labels.shape or not _are_classes(labels, logits.shape[-1]):
        return None
    shifts = (0, 1) if labels.ndim > 1 and labels.shape[1] > 1 else (0,)
    found = torch.stack([_sequence_cross_entropy(logits, labels, shift)[0] for shift in shifts])
    distance = (found - loss.detach().to(found).reshape(())).abs()
    # an untrained language model has nearly the same loss with either shift, so the nearest is taken, not the first
    nearest = int(distance.argmin())
    return shifts[nearest] if bool(distance[nearest] <= 1e-5 * (1 + found[nearest].abs())) else None
