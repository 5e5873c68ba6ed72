"""The mean loss over a data set, its gradient and its Hessian, as functions of a flat perturbation of the weights."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from . import modes, sampling
from .batches import Batch, BatchSource, head, map_tensors, tensors_of
from .errors import NonFiniteLossError, SecondDerivativeError
from .losses import LossFn, LossRule, OtherLossError, PluginRule, logits_of, resolve_loss, unwrap
from .progress import ProgressEvent, ProgressListener
from .report import Cost
from .space import ParameterSpace, Select

__all__ = ["BATCH_NORM_POLICIES", "Objective"]

BATCH_NORM_POLICIES = ("eval", "batch")

T = TypeVar("T")


class Objective:
    """Mean loss, gradient and Hessian-vector product over a loader, at the trained weights plus a perturbation.

    The model is evaluated by ``torch.func.functional_call`` on views of one flat vector, in eval mode, outside autocast
    and inference mode; nothing is written to it, and flags and random states are put back after every call, also after
    an exception or Ctrl-C. The loss is weighted by samples (more exactly, by the loss's own denominator), so that any
    batching of the same samples gives the same numbers; it accumulates in float64.

    Constructing it reads the data (twice, unless it is a list: does a second pass give the same samples?), keeps the
    batches on the device when they fit in ``cache_bytes``, finds the loss, and evaluates it once.

    Args:
        model: any module; compiled and data-parallel wrappers are taken off.
        loader: an iterable of batches that can be iterated again: a DataLoader, a list of batches.
        loss_fn: ``(model, batch) ->`` scalar mean loss, or ``(mean, weight)``. See ``losses.resolve_loss`` for the rules.
        criterion: ``(output, targets) ->`` loss, for a loader of pairs.
        select: which trainable parameters to perturb: None (all), a predicate ``(name, parameter)``, globs.
        batch_norm: "eval" uses running statistics, "batch" those of each evaluation batch (which then change with the
            batching). It matters: measured, 9 to 40 times in ε-box sharpness.
        max_samples: use the first so many samples.
        device: where to evaluate; None for the device of the parameters.
        cache_bytes: see ``batches.BatchSource``.
        seed: of shuffling and augmenting loaders.
        plugin_rule: asked for a loss after ``loss_fn`` and ``criterion``.
        listener: receives a ``ProgressEvent`` after every batch.
    Attributes:
        space: the selected parameters; ``origin``: their trained values, shape ``(dim,)``.
        loss: mean loss at the origin.
        loss_rule: the sentence that says how the loss was found.
        cost: work done so far.
        notes: sentences that a reader of the numbers must know.
    Raises:
        LoaderError, LossRuleError: see there.
        ValueError: nothing to perturb, unknown ``batch_norm``; from ``value_and_grad``, a loss cut off from the weights.
        NonFiniteLossError: the loss at the origin is NaN or infinite on some batch, which is named.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        *,
        loss_fn: LossFn | None = None,
        criterion: Callable[..., Any] | None = None,
        select: Select = None,
        batch_norm: str = "eval",
        max_samples: int | None = None,
        device: torch.device | str | None = None,
        cache_bytes: int | None = None,
        seed: int = 0,
        plugin_rule: PluginRule | None = None,
        listener: ProgressListener | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got a {type(model).__name__}")
        if isinstance(model, torch.jit.ScriptModule):
            raise TypeError(
                "model is scripted, and TorchScript does not let its weights be replaced by perturbed ones. "
                "Pass the nn.Module it was made from."
            )
        if batch_norm not in BATCH_NORM_POLICIES:
            raise ValueError(f"batch_norm must be one of {BATCH_NORM_POLICIES}, got {batch_norm!r}")
        self._began = time.perf_counter()
        self._counts = {"values": 0.0, "gradients": 0.0, "hvps": 0.0, "passes": 0.0}
        self._sweeps, self._partial_passes = 0, 0.0  # batches seen by whole passes; fractions of passes beside them
        self._depth = 0
        self._seed = sampling.key_for(seed, "model") >> 2  # room for the position of the batch
        self.module, wrappers = unwrap(model)
        self._batch_norm = batch_norm
        # a loss that is a module has modes, too
        self._modules = [self.module, *(part for part in (criterion, loss_fn) if isinstance(part, nn.Module))]
        with torch.inference_mode(False):
            self.space = ParameterSpace(self.module, select, device=None if device is None else torch.device(device))
        self.device = self.space.device
        if self.device.type == "mps":
            raise ValueError(
                "device mps has no float64, in which losses accumulate. Pass device='cpu'; the model stays put."
            )
        self.origin = self.space.origin
        self._listener = listener
        self._metric = ""
        self._expected_passes: float | None = None
        self._metric_began, self._metric_passes = self._began, 0.0
        self._hvp_mode: str | None = None
        self._own_notes = self._notes_on_model(wrappers)
        self._source = BatchSource(
            loader,
            device=self.device,
            max_samples=max_samples,
            cache_bytes=cache_bytes,
            upcast_half=self.space.has_half,
            seed=seed,
        )
        with self.session():
            self._source.load()
            # the first pass looks at what the model does beside computing; later ones guard against it where it does
            self._first_look, self._inputs_written, self._weights_written, self._draws = True, False, False, False
            self._value_needs_grad = False
            self._rule = self._resolve_loss(loss_fn, criterion, plugin_rule)
            # of the whole loader, and the batches that have none: the first pass tells them
            self._weight = torch.tensor(0.0, dtype=torch.float64)
            self._weightless: set[int] = set()
            try:
                self._look_elsewhere()
                self.loss = self._first_value()
            except OtherLossError:
                if self._rule.fallback is None:
                    raise
                self._rule = self._rule.fallback
                self.loss = self._first_value()
            self._first_look = False

    # ------------------------------------------------------------------ what it is

    @property
    def dim(self) -> int:
        return self.space.dim

    @property
    def num_samples(self) -> int:
        return self._source.num_samples

    @property
    def num_batches(self) -> int:
        return self._source.num_batches

    @property
    def loss_rule(self) -> str:
        return self._rule.description

    @property
    def hvp_mode(self) -> str | None:
        """How Hessian-vector products are made, once one was: "forward over reverse" or "double backward"."""
        return self._hvp_mode

    @property
    def notes(self) -> list[str]:
        drawing = ["the model draws random numbers in eval mode; every evaluation repeats the same draws"]
        return self._own_notes + drawing * self._draws + self._source.notes

    @property
    def cost(self) -> Cost:
        return Cost(**self._counts, seconds=time.perf_counter() - self._began)

    def describe(self) -> dict[str, Any]:
        """What the numbers depend on, as JSON types."""
        cached = self._source.cached
        return {
            "model": type(self.module).__name__,
            "dim": self.dim,
            "num_parameters": self.space.num_parameters,
            "num_frozen": self.space.num_frozen,
            "num_samples": self.num_samples,
            "num_batches": self.num_batches,
            "batches": f"cached on {self.device}" if cached else "read anew at every pass",
            "cache_bytes": self._source.budget,
            "loss_rule": self.loss_rule,
            "batch_norm": self._batch_norm,
            "dtype": str(self.space.dtype).removeprefix("torch."),
            "device": str(self.device),
            "hvp_mode": self.hvp_mode,
            "notes": self.notes,
        }

    def _notes_on_model(self, wrappers: list[str]) -> list[str]:
        notes = []
        if wrappers:
            notes.append(f"measured inside {' and '.join(wrappers)}, on the wrapped {type(self.module).__name__}")
        if self.space.has_half:
            notes.append(
                "half-precision weights were measured on a float32 copy (a step of ε = 1e-3 is lost in their rounding)"
            )
        batch_statistics = self._batch_norm == "batch"
        if modes.has_batch_norm(self.module, without_running_statistics=not batch_statistics):
            notes.append("BatchNorm used the statistics of each evaluation batch, so the numbers depend on the batch size")
        return notes

    # ------------------------------------------------------------------ evaluation

    def value(self, perturbation: Tensor | None = None) -> float:
        """Mean loss at ``origin + perturbation``, shape ``(dim,)``. One pass, forward only."""
        losses: list[Tensor] = []
        weights: list[Tensor] = []
        with self.session(), torch.set_grad_enabled(self._value_needs_grad):
            point = self._point(perturbation)
            for batch in self._batches():
                loss, weight = self._with_loss(point, batch, lambda loss, weight: (loss, weight))
                losses.append(loss.detach())
                weights.append(weight)
        self._counts["values"] += 1
        if self._weight == 0:
            self._weight = torch.stack(weights).sum()
            self._weightless = {i for i, weight in enumerate(weights) if weight == 0}
            if not self._weight > 0:
                raise ValueError("the loss has weight 0 over the whole loader: every target is ignored")
        return self._mean(losses, weights, at_origin=perturbation is None)

    def value_and_grad(self, perturbation: Tensor | None = None) -> tuple[float, Tensor]:
        """Mean loss at ``origin + perturbation`` and its gradient, both of shape ``(dim,)``. One pass."""
        losses: list[Tensor] = []
        weights: list[Tensor] = []
        gradient: Tensor | None = None
        with self.session():
            leaf = self._point(perturbation).requires_grad_()
            for batch in self._batches():
                loss, weight, part = self._batch_gradient(leaf, batch)
                gradient = part if gradient is None else gradient.add_(part)
                losses.append(loss)
                weights.append(weight)
        assert gradient is not None  # the source is never empty
        self._counts["gradients"] += 1
        return self._mean(losses, weights, at_origin=perturbation is None), gradient

    def hvp(self, vector: Tensor, perturbation: Tensor | None = None) -> Tensor:
        """Hessian at ``origin + perturbation`` times ``vector``, shape ``(dim,)``, or each row of ``(k, dim)``.

        Exact: ``torch.func`` forward-over-reverse (about 3.2 gradients a product), or double backward where an operation
        of the model has no forward mode (about 3.1, and one shared first pass for the k rows). Chosen at the first
        product; ``hvp_mode`` names it. Attention runs on the MATH backend, which alone has second derivatives. One pass.

        Raises:
            SecondDerivativeError: neither mode works on this model.
        """
        rows = vector if vector.ndim == 2 else vector[None]
        with self.session(), modes.second_derivatives(self.module):
            rows = torch.stack([self.space.check(row, "vector") for row in rows])
            point = self._point(perturbation)
            products = torch.zeros_like(rows)
            for batch in self._batches():
                products += self._batch_hvp(point, rows, batch)
        self._counts["hvps"] += len(rows)
        return products if vector.ndim == 2 else products[0]

    def output_gradients(self, *, max_outputs: int = 10, max_samples: int = 512) -> Iterator[tuple[int, Tensor]]:
        """``(k, gradient of the mean of output k)`` at the origin, for the classes or output coordinates of the model.

        Made from the first ``max_samples`` samples, one backward pass for each output. Above
        ``max_outputs``, the outputs with the largest mean probability. Yields nothing where the model's output is not a
        tensor of scores. The direction in which one class is inflated leads to a local maximum of its own.
        """
        sums: Tensor | None = None
        probabilities: Tensor | None = None
        taken = 0
        with self.session():
            leaf = self.origin.clone().requires_grad_()
            for batch in self._batches(counted=False):
                if batch.num_samples is not None and batch.num_samples > max_samples - taken:
                    few = max_samples - taken
                    batch = batch._replace(data=head(batch.data, few, of=batch.num_samples), num_samples=few)
                scores = self._scores(leaf, batch)
                if scores is None:
                    return
                sums = scores.sum(0) if sums is None else sums + scores.sum(0)
                mass = scores.detach().softmax(1).sum(0)
                probabilities = mass if probabilities is None else probabilities + mass
                taken += batch.num_samples or 0
                if taken >= max_samples:
                    break
        if sums is None or probabilities is None or not sums.requires_grad:
            return
        share = min(taken / self.num_samples, 1.0) if self.num_samples else 1.0
        chosen = probabilities.topk(min(max_outputs, len(probabilities))).indices.sort().values.tolist()
        for position, k in enumerate(chosen):
            with self.session():
                (gradient,) = torch.autograd.grad(sums[k], leaf, retain_graph=position + 1 < len(chosen))
            self._counts["gradients"] += share
            self._partial_passes += share
            self._counts["passes"] += share
            yield k, gradient

    @property
    def has_classes(self) -> bool:
        """Whether the loss is a cross-entropy over the model's outputs."""
        return self._rule.class_axis is not None

    # ------------------------------------------------------------------ the parts

    def _point(self, perturbation: Tensor | None) -> Tensor:
        if perturbation is None:
            return self.origin.clone()
        return self.origin + self.space.check(perturbation, "perturbation").detach()

    def _with_loss(self, flat: Tensor, batch: Batch, use: Callable[[Tensor, Tensor], T]) -> T:
        """``use(loss, weight)`` of the batch, while the weights ``flat`` are in the model.

        Derivatives belong inside ``use``: a checkpointed model runs forward again in its backward pass.
        """

        def bound(model: nn.Module, data: Any) -> T:
            loss, weight = self._rule.loss_fn(model, data)
            loss = loss.to(torch.float64)
            return use(loss, torch.as_tensor(weight, dtype=torch.float64, device=loss.device).detach())

        answer: T = self._call(bound, flat, batch)
        return answer

    def _batches(self, *, counted: bool = True) -> Iterator[Batch]:
        """One pass over the batches that have weight; those of which every target is ignored have no loss either."""
        for position, batch in enumerate(self._source):
            if position not in self._weightless:
                # what a model draws, although in eval mode, it draws again at every evaluation
                sampling.seed_global(self._seed + position, self.device)
                yield batch
            if counted:
                self._tick()

    def _call(self, function: Callable[[nn.Module, Any], Any], flat: Tensor, batch: Batch) -> Any:
        """``function(model, batch)`` with the weights ``flat``; containers of the batch are new each time."""
        copy_inputs, copy_weights = self._first_look or self._inputs_written, self._first_look or self._weights_written
        data = map_tensors(batch.data, torch.clone if copy_inputs else torch.detach)
        weights = self.space.state(flat, copy_constants=copy_weights)
        given, drawn = tensors_of(data), sampling.torch_state(self.device) if self._first_look else ()
        state = {f"model.{name}": tensor for name, tensor in weights.items()}
        answer = functional_call(_Bound(self.module, function), state, (data,))
        if self._first_look:
            self._inputs_written |= any(tensor._version > 0 for tensor in given)
            self._weights_written |= any(weights[name]._version > 0 for name in self.space.constants)
            self._draws |= drawn != sampling.torch_state(self.device)
        return answer

    def _share(self, loss: Tensor, weight: Tensor) -> Tensor:
        """The batch's part of the mean loss."""
        return loss * (weight / self._weight)

    def _batch_gradient(self, leaf: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        def use(loss: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return loss.detach(), weight, self._gradient(loss, weight, leaf, batch)

        return self._with_loss(leaf, batch, use)

    def _gradient(self, loss: Tensor, weight: Tensor, leaf: Tensor, batch: Batch, *, create_graph: bool = False) -> Tensor:
        """Of the batch's part of the mean loss."""
        gradient: Tensor | None = None
        if loss.requires_grad:
            share = self._share(loss, weight)
            (gradient,) = torch.autograd.grad(share, leaf, create_graph=create_graph, allow_unused=True)
        if gradient is None:
            raise ValueError(
                f"the loss of batch {batch.position} does not depend on the selected parameters: the model or the loss "
                "detaches it (torch.no_grad, .detach(), .item()), or does not use them (a loss_fn must use the model that "
                "it is given). Change that, or select others."
            )
        return gradient

    def _look_elsewhere(self) -> None:
        """A rule that was read off the loss at the origin must hold at other weights, too."""
        if self._rule.fallback is None:
            return
        noise = sampling.normal(self.dim, sampling.generator_for(self._seed, "elsewhere"), self.origin)
        with torch.no_grad():
            self._call(self._rule.loss_fn, (self.origin.abs() + 0.1) * noise, next(iter(self._source)))

    def _first_value(self) -> float:
        try:
            return self.value()
        except RuntimeError as error:
            if "require grad" not in str(error):
                raise
        self._value_needs_grad = True  # the loss itself takes derivatives, with respect to its inputs, say
        return self.value()

    def _mean(self, losses: list[Tensor], weights: list[Tensor], *, at_origin: bool) -> float:
        stacked, w = torch.stack(losses), torch.stack(weights)
        # a batch without weight (every target ignored) has no mean
        mean = (torch.where(w > 0, stacked, 0.0) * w).sum().div(w.sum()).item()
        if at_origin and not math.isfinite(mean):
            bad = [i for i, loss in enumerate(stacked.tolist()) if not math.isfinite(loss)]
            which = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
            raise NonFiniteLossError(
                f"the loss at the trained weights is {stacked[bad[0]].item() if bad else mean} on batch {which} of "
                f"{len(losses)} (counted from 0), so there is no minimum to measure. Look for NaN inputs or diverged "
                "weights."
            )
        return mean

    def _batch_hvp(self, point: Tensor, rows: Tensor, batch: Batch) -> Tensor:
        products = {"forward over reverse": self._forward_over_reverse, "double backward": self._double_backward}
        if self._hvp_mode is not None:
            return products[self._hvp_mode](point, rows, batch)
        causes: list[tuple[str, Exception]] = []
        for name, product in products.items():
            try:
                found = product(point, rows, batch)
            except Exception as error:
                causes.append((name, error))
                continue
            if not found.any():  # a linear loss, or one that is cut off from the weights
                self._batch_gradient(point.clone().requires_grad_(), batch)
            self._hvp_mode = name
            return found
        if all(type(error) is type(causes[0][1]) and str(error) == str(causes[0][1]) for _, error in causes):
            raise causes[0][1]  # nothing to do with differentiation: the model itself fails
        said = "; ".join(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}" for name, error in causes)
        raise SecondDerivativeError(
            f"no exact mode gives a Hessian-vector product of {type(self.module).__name__} ({said}). Replace the operation "
            "that has no second derivative, or measure first-order metrics only: metrics=['epsilon_box', 'random_subspace']."
        ) from causes[-1][1]

    def _forward_over_reverse(self, point: Tensor, rows: Tensor, batch: Batch) -> Tensor:
        def share(flat: Tensor) -> Tensor:
            return self._with_loss(flat, batch, self._share)

        gradient = torch.func.grad(share)
        return torch.stack([torch.func.jvp(gradient, (point,), (row,))[1] for row in rows]).detach()

    def _double_backward(self, point: Tensor, rows: Tensor, batch: Batch) -> Tensor:
        leaf = point.detach().clone().requires_grad_()

        def products(loss: Tensor, weight: Tensor) -> Tensor:
            gradient = self._gradient(loss, weight, leaf, batch, create_graph=True)
            if not gradient.requires_grad:  # the loss is linear in the parameters
                return torch.zeros_like(rows)
            found = [
                torch.autograd.grad(
                    gradient, leaf, row, retain_graph=i + 1 < len(rows), allow_unused=True, materialize_grads=True
                )[0]
                for i, row in enumerate(rows)
            ]
            return torch.stack(found)

        return self._with_loss(leaf, batch, products)

    def _scores(self, leaf: Tensor, batch: Batch) -> Tensor | None:
        """The model's output on the batch as rows of scores, shape ``(positions, outputs)``."""
        seen: list[Any] = []
        handle = self.module.register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            self._with_loss(leaf, batch, lambda loss, weight: loss)
        finally:
            handle.remove()
        try:
            scores = logits_of(seen[-1], "output_gradients")
        except (TypeError, IndexError):  # no tensor of scores, or the model itself was never called
            return None
        axis = self._rule.class_axis
        if axis is None:
            axis = 1
            if scores.ndim != 2:
                return None
        if not scores.is_floating_point() or scores.ndim < 2:
            return None
        return scores.movedim(axis, -1).reshape(-1, scores.shape[axis])

    def _resolve_loss(
        self, loss_fn: LossFn | None, criterion: Callable[..., Any] | None, plugin_rule: PluginRule | None
    ) -> LossRule:
        def resolve(model: nn.Module, batch: Any) -> LossRule:
            return resolve_loss(model, batch, loss_fn=loss_fn, criterion=criterion, plugin_rule=plugin_rule)

        first = next(iter(self._source))
        rule: LossRule = self._call(resolve, self.origin, first)
        return rule

    # ------------------------------------------------------------------ around evaluations

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Everything that must hold while the model is evaluated, and be put back afterwards. Reentrant.

        Enter it once around many evaluations to save the set-up (about a millisecond for a thousand modules).
        """
        self._depth += 1
        try:
            if self._depth > 1:
                yield
                return
            with modes.evaluation(
                self._modules,
                self.device,
                batch_statistics=self._batch_norm == "batch",
                holders=self._source.holders,
            ):
                yield
        finally:
            self._depth -= 1

    def announce(self, metric: str, expected_passes: float | None) -> None:
        """From here on, progress events are about ``metric``."""
        self._metric, self._expected_passes = metric, expected_passes
        self._metric_began, self._metric_passes = time.perf_counter(), self._counts["passes"]

    def _tick(self) -> None:
        self._sweeps += 1
        self._counts["passes"] = self._sweeps / self.num_batches + self._partial_passes
        if self._listener is not None and self._metric:
            passes, seconds = self._counts["passes"] - self._metric_passes, time.perf_counter() - self._metric_began
            self._listener(ProgressEvent(self._metric, passes, self._expected_passes, seconds))


class _Bound(nn.Module):
    """``function(model, batch)`` as a module, so that ``functional_call`` swaps the weights for all of ``function``.

    A loss function may call a method or a part of the model, not only the model.
    """

    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, batch: Any) -> Any:
        return self.function(self.model, batch)
