"""Everything that must hold while a model is evaluated, and be put back afterwards, whatever interrupts."""

from __future__ import annotations

import contextlib
import importlib
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from . import sampling
from .interrupts import surely

__all__ = ["evaluation", "has_batch_norm", "second_derivatives"]

_ONE_AT_A_TIME = threading.RLock()
_FLAGS = ("training", "sparse", "padding_idx", "scale_grad_by_freq")
_OLD_WEIGHT_NORM = importlib.import_module("torch.nn.utils.weight_norm")  # the function of that name hides the module


@contextlib.contextmanager
def evaluation(
    modules: Iterable[nn.Module], device: torch.device, *, batch_statistics: bool, holders: Iterable[Any] = ()
) -> Iterator[None]:
    """Gradients on, inference mode and autocast off, full float32, eval mode, nothing compiled; no trace afterwards.

    One at a time: the switches of torch are those of the process, so other threads wait here.

    Args:
        modules: the model, and a criterion that is a module.
        batch_statistics: whether BatchNorm uses those of each batch.
        holders: see ``sampling.rng_states``.
    """
    tree = list(dict.fromkeys(m for module in modules for m in module.modules()))
    with _ONE_AT_A_TIME:
        restores = (_module_state(tree), _switches(device), sampling.rng_states(device, holders))
        try:
            with contextlib.ExitStack() as stack:
                _enter(stack, tree, device, batch_statistics=batch_statistics)
                yield
        finally:
            surely(lambda: [restore() for restore in restores])


def _enter(stack: contextlib.ExitStack, tree: list[nn.Module], device: torch.device, *, batch_statistics: bool) -> None:
    # reentrant checkpointing cuts the weights out of the graph; without it, a layer is simply computed
    checkpointing = importlib.import_module("torch.utils.checkpoint")
    stack.enter_context(_replaced(checkpointing, "CheckpointFunction", _NoCheckpoint))
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.enable_grad())
    for device_type in {"cpu", device.type}:
        stack.enter_context(torch.autocast(device_type, enabled=False))
    if any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in tree):
        # compiled graphs have no double backward; asked only where needed, since it imports the compiler
        stack.enter_context(torch.compiler.set_stance("force_eager"))
    for m in tree:
        # set directly: some modules do work in train() and eval(), such as merging adapters
        m.training = batch_statistics and isinstance(m, _BatchNorm)
        if isinstance(m, (nn.Embedding, nn.EmbeddingBag)):
            m.sparse = m.scale_grad_by_freq = False
        if isinstance(m, nn.Embedding):
            m.padding_idx = None  # a padding row is a weight like others to the loss (a bag leaves it out of its sum)
    # inference kernels of attention: without gradients they would take another path than with them
    torch.backends.mha.set_fastpath_enabled(False)
    if device.type == "cuda":
        # TensorFloat-32 moves ε-box sharpness by up to 0.3 % at ε = 1e-3 and 12 % at 1e-5
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        if any(isinstance(m, nn.RNNBase) for m in tree):  # cuDNN's RNNs have no backward in eval mode
            torch.backends.cudnn.enabled = False


@contextlib.contextmanager
def second_derivatives(module: nn.Module) -> Iterator[None]:
    """Inside ``evaluation``: attention by matrix products, RNNs without oneDNN, weight norm and hardsigmoid by others.

    Fused attention, oneDNN's RNNs and ``hardsigmoid`` lack second derivatives; ``torch._weight_norm`` has wrong ones
    (measured: an asymmetric Hessian, off by a sixth).
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # torch's forward mode scripts some formulas when it is first used, and its own script warns
        warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated")
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(m, nn.RNNBase) for m in module.modules()):
            stack.enter_context(_replaced(torch.backends.mkldnn, "enabled", False))
        stack.enter_context(_replaced(torch, "_weight_norm", _weight_norm))
        stack.enter_context(_replaced(_OLD_WEIGHT_NORM, "_weight_norm", _weight_norm))
        stack.enter_context(_replaced(nn.functional, "hardsigmoid", _hardsigmoid))
        yield


def has_batch_norm(module: nn.Module, *, without_running_statistics: bool = False) -> bool:
    found = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    return any(m.running_mean is None for m in found) if without_running_statistics else bool(found)


def _module_state(tree: list[nn.Module]) -> Callable[[], None]:
    """Puts back flags, parameters, buffers and tensors that are plain attributes.

    ``functional_call`` swaps the weights in place and back, but not if Ctrl-C falls into the swap (measured: one
    interrupt in twenty left perturbed weights in the model).
    """
    saved = [
        (m, dict(m._parameters), dict(m._buffers), {n: vars(m)[n] for n in _FLAGS if n in vars(m)}, _plain_tensors(m))
        for m in tree
    ]

    def restore() -> None:
        for m, parameters, buffers, flags, plain in saved:
            pairs: list[tuple[Any, Any]] = [(m._parameters, parameters), (m._buffers, buffers)]
            for now, before in pairs:
                if list(now) != list(before) or any(now[name] is not before[name] for name in before):
                    now.clear()
                    now.update(before)
            m.__dict__.update(flags)
            for name in _plain_tensors(m).keys() - plain.keys():
                del m.__dict__[name]
            m.__dict__.update(plain)

    return restore


def _plain_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}


def _switches(device: torch.device) -> Callable[[], None]:
    """Puts back the switches of the process that ``evaluation`` and ``second_derivatives`` turn."""
    backends: Any = torch.backends
    fast_path, onednn = backends.mha.get_fastpath_enabled(), backends.mkldnn.enabled
    attention = [
        (name, getattr(backends.cuda, f"{name}_sdp_enabled")()) for name in ("flash", "mem_efficient", "math", "cudnn")
    ]
    gradients = torch.is_grad_enabled()
    function_modes = _num_function_modes()
    on_cuda = device.type == "cuda"
    if on_cuda:
        matmul = torch.get_float32_matmul_precision()
        cudnn, conv = backends.cudnn.enabled, backends.cudnn.allow_tf32

    def restore() -> None:
        torch.set_grad_enabled(gradients)
        while _num_function_modes() > function_modes:  # Ctrl-C may fall between entering one and the code inside of it
            torch._C._pop_torch_function_stack()
        backends.mha.set_fastpath_enabled(fast_path)
        backends.mkldnn.enabled = onednn
        for name, enabled in attention:
            getattr(backends.cuda, f"enable_{name}_sdp")(enabled)
        if on_cuda:
            torch.set_float32_matmul_precision(matmul)
            backends.cudnn.enabled, backends.cudnn.allow_tf32 = cudnn, conv

    return restore


def _num_function_modes() -> int:
    return int(torch._C._len_torch_function_stack())


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)

    def restore() -> None:
        setattr(owner, name, before)

    with contextlib.ExitStack() as stack:
        stack.callback(surely, restore)
        setattr(owner, name, value)
        yield


class _NoCheckpoint:
    """In place of ``torch.utils.checkpoint.CheckpointFunction``."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``g v / ‖v‖``, the norm over all axes but ``dim`` (over all for -1)."""
    axes = [axis for axis in range(v.ndim) if axis != dim]
    return v * (g / v.square().sum(dim=axes, keepdim=True).sqrt() if axes else g / v.abs())


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    return nn.functional.relu6(input + 3) / 6
