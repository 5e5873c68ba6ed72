"""A warm start in timm: small batches first, large ones later, and the sharpness of what they reach.

    python adapters/examples/timm_digits.py [FOLDER]

Trains one of timm's models on scikit-learn's digits, with batches of 16 for the first epochs and of 128 after them, by SAM
around AdamW; measures as it goes; and writes ``timm_digits.csv`` and ``timm_digits.png``. A minute on a laptop. With timm's
train.py the same needs no code: see ``sharpness-timm --help``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import create_loader
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from torch.utils.data import Dataset

from sharpness_adapters.timm import Settings, TaskMonitor
from sharpness_plugins import BatchController


class Digits(Dataset):
    """1797 pictures of 8 x 8 pixels, as timm's loaders want them: with a transform that they set."""

    transform = None

    def __init__(self, indices: range) -> None:
        images, labels = load_digits(return_X_y=True)
        self.images = [Image.fromarray((images[i].reshape(8, 8) * 15).astype("uint8")).convert("RGB") for i in indices]
        self.labels = [int(labels[i]) for i in indices]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def loader_of(indices: range, *, is_training: bool) -> torch.utils.data.DataLoader:
    size = {"input_size": (3, 32, 32), "batch_size": 16, "crop_pct": 1.0, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    return create_loader(Digits(indices), **size, is_training=is_training, no_aug=True, num_workers=0, use_prefetcher=False)


def main(folder: Path, *, epochs: int = 4, num_train: int = 1200) -> list[dict[str, float]]:
    """Train, measure, plot; returns what was measured. The batch grows at half time."""
    torch.manual_seed(0)
    train, test = loader_of(range(num_train), is_training=True), loader_of(range(1200, 1797), is_training=False)
    model = create_model("test_resnet", num_classes=10)
    task = ClassificationTask(model, torch.nn.CrossEntropyLoss(), verbose=False)
    optimizer = create_optimizer_v2(model, opt="samadamw", lr=1e-3, weight_decay=0.01, rho=0.05)

    controller = BatchController(f"0:16 {epochs // 2}ep:128", optimizer, model=model)
    settings = Settings(("hessian_topk:k=1,num_matvecs=12",), "1ep", folder / "timm_digits.csv", num_samples=64, budget=None)
    monitor = TaskMonitor(settings, epoch=lambda: controller.progress.epoch or 0.0)
    for epoch in range(epochs):
        model.train()
        for images, labels in controller.batches(train):
            controller.backward(task(images, labels)["loss"])
            if controller.at_step:
                optimizer.step()
                optimizer.zero_grad()
        model.eval()
        with torch.inference_mode():
            right = sum((model(x).argmax(1) == y).sum().item() for x, y in test)
        print(f"epoch {epoch + 1}: batches of {len(labels)}, test accuracy {right / 597:.3f}")
    monitor.close()

    history = [{"step": made.step, "loss": made.loss or 0.0, **made.values} for made in monitor.monitor.history]
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["step"] for row in history], [row["hessian_topk"] for row in history], "o-", label="largest eigenvalue")
    axes.plot([row["step"] for row in history], [row["loss"] for row in history], "s--", label="training loss")
    for change in controller.history:
        axes.axvline(change.step, color="0.7")
        axes.annotate(f"batches of {change.new.batch_size}", (change.step, axes.get_ylim()[1]), va="top")
    axes.set(xlabel="optimizer step", yscale="log")
    axes.legend()
    figure.savefig(folder / "timm_digits.png")
    return history


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path())
