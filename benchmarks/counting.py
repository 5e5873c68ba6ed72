"""Counts what a call would move and start on a GPU: bytes, kernel launches, synchronizations. No GPU is needed.

Rules, per operation as torch dispatches it:

* **bytes**: every tensor that it reads, once, and every tensor that it writes; a tensor written without being read
  (``out=``, ``copy_``, ``fill_``) only that. Views and ``empty`` are free. An expanded tensor counts the memory it has.
* **launches**: one. A multi-tensor (``_foreach_*``, ``_fused_*``) operation takes as many as CUDA's multi-tensor apply:
  blocks of 65536 elements, at most 320 blocks and 110, 64, 48, 36 or 30 tensors a launch for 1 to 5 lists; its norm two
  more, to clear and to add up. ``cat`` and ``stack`` take 128 tensors a launch. Matrix products are one.
* **syncs**: what hands a number to the host (``item``, a comparison of tensors, ``nonzero``), or a copy to another device.
* **operations of this package** count what they declare: inputs once, or twice where a second pass reads them, outputs once.

On tensors that have addresses, a cache can be modelled beside that: **memory_bytes** are what misses a write-back cache of
``cache_bytes`` with pages of 4 kB, the least recently used evicted first. What plain torch does piece by piece moves many
bytes, but few of them to or from memory.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from sharpness_plugins.kernels import dispatch

__all__ = ["Traffic", "multi_tensor_launches"]

_MULTI_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
_MULTI_BLOCKS, _MULTI_ELEMENTS = 320, 65536
_CAT_TENSORS = 128
_PAGE = 4096
_FREE = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}
_FREE |= {"aten::lift_fresh", "aten::alias", "aten::detach"}
_OVERWRITES = {"aten::copy_", "aten::fill_", "aten::zero_", "aten::_foreach_copy_", "aten::_foreach_zero_"}
_SYNCS = {"aten::_local_scalar_dense", "aten::item", "aten::equal", "aten::nonzero", "aten::masked_select"}


class Traffic(TorchDispatchMode):
    """Counts while it is entered; read the attributes afterwards.

    Args:
        cache_bytes: size of the cache to model; None for none.
        inside: count what plain torch does inside the operations of this package, not what they declare.
    Attributes:
        bytes, launches, syncs: as above.
        memory_bytes: what missed the cache, written-back pages included.
        by_operation: launches of each operation.
    """

    def __init__(self, *, cache_bytes: int | None = None, inside: bool = False) -> None:
        super().__init__()
        self._inside = inside
        self.bytes = self.launches = self.syncs = 0
        self.by_operation: Counter[str] = Counter()
        self._cache = None if cache_bytes is None else _Cache(cache_bytes // _PAGE)

    @property
    def memory_bytes(self) -> int:
        if self._cache is None:
            raise ValueError("memory_bytes needs a cache to model: give cache_bytes")
        return self._cache.moved + _PAGE * self._cache.dirty

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        space, _, operation = name.partition("::")
        if self._inside and space == dispatch.NAMESPACE:
            with self:
                return dispatch.operation(operation).reference(*args, **kwargs)
        reads, writes = _operands(func, args, kwargs)
        skipped = name.startswith("aten::_fused_") and any(isinstance(x, FakeTensor) for x in [*reads, *writes])
        result = None if skipped else func(*args, **kwargs)  # it has no rule for tensors without data, and returns nothing
        if name in _FREE or name.startswith("prim::") or _is_view(func):
            return result
        produced = [] if _returns_arguments(func) else list(_tensors((result,)))
        self._touch(reads, [*writes, *produced])
        self.syncs += name in _SYNCS or len({x.device for x in [*reads, *produced] if x.ndim or x.is_cuda}) > 1
        started = _launches(func, args, kwargs, produced)
        self.launches += started
        self.by_operation[name] += started
        return result

    def _touch(self, reads: Sequence[Tensor], writes: Sequence[Tensor]) -> None:
        self.bytes += sum(map(_memory, reads)) + sum(map(_memory, writes))
        if self._cache is not None:
            for tensor in reads:
                self._cache.touch(tensor, written=False)
            for tensor in writes:
                self._cache.touch(tensor, written=True)


class _Cache:
    """Pages by their address, the most recently used last, and whether they were written to."""

    def __init__(self, pages: int) -> None:
        self._pages: OrderedDict[int, bool] = OrderedDict()
        self._capacity = pages
        self.moved = 0

    @property
    def dirty(self) -> int:
        return sum(self._pages.values())

    def touch(self, tensor: Tensor, *, written: bool) -> None:
        begin = tensor.data_ptr()
        for page in range(begin // _PAGE, -(-(begin + _memory(tensor)) // _PAGE)):
            known = page in self._pages
            if not known and not written:
                self.moved += _PAGE
            self._pages[page] = written or (known and self._pages[page])
            self._pages.move_to_end(page)
            if len(self._pages) > self._capacity and self._pages.popitem(last=False)[1]:
                self.moved += _PAGE


def multi_tensor_launches(numels: Iterable[int], lists: int) -> int:
    """Launches of CUDA's multi-tensor apply on ``lists`` parallel lists of tensors of these sizes."""
    launches = tensors = blocks = 0
    for numel in numels:
        if not numel:
            continue
        tensors += 1
        count = math.ceil(numel / _MULTI_ELEMENTS)
        for block in range(count):
            blocks += 1
            last = block == count - 1
            if (tensors == _MULTI_TENSORS[lists] and last) or blocks == _MULTI_BLOCKS:
                launches, blocks, tensors = launches + 1, 0, 0 if last else 1
    return launches + (blocks > 0)


