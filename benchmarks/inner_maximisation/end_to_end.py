"""Sharpness of large networks from call to answer: ``python -m benchmarks.inner_maximisation.end_to_end``.

A timm ResNet-50 and two GPT-2 Transformers with random weights on synthetic data, by the default and by SciPy's ten scaled
iterations, each in a process of its own, one thread. SciPy is left out where its 490 bytes per parameter do not fit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from sharpness_plugins import sampling
from sharpness_plugins.maximizers import LBFGSB, Maximizer
from sharpness_plugins.metrics import EpsilonBox
from sharpness_plugins.objective import Objective

from .memory import largest_resident, resident_now
from .networks import one_thread, seeded
from .solvers import equivalents

__all__ = ["Measured", "main", "measured"]

SCIPY_BYTES = 490  # per parameter, on the host
EPSILON = 1e-3


@dataclass(frozen=True)
class Measured:
    """One call. Seconds are wall time; ``grown``: bytes by which the resident set grew at most."""

    dim: int
    value: float
    gradients: float
    equivalents: float
    in_objective: float
    in_solver: float
    grown: int


def _resnet50() -> tuple[nn.Module, list[Any]]:
    import timm

    with seeded(0):
        model = timm.create_model("resnet50", num_classes=10)
        images = torch.randn(8, 3, 64, 64)
    model.train()
    with torch.no_grad():
        for _ in range(20):  # running statistics of these images: a new model has those of none
            model(images)
    return model.eval(), [(images, torch.arange(len(images)) % 10)]


def _gpt2(layers: int, width: int) -> tuple[nn.Module, list[Any]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    with seeded(0):
        model = GPT2LMHeadModel(GPT2Config(n_layer=layers, n_embd=width, n_head=width // 64, n_positions=128))
        tokens = torch.randint(0, model.config.vocab_size, (2, 32))
    return model.eval(), [{"input_ids": tokens, "labels": tokens}]


MODELS: Mapping[str, Callable[[], tuple[nn.Module, list[Any]]]] = {
    "resnet50": _resnet50,
    "gpt2_narrow": lambda: _gpt2(4, 256),
    "gpt2": lambda: _gpt2(12, 768),
}
SOLVERS: Mapping[str, Callable[[], Maximizer | str]] = {"default": lambda: EpsilonBox().maximizer, "scipy": LBFGSB}


def measured(model: nn.Module, batches: list[Any], maximizer: Maximizer | str) -> Measured:
    """One call of the metric; the objective is made before, as every metric shares it."""
    objective = Objective(model, batches)
    inside = _timed(objective)
    before, resident, began = objective.cost, resident_now(), time.perf_counter()
    with objective.session():
        result = EpsilonBox(epsilon=EPSILON, maximizer=maximizer)(objective, sampling.generator_for(0, "end_to_end"))
    seconds, cost = time.perf_counter() - began, objective.cost - before
    return Measured(
        dim=objective.dim,
        value=result.value,
        gradients=cost.gradients,
        equivalents=equivalents(cost),
        in_objective=sum(inside),
        in_solver=seconds - sum(inside),
        grown=largest_resident() - resident,
    )


def _timed(objective: Any) -> list[float]:
    """Seconds of every later call of the objective, in a list that grows."""
    inside: list[float] = []

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **settings: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(*args, **settings)
            finally:
                inside.append(time.perf_counter() - began)

        return call

    def sketch(max_samples: int) -> Any:
        made = make(max_samples)
        made.probabilities, made.gradient = timed(made.probabilities), timed(made.gradient)
        return made

    make = objective.sketch
    objective.value, objective.value_and_grad = timed(objective.value), timed(objective.value_and_grad)
    objective.sketch = sketch
    return inside


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inner_maximisation.end_to_end", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--solvers", nargs="+", choices=tuple(SOLVERS), default=list(SOLVERS))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        with one_thread():
            model, batches = MODELS[options.models[0]]()
            if options.solvers[0] == "scipy" and (said := _too_large(sum(p.numel() for p in model.parameters()))):
                sys.exit(said)
            print(json.dumps(asdict(measured(model, batches, SOLVERS[options.solvers[0]]()))))
        return
    print("| model | parameters | solver | value | gradients | equivalents | objective s | solver s | resident B/param |")
    print("|" + "---|" * 9)
    for model_name in options.models:
        for solver in options.solvers:
            command = [sys.executable, "-m", __spec__.name, "--child", "--models", model_name, "--solvers", solver]
            answer = subprocess.run(command, capture_output=True, text=True, check=False)
            if answer.returncode != 0:
                said = (answer.stderr.strip().splitlines() or ["killed"])[-1]
                print(f"| {model_name} | | {solver} | {said} |" + " |" * 5, flush=True)
                continue
            m = Measured(**json.loads(answer.stdout.splitlines()[-1]))
            cells = [model_name, f"{m.dim:,}", solver, f"{m.value:.5g}", f"{m.gradients:g}", f"{m.equivalents:.1f}"]
            cells += [f"{m.in_objective:.1f}", f"{m.in_solver:.1f}", f"{m.grown / m.dim:.0f}"]
            print("| " + " | ".join(cells) + " |", flush=True)


def _too_large(dim: int) -> str:
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    needed = SCIPY_BYTES * dim
    return f"needs about {needed / 1e9:.0f} GB, {available / 1e9:.0f} are free" if needed > available else ""


if __name__ == "__main__":
    main()
