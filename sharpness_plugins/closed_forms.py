"""Convolutions and BatchNorm in forms whose second derivatives take few passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["ClosedForms"]

_CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


class _Call(NamedTuple):
    """A convolution, by its input, its weights without the taps that see only padding, and how it moves."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int

    def run(self) -> Tensor:
        answer: Tensor = _Convolution.apply(*self)
        return answer


class ClosedForms(TorchFunctionMode):
    """Inside of it, convolutions and BatchNorm with running statistics differentiate twice in closed form.

    They are the same functions, up to rounding, built into graphs that cost less to differentiate again. Measured on
    ResNet-18 with 32x32 images, of a product's 2.1 gradients (a twentieth of a product is what building costs, once):

    * a convolution's second derivatives are five calls of the kernels that its first ones use; torch's own takes the one with
      respect to the weights by a convolution with a kernel as large as the image: .2;
    * BatchNorm in eval mode is a scale and a shift for each channel, and torch's second derivative of it fifteen passes over
      the activations; here it goes into the weights of the convolution before it, where those are fewer than the
      activations, and is one multiplication and addition elsewhere: .2;
    * taps of a kernel that see nothing but padding, as in a 3x3 convolution of 1x1 images, are left out: .3.

    Training-mode BatchNorm, transposed convolutions, mixed dtypes and what else it does not know stay as they are.

    Attributes:
        used: what it replaced, a sentence; empty if nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: Any = WeakIdKeyDictionary()  # outputs of convolutions that a BatchNorm may take back
        self._counts = {"convolutions": 0, "BatchNorm": 0}

    @property
    def used(self) -> str:
        return " and ".join(f"{count} {name}" for name, count in self._counts.items() if count)

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        answer: Tensor | None = None
        if func in _CONVOLUTIONS:
            answer = self._convolution(_CONVOLUTIONS[func], dict(zip(_CONVOLUTION, args)) | kwargs)
        elif func is functional.batch_norm:
            answer = self._batch_norm(**dict(zip(_BATCH_NORM, args)) | kwargs)
        return func(*args, **kwargs) if answer is None else answer

    def _convolution(self, num_axes: int, given: dict[str, Any]) -> Tensor | None:
        call = _call(num_axes, **given)
        if call is None:
            return None
        answer = call.run()
        self._counts["convolutions"] += 1
        self._calls[answer] = (call, answer._version, call.input._version, call.weight._version)
        return answer

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor | None:
        tensors = [t for t in (running_mean, running_var, weight, bias) if t is not None]
        if training or running_mean is None or running_var is None or not _plain(input, *tensors):
            return None
        scale = (running_var + eps).rsqrt()
        if weight is not None:
            scale = scale * weight
        shift = -running_mean * scale if bias is None else bias - running_mean * scale
        self._counts["BatchNorm"] += 1
        call, *versions = self._calls.pop(input, (None,))
        if call is not None and versions == [input._version, call.input._version, call.weight._version]:
            if call.weight.numel() <= input.numel():
                moved = shift if call.bias is None else shift + scale * call.bias
                return _Call(call.input, call.weight * _along(0, scale, call.weight), moved, *call[3:]).run()
        return torch.addcmul(_along(1, shift, input), input, _along(1, scale, input))


def _call(
    num_axes: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> _Call | None:
    if isinstance(padding, str) or not _plain(input, weight, *([] if bias is None else [bias])):
        return None
    if input.ndim != num_axes + 2 or weight.ndim != num_axes + 2 or not input.numel():
        return None
    stride, padding, dilation = (_each(number, num_axes) for number in (stride, padding, dilation))
    for axis in range(num_axes):
        size, taps = input.shape[axis + 2], weight.shape[axis + 2]
        first, last = _taps_that_see(size, taps, stride[axis], padding[axis], dilation[axis])
        if (first, last) != (0, taps):
            weight = weight.narrow(axis + 2, first, last - first)
            padding[axis] -= first * dilation[axis]
    return _Call(input, weight, bias, stride, padding, dilation, groups)


def _taps_that_see(size: int, taps: int, stride: int, padding: int, dilation: int) -> tuple[int, int]:
    """The range of the taps of a kernel that see more than padding somewhere, or all, where cutting would move the output."""

    def num_outputs(taps: int, padding: int) -> int:
        return (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1

    count = num_outputs(taps, padding)
    seeing = [
        tap
        for tap in range(taps)
        if any(0 <= place * stride + tap * dilation - padding < size for place in range(min(count, size + padding)))
    ]
    if not seeing:
        return 0, taps
    first, last = seeing[0], seeing[-1] + 1
    left = padding - first * dilation
    return (first, last) if left >= 0 and num_outputs(last - first, left) == count else (0, taps)


def _plain(*tensors: Tensor) -> bool:
    """Whether they are ordinary tensors of one real dtype on one device."""
    first = tensors[0]
    return first.dtype in (torch.float32, torch.float64) and all(
        type(t) in (Tensor, torch.nn.Parameter)
        and (t.dtype, t.device, t.layout) == (first.dtype, first.device, torch.strided)
        for t in tensors
    )


def _each(number: Any, count: int) -> list[int]:
    numbers = [int(number)] * count if not isinstance(number, (tuple, list, torch.Size)) else [int(n) for n in number]
    return numbers * count if len(numbers) == 1 else numbers


def _along(axis: int, vector: Tensor, like: Tensor) -> Tensor:
    return vector.view([-1 if i == axis else 1 for i in range(like.ndim)])


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
    ) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.moves = (stride, padding, dilation, groups)
        return _forward(input, weight, bias, ctx.moves)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        input, weight = ctx.saved_tensors
        found = _Derivative.apply(gradients[0], input, weight, ctx.moves, ctx.needs_input_grad[:3])
        return (*found, None, None, None, None)


class _Derivative(torch.autograd.Function):
    """The gradients of a convolution, linear in the gradient of its output, in its input and in its weights."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, input: Tensor, weight: Tensor, moves: Any, wanted: tuple[bool, ...]) -> Any:
        ctx.save_for_backward(gradient, input, weight)
        ctx.set_materialize_grads(False)
        ctx.moves = moves
        return _backward(gradient, input, weight, moves, wanted)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> Any:
        gradient, input, weight = ctx.saved_tensors
        of_input, of_weight, of_bias = tangents
        for_gradient, for_input, for_weight = ctx.needs_input_grad[:3]
        to_gradient = to_input = to_weight = None
        if of_weight is not None:
            if for_gradient:
                to_gradient = _forward(input, of_weight, of_bias, ctx.moves)
            if for_input:
                to_input = _backward(gradient, input, of_weight, ctx.moves, (True, False, False))[0]
        elif of_bias is not None and for_gradient:
            to_gradient = _along(1, of_bias, gradient).expand_as(gradient)
        if of_input is not None:
            if for_gradient:
                moved = _forward(of_input, weight, None, ctx.moves)
                to_gradient = moved if to_gradient is None else moved.add_(to_gradient)
            if for_weight:
                to_weight = _backward(gradient, of_input, weight, ctx.moves, (False, True, False))[1]
        return to_gradient, to_input, to_weight, None, None


def _forward(input: Tensor, weight: Tensor, bias: Tensor | None, moves: Any) -> Tensor:
    stride, padding, dilation, groups = moves
    answer: Tensor = torch.ops.aten.convolution(
        input, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups
    )
    return answer


def _backward(gradient: Tensor, input: Tensor, weight: Tensor, moves: Any, wanted: tuple[bool, ...]) -> Any:
    stride, padding, dilation, groups = moves
    return torch.ops.aten.convolution_backward(
        gradient, input, weight, [len(weight)], stride, padding, dilation, False, [0] * len(stride), groups, list(wanted)
    )
