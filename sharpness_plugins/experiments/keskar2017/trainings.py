"""A training that a kill does not undo: kept after every epoch, and gone on from bit for bit."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..training import Run, evaluate, seeded
from .endings import Ending
from .grounds import Ground
from .plan import TrainingPlan
from .store import Store, key_of

__all__ = ["file_of", "train", "training_config"]

KIND = "trainings"
CHECKPOINT = "checkpoint.pt"
Tell = Callable[[str], None]


def training_config(ground: Ground, plan: TrainingPlan, start: tuple[str, str] | None) -> dict[str, Any]:
    """All that a training depends on.

    Args:
        start: key and ending of the training that a warm start begins from.
    """
    settings = ground.settings
    return {
        **ground.config(),
        "recipe": dataclasses.asdict(plan.recipe),
        "learning_rate": plan.learning_rate,
        "step": repr(ground.step(plan.remedy)) if plan.remedy else "plain",
        "endings": list(plan.endings),
        "max_epochs": _max_epochs(ground, plan),
        "check_every": settings.check_every,
        "evaluation_batch": settings.evaluation_batch,
        "start": start,
    }


def _max_epochs(ground: Ground, plan: TrainingPlan) -> int:
    settings = ground.settings
    return settings.warm_start.max_epochs if plan.problem == "warm_start" else settings.max_epochs


def file_of(ending: str) -> str:
    return f"{ending.replace(':', '=')}.pt"


def train(
    store: Store, ground: Ground, plan: TrainingPlan, *, start: tuple[str, str] | None, tell: Tell
) -> tuple[str, dict[str, Any]]:
    """Train as planned, or read what was trained before; returns the key in the store and what it holds.

    The weights of each ending are in ``file_of(ending)``, what was done up to there under ``stops``. A loss or plateau
    that does not come in the epochs allowed is given up there, and so is a training that diverged, at its last epoch with
    a finite loss. After a kill the next call goes on from the last whole epoch.
    """
    config = training_config(ground, plan, start)
    key = key_of(config)
    done = store.done(KIND, key)
    if done is None:
        with seeded(ground.seed):  # for dropout and augmentation
            done = _Trained(store, key, ground, plan, start, tell).run()
        store.finish(KIND, key, config, done)
        store.remove(KIND, key, CHECKPOINT)
    return key, done


class _Trained:
    def __init__(
        self, store: Store, key: str, ground: Ground, plan: TrainingPlan, start: tuple[str, str] | None, tell: Tell
    ) -> None:
        self.store, self.key, self.ground, self.plan, self.start, self.tell = store, key, ground, plan, start, tell
        self.device = ground.split.train.inputs.device
        self.max_epochs = _max_epochs(ground, plan)
        self.history: list[float] = []
        self.stops: dict[str, dict[str, Any]] = {}

    def run(self) -> dict[str, Any]:
        training = self._begun()
        pending = [ending for ending in map(Ending.parse, self.plan.endings) if str(ending) not in self.stops]
        check_epochs = math.ceil(self.ground.settings.check_every / training.steps_per_epoch)
        while True:
            for ending in self._reached(training, pending, check_epochs):
                self._stop(training, ending, ended=True)
                pending.remove(ending)
            if training.epochs >= self.max_epochs:
                for ending in [ending for ending in pending if not ending.always_comes]:
                    self._stop(training, ending, ended=False)
                    pending.remove(ending)
            if not pending:
                return {"stops": self.stops, "seconds": training.seconds}
            try:
                training.advance(training.steps_per_epoch)
            except ArithmeticError:
                stops = self.stops
                training = self._begun()  # the last epoch that was kept, or the beginning
                self.stops = stops
                for ending in pending:
                    self._stop(training, ending, ended=False)
                return {"stops": self.stops, "seconds": training.seconds}
            self.history.append(training.epoch_loss)
            self._keep(training)
            self.tell(f"epoch {training.epochs}, training loss {training.epoch_loss:.3g}")

    def _reached(self, run: Run, pending: list[Ending], check_epochs: int) -> list[Ending]:
        @functools.cache
        def loss() -> float:
            return evaluate(run.model, self.ground.split.train, batch_size=self.ground.settings.evaluation_batch).loss

        return [ending for ending in pending if ending.reached(run, self.history, loss, check_epochs=check_epochs)]

    def _begun(self) -> Run:
        """Where the last process was killed, or from the start."""
        samples, batch_size = self.ground.split.train, self.plan.recipe.batch_size
        model = self.ground.model()
        if self.start is not None:
            weights = self.store.load(KIND, self.start[0], file_of(self.start[1]))
            if weights is None:
                raise FileNotFoundError(f"the warm start's weights {file_of(self.start[1])} are gone from the store")
            model.load_state_dict(weights)
        run = Run(
            model,
            samples,
            batch_size=batch_size,
            optimizer=functools.partial(torch.optim.Adam, lr=self.plan.learning_rate, fused=True),
            seed=self.ground.seed,
            drop_last=self.ground.has_batch_norm and len(samples) % batch_size == 1,  # one sample has no variance
            step=self.ground.step(self.plan.remedy),
        )
        kept = self.store.load(KIND, self.key, CHECKPOINT)
        if kept is not None:
            run.load_state_dict(kept["run"])
            self.history, self.stops = list(kept["history"]), dict(kept["stops"])
            torch.set_rng_state(kept["generator"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(kept["cuda_generator"], self.device)
            self.tell(f"goes on from epoch {run.epochs}")
        return run

    def _keep(self, run: Run) -> None:
        states: dict[str, Tensor] = {"generator": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda_generator"] = torch.cuda.get_rng_state(self.device)
        kept = {"run": run.state_dict(), "history": self.history, "stops": self.stops, **states}
        self.store.save(KIND, self.key, CHECKPOINT, kept, durable=False)  # one an epoch, be it of 10 ms

    def _stop(self, run: Run, ending: Ending, *, ended: bool) -> None:
        self.store.save(KIND, self.key, file_of(str(ending)), run.model.state_dict())
        self.stops[str(ending)] = {
            "epochs": run.epochs,
            "steps": run.steps,
            "samples": run.samples_seen,
            "epoch_loss": run.epoch_loss if math.isfinite(run.epoch_loss) else None,
            "ended": ended,
        }
