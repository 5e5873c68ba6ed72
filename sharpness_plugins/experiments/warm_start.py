"""The warm-start experiment: a few epochs of small batches, then large ones, as in Figure 5 of Keskar et al. (2017)."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import MeasurementWarning
from ..metrics import EpsilonBox, HessianTopK
from .curve import Iterate, SeedRuns, WarmStartCurve, WarmStartSettings
from .data import Pairs, Split, as_split
from .files import versions
from .match import Match, Stop, train_to_match
from .recipes import ExperimentEvent, ExperimentListener, Network, Recipe, measured
from .training import ADAM, OptimizerFactory, Run, Training, evaluate, one_thread, seeded

__all__ = ["WarmStartInterrupted", "run_warm_start", "warm_start_curve"]

Data = Split | Pairs
DEFAULT_METRICS = (EpsilonBox(), HessianTopK(k=1))


class WarmStartInterrupted(KeyboardInterrupt):
    """Ctrl-C after at least one seed was complete: ``curve`` holds those that are."""

    def __init__(self, curve: WarmStartCurve) -> None:
        super().__init__()
        self.curve = curve


def warm_start_curve(
    model_fn: Callable[[int], nn.Module],
    data: Data | Callable[[int], Data],
    small_batch: int,
    large_batch: int,
    epochs: Sequence[int],
    seeds: int | Sequence[int],
    match: str | Match = "loss:0.005",
    *,
    optimizer: OptimizerFactory = ADAM,
    metrics: Any = None,
    check_every: int = 10,
    max_steps: int = 20_000,
    title: str = "",
    listener: ExperimentListener | None = None,
) -> WarmStartCurve:
    """What does large-batch training gain from so many epochs of small batches before it?

    As in the paper: one small-batch run per seed, its weights kept after each of ``epochs``; from each of them a new
    training with the large batch and a fresh optimizer. Here every network is trained to the same ``match``, by default
    the training loss, because sharpness depends on it; the small-batch run goes there too. Each is measured, and
    compared seed by seed with the cold start: epoch 0, always part of the curve. The large-batch run from a cold start
    is also measured after as many epochs as the small batch took; where that turns an order round, a
    ``MeasurementWarning`` and the printed curve say so.

    Runs on the data's device, on one CPU thread; the caller's random generators are left as they were. Ctrl-C raises
    ``WarmStartInterrupted`` with what is complete.

    Args:
        model_fn: ``seed ->`` a network that gives logits; called once per seed with torch's generators seeded. The
            network is copied, to the data's device, so it may be the same each time.
        data: a ``Split``, or ``((train_inputs, train_labels), (test_inputs, test_labels))``, or a function
            ``seed ->`` one of these. Labels are integers; the loss is the cross-entropy.
        epochs: of small batches, after which the large batch takes over.
        seeds: of the initial weights and of the order of the samples: how many from 0 on, or which.
        match: where every training ends: ``"loss:0.005"`` on all training samples in eval mode, ``"epochs:60"`` or
            ``"steps:1000"`` (of the last phase alone).
        optimizer: makes a new one from the parameters for every training, the same for both batch sizes.
        metrics: as for ``measure_sharpness``; None for ε-box sharpness and the largest eigenvalue of the Hessian.
        check_every: steps between two looks at the loss, rounded up to whole epochs.
        max_steps: of one training, where a loss that is not reached is given up; the curve marks it.
        title: what is trained on what, for table and figure.
        listener: hears of every epoch, measurement and finished network.
    Returns:
        the curve: ``print(curve)``, ``curve.paired(12, "test_accuracy")``, ``curve.figure()``, ``curve.to_json()``.
    Cost: the small-batch run, and a large-batch run and a measurement per epoch asked for. Keeps ``len(epochs) + 2``
        copies of the network.
    Raises:
        ValueError, TypeError: settings or data that make no sense; said before anything is trained where possible.
        ArithmeticError: a training diverged.
    """
    chosen = tuple(range(seeds) if isinstance(seeds, int) else seeds)
    settings = WarmStartSettings(
        small_batch, large_batch, tuple(epochs), chosen, Match.parse(match), check_every, max_steps, title
    )
    curve = run_warm_start(settings, model_fn, data, optimizer=optimizer, metrics=metrics, listener=listener)
    for sentence in curve.disagreement():
        warnings.warn(sentence, MeasurementWarning, stacklevel=2)
    return curve


def run_warm_start(
    settings: WarmStartSettings,
    model_fn: Callable[[int], nn.Module],
    data: Data | Callable[[int], Data],
    *,
    optimizer: OptimizerFactory = ADAM,
    metrics: Any = None,
    listener: ExperimentListener | None = None,
) -> WarmStartCurve:
    """``warm_start_curve`` with its settings in one object, and warnings in the printed curve alone."""
    began = time.monotonic()
    chosen = DEFAULT_METRICS if metrics is None else list(metrics) if isinstance(metrics, Iterator) else metrics
    complete: list[SeedRuns] = []

    def curve() -> WarmStartCurve:
        return WarmStartCurve(settings, tuple(complete), versions(), time.monotonic() - began)

    try:
        with one_thread():
            for number, seed in enumerate(settings.seeds):
                split = as_split(data(seed) if callable(data) else data)
                settings.check(split)
                with seeded(seed):
                    model = model_fn(seed)
                if not isinstance(model, nn.Module):
                    raise TypeError(f"model_fn must return a torch.nn.Module, got {type(model).__name__}")
                watch = _Watch(listener, number * settings.networks_per_seed, settings, seed)
                complete.append(_Seed(settings, seed, split, optimizer, chosen, watch).runs(model))
    except KeyboardInterrupt:
        if complete:
            raise WarmStartInterrupted(curve()) from None
        raise
    return curve()


class _Watch:
    """Tells the listener which of all networks is being trained or measured."""

    def __init__(self, listener: ExperimentListener | None, before: int, settings: WarmStartSettings, seed: int) -> None:
        self._listener, self._network, self._seed = listener, before, seed
        self._num_networks = settings.networks_per_seed * len(settings.seeds)

    def next(self) -> None:
        self._network += 1

    def __call__(self, recipe: Recipe, text: str, *, finished: bool = False) -> None:
        if self._listener is not None and text:
            self._listener(ExperimentEvent(self._network, self._num_networks, self._seed, recipe, text, finished))


@dataclass(frozen=True)
class _Seed:
    """All trainings of one seed."""

    settings: WarmStartSettings
    seed: int
    split: Split
    optimizer: OptimizerFactory
    metrics: Any
    watch: _Watch

    def runs(self, model: nn.Module) -> SeedRuns:
        warm = self.settings.epochs[1:]
        recipe = Recipe(self.settings.small_batch)
        self.watch.next()
        end, iterates = self._train(model, recipe, epochs=warm)
        small = self._measured(end, recipe)
        cold, equal_epochs = self._cold(model, max(1, end.training.epochs))
        return SeedRuns(
            self.seed,
            points=(cold, *(self._warm(iterates[epochs], epochs) for epochs in warm)),
            small=small,
            equal_epochs=equal_epochs,
            iterates=tuple(
                Iterate(epochs, evaluate(stop.model, self.split.train), evaluate(stop.model, self.split.test))
                for epochs, stop in iterates.items()
            ),
        )

    def _cold(self, model: nn.Module, equal_epochs: int) -> tuple[Network, Network]:
        """At the match, and after so many epochs of the same run."""
        recipe = self.settings.recipe(0)
        self.watch.next()
        end, after = self._train(model, recipe, epochs=[equal_epochs])
        cold = self._measured(end, recipe)
        self.watch.next()
        return cold, self._measured(after[equal_epochs], recipe)

    def _warm(self, start: Stop, epochs: int) -> Network:
        recipe = self.settings.recipe(epochs)
        self.watch.next()
        end, _ = self._train(start.model, recipe)
        return self._measured(end, recipe, start.training)

    def _train(self, start: nn.Module, recipe: Recipe, *, epochs: Sequence[int] = ()) -> tuple[Stop, dict[int, Stop]]:
        run = Run(
            copy.deepcopy(start).to(self.split.train.inputs.device),
            self.split.train,
            batch_size=recipe.batch_size,
            optimizer=self.optimizer,
            seed=self.seed,
            drop_last=True,  # every step has exactly the batch size
        )
        with seeded(self.seed):  # for dropout
            return train_to_match(
                run,
                self.settings.match,
                epochs=epochs,
                check_every=self.settings.check_every,
                max_steps=self.settings.max_steps,
                on_epoch=lambda done, loss: self.watch(recipe, f"epoch {done}, training loss {loss:.3g}"),
            )

    def _measured(self, end: Stop, recipe: Recipe, *before: Training) -> Network:
        network = measured(
            end.model,
            self.split,
            seed=self.seed,
            recipe=recipe,
            phases=(*before, end.training),
            metrics=self.metrics,
            progress=lambda event: self.watch(recipe, str(event)),
        )
        self.watch(recipe, str(network), finished=True)
        return network
