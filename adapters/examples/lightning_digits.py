"""Lightning's Trainer on scikit-learn's digits: a warm start, sharpness along the way, and a plot.

python lightning_digits.py [FOLDER]     a few seconds on a CPU; needs: pip install "sharpness-plugins[demo,lightning]"
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from sharpness_adapters.lightning import BatchSizeCallback, SharpnessCallback

EPOCHS, SMALL, LARGE, SWITCH = 10, 16, 256, 3


class Digits(LightningDataModule):
    def __init__(self, batch_size: int = SMALL) -> None:
        super().__init__()
        self.batch_size = batch_size  # BatchSizeCallback sets it
        pixels, digits = load_digits(return_X_y=True)
        inputs, labels = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        self.parts = [TensorDataset(inputs[part], labels[part]) for part in (order[:1000], order[1000:])]

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.parts[0], batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.parts[1], batch_size=500)


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def train(folder: Path) -> tuple[SharpnessCallback, BatchSizeCallback, float]:
    """What was measured, the changes of the batch size, and the accuracy on the test samples."""
    torch.manual_seed(0)
    sharpness = SharpnessCallback(
        ["epsilon_box"],
        every="1ep",
        budget=None,  # the data are few, so measuring takes longer than training; .02 would keep it to 2 %
        csv=str(folder / "lightning_digits.csv"),
    )
    sizes = BatchSizeCallback(f"0:{SMALL} {SWITCH}ep:{LARGE}")
    flattest = ModelCheckpoint(folder, monitor="sharpness/epsilon_box", filename="flattest")
    trainer = Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        callbacks=[sharpness, sizes, flattest],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), datamodule=Digits())
    return sharpness, sizes, trainer.callback_metrics["accuracy"].item()


def plot(sharpness: SharpnessCallback, sizes: BatchSizeCallback) -> Figure:
    """Loss and sharpness over the epochs, with the changes of the batch size."""
    assert sharpness.monitor is not None
    history = sharpness.monitor.history
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    epochs = [made.epoch or 0.0 for made in history]
    above.plot(epochs, [made.loss for made in history], marker="o", markersize=4, color="#0072B2")
    below.plot(epochs, [made.values["epsilon_box"] for made in history], marker="o", markersize=4, color="#D55E00")
    above.set_ylabel("loss on the probe [nats]")
    below.set_ylabel("ε-box sharpness [%]")
    below.set_xlabel("epochs")
    for axes in (above, below):
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        for change in sizes.history:
            axes.axvline(change.epoch or 0.0, color="#666666", linestyle=":")
    for change in sizes.history:
        above.annotate(
            f"batch {change.old.batch_size} → {change.new.batch_size}",
            (change.epoch or 0.0, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -12),
            textcoords="offset points",
            color="#666666",
        )
    figure.suptitle("Digits with Lightning: a small-batch warm start", fontsize="medium")
    return figure


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "lightning-digits")
    folder.mkdir(parents=True, exist_ok=True)
    sharpness, sizes, accuracy = train(folder)
    for change in sizes.history:
        print(change)
    print(f"Test accuracy {100 * accuracy:.1f} %. Table, plot and the flattest checkpoint are in {folder}.")
    plot(sharpness, sizes).savefig(folder / "lightning_digits.png", dpi=120)
