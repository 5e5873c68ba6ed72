"""What the reproduction is asked for: one frozen object, with presets by data set."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import did_you_mean
from .endings import Ending
from .networks import BATCH_NORMS, kind_of
from .record import STUDIES
from .remedies import REMEDIES
from .sources import source_of

__all__ = ["Settings", "WarmStart", "preset"]


@dataclass(frozen=True)
class WarmStart:
    """Figure 5: so many epochs of small batches, then large ones to ``ending``.

    Attributes:
        network, data: its own, or None for those of the rest.
        epochs: of small batches, each positive; the cold start is always there.
        max_epochs: where a loss that is not reached is given up.
    """

    network: str | None = None
    data: str | None = None
    small_batch: int | None = None
    large_batch: int | None = None
    epochs: tuple[int, ...] = (1, 5, 10, 25, 50, 100)
    ending: str = "epochs:100"
    max_epochs: int = 300

    def __post_init__(self) -> None:
        if (self.network is None) != (self.data is None):
            raise ValueError(f"a warm start has a network and data of its own or neither, got {self.network}, {self.data}")
        if not self.epochs or min(self.epochs) < 1 or self.max_epochs < 1:
            raise ValueError(f"warm epochs must be at least one number, each positive, got {self.epochs}")
        Ending.parse(self.ending)
        object.__setattr__(self, "epochs", tuple(sorted(set(self.epochs))))


@dataclass(frozen=True)
class Settings:
    """All that the numbers depend on, apart from versions, device and the files of the data.

    Attributes:
        seeds: of the split (where there is one by seed), the initial weights, the order of the samples, the measurements.
        studies: names of ``record.STUDIES`` to run.
        batch_norm: "batch" or "running"; see ``networks.build``.
        width: factor on the networks' channels.
        small_batch, large_batch: None for the paper's 256, or a sixteenth of the large one where that is no more than 256,
            and for its tenth of the training samples.
        protocol: ending of the paper's protocol; ``matched`` and ``matched_clean``: of matched loss, over an epoch while
            the weights move, and of the training set, which augmentation and the like leave comparable.
        epochs: of Figure 4, and of what Figure 6 watches, at ``watched``.
        equal_steps: of the study of equal updates.
        batch_sizes: of Figure 4; the small and the large one are always among them.
        max_epochs: where a loss that is not reached is given up; ``check_every``: steps between two looks at it.
        draws, dim: of the random subspaces.
        eigenvalues, density_nodes: of the Hessian: how many, and products for the density.
        directions, steep: of the test of the cone: random directions, and from how many percent on a rise is steep.
        measure_samples, max_train, max_test: use the first so many; None for all.
        evaluation_batch: samples at once in evaluations and measurements. Batch statistics are taken over it.
    """

    network: str = "R"
    data: str = "digits"
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    studies: tuple[str, ...] = tuple(STUDIES)
    batch_norm: str = "batch"
    width: float = 1.0
    small_batch: int | None = None
    large_batch: int | None = None
    learning_rate: float = 1e-3
    protocol: str = "plateau:10"
    matched: str = "loss:0.01"
    matched_clean: str = "loss:0.01"
    epochs: int = 100
    watched: tuple[int, ...] = (0, 1, 2, 5, 10, 20, 35, 60, 100)
    equal_steps: int = 20_000
    batch_sizes: tuple[int, ...] = ()
    remedies: tuple[str, ...] = tuple(REMEDIES)
    max_epochs: int = 300
    check_every: int = 10
    draws: int = 5
    dim: int = 100
    eigenvalues: int = 20
    density_nodes: int = 80
    directions: int = 100
    steep: float = 1.0
    measure_samples: int | None = None
    max_train: int | None = None
    max_test: int | None = None
    evaluation_batch: int = 5000
    warm_start: WarmStart = field(default_factory=WarmStart)

    def __post_init__(self) -> None:
        kind_of(self.network)
        source_of(self.data)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds must be at least one number, each different and from 0 on, got {self.seeds}")
        for name, given, known in (("study", self.studies, STUDIES), ("remedy", self.remedies, REMEDIES)):
            for one in given:
                if one not in known:
                    raise ValueError(f"there is no {name} {one!r}.{did_you_mean(one, known)} There are: {', '.join(known)}")
        if not self.studies:
            raise ValueError(f"studies is empty, so there is nothing to do. There are: {', '.join(STUDIES)}")
        if self.batch_norm not in BATCH_NORMS:
            raise ValueError(f"batch_norm must be one of {', '.join(BATCH_NORMS)}, got {self.batch_norm!r}")
        for name in ("protocol", "matched", "matched_clean"):
            Ending.parse(getattr(self, name))
        for name in ("epochs", "equal_steps", "max_epochs", "check_every", "draws", "dim", "eigenvalues", "directions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        pair = [size for size in (self.small_batch, self.large_batch) if size is not None]
        sizes = (*pair, *self.batch_sizes)
        if min(sizes, default=1) < 1 or (len(pair) == 2 and pair[0] >= pair[1]):
            raise ValueError(f"batch sizes must be at least 1, the large one above the small one, got {sizes}")
        if not self.learning_rate > 0 or not self.width > 0 or not self.steep > 0:
            raise ValueError(
                f"learning_rate, width and steep must be positive, got {self.learning_rate}, {self.width}, {self.steep}"
            )
        watched = sorted({0, *(epochs for epochs in self.watched if 0 <= epochs <= self.epochs), self.epochs})
        object.__setattr__(self, "watched", tuple(watched))
        object.__setattr__(self, "studies", tuple(study for study in STUDIES if study in self.studies))

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        told: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return told

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, quick: bool = False) -> Settings:
        """The inverse of ``to_dict``; what is left out is that of the preset for ``data`` and ``network``.

        Raises:
            ValueError: a name that is no setting, or a value that makes no sense.
        """
        given = dict(data)
        warm = given.pop("warm_start", {})
        if not isinstance(warm, Mapping):
            raise ValueError(f"warm_start must be a mapping of its settings, got {type(warm).__name__}")
        base = preset(given.get("data"), given.get("network"), quick=quick)
        for name, known in (
            ("setting", dataclasses.fields(cls)),
            ("setting of the warm start", dataclasses.fields(WarmStart)),
        ):
            names = [f.name for f in known]
            for key in given if name == "setting" else warm:
                if key not in names:
                    raise ValueError(
                        f"there is no {name} {key!r}.{did_you_mean(str(key), names)} There are: {', '.join(names)}"
                    )
        return dataclasses.replace(
            base, **_tuples(given), warm_start=dataclasses.replace(base.warm_start, **_tuples(dict(warm)))
        )


def _tuples(given: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}


_NETWORK_FOR = {"digits": "R", "digits-noisy": "A", "mnist": "F1", "timit": "F2", "cifar10": "C1", "cifar100": "C3"}
_BATCH_SIZES = {
    "digits": (16, 50, 100, 250, 500),
    "digits-noisy": (8, 80, 400),
    "mnist": (256, 1000, 2500, 6000),
    "timit": (256, 5000, 15_000, 72_000),
    "cifar10": (256, 500, 1000, 5000),
    "cifar100": (256, 500, 1000, 5000),
}
_RECIPE_A = WarmStart("A", "digits-noisy", 8, 400, (5, 12, 25, 50), "loss:0.005", 2000)


def preset(data: str | None = None, network: str | None = None, *, quick: bool = False) -> Settings:
    """The settings for a data set (digits) and a network (the paper's for it; recipe R on digits).

    On digits they are those that show the paper's effects in minutes: batches of 16 and 500 of 500 samples, matched at an
    epoch's loss of 0.002; Figure 5 on 800 samples with wrong labels (recipe A), batches of 8 and 400.

    Args:
        quick: two seeds, a narrow network, few epochs, a few directions: a look at every part in seconds, not at numbers.
    """
    data = data or ("digits" if network is None else _data_for(network))
    source_of(data)
    network = network or _NETWORK_FOR[data]
    settings = Settings(network, data, batch_sizes=_BATCH_SIZES[data])
    if data.startswith("digits"):
        noisy = data == "digits-noisy"
        settings = dataclasses.replace(
            settings,
            small_batch=8 if noisy else 16,
            large_batch=400 if noisy else 500,
            matched="epoch_loss:0.005" if noisy else "epoch_loss:0.002",
            matched_clean="loss:0.005" if noisy else "loss:0.002",
            equal_steps=1000,
            max_epochs=1000,
            watched=(0, 1, 2, 3, 5, 8, 12, 20, 35, 60, 100),
            warm_start=_RECIPE_A,
        )
    if quick:
        settings = dataclasses.replace(
            settings,
            seeds=(0, 1),
            width=settings.width / 8,
            epochs=3,
            watched=(0, 1, 3),
            equal_steps=12,
            batch_sizes=settings.batch_sizes[::2],
            protocol="epochs:4",
            matched="epoch_loss:1.5",
            matched_clean="loss:1.5",
            max_epochs=8,
            draws=2,
            dim=10,
            eigenvalues=3,
            density_nodes=10,
            directions=10,
            warm_start=dataclasses.replace(settings.warm_start, epochs=(1,), ending="epochs:2", max_epochs=4),
        )
    return settings


def _data_for(network: str) -> str:
    return kind_of(network).data[0]
