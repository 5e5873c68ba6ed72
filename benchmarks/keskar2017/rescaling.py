"""Dinh's rescaling: ``python -m benchmarks.keskar2017.rescaling --out benchmarks/keskar2017/rescaling.json``.

One trained ReLU network, written down three times: its first layer times α, its second one divided by it. Being positively
homogeneous, it computes the same function, and so must everything that deserves to be called a property of that function.

Source: Dinh, Pascanu, Bengio and Bengio, Sharp Minima Can Generalize For Deep Nets, arXiv 1703.04933 (2017).
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sharpness_plugins import measure_sharpness
from sharpness_plugins.experiments.data import Samples, Split, digits_split
from sharpness_plugins.experiments.networks import relu_mlp
from sharpness_plugins.experiments.training import one_thread, train_to_loss

__all__ = ["ALPHAS", "main", "measured", "rescaled", "table"]

ALPHAS = (0.1, 1.0, 10.0)
METRICS = {  # key -> how a reader knows it
    "epsilon_box": "ε-box, 1e-3 [%]",
    "hessian_topk": "λmax of H",
    "adaptive_topk": "λmax of D H D, D = diag \\|w\\|",
}


def rescaled(model: nn.Sequential, alpha: float) -> nn.Sequential:
    """A copy with the first linear layer times ``alpha`` and the weights of the second divided by it: the same function.

    Raises:
        ValueError: ``alpha`` is not positive, for which ReLU is not homogeneous; or there are not two layers.
    """
    copied = copy.deepcopy(model)
    layers = [layer for layer in copied if isinstance(layer, nn.Linear)]
    if not alpha > 0 or len(layers) < 2:
        raise ValueError(f"alpha must be positive and there must be two linear layers, got {alpha} and {len(layers)}")
    with torch.no_grad():
        layers[0].weight *= alpha
        layers[0].bias *= alpha
        layers[1].weight /= alpha
    return copied


def measured(model: nn.Sequential, split: Split, alphas: Sequence[float] = ALPHAS) -> list[dict[str, float]]:
    """By α: the metrics, the training loss, the test accuracy, and by how much any logit moved relative to the largest."""
    batches = split.train.batches(500)
    with torch.no_grad():
        original = model(split.test.inputs)
    found = []
    for alpha in alphas:
        twin = rescaled(model, alpha)
        with torch.no_grad():
            logits = twin(split.test.inputs)
        report = measure_sharpness(twin, batches, tuple(METRICS), seed=0)
        right = (logits.argmax(dim=1) == split.test.labels).double().mean().item()
        moved = ((logits - original).abs().max() / original.abs().max()).item()
        values = {key: report[key].value for key in METRICS}
        found.append({"alpha": alpha, "loss": report.loss, "test_accuracy": right, "logits_moved": moved, **values})
    return found


def trained() -> tuple[nn.Sequential, Split]:
    """Recipe R's network, batch 16, to an epoch's loss of 0.002, in float64."""
    split = digits_split(0)
    doubled = Split(*(Samples(half.inputs.double(), half.labels) for half in (split.train, split.test)))
    model = relu_mlp((64, 256, 256, 256, 256, 10), seed=0).double()
    train_to_loss(model, doubled.train, batch_size=16, target_loss=2e-3, max_epochs=500)
    return model.eval(), doubled


def table(record: dict[str, Any]) -> str:
    """As Markdown."""
    lines = [
        ["α", "largest move of a logit", "training loss [nats]", "test accuracy [%]", *METRICS.values()],
        ["---:"] * (4 + len(METRICS)),
    ]
    for row in record["rows"]:
        cells = [f"{row['alpha']:g}", f"{row['logits_moved']:.0e}", f"{row['loss']:.6f}"]
        cells.append(f"{100 * row['test_accuracy']:.2f}")
        lines.append(cells + [f"{row[key]:.4g}" for key in METRICS])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.keskar2017.rescaling", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the record; with --table it is read")
    parser.add_argument("--table", action="store_true", help="print the table of an old record, and measure nothing")
    chosen = parser.parse_args(arguments)
    if not chosen.table:
        with one_thread():
            rows = measured(*trained())
        record = {"network": "R", "data": "digits", "seed": 0, "torch": torch.__version__, "rows": rows}
        chosen.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(json.loads(chosen.out.read_text(encoding="utf-8"))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
