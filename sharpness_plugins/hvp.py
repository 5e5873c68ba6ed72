"""Hessian-vector products of one batch: four ways, which of them to trust, and first graphs that are kept for the next."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import reductions, sampling
from .batches import Batch, map_tensors, rows_of, tensors_of
from .closed_forms import ClosedForms
from .errors import SecondDerivativeError
from .evaluation import CutOffError, Evaluator, WeightlessError, gradient_of
from .memory import MemoryBudget, free_bytes, is_out_of_memory
from .micro_batches import Part

__all__ = [
    "ASYMMETRY",
    "DIFFERENCES",
    "DISAGREEMENT",
    "FRESH",
    "HVP_MODES",
    "KINK",
    "STEP",
    "HessianProducts",
    "heads",
    "short",
]

RETAINED, FRESH, FORWARD, DIFFERENCES = (
    "retained double backward",
    "double backward",
    "forward over reverse",
    "central differences",
)
HVP_MODES = ("auto", RETAINED, FRESH, FORWARD, DIFFERENCES)

_PROBE_SAMPLES = 8
# of the norm of a product with a standard normal vector u, of which uᵀHv has the size
ASYMMETRY = {torch.float32: 1e-2, torch.float64: 1e-4}
DISAGREEMENT = {torch.float32: 1e-2, torch.float64: 1e-4}
STEP = {torch.float32: 5e-3, torch.float64: 6e-6}  # the cube root of the rounding unit
KINK = 0.05  # between differences with one step and a quarter of it; measured, 1e-3 on tanh networks and 1 on ReLU ones
# what the probe costs, in gradients on its few samples
_TWO_PRODUCTS, _ONE_PRODUCT, _TWO_DIFFERENCES = 5.0, 3.0, 4.0


@dataclass(frozen=True)
class _Graph:
    """The gradient of a batch at a point, with its graph."""

    leaf: Tensor
    gradient: Tensor

    def times(self, rows: Tensor, *, retain: bool) -> Tensor:
        if not self.gradient.requires_grad:  # the loss is linear in the parameters
            return torch.zeros_like(rows)
        found = []
        for i, row in enumerate(rows):
            keep = retain or i + 1 < len(rows)
            (product,) = torch.autograd.grad(
                self.gradient, self.leaf, row, retain_graph=keep, allow_unused=True, materialize_grads=True
            )
            found.append(product)
        return torch.stack(found) if len(found) > 1 else found[0][None]


class HessianProducts:
    """Products of the Hessian of a batch's part of the mean loss with vectors, all in the way that a probe chose.

    In gradients a product, measured on ResNet-18: double backward with the first graph kept from an earlier product 1.5
    (and the memory of that graph), double backward 2.5, forward over reverse 3.2, central differences 2. Double backward
    goes through ``ClosedForms`` of convolutions and BatchNorm; without them it takes 2.1 and 3.1. The probe runs once, on a
    few samples of the first batch: it takes the first of these whose ``uᵀHv`` equals ``vᵀHu`` and with which another one
    agrees, or else differences of gradients in float64; neither of these judges uses closed forms, and where they fail or
    do not agree, double backward does without. Central differences are never chosen: kinks (ReLU, max
    pooling) make them differ from the Hessian by 97 %, measured; asked for, they are refused where two steps disagree.

    Args:
        mode: one of ``HVP_MODES``.
        graph_bytes: keep first graphs while they take at most this; None for what ``memory`` has left, and at most a third
            of the free memory where no budget was given.
        memory: the budget that they share with others.
    Attributes:
        mode: how the last product was made; None before the first.
        check: the sentence that says what the probe saw.
        spent: gradients that the probe took, in samples.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        *,
        mode: str = "auto",
        graph_bytes: int | None = None,
        memory: MemoryBudget | None = None,
        seed: int = 0,
    ) -> None:
        if mode not in HVP_MODES:
            raise ValueError(f"hvp must be one of {HVP_MODES}, got {mode!r}")
        if graph_bytes is not None and graph_bytes < 0:
            raise ValueError(f"graph_bytes must be at least 0 (which keeps nothing), got {graph_bytes}")
        self._evaluator, self._module, self._seed = evaluator, evaluator.module, seed
        self._asked, self._graph_bytes, self._memory = mode, graph_bytes, memory
        self._held = 0
        self.mode: str | None = None
        self.check = ""
        self.spent = 0.0
        self._chosen: str | None = None
        self._closed, self._forms = True, ""  # whether closed forms are used; which ones there are
        self._point: Tensor | None = None
        self._at_origin = False
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._bytes_left: int | None = None
        self._bytes_per_sample: float | None = None

    @property
    def num_kept(self) -> int:
        """Parts of batches whose first graph is kept now."""
        return len(self._graphs)

    def move_to(self, origin: Tensor, perturbation: Tensor | None) -> None:
        """Products are at ``origin + perturbation`` from now on; graphs of another point are freed.

        Args:
            origin: the same tensor at every call, with the same numbers.
        """
        if perturbation is None and self._at_origin:
            return  # comparing would read two vectors a product
        point = origin if perturbation is None else origin + perturbation
        if self._point is None or not torch.equal(self._point, point):
            self.release()
            self._point = point.detach().clone().requires_grad_()
        self._at_origin = perturbation is None

    def release(self) -> bool:
        """Free the graphs; whether there were any."""
        had = bool(self._graphs)
        self._graphs.clear()
        if self._memory is not None and self._held:
            self._memory.release("graphs", self._held)
        self._held = 0
        self._point, self._at_origin, self._bytes_left = None, False, None
        return had

    def relieve(self) -> bool:
        """Free the graphs and keep none from now on, since memory ran out; whether there were any."""
        point, at_origin, self._graph_bytes = self._point, self._at_origin, 0
        had = self.release()
        self._point, self._at_origin = point, at_origin
        return had

    def state(self) -> list[Any]:
        """What the probe chose, as JSON."""
        return [self._chosen, self.mode, self.check, self._closed, self._forms]

    def set_state(self, state: list[Any]) -> None:
        """Go on with what a probe chose before, on the same model and data."""
        self._chosen, self.mode, self.check, self._closed, self._forms = state

    def __call__(self, rows: Tensor, part: Part, *, keep: bool) -> Tensor:
        """The Hessian at the point times each of the rows, shape ``(k, dim)``.

        Args:
            keep: whether more products with this part will follow, so that its first graph may be kept.
        """
        assert self._point is not None  # move_to comes first
        if self._chosen is None:
            self._chosen = self._choose(part.batch)
        try:
            if self._chosen == RETAINED:
                return self._retained(rows, part, keep=keep)
            self.mode = self._chosen
            return self._product(self._chosen, self._point, rows, part.batch)
        except WeightlessError:
            return torch.zeros_like(rows)

    def _product(self, mode: str, point: Tensor, rows: Tensor, batch: Batch) -> Tensor:
        if mode == FORWARD:
            return self._forward_over_reverse(point, rows, batch)
        if mode == DIFFERENCES:
            return torch.stack([self._difference(point, row, batch, STEP[row.dtype]) for row in rows])
        return self._double_backward(point, rows, batch)

    # ------------------------------------------------------------------ the ways

    def _double_backward(self, point: Tensor, rows: Tensor, batch: Batch) -> Tensor:
        leaf = point.detach().requires_grad_()

        def products(share: Tensor) -> Tensor:
            graph = _Graph(leaf, gradient_of(share, leaf, batch.position, create_graph=True))
            return graph.times(rows, retain=False)

        with self._closed_forms():
            return self._evaluator.share(leaf, batch, products)

    @contextlib.contextmanager
    def _closed_forms(self) -> Iterator[None]:
        """In which first graphs are built, where the probe has not found that they fail.

        They do with checkpointed layers: autograd leaves the mode before it builds those again, in another form.
        """
        if not self._closed:
            yield
            return
        forms = ClosedForms()
        try:
            with forms:
                yield
        finally:
            self._forms = forms.used or self._forms

    def _forward_over_reverse(self, point: Tensor, rows: Tensor, batch: Batch) -> Tensor:
        def share(flat: Tensor) -> Tensor:
            return self._evaluator.share(flat, batch, lambda share: share)

        gradient = torch.func.grad(share)
        return torch.stack([torch.func.jvp(gradient, (point.detach(),), (row,))[1] for row in rows]).detach()

    def _difference(self, point: Tensor, row: Tensor, batch: Batch, step: float) -> Tensor:
        length = reductions.norm(row).item()
        if length == 0:
            return torch.zeros_like(row)
        move = row * (step / length)
        ahead, behind = (self._gradient(point.detach() + sign * move, batch) for sign in (1, -1))
        return (ahead - behind).mul_(length / (2 * step))

    def _gradient(self, point: Tensor, batch: Batch) -> Tensor:
        leaf = point.requires_grad_()
        evaluate = self._evaluator.share if leaf.dtype == self._dtype else self._evaluator.in_float64
        return evaluate(leaf, batch, lambda share: gradient_of(share, leaf, batch.position))

    @property
    def _dtype(self) -> torch.dtype:
        assert self._point is not None
        return self._point.dtype

    # ------------------------------------------------------------------ graphs that are kept

    def _retained(self, rows: Tensor, part: Part, *, keep: bool) -> Tensor:
        key, leaf = (part.batch.position, part.start), self._point
        assert leaf is not None
        graph = self._graphs.get(key)
        if graph is not None:
            self.mode = RETAINED
            # inside the model again: a checkpointed layer runs forward in this backward pass, too
            return self._evaluator.inside(leaf, part.batch, lambda: graph.times(rows, retain=True))
        if not (keep and self._has_room(part.batch)):
            self.mode = RETAINED if self._graphs else FRESH
            return self._double_backward(leaf, rows, part.batch)

        def products(share: Tensor) -> Tensor:
            graph = _Graph(leaf, gradient_of(share, leaf, part.batch.position, create_graph=True))
            self._graphs[key] = graph
            return graph.times(rows, retain=True)

        num_samples = part.batch.num_samples or 1
        with self._closed_forms():
            if self._bytes_per_sample is None:
                with _counted_bytes(leaf) as counted:
                    answer = self._evaluator.share(leaf, part.batch, products)
                self._bytes_per_sample = counted() / num_samples
            else:
                answer = self._evaluator.share(leaf, part.batch, products)
        taken = int(self._bytes_per_sample * num_samples)
        if self._bytes_left is not None and taken > self._bytes_left:  # only the first can be so large
            del self._graphs[key]
        else:
            if self._bytes_left is not None:
                self._bytes_left -= taken
            if self._memory is not None:
                self._memory.hold("graphs", taken)
                self._held += taken
        self.mode = RETAINED if self._graphs else FRESH
        return answer

    def _has_room(self, batch: Batch) -> bool:
        assert self._point is not None
        if self._bytes_left is None:
            self._bytes_left = self._budget(self._point.device)
        if self._bytes_left is None:
            return True
        expected = (self._bytes_per_sample or 0.0) * (batch.num_samples or 1)
        return self._bytes_left > 0 and expected <= self._bytes_left

    def _budget(self, device: torch.device) -> int | None:
        """Bytes that graphs may take from now on; None for no limit."""
        if self._graph_bytes is not None:
            return self._graph_bytes
        left = math.inf if self._memory is None else self._memory.left
        if self._memory is None or self._memory.is_automatic:
            free = free_bytes(device)
            left = left if free is None else min(left, free // 3)
        return None if left == math.inf else int(left)

    # ------------------------------------------------------------------ the probe

    def _choose(self, batch: Batch) -> str:
        causes: dict[str, Exception] = {}
        if self._asked == DIFFERENCES:
            return self._without_kinks(batch)
        for few in heads(batch):
            causes = {}
            if (mode := self._probe(few, causes)) is not None:
                if self._forms and mode != FORWARD:
                    self.check += f"; closed forms of {self._forms}"
                self._closed = bool(self._forms)
                return mode
        errors = list(causes.values())
        if len(errors) > 1 and all(type(e) is type(errors[0]) and str(e) == str(errors[0]) for e in errors):
            raise errors[0]  # nothing to do with differentiation: the model itself fails
        raise SecondDerivativeError(self._refusal(batch, causes)) from errors[-1]

    def _probe(self, batch: Batch, causes: dict[str, Exception]) -> str | None:
        """The mode to use, judged on a few samples; None where none works, with the causes."""
        self._closed, self._forms = True, ""
        mode = None
        try:
            mode = self._judged(batch, causes)
        except SecondDerivativeError:
            if not self._forms:
                raise
        if self._forms and (mode is None or FRESH in causes):
            causes.clear()
            self._closed, self._forms = False, ""
            mode = self._judged(batch, causes)
        return mode

    def _judged(self, batch: Batch, causes: dict[str, Exception]) -> str | None:
        assert self._point is not None
        pair = self._normals(2)
        wanted = {"auto": [FRESH, FORWARD], FORWARD: [FORWARD]}.get(self._asked, [FRESH])
        found: dict[str, Tensor] = {}
        for mode in (FRESH, FORWARD) if wanted[0] == FRESH else (FORWARD, FRESH):
            try:
                found[mode] = self._trial(mode, pair if not found else pair[:1], batch)
            except CutOffError:
                raise
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                causes[mode] = error
        candidates = [mode for mode in wanted if mode in found]
        if not candidates:
            return None
        mode, others = candidates[0], [other for other in found if other != candidates[0]]
        if not all(product.isfinite().all() for product in found.values()):
            self.check = "the products are not finite"
        elif others and (apart := _apart(found[mode], found[others[0]])) <= DISAGREEMENT[self._dtype]:
            self.check = f"uᵀHv = vᵀHu, and {others[0]} agrees to {apart:.0e}"
        else:
            mode = self._verified(candidates, found, pair[0], batch, causes)
        return RETAINED if mode == FRESH and self._asked != FRESH else mode

    def _trial(self, mode: str, rows: Tensor, batch: Batch) -> Tensor:
        """The product with the first of the rows; with two of them, symmetry is checked."""
        assert self._point is not None
        self._spend(_TWO_PRODUCTS if len(rows) > 1 else _ONE_PRODUCT, batch)
        products = self._product(mode, self._point, rows, batch)
        if len(rows) > 1:
            _check_symmetry(rows, products)
        return products[0]

    def _verified(
        self, candidates: list[str], found: dict[str, Tensor], row: Tensor, batch: Batch, causes: dict[str, Exception]
    ) -> str:
        """The mode that differences of gradients in float64 confirm, asked where no second mode agrees.

        In float64 the step is so short that it meets no kink, as a rule; two steps tell.
        """
        assert self._point is not None
        self._spend(_TWO_DIFFERENCES, batch)
        step = STEP[torch.float64]
        try:
            near, nearer = (self._difference(self._point.double(), row.double(), batch, h) for h in (step, step / 4))
            scatter = _apart(nearer, near)
            reason = "differences of gradients with two steps disagree" if scatter > KINK else ""
        except Exception as error:
            if is_out_of_memory(error):
                raise
            reason = f"the model does not run in float64: {short(error)}"
        if reason and len(found) == 1:
            without = "; ".join(f"{name}: {short(error)}" for name, error in causes.items())
            self.check = f"uᵀHv = vᵀHu, but no other mode confirms it ({without}; {reason})"
            return candidates[0]
        if not reason:
            apart = {mode: _apart(found[mode].double(), nearer) for mode in candidates}
            for mode in candidates:
                if apart[mode] <= DISAGREEMENT[self._dtype] + 2 * scatter:
                    self.check = f"uᵀHv = vᵀHu, and differences of gradients in float64 agree to {apart[mode]:.0e}"
                    return mode
            reason = f"differences of gradients in float64 are {apart[candidates[0]]:.0%} off {candidates[0]}"
        if len(found) > 1:
            reason += f", and {' and '.join(found)} differ by {_apart(*found.values()):.0%}"
        raise SecondDerivativeError(
            f"an operation of {type(self._module).__name__} has a wrong second derivative{self._suspects(batch)}: {reason}. "
            "Its backward must be differentiable itself: built from torch operations, with nothing detached. Mend it, or "
            "measure first-order metrics only: metrics=['epsilon_box', 'random_subspace']."
        )

    def _normals(self, count: int) -> Tensor:
        assert self._point is not None
        generator = sampling.generator_for(self._seed, "hvp")
        return torch.stack([sampling.normal(len(self._point), generator, self._point) for _ in range(count)])

    def _without_kinks(self, batch: Batch) -> str:
        """Whether two steps agree on a whole batch: on a few samples they may meet no kink."""
        assert self._point is not None
        (row,) = self._normals(1)
        step = STEP[self._dtype]
        self._spend(_TWO_DIFFERENCES, batch)
        near, nearer = (self._difference(self._point, row, batch, h) for h in (step, step / 4))
        apart = _apart(nearer, near)
        if apart > KINK:
            raise SecondDerivativeError(
                f"central differences of the gradient with steps of {step:g} and a quarter of that differ by {apart:.0%}: "
                "the loss has kinks (ReLU, max pooling), or bends too much within a step. They would not be the Hessian. "
                "Use an exact mode: hvp='auto'."
            )
        self.check = f"differences with a quarter of the step agree to {apart:.0e}"
        return DIFFERENCES

    def _spend(self, gradients: float, batch: Batch) -> None:
        self.spent += gradients * (batch.num_samples or 0)

    # ------------------------------------------------------------------ who is to blame

    def _refusal(self, batch: Batch, causes: dict[str, Exception]) -> str:
        said = "; ".join(f"{name}: {short(error)}" for name, error in causes.items())
        few = next(iter(heads(batch)))
        culprit = self._culprit(few) or f"{type(self._module).__name__}{self._suspects(few)}"
        asked = "no exact mode gives" if self._asked == "auto" else f"{self._asked} does not give"
        return (
            f"{asked} a Hessian-vector product of {culprit} ({said}). Replace the operation that has no second derivative, "
            "or measure first-order metrics only: metrics=['epsilon_box', 'random_subspace']."
        )

    def _culprit(self, batch: Batch) -> str | None:
        """The innermost module of the model that has no double backward of its own, by name and type."""
        calls: dict[nn.Module, tuple[Any, Any]] = {}
        leaf = self._point.detach().requires_grad_() if self._point is not None else None

        def blame(share: Tensor) -> str | None:
            for handle in handles:
                handle.remove()
            for name, module in reversed(list(self._module.named_modules())):  # children before their parents
                if module in calls and not _has_second_derivative(module, *calls[module]):
                    return f"module {name!r} ({type(module).__name__})" if name else None
            return None

        handles = [
            module.register_forward_pre_hook(
                lambda module, args, kwargs: calls.setdefault(module, _detached((args, kwargs))) and None, with_kwargs=True
            )
            for module in self._module.modules()
        ]
        try:
            return None if leaf is None else self._evaluator.share(leaf, batch, blame)
        except Exception:
            return None
        finally:
            for handle in handles:
                handle.remove()

    def _suspects(self, batch: Batch) -> str:
        """The custom autograd functions in the graph of the loss, as the end of a sentence."""
        assert self._point is not None
        leaf = self._point.detach().requires_grad_()
        try:
            names = self._evaluator.share(leaf, batch, lambda share: _custom_functions(share.grad_fn))
        except Exception:  # the model does not even run; another error says so
            return ""
        return f" (custom autograd functions: {', '.join(names)})" if names else ""


def heads(batch: Batch) -> Iterator[Batch]:
    """A few samples of the batch, and the whole, in case those cannot be taken out or fail by themselves."""
    count = batch.num_samples
    if count is not None and count > _PROBE_SAMPLES:
        with contextlib.suppress(Exception):
            data = rows_of(batch.data, slice(_PROBE_SAMPLES), count)
            yield batch._replace(data=data, num_samples=_PROBE_SAMPLES)
    yield batch


def _apart(found: Tensor, expected: Tensor) -> float:
    size = max(reductions.norm(expected).item(), reductions.norm(found).item())
    return reductions.norm(found - expected).item() / size if size else 0.0


def _check_symmetry(pair: Tensor, products: Tensor) -> None:
    """Raise an ArithmeticError where ``uᵀHv`` and ``vᵀHu`` differ."""
    size = max(reductions.norm(product).item() for product in products)
    apart = abs((reductions.dot(pair[0], products[1]) - reductions.dot(pair[1], products[0])).item())
    if apart > ASYMMETRY[pair.dtype] * size:
        raise ArithmeticError(f"its Hessian is not symmetric: uᵀHv and vᵀHu differ by {apart / size:.2g} of ‖Hv‖")


@contextlib.contextmanager
def _counted_bytes(leaf: Tensor) -> Iterator[Callable[[], int]]:
    """Bytes that graphs built inside save, each storage once; those of the weights, which exist anyway, are left out."""
    own = leaf.untyped_storage().data_ptr()
    sizes: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        yield lambda: sum(size for pointer, size in sizes.items() if pointer != own)


def _detached(tree: Any) -> Any:
    return map_tensors(tree, lambda tensor: tensor.detach().clone())


def _has_second_derivative(module: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether a double backward through the module alone works."""
    args, kwargs = map_tensors((args, kwargs), lambda t: t.requires_grad_() if t.is_floating_point() else t)
    inputs = [tensor for tensor in tensors_of((args, kwargs)) if tensor.requires_grad]
    wanted = inputs + [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        outputs = [t for t in tensors_of(module(*_shallow(args), **kwargs)) if t.requires_grad]
        if not outputs:
            return True
        total = torch.stack([t.square().sum() for t in outputs]).sum()
        gradients = torch.autograd.grad(total, wanted, create_graph=True, allow_unused=True)
        bent = [g.square().sum() for g in gradients if g is not None and g.requires_grad]
        if bent:
            torch.autograd.grad(torch.stack(bent).sum(), wanted, allow_unused=True)
    except Exception:
        return False
    return True


def _shallow(args: Any) -> Any:
    """Copies that a module may write to."""
    return map_tensors(args, lambda tensor: tensor.clone() if tensor.requires_grad else tensor)


def _custom_functions(node: Any) -> list[str]:
    """Names of the Python autograd functions in a graph, in the order in which they are found."""
    names: dict[str, None] = {}
    seen: set[Any] = set()
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            names.setdefault(type(node).__name__.removesuffix("Backward"))
        waiting += [after for after, _ in node.next_functions]
    return list(names)


def short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
