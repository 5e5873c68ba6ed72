"""The networks of the comparison: trained a little, in eval mode, one batch each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from sharpness_plugins.experiments.data import digits_split

from ..inner_maximisation.networks import seeded

__all__ = ["NETWORKS", "Network", "dense_hessian", "digits_cnn"]


@dataclass(frozen=True)
class Network:
    """A model and its batch.

    Attributes:
        fused_attention: whether the model has attention that no peer differentiates twice, unless it is told to.
    """

    model: nn.Module
    inputs: Tensor
    labels: Tensor
    fused_attention: bool = False

    @property
    def dim(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


def digits_cnn(*, steps: int = 60, batch_size: int = 500, dtype: torch.dtype = torch.float32) -> Network:
    """2886 parameters: the whole Hessian is known. Trained in float64 by Adam, on all 500 digits at a time or on fewer."""
    samples = digits_split(0).train
    with seeded(0):
        model = nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 12, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(192, 10),
        )
    inputs = samples.inputs.double()
    _train(model.double(), torch.optim.Adam(model.parameters(), 5e-3), inputs, samples.labels, steps, batch_size)
    return Network(model.to(dtype).eval(), inputs.to(dtype), samples.labels)


def dense_hessian(network: Network) -> Tensor:
    """Of the mean loss, row by row in plain torch, shape ``(dim, dim)``; the network must be in float64 to be exact."""
    parameters = list(network.model.parameters())
    loss = functional.cross_entropy(network.model(network.inputs), network.labels)
    slope = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters, create_graph=True)])
    hessian = torch.empty(network.dim, network.dim, dtype=slope.dtype)
    for i in range(network.dim):
        row = torch.autograd.grad(slope[i], parameters, retain_graph=True)
        hessian[i] = torch.cat([part.reshape(-1) for part in row])
    return (hessian + hessian.T) / 2


def _resnet18() -> Network:
    """timm's, on 256 images of 32x32 with a pattern for each class and a tenth of the labels wrong."""
    import timm

    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(256) % 10
    patterns = functional.interpolate(torch.randn(10, 3, 8, 8, generator=draw), scale_factor=4)
    images = 0.5 * patterns[labels] + torch.randn(256, 3, 32, 32, generator=draw)
    wrong = torch.rand(256, generator=draw) < 0.1
    labels = torch.where(wrong, torch.randint(0, 10, (256,), generator=draw), labels)
    with seeded(0):
        model = timm.create_model("resnet18", num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    _train(model, optimizer, images, labels, steps=14, batch_size=128)
    return Network(model, images, labels)


class _NextToken(nn.Module):
    """Logits of all positions in one list, which a plain cross-entropy takes."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.transformer(input_ids=tokens, use_cache=False).logits
        return logits.flatten(0, 1)


def _gpt2_blocks() -> Network:
    """Two blocks of the small GPT-2 (width 768, 12 heads) with 1000 tokens, on 4 texts of 32."""
    import transformers

    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 50, (4, 33), generator=draw).cumsum(dim=1) % 1000  # the next one depends on this one
    with seeded(0):
        config = transformers.GPT2Config(vocab_size=1000, n_positions=32, n_embd=768, n_layer=2, n_head=12)
        model = _NextToken(transformers.GPT2LMHeadModel(config))
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].reshape(-1)
    model.eval()  # without dropout
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    for _ in range(15):
        optimizer.zero_grad()
        torch.autograd.backward(functional.cross_entropy(model(inputs), labels))
        optimizer.step()
    optimizer.zero_grad()
    return Network(model, inputs, labels, fused_attention=True)


def _vit_tiny() -> Network:
    """timm's, on 16 images of 64x64."""
    import timm

    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(16) % 10
    images = torch.randn(10, 3, 64, 64, generator=draw)[labels] + torch.randn(16, 3, 64, 64, generator=draw)
    with seeded(0):
        model = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=10)
    _train(model, torch.optim.Adam(model.parameters(), 1e-4), images, labels, steps=10, batch_size=16)
    return Network(model, images, labels, fused_attention=True)


NETWORKS: dict[str, Callable[[], Network]] = {
    "digits_cnn": digits_cnn,
    "resnet18": _resnet18,
    "gpt2_blocks": _gpt2_blocks,
    "vit_tiny": _vit_tiny,
}


def _train(
    model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, labels: Tensor, steps: int, batch_size: int
) -> None:
    draw = torch.Generator().manual_seed(1)
    model.train()
    for _ in range(steps):
        rows = torch.randperm(len(labels), generator=draw)[:batch_size]
        optimizer.zero_grad()
        torch.autograd.backward(functional.cross_entropy(model(inputs[rows]), labels[rows]))
        optimizer.step()
    optimizer.zero_grad()
    model.eval()
