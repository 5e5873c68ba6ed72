"""What trainings and measurements stand on: a network and the data of one seed, on a device, and what names them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import SharpnessError
from ..data import Samples, Split
from ..files import versions
from ..training import Step, one_thread
from .networks import build, kind_of
from .record import Problem
from .remedies import step_for
from .settings import Settings
from .sources import checksum, load, source_of

__all__ = ["Ground", "Grounds", "repeatable"]

STORE_VERSION = 1  # of what is computed: raise it where the same settings come to give other numbers


@dataclass(frozen=True)
class Ground:
    """A network and the data of one seed."""

    network: str
    data: str
    seed: int
    settings: Settings
    split: Split
    checksum: str

    def model(self) -> nn.Sequential:
        """With its initial weights, the same for every condition."""
        model = build(
            self.network,
            inputs=self.split.train.inputs.shape[1:],
            num_classes=source_of(self.data).num_classes,
            seed=self.seed,
            width=self.settings.width,
            batch_norm=self.settings.batch_norm,
        )
        return model.to(self.split.train.inputs.device)

    def step(self, remedy: str) -> Step:
        source = source_of(self.data)
        step = step_for(remedy, image=source.image, flips=source.flips)
        if step is None:
            raise ValueError(f"{self.data} cannot be augmented: its samples are no images")
        return step

    @property
    def has_batch_norm(self) -> bool:
        return kind_of(self.network).has_batch_norm

    def config(self) -> dict[str, Any]:
        """All that its numbers depend on, for keys."""
        return {
            "store_version": STORE_VERSION,
            "network": self.network,
            "width": self.settings.width,
            "batch_norm": self.settings.batch_norm if self.has_batch_norm else "none",
            "data": self.checksum,
            "seed": self.seed,
            "device": self.split.train.inputs.device.type,
            "torch": torch.__version__,
            "sharpness-plugins": versions().get("sharpness-plugins", "unknown"),
        }

    def problem(self) -> Problem:
        kind, source = kind_of(self.network), source_of(self.data)
        narrow = "" if self.settings.width == 1 else f", channels times {self.settings.width:g}"
        return Problem(
            network=self.network,
            description=kind.description + narrow,
            batch_norm=self.settings.batch_norm if kind.has_batch_norm else "none",
            dim=sum(weight.numel() for weight in self.model().parameters()),
            data=source.description,
            checksum=self.checksum,
            num_train=len(self.split.train),
            num_test=len(self.split.test),
            num_classes=source.num_classes,
        )


class Grounds:
    """Grounds by problem and seed; the last one of each data set stays in memory."""

    def __init__(self, settings: Settings, *, folder: Path | None, verify: bool, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self._folder, self._verify = folder, verify
        self._last: dict[tuple[str, str], tuple[int, Ground]] = {}

    def names(self, problem: str) -> tuple[str, str]:
        """Network and data of a problem of the plan."""
        warm = self.settings.warm_start
        if problem == "warm_start" and warm.network is not None and warm.data is not None:
            return warm.network, warm.data
        return self.settings.network, self.settings.data

    def at(self, problem: str, seed: int) -> Ground:
        network, data = self.names(problem)
        last = self._last.get((network, data))
        if last is not None and last[0] == seed:
            return last[1]
        split, sum_ = last[1].split if last else None, last[1].checksum if last else ""
        if split is None or source_of(data).by_seed:
            s = self.settings
            loaded = load(data, seed, folder=self._folder, verify=self._verify, max_train=s.max_train, max_test=s.max_test)
            sum_ = checksum(loaded)
            split = Split(*(_shaped(half, network, data).to(self.device) for half in (loaded.train, loaded.test)))
        ground = Ground(network, data, seed, self.settings, split, sum_)
        self._last[network, data] = seed, ground
        return ground

    @functools.cached_property
    def is_small(self) -> bool:
        """Whether one thread is as fast as several."""
        return all(self.names(problem)[1].startswith("digits") for problem in ("main", "warm_start"))


def _shaped(samples: Samples, network: str, data: str) -> Samples:
    """Flat samples for networks of linear layers alone, images for the others."""
    image = source_of(data).image
    if not kind_of(network).takes_images:
        return Samples(samples.inputs.flatten(1), samples.labels)
    if image is None:
        raise ValueError(f"network {network} takes images, and the samples of {data} are none. Choose another network")
    return Samples(samples.inputs.reshape(-1, *image), samples.labels)


@contextlib.contextmanager
def repeatable(device: torch.device, *, threads: int | None) -> Iterator[None]:
    """The same bits in every run on the same machine.

    Args:
        threads: 1 where more are no faster; None leaves their number.
    Raises:
        SharpnessError: the device cannot be used.
    """
    try:
        torch.zeros(1, device=device)
    except Exception as error:
        raise SharpnessError(f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from None
    cudnn: Mapping[str, bool] = {"deterministic": True, "benchmark": False}
    before = {name: getattr(torch.backends.cudnn, name) for name in cudnn}
    with contextlib.ExitStack() as stack:
        if threads == 1:
            stack.enter_context(one_thread())
        for name, value in cudnn.items():
            setattr(torch.backends.cudnn, name, value)
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(torch.backends.cudnn, name, value)
