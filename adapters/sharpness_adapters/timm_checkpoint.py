"""Checkpoints of timm's train.py describe themselves: the model, and how its images are read, come from the file alone."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, Subset

from sharpness_plugins import sampling
from sharpness_plugins.errors import LoaderError, missing_dependency

__all__ = ["TimmCheckpoint", "read_timm_checkpoint"]


@dataclass(frozen=True)
class TimmCheckpoint:
    """What train.py saved.

    Attributes:
        arguments: of train.py, by name.
        state_dict: of the model; of the averaged one (EMA) there is another, which is not measured.
    """

    arguments: Mapping[str, Any]
    state_dict: Mapping[str, Any]

    def open(self, data: str) -> Mapping[str, Any]:
        """The trained model, and the images of a folder as they are evaluated, in a fixed random order.

        Args:
            data: as ``--data-dir``: the training split is taken where the folder has one; else the images in it.
        Returns:
            ``model`` and ``loader``.
        Raises:
            ImportError: timm is not installed. LoaderError: there are no images. ValueError: the weights do not fit.
        """
        missing_dependency("timm", extra="timm", purpose="a checkpoint of timm's train.py")
        model = self._model()
        return {"model": model, "loader": self._loader(model, data)}

    def _model(self) -> Any:
        from timm.models import clean_state_dict, create_model

        told = self.arguments
        channels = told.get("in_chans") or (told.get("input_size") or (3,))[0]
        model = create_model(
            told["model"],
            num_classes=told["num_classes"],
            in_chans=channels,
            global_pool=told.get("gp"),
            bn_eps=told.get("bn_eps"),
            **(told.get("model_kwargs") or {}),
        )
        try:
            model.load_state_dict(clean_state_dict(dict(self.state_dict)))
        except RuntimeError as error:
            raise ValueError(f"the weights do not fit {told['model']} as this timm builds it: {error}") from error
        return model.eval()

    def _loader(self, model: Any, data: str) -> DataLoader[Any]:
        from timm.data import create_dataset, create_loader, resolve_data_config

        told = self.arguments
        config: dict[str, Any] = resolve_data_config(dict(told), model=model)  # type: ignore[no-untyped-call]
        split = told.get("train_split") or "train"
        if not os.path.isdir(data):
            raise LoaderError(f"there is no folder {data}")
        try:
            dataset = create_dataset(
                told.get("dataset") or "",
                root=data,
                split=split,
                class_map=told.get("class_map") or "",  # type: ignore[arg-type]  # a file's name is meant, too
                input_img_mode="RGB" if config["input_size"][0] == 3 else "L",
            )
        except (RuntimeError, AssertionError, OSError) as error:
            raise LoaderError(f"{data} holds no images as train.py reads them: {error}") from error
        batch_size = told.get("validation_batch_size") or told["batch_size"]
        keep = ("input_size", "interpolation", "mean", "std", "crop_pct")
        loader: DataLoader[Any] = create_loader(
            dataset,
            batch_size=batch_size,
            is_training=False,
            use_prefetcher=False,
            num_workers=told.get("workers", 0),
            persistent_workers=False,
            **{name: config[name] for name in keep},
        )
        if isinstance(dataset, IterableDataset):
            return loader
        # in a folder's own order the first samples are all of one class
        order = sampling.permutation(len(dataset), sampling.generator_for(0, "checkpoint"))
        workers = min(int(told.get("workers", 0)), (os.cpu_count() or 1) - 1)
        return DataLoader(
            Subset(dataset, order.tolist()),
            batch_size=batch_size,
            num_workers=workers,
            persistent_workers=workers > 0,
        )


def read_timm_checkpoint(path: str) -> TimmCheckpoint | None:
    """What the file holds; None where train.py did not write it. Runs no code from it."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # the unpickler stumbles over foreign bytes in many ways
        return None
    if not isinstance(loaded, Mapping) or not isinstance(loaded.get("state_dict"), Mapping):
        return None
    arguments = loaded.get("args")
    if not isinstance(arguments, argparse.Namespace) or not {"model", "num_classes", "batch_size"} <= set(vars(arguments)):
        return None
    return TimmCheckpoint(vars(arguments), loaded["state_dict"])
