"""The mean loss over a data set, its gradient and its Hessian, as functions of a flat perturbation of the weights."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import agreement, modes, sampling, sharded, stopping
from .batches import Batch
from .distributed import Ranks, RanksLike, resolve_ranks, world_size
from .errors import RemoteFailureError
from .evaluation import Evaluator, LossSums, mean_of
from .hvp import HessianProducts, heads
from .interrupts import surely
from .losses import LossFn, LossRule, OtherLossError, PluginRule, resolve_loss, unwrap
from .memory import MemoryBudget
from .micro_batches import MicroBatches, Part
from .progress import ProgressEvent, ProgressListener
from .report import Cost
from .rounds import InStep, Rounds
from .sharded_space import ShardedSpace
from .shares import share_of
from .sketch import Sketch
from .source import BatchSource
from .space import ParameterSpace, Select
from .steps import evaluation, stoppable
from .streamed_products import Data, StreamedProducts
from .streaming import Stream, StreamedEvaluator

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

    Where weights of ``fully_shard`` do not fit in memory when they are gathered, each rank has a shard of every vector,
    ``layout`` says which, and ``(dim,)`` below stands for its shape. The ranks then evaluate in step, and gather the weights
    of each module while it computes.

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
        cache_bytes: of ``memory``, for the batches; None for half of what the vectors leave, at most 4 GiB unless ``memory``
            is given. See ``source.BatchSource``.
        seed: of shuffling and augmenting loaders.
        plugin_rule: asked for a loss after ``loss_fn`` and ``criterion``.
        listener: receives a ``ProgressEvent`` after every batch.
        hvp: how Hessian-vector products are made, one of ``hvp.HVP_MODES``; "auto" for what a probe finds to be right and
            cheapest, which is never "central differences".
        memory: bytes, or a text such as "4GB", that may be kept between evaluations: the weights and working vectors, the
            batches, Krylov bases and first graphs together; None for half of what is free. See ``memory.MemoryBudget``.
        graph_bytes: of it, for first graphs that are kept between products; None for what is left.
        ranks: see ``measure_sharpness``.
    Attributes:
        space: the selected parameters; ``origin``: their trained values, shape ``(dim,)``.
        layout: how the vectors lie: whole on every rank, or in shards.
        loss: mean loss at the origin.
        loss_rule: the sentence that says how the loss was found.
        cost: work done so far.
        memory: the budget of what is kept, and who keeps it.
        notes: sentences that a reader of the numbers must know.
        ranks: the processes that share the evaluations; each of them must make the same ones, at the same points.
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
        hvp: str = "auto",
        memory: int | str | None = None,
        graph_bytes: int | None = None,
        ranks: RanksLike = "auto",
    ) -> None:
        self.ranks = resolve_ranks(ranks)
        with self.ranks.together():
            with self.ranks.sharing("setting up a measurement"):
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
                sharded.reshard(model)
                sharded.check_supported(model)
                self.module, wrappers = unwrap(model)
                if sharded.is_fully_sharded(self.module):
                    sharded.check_gathered(self.module, self.ranks)
                    wrappers.append("fully_shard")
                self._batch_norm = batch_norm
                if batch_norm == "batch" and world_size() > 1 and modes.has_synchronized_batch_norm(self.module):
                    raise ValueError(
                        "batch_norm='batch' with SyncBatchNorm on several ranks: its statistics are of the batches of all "
                        "ranks, which need not have equally many. Use batch_norm='eval', or plain BatchNorm."
                    )
                # a loss that is a module has modes, too
                self._modules = [self.module, *(part for part in (criterion, loss_fn) if isinstance(part, nn.Module))]
                where = None if device is None else torch.device(device)
                fits = sharded.fits_gathered(self.module, memory, where)
            in_shards = not all(self.ranks.gather(fits))
            with self.ranks.sharing("laying out the weights"):
                with torch.inference_mode(False):
                    self.space = (
                        ShardedSpace(self.module, select, device=where, ranks=self.ranks)
                        if in_shards
                        else ParameterSpace(self.module, select, device=where)
                    )
                self.layout = self.space.layout
                self.device = self.space.device
                if self.device.type == "mps":
                    raise ValueError(
                        "device mps has no float64, in which losses accumulate. Pass device='cpu'; the model stays put."
                    )
                self.origin = self.space.origin
                self.memory = MemoryBudget(memory, device=self.device, vector_bytes=self.origin.nbytes)
                self._listener = listener
                self._metric = ""
                self._expected_passes: float | None = None
                self._metric_began, self._metric_passes = self._began, 0.0
                self._evaluator, self._rounds = self._evaluates()
                self._graph_bytes = graph_bytes
                self._products = self._products_by(hvp)
                self._all_products = {hvp: self._products}  # each probed once
                # a gradient takes less memory than a product
                self._gradient_parts, self._product_parts, self._sweep_parts = (
                    MicroBatches(self._whole_batches_only) for _ in range(3)
                )
                self._most_in_sweep: int | None = None  # samples in ``over_parts``, once memory has run out there
                self._own_notes = self._notes_on_model(wrappers)
                self._source = BatchSource(
                    loader,
                    device=self.device,
                    max_samples=max_samples,
                    cache_bytes=self.memory.for_batches if cache_bytes is None else cache_bytes,
                    upcast_half=self.space.has_half,
                    seed=seed,
                )
            self._own_notes += agreement.on_weights(self.space, self.ranks)
            with self.session():
                if not self.ranks.is_alone:
                    self._source.share_out(self.ranks, share_of)
                self._source.load()
                self.memory.hold("batches", self._source.num_bytes)
                self._hold_gathered_weights()
                self._value_needs_grad = False
                with self.ranks.sharing("finding the loss"):
                    rule = self._resolve_loss(loss_fn, criterion, plugin_rule)
                self._evaluator.rule = agreement.on_rule(rule, self.ranks)
                self._evaluator.draws = any(self.ranks.gather(self._evaluator.draws))
                self._keep_whole_where_pieces_differ()
                self._weightless: set[int] = set()  # batches without weight: the first pass tells
                try:
                    with self.ranks.sharing("the loss at other weights"):
                        self._look_elsewhere()
                    self.loss = self._first_value()
                except (OtherLossError, RemoteFailureError) as error:
                    if self._rule.fallback is None or OtherLossError.__name__ not in f"{type(error).__name__} {error}":
                        raise
                    self._evaluator.rule = self._rule.fallback
                    self.loss = self._first_value()
                self._evaluator.looking = False
                self._evaluator.draws = any(self.ranks.gather(self._evaluator.draws))

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
    def first_rank(self) -> int:
        """The first rank that has data."""
        return self._source.first_rank

    @property
    def total_weight(self) -> float:
        """What the mean loss is a mean over: samples, or targets that are not ignored."""
        return float(self._evaluator.total_weight)

    @property
    def _rule(self) -> LossRule:
        assert self._evaluator.rule is not None  # from the constructor on
        return self._evaluator.rule

    @property
    def loss_rule(self) -> str:
        return self._rule.description

    @property
    def hvp_mode(self) -> str | None:
        """How the last Hessian-vector product was made; None before the first. One of ``hvp.HVP_MODES``."""
        return self._products.mode

    @property
    def hvp_check(self) -> str:
        """What the probe of Hessian-vector products compared, and how well it agreed; empty before the first."""
        return self._products.check

    @property
    def hvp_error(self) -> float:
        """Of a product by central differences, relative, estimated by another step; 0 for exact ones."""
        return self._products.error

    @property
    def notes(self) -> list[str]:
        drawing = ["the model draws random numbers in eval mode; every evaluation repeats the same draws"]
        sizes = [parts.size for parts in (self._gradient_parts, self._product_parts) if parts.size is not None]
        split = [f"memory ran out, and batches were evaluated in parts of {min(sizes)} samples or fewer"] if sizes else []
        return self._own_notes + drawing * self._evaluator.draws + split + self._source.notes

    @property
    def cost(self) -> Cost:
        return Cost(**self._counts, seconds=time.perf_counter() - self._began)

    def describe(self) -> dict[str, Any]:
        """What the numbers depend on, as JSON types."""
        cached = self._source.cached
        return {
            "model": self._model_name,
            "dim": self.dim,
            "num_parameters": self.space.num_parameters,
            "num_frozen": self.space.num_frozen,
            "num_samples": self.num_samples,
            "num_batches": self.num_batches,
            "ranks": self.ranks.size,
            "ranks_read": self.ranks.how,
            "batches": f"cached on {self.device}" if cached else "read anew at every pass",
            "cache_bytes": self._source.budget,
            "memory": self.memory.describe(),
            "loss_rule": self.loss_rule,
            "batch_norm": self._batch_norm,
            "dtype": str(self.space.dtype).removeprefix("torch."),
            "device": str(self.device),
            "vectors": "whole"
            if self.layout.is_whole
            else f"in shards, {len(self.origin)} of {self.dim} on rank {self.ranks.rank}",
            "hvp_mode": self.hvp_mode,
            "hvp_check": self.hvp_check,
            "notes": self.notes,
        }

    def identity(self) -> dict[str, str]:
        """What the loss is a function of, as checksums and words by what they are of; reads every weight once."""
        digits = 4 if self.space.dtype is torch.float32 else 9  # what another number of threads does not change
        settings = [self._batch_norm, str(self.space.dtype), self.device.type, self.loss_rule]
        return {
            "model": f"{self._model_name} {sampling.key_for(0, repr(self.module)):x}",
            "weights": self.space.checksum(),
            "data": self._source.checksum(),
            "loss": f"{self.loss:.{digits}e}",
            "settings": ", ".join(settings),
        }

    @property
    def _model_name(self) -> str:
        kinds = [kind.__name__ for kind in type(self.module).__mro__]
        # fully_shard makes a class of its own, before its mixin and the class that it was
        return kinds[kinds.index("FSDPModule") + 1] if "FSDPModule" in kinds else kinds[0]

    def _notes_on_model(self, wrappers: list[str]) -> list[str]:
        notes = []
        if wrappers:
            notes.append(f"measured inside {' and '.join(wrappers)}, on the wrapped {self._model_name}")
        if not self.layout.is_whole:
            notes.append("weights and vectors stayed in shards, since they do not fit in memory when they are gathered")
        if self.space.has_half:
            notes.append(
                "half-precision weights were measured on a float32 copy (a step of ε = 1e-3 is lost in their rounding)"
            )
        batch_statistics = self._batch_norm == "batch"
        if modes.has_batch_norm(self.module, without_running_statistics=not batch_statistics):
            notes.append("BatchNorm used the statistics of each evaluation batch, so the numbers depend on the batch size")
        return notes

    # ------------------------------------------------------------------ evaluation

    @evaluation
    def value(self, perturbation: Tensor | None = None) -> float:
        """Mean loss at ``origin + perturbation``, shape ``(dim,)``. One pass, forward only."""
        sums = LossSums()
        with (
            self.session(),
            torch.set_grad_enabled(self._value_needs_grad),
            self.ranks.sharing("a loss", self._same((perturbation,))) as shared,
        ):
            point = self._point(perturbation)

            def add(part: Part) -> None:
                sums.add(part.batch.position, *self._evaluator.value(point, part.batch))

            for _ in self._rounds.each(self._batches(), self._gradient_parts, add, lend=lambda: self._lend(point)):
                pass
            shared.numbers = sums.totals(at_origin=perturbation is None)
        self._counts["values"] += 1
        if self._evaluator.total_weight == 0:
            self._evaluator.total_weight = torch.tensor(shared.numbers[1], dtype=torch.float64, device=self.device)
            self._weightless = sums.weightless()
            if not self._evaluator.total_weight > 0:
                raise ValueError("the loss has weight 0 over the whole loader: every target is ignored")
        return mean_of(shared.numbers, at_origin=perturbation is None)

    @evaluation
    def value_and_grad(self, perturbation: Tensor | None = None) -> tuple[float, Tensor]:
        """Mean loss at ``origin + perturbation`` and its gradient, both of shape ``(dim,)``. One pass."""
        sums = LossSums()
        gradient: Tensor | None = None
        with self.session(), self.ranks.sharing("a gradient", self._same((perturbation,))) as shared:
            leaf = self._point(perturbation).requires_grad_()

            def work(part: Part) -> Tensor:
                loss, weight, share = self._evaluator.value_and_grad(leaf, part.batch)
                sums.add(part.batch.position, loss, weight)
                return share

            for share in self._rounds.each(self._batches(), self._gradient_parts, work, lend=lambda: self._lend(leaf)):
                gradient = share if gradient is None else gradient.add_(share)
            shared.numbers = sums.totals(at_origin=perturbation is None)
            gradient = torch.zeros_like(self.origin) if gradient is None else gradient
            shared.vector = gradient if self.layout.is_whole else None  # shards are added up already
        self._counts["gradients"] += 1
        return mean_of(shared.numbers, at_origin=perturbation is None), gradient if shared.vector is None else shared.vector

    @evaluation
    def hvp(self, vector: Tensor, perturbation: Tensor | None = None) -> Tensor:
        """Hessian at ``origin + perturbation`` times ``vector``, shape ``(dim,)``, or each row of ``(k, dim)``.

        Exact, by the way that a probe chooses at the first product (``hvp.HessianProducts``); ``hvp_mode`` names it. Inside
        a ``session`` the graphs of the gradients are kept between products at the same point, as many as fit in
        ``graph_bytes``: 1.5 gradients a product of ResNet-18 and not 2.5. Where vectors lie in shards, no graph is kept, and
        central differences stand in for a double backward that does not work (``streamed_products.StreamedProducts``);
        ``hvp_error`` is their error. Attention runs on the MATH backend, which alone has second derivatives. One pass.

        Raises:
            SecondDerivativeError: no mode works on this model, or its second derivatives are wrong.
        """
        rows = vector if vector.ndim == 2 else vector[None]
        keep = self._source.cached and self._depth > 0
        try:
            with (
                self.session(),
                modes.second_derivatives(self.module),
                self.ranks.sharing("a product with the Hessian", self._same((vector, perturbation))) as shared,
            ):
                checked = [self.space.check(row, "vector") for row in rows]
                rows = checked[0][None] if len(checked) == 1 else torch.stack(checked)
                away = None if perturbation is None else self.space.check(perturbation, "perturbation").detach()
                self._products.move_to(self.origin, away)
                if isinstance(self._products, StreamedProducts):
                    products, tried_here = self._products(rows, self._in_step), True
                else:
                    products, tried_here = (
                        self._of_whole(self._products, rows, keep=keep),
                        self.first_rank == self.ranks.rank,
                    )
                shared.vector = products if self.layout.is_whole else None  # shards are added up already
                shared.numbers = [self._products.spent if tried_here else 0.0]
            products = products if shared.vector is None else shared.vector
            self._products.spent = shared.numbers[0]
        except BaseException:
            self._products.release()
            raise
        self._counts["hvps"] += len(rows)
        self._count_probe()
        return products if vector.ndim == 2 else products[0]

    def _of_whole(self, products: HessianProducts, rows: Tensor, *, keep: bool) -> Tensor:
        """Of this rank's batches."""
        total: Tensor | None = None
        for batch in self._batches():
            for found in self._product_parts.each(
                batch, lambda part: products(rows, part, keep=keep), relief=products.relieve
            ):
                # a product is a new tensor, and to allocate and clear one more costs as much as to add to it
                total = found if total is None else total.add_(found)
        return torch.zeros_like(rows) if total is None else total  # a rank may have no batch

    def _in_step(self, work: Callable[[Part | None], Tensor], count: int, data: Data = Data.ALL) -> Tensor:
        """See ``streamed_products.Total``."""
        batches = self._batches() if data is Data.ALL else self._first_batches(few=data is Data.FEW)
        total = self.origin.new_zeros((count, len(self.origin)))
        for found in self._rounds.each(batches, self._product_parts, work, lend=lambda: work(None)):
            total += found
        return total

    @stoppable
    def sum_over_parts(self, work: Callable[[Evaluator, Part], Tensor], where: Sequence[Tensor] = ()) -> Tensor:
        """``work(evaluator, part)``, shape ``(dim,)`` each, summed over the parts of one pass; counts as one product.

        Second derivatives work inside of it: it is for products with matrices other than the Hessian.

        Args:
            where: at most two vectors that the work depends on, the same on every rank.
        """
        answer = torch.zeros_like(self.origin)
        self._require_whole("a product with a matrix other than the Hessian")
        with (
            self.session(),
            modes.second_derivatives(self.module),
            self.ranks.sharing("a product with a matrix", where) as shared,
        ):
            for batch in self._batches():
                for found in self._product_parts.each(batch, lambda part: work(self._evaluator, part)):
                    answer += found
            shared.vector = answer
        self._counts["hvps"] += 1
        return shared.vector

    @stoppable
    def over_parts(self, size: int, work: Callable[[Evaluator, Part], None]) -> None:
        """``work(evaluator, part)`` for parts of at most ``size`` samples, in one pass; counts as one gradient.

        Attention runs on the MATH backend, which alone can be vectorized over samples. On several ranks each does its own
        parts, and what the work adds up is that of this rank: see ``ranks``.

        Raises:
            ValueError: the loss of a batch is not made of the losses of its parts; the message says why.
        """
        self._require_whole("work on samples one by one")
        if cause := self._whole_batches_only():
            raise ValueError(f"{cause}, so a batch is not the sum of its parts")
        self._sweep_parts.size = size if self._most_in_sweep is None else min(size, self._most_in_sweep)
        with self.session(), modes.second_derivatives(self.module), self.ranks.sharing("parts of the data"):
            for batch in self._batches():
                for _ in self._sweep_parts.each(batch, lambda part: work(self._evaluator, part)):
                    pass
        if self._sweep_parts.size < size:  # memory ran out, now or before
            self._most_in_sweep = self._sweep_parts.size
        self._counts["gradients"] += 1

    def sketch(self, max_samples: int) -> Sketch:
        """The model on about ``max_samples`` of the samples, the same for any order and batching; one pass if not cached.

        Raises:
            ValueError: ``max_samples`` is not positive.
        """
        if max_samples < 1:
            raise ValueError(f"max_samples must be at least 1, got {max_samples}")
        with self.session(), self.ranks.sharing("a sketch") as shared:
            batches = self._source.some(max_samples, least=2 if self._batch_norm == "batch" else 1)
            shared.numbers = [sum(batch.num_samples or 0 for batch in batches), len(batches)]
        taken, count = shared.numbers
        share = min(taken / self.num_samples if self.num_samples else count / self.num_batches, 1.0)
        return Sketch(
            self._evaluator,
            batches,
            share,
            self.ranks,
            rounds=self._rounds,
            parts=self._gradient_parts,
            lend=self._lend,
            session=self.session,
            spend=self._spend,
        )

    @property
    def has_classes(self) -> bool:
        """Whether the loss is a cross-entropy over the model's outputs."""
        return self._rule.class_axis is not None

    # ------------------------------------------------------------------ the parts

    def _evaluates(self) -> tuple[Evaluator, Rounds]:
        """How the model is evaluated: by each rank for itself, or by all in step, who gather its weights as they go."""
        if not isinstance(self.space, ShardedSpace):
            return Evaluator(self.module, self.space, self._seed), Rounds()
        stream = Stream(self.space, self.ranks)
        return StreamedEvaluator(self.module, self.space, self._seed, stream), InStep(self.ranks)

    def _hold_gathered_weights(self) -> None:
        """A quarter of what is left may go to gathered weights that wait for the backward pass."""
        if isinstance(self._evaluator, StreamedEvaluator):
            weights = self.space.num_parameters * self.origin.element_size()
            share = int(min(*self.ranks.gather(self.memory.left / 4), weights))
            self.memory.hold("gathered weights", share)
            self._evaluator.stream.hold_bytes = share

    def _same(self, where: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Of the vectors that an evaluation depends on, those that ought to be the same on every rank."""
        return where if self.layout.is_whole else ()

    def _lend(self, flat: Tensor) -> Tensor:
        """Take part in a round in which only others have data; what that adds to the gradient."""
        assert isinstance(self._evaluator, StreamedEvaluator)
        return self._evaluator.stream.lend(flat).gradient

    def _require_whole(self, what: str) -> None:
        if not self.layout.is_whole:
            raise TypeError(
                f"{what} needs whole weights on every rank, and these lie in shards, since they do not fit in memory when "
                "they are gathered. Measure fewer parameters (select=...), or on larger devices."
            )

    def _first_batches(self, *, few: bool) -> Iterator[Batch]:
        """The first batch of this rank that has weight, or a few samples of it."""
        for batch in itertools.islice(self._batches(counted=False), 1):
            yield next(heads(batch)) if few else batch

    def _look_elsewhere(self) -> None:
        def work(part: Part) -> None:
            self._evaluator.look_elsewhere(part.batch, self._seed)

        if self._rule.fallback is not None:
            first = itertools.islice(self._source, 1)
            for _ in self._rounds.each(first, self._gradient_parts, work, lend=self._lend_elsewhere):
                pass

    def _lend_at_origin(self) -> None:
        self._lend(self.origin)

    def _lend_elsewhere(self) -> None:
        self._lend(self._evaluator.elsewhere(self._seed))

    def _point(self, perturbation: Tensor | None) -> Tensor:
        if perturbation is None:
            return self.origin.clone()
        return self.origin + self.space.check(perturbation, "perturbation").detach()

    def _batches(self, *, counted: bool = True) -> Iterator[Batch]:
        """One pass over the batches that have weight; those of which every target is ignored have no loss either."""
        for batch in self._source:
            self._evaluator.sizes[batch.position] = batch.num_samples
            if batch.position not in self._weightless:
                self._evaluator.seed(batch.position)
                yield batch
            if counted:
                self._tick()
        if counted and not self._source.own_batches:
            self._partial_passes += 1
            self._counts["passes"] += 1

    def _first_value(self) -> float:
        try:
            return self.value()
        except RuntimeError as error:
            if "require grad" not in str(error):
                raise
        self._value_needs_grad = True  # the loss itself takes derivatives, with respect to its inputs, say
        return self.value()

    def _count_probe(self) -> None:
        """What the products were tried on counts as gradients."""
        if self._products.spent and self.num_samples:
            self._spend("gradients", self._products.spent / self.num_samples)
            self._products.spent = 0.0

    def _whole_batches_only(self) -> str | None:
        """Why parts of a batch would not have the loss of the batch."""
        if self._evaluator.draws:
            return "the model draws random numbers, others in parts of a batch"
        if modes.has_batch_norm(self.module, without_running_statistics=self._batch_norm != "batch"):
            return "BatchNorm uses the statistics of the batch"
        return None

    def _resolve_loss(
        self, loss_fn: LossFn | None, criterion: Callable[..., Any] | None, plugin_rule: PluginRule | None
    ) -> LossRule | None:
        """By this rank's first batch; None where it has none."""

        def resolve(model: nn.Module, batch: Any) -> LossRule:
            return resolve_loss(model, batch, loss_fn=loss_fn, criterion=criterion, plugin_rule=plugin_rule)

        first = next(iter(self._source), self._source.uncut)  # of which this rank's piece may be empty
        found: list[LossRule | None] = list(
            self._rounds.each(
                [] if first is None else [first],
                self._gradient_parts,
                lambda part: self._evaluator.call(resolve, self.origin, part.batch),
                lend=self._lend_at_origin,
            )
        )
        return found[0] if found else None

    def _keep_whole_where_pieces_differ(self) -> None:
        """Of a batch that was cut for the ranks, the pieces must have the loss of the whole."""
        whole, self._source.uncut = self._source.uncut, None
        if not self.layout.is_whole and not all(self.ranks.gather(whole is not None)):
            whole = None  # nothing that all ranks could evaluate
        together = Ranks() if self.layout.is_whole else self.ranks
        may = whole is None or (
            self._whole_batches_only() is None
            and agreement.is_sum_of_pieces(self._evaluator, whole, self.ranks.size, self._seed, together)
        )
        if not all(self.ranks.gather(may and not self._whole_batches_only())):
            self._source.keep_whole()
            self._source.load()

    # ------------------------------------------------------------------ around evaluations

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Everything that must hold while the model is evaluated, and be put back afterwards. Reentrant.

        Enter it once around many evaluations to save the set-up (about a millisecond for a thousand modules).
        """
        outside = self._depth

        def end() -> None:
            self._depth = outside
            if not outside:
                self._products.release()

        try:
            self._depth = outside + 1  # inside: Ctrl-C before it leaves nothing to end
            if outside:
                yield
                return
            with (
                modes.evaluation(
                    self._modules,
                    self.device,
                    batch_statistics=self._batch_norm == "batch",
                    holders=self._source.holders,
                ),
                self.ranks.measuring(),
            ):
                yield
        finally:
            surely(end)

    @contextlib.contextmanager
    def hvp_by(self, mode: str | None) -> Iterator[None]:
        """A session in which Hessian-vector products are made by one of ``hvp.HVP_MODES``; None changes nothing."""
        before = self._products
        with self.session():
            try:
                if mode is not None:
                    self._products = self._all_products.setdefault(mode, self._products_by(mode))
                yield
            finally:
                if self._products is not before:
                    self._products.release()
                self._products = before

    def _products_by(self, mode: str) -> HessianProducts | StreamedProducts:
        if isinstance(self._evaluator, StreamedEvaluator):
            return StreamedProducts(self._evaluator, self.layout, mode=mode, seed=self._seed)
        return HessianProducts(
            self._evaluator, mode=mode, graph_bytes=self._graph_bytes, memory=self.memory, seed=self._seed
        )

    def announce(self, metric: str, expected_passes: float | None) -> None:
        """From here on, progress events are about ``metric``; what was kept for the last one is freed."""
        self._products.release()
        self._metric, self._expected_passes = metric, expected_passes
        self._metric_began, self._metric_passes = time.perf_counter(), self._counts["passes"]

    def _spend(self, kind: str, share: float) -> None:
        """Count a ``share`` of one evaluation."""
        self._counts[kind] += share
        self._partial_passes += share
        self._counts["passes"] += share

    def work(self) -> dict[str, Any]:
        """What was done so far and how, as JSON, for ``set_work``."""
        return {
            "counts": dict(self._counts),
            "sweeps": self._sweeps,
            "partial_passes": self._partial_passes,
            "seconds": time.perf_counter() - self._began,
            "parts": [self._gradient_parts.size, self._product_parts.size],
            "products": {mode: products.state() for mode, products in self._all_products.items()},
        }

    def set_work(self, state: Mapping[str, Any]) -> None:
        """Go on as an objective of the same model and data that had come so far; its work counts as this one's."""
        self._counts = dict(state["counts"])
        self._sweeps, self._partial_passes = state["sweeps"], state["partial_passes"]
        self._began = min(self._began, time.perf_counter() - state["seconds"])
        self._gradient_parts.size, self._product_parts.size = state["parts"]
        for mode, told in state["products"].items():
            self._all_products.setdefault(mode, self._products_by(mode)).set_state(told)

    def _tick(self) -> None:
        self._sweeps += 1
        self._counts["passes"] = self._sweeps / self._source.own_batches + self._partial_passes
        if self._listener is not None and self._metric:
            passes, seconds = self._counts["passes"] - self._metric_passes, time.perf_counter() - self._metric_began
            self._listener(ProgressEvent(self._metric, passes, self._expected_passes, seconds))
        if self.ranks.is_alone:  # several ranks end an evaluation together
            stopping.check()