def _launches(func: Any, args: Any, kwargs: Any, produced: Sequence[Tensor]) -> int:
    space, _, name = func._schema.name.partition("::")
    if space == dispatch.NAMESPACE:
        return dispatch.operation(name).launches
    if name.startswith(("_foreach_", "_fused_")):
        lists = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, (list, tuple)) and _all_tensors(arg)]
        depth = len(lists) + bool(produced and not name.endswith("_norm"))
        return multi_tensor_launches((x.numel() for x in lists[0]), depth) + 2 * (name == "_foreach_norm")
    if name in ("cat", "stack"):
        return math.ceil(len(args[0]) / _CAT_TENSORS)
    if name in _SYNCS or name == "_local_scalar_dense":
        return 0
    return 1


def _operands(func: Any, args: Any, kwargs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors read, and arguments written."""
    space, _, name = func._schema.name.partition("::")
    own = dispatch.operation(name) if space == dispatch.NAMESPACE else None
    reads: list[Tensor] = []
    writes: list[Tensor] = []
    for place, argument in enumerate(func._schema.arguments):
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        found = list(_tensors((value,)))
        written = argument.alias_info is not None and argument.alias_info.is_write
        if name.startswith("_fused_") and argument.name == "grads":
            written = kwargs.get("grad_scale") is not None  # they are written to only where they are unscaled
        if own is not None:
            overwritten = argument.name in own.overwrites
        else:
            overwritten = argument.is_out or (written and func._schema.name in _OVERWRITES)
        writes += found if written else []
        reads += [] if overwritten else found
        reads += found if own is not None and argument.name in own.reads_twice else []
    if own is not None:
        return reads, writes
    return list({(x.data_ptr() if _has_address(x) else id(x), x.shape): x for x in reads}.values()), writes


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _all_tensors(values: Sequence[Any]) -> bool:
    return len(values) > 0 and all(isinstance(value, Tensor) for value in values)


def _has_address(tensor: Tensor) -> bool:
    return not isinstance(tensor, FakeTensor) and tensor.device.type != "meta"


def _memory(tensor: Tensor) -> int:
    distinct = math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return (0 if tensor.numel() == 0 else distinct) * tensor.element_size()


def _is_view(func: Any) -> bool:
    returned = [value.alias_info for value in func._schema.returns]
    return bool(returned) and all(alias is not None and not alias.is_write for alias in returned)


def _returns_arguments(func: Any) -> bool:
    return any(value.alias_info is not None for value in func._schema.returns) or not func._schema.returns
