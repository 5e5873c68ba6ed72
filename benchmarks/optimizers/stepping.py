"""What a step costs: in gradients, where they dominate, and beside them in bytes, launches and seconds, beside peers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD

from sharpness_plugins.experiments.networks import relu_mlp
from sharpness_plugins.optimizers import (
    ASAM,
    FSAM,
    GSAM,
    SAM,
    WSAM,
    KStepSAM,
    LookSAM,
    MomentumSAM,
    RandomSAM,
    Rule,
    SharpnessAware,
)

from .. import counting
from ..measuring import clock
from . import peers

__all__ = ["RULES", "compare", "counted", "ratio", "resnet50_shapes", "table"]

RULES: Mapping[str, tuple[Rule, int]] = {  # with the interval
    "SAM": (SAM(), 1),
    "ASAM": (ASAM(), 1),
    "GSAM": (GSAM(), 1),
    "WSAM": (WSAM(), 1),
    "F-SAM": (FSAM(), 1),
    "LookSAM, k 5": (LookSAM(k=5), 1),
    "SAM each 5th step": (SAM(), 5),
    "SAM, 2 ascents": (KStepSAM(k=2), 1),
    "momentum-SAM": (MomentumSAM(), 1),
    "random": (RandomSAM(), 1),
}
WIDTHS, BATCH, STEPS = (256, 512, 512, 512, 10), 2048, 5  # 2048 samples through 664 000 weights
SGD_SETTINGS: Mapping[str, Any] = {"lr": 1e-3, "momentum": 0.9}


def ratio(rule: Rule, interval: int, rounds: int) -> list[float]:
    """Processor seconds of as many steps as the rule's cycle has, over those of SGD with momentum, one after the other."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(BATCH, WIDTHS[0], generator=generator)
    labels = torch.randint(0, WIDTHS[-1], (BATCH,), generator=generator)
    plain, sharp = relu_mlp(WIDTHS, seed=0), relu_mlp(WIDTHS, seed=0)
    base = SGD(plain.parameters(), **SGD_SETTINGS)
    optimizer = SharpnessAware(SGD(sharp.parameters(), **SGD_SETTINGS), rule, interval=interval, model=sharp)

    def steps(one: torch.optim.Optimizer, model: nn.Module) -> float:
        def closure() -> Tensor:
            loss = functional.cross_entropy(model(inputs), labels)
            torch.autograd.backward(loss)
            return loss.detach()

        began = clock()
        for _ in range(STEPS):
            one.zero_grad()
            one.step(closure)
        return clock() - began

    steps(base, plain), steps(optimizer, sharp)  # kernels are chosen, memory is allocated
    return [steps(optimizer, sharp) / steps(base, plain) for _ in range(rounds)]


def resnet50_shapes() -> list[torch.Size]:
    """Of timm's: 161 tensors, 25.6 million weights."""
    import timm

    with torch.device("meta"):
        return [parameter.shape for parameter in timm.create_model("resnet50").parameters()]


def _at(shapes: Sequence[torch.Size]) -> tuple[list[nn.Parameter], Callable[[], None]]:
    """Parameters, and a closure that costs nothing: it hands out gradients made before."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    gradients = [torch.randn(shape, generator=generator) for shape in shapes]

    def evaluate() -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient

    return parameters, evaluate


def steppers(shapes: Sequence[torch.Size]) -> dict[str, Callable[[], None]]:
    """A whole step of SAM around SGD with momentum, gradients left out, by each library; and SGD's own."""
    found: dict[str, Callable[[], None]] = {}
    parameters, evaluate = _at(shapes)
    optimizer = SharpnessAware(SGD(parameters, **SGD_SETTINGS), SAM(), rho=0.05)
    found["ours"] = lambda: optimizer.step(evaluate)
    for name, peer in peers.available().items():
        theirs, their_evaluate = _at(shapes)
        other = peers.sgd(peer, theirs, **SGD_SETTINGS)
        found[name] = lambda other=other, evaluate=their_evaluate: peers.step(other, evaluate)
    plain, plain_evaluate = _at(shapes)
    base = SGD(plain, **SGD_SETTINGS)

    def step() -> None:
        plain_evaluate()
        base.step()

    found["SGD alone"] = step
    return found


def counted(work: Callable[[], None], num_parameters: int) -> dict[str, float]:
    """Bytes per weight and synchronizations of a step, by what plain torch does on a CPU."""
    with counting.Traffic(inside=True) as traffic:
        work()
    return {"bytes": traffic.bytes / num_parameters, "syncs": traffic.syncs}


def compare(rounds: int) -> dict[str, Any]:
    ratios = {}
    for name, (rule, interval) in RULES.items():
        claimed = SharpnessAware(SGD([nn.Parameter(torch.zeros(1))], lr=0.1), rule, interval=interval).gradients_per_step
        ratios[name] = {"claimed": claimed, "measured": ratio(rule, interval, rounds)}
        print(name, ratios[name], flush=True)
    shapes = resnet50_shapes()
    size = sum(shape.numel() for shape in shapes)
    vector: dict[str, dict[str, Any]] = {}
    works = steppers(shapes)
    for name, work in works.items():
        work()  # momentum buffers
        vector[name] = {**counted(work, size), "seconds": []}
    for _ in range(rounds):
        for name, work in works.items():
            began = clock()
            work()
            vector[name]["seconds"].append(clock() - began)
    return {"ratios": ratios, "resnet50": vector}


def table(found: Mapping[str, Any]) -> str:
    lines = ["| rule | gradients a step | time of a step / SGD's | over |", "| --- | ---: | ---: | ---: |"]
    for name, one in found["ratios"].items():
        measured = statistics.median(one["measured"])
        lines.append(f"| {name} | {one['claimed']:.2f} | {measured:.2f} | {100 * (measured / one['claimed'] - 1):+.1f} % |")
    lines += ["", "| a step without its gradients | bytes a weight | syncs | time / ours |"]
    lines.append("| --- | ---: | ---: | ---: |")
    mine = found["resnet50"]["ours"]["seconds"]
    for name, one in found["resnet50"].items():
        times = statistics.median(other / own for other, own in zip(one["seconds"], mine, strict=True))
        lines.append(f"| {name} | {one['bytes']:.0f} | {one['syncs']:.0f} | {times:.2f} |")
    return "\n".join(lines)
