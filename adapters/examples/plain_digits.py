"""A loop of one's own on scikit-learn's digits: a warm start, sharpness along the way, and a plot.

python plain_digits.py [FOLDER]     a few seconds on a CPU; needs: pip install "sharpness-plugins[demo]"
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from sharpness_adapters.plain import Run, attach
from sharpness_plugins.metrics import EpsilonBox

EPOCHS, SMALL, LARGE, SWITCH = 10, 16, 256, 3


def train(folder: Path) -> tuple[Run, float]:
    """The run, and the accuracy on the test samples."""
    torch.manual_seed(0)
    pixels, digits = load_digits(return_X_y=True)
    inputs, labels = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits)
    order = torch.randperm(len(labels))
    kept, test = order[:1000], order[1000:]
    loader = DataLoader(TensorDataset(inputs[kept], labels[kept]), batch_size=SMALL, shuffle=True)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    with attach(
        model,
        optimizer,
        loader,
        metrics=EpsilonBox(),
        every="1ep",
        schedule=f"0:{SMALL} {SWITCH}ep:{LARGE}",
        budget=None,  # the data are few, so measuring takes longer than training; .02 would keep it to 2 %
        log=folder / "plain_digits.csv",
    ) as run:
        for _ in range(EPOCHS):
            for x, y in loader:
                optimizer.zero_grad()
                functional.cross_entropy(model(x), y).backward()
                optimizer.step()

    with torch.no_grad():
        accuracy = (model(inputs[test]).argmax(1) == labels[test]).float().mean().item()
    return run, accuracy


def plot(run: Run) -> Figure:
    """Loss and sharpness over the epochs, with the changes of the batch size."""
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    epochs = [made.epoch or 0.0 for made in run.history]
    above.plot(epochs, [made.loss for made in run.history], marker="o", markersize=4, color="#0072B2")
    below.plot(epochs, [made.values["epsilon_box"] for made in run.history], marker="o", markersize=4, color="#D55E00")
    above.set_ylabel("loss on the probe [nats]")
    below.set_ylabel("ε-box sharpness [%]")
    below.set_xlabel("epochs")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        for change in run.changes:
            axes.axvline(change.epoch or 0.0, color="#666666", linestyle=":")
    for change in run.changes:
        above.annotate(
            f"batch {change.old.batch_size} → {change.new.batch_size}",
            (change.epoch or 0.0, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -12),
            textcoords="offset points",
            color="#666666",
        )
    figure.suptitle("Digits: a small-batch warm start", fontsize="medium")
    return figure


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "plain-digits")
    folder.mkdir(parents=True, exist_ok=True)
    run, accuracy = train(folder)
    print(run.report())
    print(f"Test accuracy {100 * accuracy:.1f} %. Table and plot are in {folder}.")
    plot(run).savefig(folder / "plain_digits.png", dpi=120)
