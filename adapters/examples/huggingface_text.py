"""Hugging Face Trainer with a warm start, measured: a tiny GPT-2 learns the characters of Python's own docstrings.

Nothing is downloaded; the text is the standard library's, the model begins at random. Half of the epochs use batches of 16
texts, then 128, as the paper's warm start does. Measured at each epoch: the loss's sharpness at the weights, on a fixed
sample. Writes ``sharpness.jsonl`` and ``huggingface_text.png``::

    python adapters/examples/huggingface_text.py --out results
"""

from __future__ import annotations

import argparse
import inspect
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from sharpness_adapters.huggingface import BatchSizeCallback, SharpnessCallback
from sharpness_plugins.metrics import HessianTopK
from sharpness_plugins.monitor import JSONLSink

LENGTH = 32  # characters of a sample
MODULES = (argparse, inspect, os)


def corpus() -> tuple[list[dict[str, torch.Tensor]], int]:
    """Docstrings cut into samples of ``LENGTH`` characters, and the number of different characters."""
    texts = [inspect.getdoc(module) or "" for module in MODULES]
    texts += [
        inspect.getdoc(value) or "" for module in MODULES for _, value in sorted(vars(module).items()) if callable(value)
    ]
    text = "\n".join(texts)
    alphabet = {character: index for index, character in enumerate(sorted(set(text)))}
    codes = torch.tensor([alphabet[character] for character in text])
    rows = codes[: len(codes) // LENGTH * LENGTH].view(-1, LENGTH)[:512]
    return [{"input_ids": row, "labels": row} for row in rows], len(alphabet)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--epochs", type=int, default=6)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    samples, num_characters = corpus()
    config = GPT2Config(
        vocab_size=num_characters, n_positions=LENGTH, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    trainer = Trainer(
        model=GPT2LMHeadModel(config),
        args=TrainingArguments(
            output_dir=str(given.out / "trainer"),
            num_train_epochs=given.epochs,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            logging_steps=16,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=False,
            seed=0,
        ),
        train_dataset=samples,
    )
    measured = SharpnessCallback(
        {"lambda_max": HessianTopK(k=1, tolerance=0.05)},
        every="1ep",
        budget=None,
        num_samples=32,
        sinks=JSONLSink(given.out / "sharpness.jsonl"),
    ).attach(trainer)
    sizes = BatchSizeCallback(f"0:16 {given.epochs // 2}ep:128").attach(trainer)
    trainer.train()

    for change in sizes.history:
        print(change)
    for made in measured.history:
        print(f"epoch {made.epoch:g}: loss {made.loss:.3f}, largest eigenvalue {made.values['lambda_max']:.3g}")
    draw(measured, sizes, given.out / "huggingface_text.png")


def draw(measured: SharpnessCallback, sizes: BatchSizeCallback, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(6, 5), layout="constrained")
    epochs = [made.epoch for made in measured.history]
    above.plot(epochs, [made.loss for made in measured.history], "o-")
    above.set_ylabel("loss")
    below.plot(epochs, [made.values["lambda_max"] for made in measured.history], "o-")
    below.set_ylabel("largest eigenvalue")
    below.set_xlabel("epoch")
    for change in sizes.history:
        for axes in (above, below):
            axes.axvline(change.epoch, color="grey", linestyle=":")
        above.annotate(f"{change.old.batch_size} → {change.new.batch_size}", (change.epoch, above.get_ylim()[1]), va="top")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
