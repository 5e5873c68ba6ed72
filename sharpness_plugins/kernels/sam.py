"""The two halves of a SAM step on lists of tensors: up to the perturbed weights, and back with the step of SGD.

Lists are parallel: ``gradients[i]`` and ``backups[i]`` have the shape and dtype of ``weights[i]``. They may mix devices and
dtypes (worked on group by group), memory formats, and empty tensors. Nothing waits for a device; the norm stays on one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import vectors
from .dispatch import Operation

__all__ = ["global_norm", "perturb_", "restore_", "restore_sgd_", "sam_ascent_"]

_ROW = 256


def global_norm(
    gradients: Sequence[Tensor], weights: Sequence[Tensor] | None = None, *, eta: Tensor | float | None = None
) -> Tensor:
    """``‖g‖`` over all tensors; with ``eta``, ``‖T g‖`` for ``T = |w| + eta``. Sums across tensors are float64.

    4 bytes per parameter in float32, 8 with ``eta``. In float32 a norm below 1e-19 is zero, because its square is.

    Args:
        weights: w, needed with ``eta``.
    Returns:
        Shape ``()``, float64, on the device of the first gradient that is not empty.
    Raises:
        ValueError: tensors that do not fit together.
    """
    if eta is not None and weights is None:
        raise ValueError("eta needs the weights: T = |w| + eta")
    lists = [gradients] if weights is None or eta is None else [gradients, weights]
    norms: list[Tensor] = []
    for group in _groups(*lists):
        like = group[0][0]
        layout = _Layout(group[-1])
        grads, *scaled = (layout.like(tensors) for tensors in group)
        norms.append(_norm(grads, scaled[0] if scaled else [], _optional(eta, like)))
    if len(norms) < 2:
        return norms[0] if norms else torch.zeros((), dtype=torch.float64)
    together: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    return together


def perturb_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    backups: Sequence[Tensor],
    norm: Tensor | float,
    rho: Tensor | float,
    *,
    eta: Tensor | float | None = None,
) -> None:
    """Copy the weights to ``backups`` and move them by ``rho·g/norm``; with ``eta``, by ``rho·T²g/norm``, ``T = |w| + eta``.

    A norm that is zero or not finite leaves the weights as they are; so does an interrupt.
    16 bytes per parameter in float32.

    Args:
        norm: as :func:`global_norm` gives it, or reduced over processes.
    Raises:
        ValueError: tensors that do not fit together.
    """
    moved: list[list[list[Tensor]]] = []
    try:
        for group in _groups(weights, gradients, backups):
            layout = _Layout(group[0])
            like = group[0][0]
            w, g, b = layout.written(group[0], reads=True), layout.like(group[1]), layout.written(group[2], reads=False)
            _perturb(w, g, b, _double(norm, like), _double(rho, like), _optional(eta, like))
            layout.write_back()
            moved.append(group)
    except BaseException:
        for group in moved:
            restore_(group[0], group[2])
        raise


def sam_ascent_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    backups: Sequence[Tensor],
    rho: Tensor | float,
    *,
    eta: Tensor | float | None = None,
) -> Tensor:
    """:func:`global_norm` and :func:`perturb_` in one: 20 bytes per parameter in float32, 24 with ``eta``.

    Returns:
        The norm, shape ``()``, float64.
    Raises:
        ValueError: tensors that do not fit together.
    Source: Foret et al., Sharpness-aware minimization (2021); Kwon et al., ASAM (2021).
    """
    groups = list(_groups(weights, gradients, backups))
    if len(groups) != 1:
        norm = global_norm(gradients, weights, eta=eta)
        perturb_(weights, gradients, backups, norm, rho, eta=eta)
        return norm
    (group,) = groups
    layout = _Layout(group[0])
    like = group[0][0]
    w, g, b = layout.written(group[0], reads=True), layout.like(group[1]), layout.written(group[2], reads=False)
    found: Tensor = _ascent(w, g, b, _double(rho, like), _optional(eta, like))
    layout.write_back()
    return found


def restore_(weights: Sequence[Tensor], backups: Sequence[Tensor]) -> None:
    """Copy ``backups`` into the weights: the same bits, at the same addresses. 8 bytes per parameter in float32.

    Raises:
        ValueError: tensors that do not fit together.
    """
    for group in _groups(weights, backups):
        layout = _Layout(group[0])
        _restore(layout.written(group[0], reads=False), layout.like(group[1]))
        layout.write_back()


def restore_sgd_(
    weights: Sequence[Tensor],
    backups: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] | None,
    *,
    lr: Tensor | float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first_step: bool = False,
) -> None:
    """:func:`restore_`, then a step of ``torch.optim.SGD`` from there, in one pass: 20 bytes per parameter in float32.

    On a CPU, in float32 and float64, bit for bit what ``torch.optim.SGD`` gives. Elsewhere up to the rounding of fused
    multiply-adds; in half precision it is rounded once where torch rounds after every operation.

    Args:
        momentum_buffers: parallel to the weights; needed where ``momentum`` is not zero.
        first_step: fill the buffers with the gradient, as torch does when there are none yet.
    Raises:
        ValueError: tensors or settings that do not fit together.
    """
    if (momentum != 0) != (momentum_buffers is not None):
        raise ValueError(f"momentum {momentum} needs {'' if momentum else 'no '}momentum_buffers")
    if nesterov and (momentum <= 0 or dampening != 0):
        raise ValueError("nesterov needs a momentum and zero dampening")
    lists = [weights, backups, gradients, *([] if momentum_buffers is None else [momentum_buffers])]
    for group in _groups(*lists):
        layout = _Layout(group[0])
        w, b, g = layout.written(group[0], reads=False), layout.like(group[1]), layout.like(group[2])
        buffers = layout.written(group[3], reads=not first_step) if momentum else []
        rate = _double(lr, group[0][0])
        _restore_sgd(w, b, g, buffers, rate, momentum, dampening, weight_decay, nesterov, maximize, first_step)
        layout.write_back()


def _double(value: Tensor | float, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().reshape(()).to(like.device, torch.float64)
    return torch.full((), value, dtype=torch.float64, device=like.device)


def _optional(value: Tensor | float | None, like: Tensor) -> Tensor | None:
    return None if value is None else _double(value, like)


def _groups(*lists: Sequence[Tensor]) -> Iterator[list[list[Tensor]]]:
    """The lists, without their empty tensors, split by device and dtype."""
    if len({len(tensors) for tensors in lists}) != 1:
        raise ValueError(f"the lists must be parallel, got lengths {', '.join(str(len(tensors)) for tensors in lists)}")
    groups: dict[tuple[torch.device, torch.dtype], list[list[Tensor]]] = {}
    for row in zip(*lists, strict=True):
        first = row[0]
        for tensor in row:
            if (tensor.shape, tensor.dtype, tensor.device) != (first.shape, first.dtype, first.device):
                raise ValueError(
                    f"tensors at the same place must be alike, got {tuple(first.shape)}, {first.dtype}, {first.device} and "
                    f"{tuple(tensor.shape)}, {tensor.dtype}, {tensor.device}"
                )
        if not first.dtype.is_floating_point or first.layout is not torch.strided:
            raise ValueError(f"weights and gradients must be dense and real, got {first.dtype}, {first.layout}")
        if first.numel():
            columns = groups.setdefault((first.device, first.dtype), [[] for _ in lists])
            for column, tensor in zip(columns, row, strict=True):
                column.append(tensor.detach())
    yield from groups.values()


class _Layout:
    """Gives every tensor of parallel lists the order in memory of the weight at its place, without gaps.

    Parameters and gradients usually have it. What does not is copied; copies that are written to are copied back.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._models = [w if _gapless(w) else torch.empty_like(w, memory_format=torch.contiguous_format) for w in weights]
        self._copies: list[tuple[Tensor, Tensor]] = []

    def like(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [t if _same_order(t, m) else torch.empty_like(m).copy_(t) for t, m in zip(tensors, self._models, strict=True)]

    def written(self, tensors: Sequence[Tensor], *, reads: bool) -> list[Tensor]:
        found = []
        for tensor, model in zip(tensors, self._models, strict=True):
            if _same_order(tensor, model):
                found.append(tensor)
                continue
            copy = torch.empty_like(model)
            if reads:
                copy.copy_(tensor)
            self._copies.append((tensor, copy))
            found.append(copy)
        return found

    def write_back(self) -> None:
        for tensor, copy in self._copies:
            tensor.copy_(copy)


def _same_order(tensor: Tensor, model: Tensor) -> bool:
    # the stride of a dimension of size 1 says nothing
    strides = zip(tensor.shape, tensor.stride(), model.stride(), strict=True)
    return all(size == 1 or a == b for size, a, b in strides)


def _gapless(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or _in_memory_order(tensor).is_contiguous()


def _in_memory_order(tensor: Tensor) -> Tensor:
    order = sorted(range(tensor.ndim), key=lambda d: (tensor.stride(d), tensor.shape[d]), reverse=True)
    return tensor.permute(order)


def _flat(tensor: Tensor) -> Tensor:
    return (tensor if tensor.is_contiguous() else _in_memory_order(tensor)).view(-1)


# the references: torch's multi-tensor and fused kernels where they do, and else piece by piece


def _multi_tensor(weights: Sequence[Tensor], eta: Tensor | None = None) -> bool:
    """Whether to take torch's multi-tensor kernels.

    On CUDA its fused SGD reads a step length on the device in float32, and ``T g`` would be rounded to half precision.
    """
    dtype = weights[0].dtype
    return weights[0].device.type == "cuda" and (dtype is torch.float32 or (eta is None and dtype is not torch.float64))


def _fused_step(weights: Sequence[Tensor], eta: Tensor | None) -> bool:
    """Whether SGD's fused step adds the gradient: on a CPU not where ``T²g`` would first take whole temporaries."""
    return _multi_tensor(weights, eta) or (weights[0].device.type == "cpu" and eta is None)


def _rows(
    count: int, dtype: torch.dtype, *lists: Sequence[Tensor]
) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """Parallel pieces of the tensors in memory order, and ``count`` buffers of that length, the same every time."""
    device = lists[0][0].device
    longest = next(vectors.pieces(max(tensor.numel() for tensor in lists[0]), device)).stop
    buffers = torch.empty((count, longest), dtype=dtype, device=device)
    cut: dict[int, tuple[Tensor, ...]] = {}
    for tensors in zip(*lists, strict=True):
        flat = [_flat(tensor) for tensor in tensors]
        for piece in vectors.pieces(len(flat[0]), device):
            size = piece.stop - piece.start
            if size not in cut:
                cut[size] = buffers[:, :size].unbind()
            yield tuple(flat if size == len(flat[0]) else [x[piece] for x in flat]), cut[size]


def _norm_reference(gradients: list[Tensor], weights: list[Tensor], eta: Tensor | None) -> Tensor:
    dtype = vectors.arithmetic_dtype(gradients[0].dtype)
    if _multi_tensor(gradients, eta):
        if eta is not None:
            gradients = list(torch._foreach_mul(_adaptive_weights(weights, eta), gradients))
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float64)
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return norm
    if eta is None and gradients[0].dtype is dtype and gradients[0].device.type == "cpu":
        return _norm_of_rows([_flat(gradient) for gradient in gradients])
    sums = vectors.Sums(1, gradients[0].device)
    for (g, *w), (buffer,) in _rows(1, dtype, gradients, *([] if eta is None else [weights])):
        u = g.to(dtype)
        if eta is not None:
            u = torch.abs(w[0].to(dtype), out=buffer).add_(eta.to(dtype)).mul_(u)
        sums.add(0, u, u, buffer)
    return sums.totals()[0].sqrt()


def _norm_of_rows(flat: list[Tensor]) -> Tensor:
    """Norms of short rows, added up in float64: they read each number once, where products would be written first (2.4 times
    as fast), and float32 is exact enough in a row.
    """
    parts = []
    for vector in flat:
        whole = len(vector) // _ROW * _ROW
        parts += [torch.linalg.vector_norm(vector[:whole].view(-1, _ROW), dim=1).double()] if whole else []
        parts += [torch.linalg.vector_norm(vector[whole:], dtype=torch.float64).view(1)] if whole < len(vector) else []
    norm: Tensor = torch.linalg.vector_norm(torch.cat(parts))
    return norm


def _adaptive_weights(weights: list[Tensor], eta: Tensor) -> list[Tensor]:
    absolute = torch._foreach_abs(weights)
    # by its overload: torch._foreach_add_ would take a tensor of one element for a number, and wait for it
    torch.ops.aten._foreach_add_.Tensor(absolute, eta.to(weights[0].dtype))
    return list(absolute)


def _perturb_reference(
    weights: list[Tensor],
    gradients: list[Tensor],
    backups: list[Tensor],
    norm: Tensor,
    rho: Tensor,
    eta: Tensor | None,
) -> None:
    torch._foreach_copy_(backups, weights)
    try:
        _move(weights, gradients, norm, rho, eta)
    except BaseException:  # Ctrl-C too: some would have moved, and nobody would know which
        torch._foreach_copy_(weights, backups)
        raise


def _move(weights: list[Tensor], gradients: list[Tensor], norm: Tensor, rho: Tensor, eta: Tensor | None) -> None:
    usable = norm.nan_to_num(nan=0.0, posinf=0.0)  # zero where the weights shall stay
    on_host = norm.device.type == "cpu"
    if _fused_step(weights, eta):
        if eta is not None:
            scaled = _adaptive_weights(weights, eta)
            squares = torch._foreach_mul(scaled, scaled)
            torch._foreach_mul_(squares, gradients)
            gradients = list(squares)
        skip = torch.logical_not(usable, out=torch.empty((), dtype=torch.float32, device=norm.device))
        scale = rho / usable if on_host else torch.div(rho, usable, out=torch.empty_like(skip))
        torch._fused_sgd_(
            weights, gradients, [], weight_decay=0.0, momentum=0.0, lr=scale, dampening=0.0, nesterov=False, maximize=True,
            is_first_step=True, found_inf=skip,
        )  # fmt: skip
        return
    dtype = vectors.arithmetic_dtype(weights[0].dtype)
    moves, scale = usable > 0, (rho / usable).to(dtype)
    if on_host and not moves.item():  # to ask costs nothing there, and torch.where as much as eight products
        return
    for (w, g), (t, moved) in _rows(2, dtype, weights, gradients):
        x, u = w.to(dtype), g.to(dtype)
        if eta is not None:
            torch.abs(x, out=t).add_(eta.to(dtype))
            u = torch.mul(u, t, out=moved).mul_(t)
        torch.mul(u, scale, out=moved).add_(x)
        w.copy_(moved if on_host else torch.where(moves, moved, x, out=moved))


def _ascent_reference(
    weights: list[Tensor], gradients: list[Tensor], backups: list[Tensor], rho: Tensor, eta: Tensor | None
) -> Tensor:
    norm = _norm_reference(gradients, [] if eta is None else weights, eta)
    _perturb_reference(weights, gradients, backups, norm, rho, eta)
    return norm


def _restore_reference(weights: list[Tensor], backups: list[Tensor]) -> None:
    torch._foreach_copy_(weights, backups)


def _restore_sgd_reference(
    weights: list[Tensor],
    backups: list[Tensor],
    gradients: list[Tensor],
    momentum_buffers: list[Tensor],
    lr: Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first_step: bool,
) -> None:
    if _multi_tensor(weights):
        torch._foreach_copy_(weights, backups)
        torch._fused_sgd_(
            weights, gradients, momentum_buffers, weight_decay=weight_decay, momentum=momentum, lr=lr.float(),
            dampening=dampening, nesterov=nesterov, maximize=maximize, is_first_step=first_step,
        )  # fmt: skip
        return
    dtype = vectors.arithmetic_dtype(weights[0].dtype)
    for (w, b, g, *buffers), (x, step, m) in _rows(
        3, dtype, weights, backups, gradients, *([momentum_buffers] if momentum else [])
    ):
        x = (w if w.dtype is dtype else x).copy_(b)
        step.copy_(g)
        if maximize:
            step.neg_()
        if weight_decay:
            step.add_(x, alpha=weight_decay)
        if momentum:
            (buffer,) = buffers
            m = buffer if buffer.dtype is dtype else m
            m.copy_(step if first_step else buffer)
            if not first_step:
                m.mul_(momentum).add_(step, alpha=1 - dampening)
            buffer.copy_(m)
            step = step.add_(m, alpha=momentum) if nesterov else m
        w.copy_(x.addcmul_(step, lr, value=-1))


def _new_norm(first: list[Tensor], *args: object) -> Tensor:
    return first[0].new_empty((), dtype=torch.float64)


_norm = Operation(
    "sam_norm",
    "(Tensor[] gradients, Tensor[] weights, Tensor? eta) -> Tensor",
    _norm_reference,
    launcher="sam_triton:norm",
    launches=3,
    fake=_new_norm,
)
_perturb = Operation(
    "sam_perturb_",
    "(Tensor(a!)[] weights, Tensor[] gradients, Tensor(b!)[] backups, Tensor norm, Tensor rho, Tensor? eta) -> ()",
    _perturb_reference,
    launcher="sam_triton:perturb_",
    mutates=("weights", "backups"),
    overwrites=("backups",),
)
_ascent = Operation(
    "sam_ascent_",
    "(Tensor(a!)[] weights, Tensor[] gradients, Tensor(b!)[] backups, Tensor rho, Tensor? eta) -> Tensor",
    _ascent_reference,
    launcher="sam_triton:ascent_",
    mutates=("weights", "backups"),
    overwrites=("backups",),
    reads_twice=("gradients",),
    launches=2,
    fake=_new_norm,
)
_restore = Operation(
    "sam_restore_",
    "(Tensor(a!)[] weights, Tensor[] backups) -> ()",
    _restore_reference,
    launcher="sam_triton:restore_",
    mutates=("weights",),
    overwrites=("weights",),
)
_restore_sgd = Operation(
    "sam_restore_sgd_",
    "(Tensor(a!)[] weights, Tensor[] backups, Tensor[] gradients, Tensor(b!)[] momentum_buffers, Tensor lr, float momentum, "
    "float dampening, float weight_decay, bool nesterov, bool maximize, bool first_step) -> ()",
    _restore_sgd_reference,
    launcher="sam_triton:restore_sgd_",
    mutates=("weights", "momentum_buffers"),
    overwrites=("weights",),
)
