"""Small networks of many kinds: what differs between them is where the local maxima of the loss in the box lie."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["ARCHITECTURES"]

SIDE = 8  # of the digits

ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


def mlp(widths: Sequence[int], activation: str = "relu", *, batch_norm: bool = False) -> nn.Sequential:
    """Linear layers, ``widths`` from the inputs to the outputs."""
    layers: list[nn.Module] = []
    for num_inputs, num_outputs in itertools.pairwise(widths[:-1]):
        layers.append(nn.Linear(num_inputs, num_outputs))
        layers += [nn.BatchNorm1d(num_outputs)] * batch_norm
        layers.append(ACTIVATIONS[activation]())
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


def cnn(channels: Sequence[int], activation: str = "relu", *, batch_norm: bool = False, pool: str = "max") -> nn.Sequential:
    """3x3 convolutions, each followed by halving the side."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, SIDE, SIDE))]
    for num_inputs, num_outputs in itertools.pairwise((1, *channels)):
        layers.append(nn.Conv2d(num_inputs, num_outputs, 3, padding=1))
        layers += [nn.BatchNorm2d(num_outputs)] * batch_norm
        layers += [ACTIVATIONS[activation](), nn.MaxPool2d(2) if pool == "max" else nn.AvgPool2d(2)]
    side = SIDE >> len(channels)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * side * side, 10))


class ResNet(nn.Module):
    """Residual blocks of two 3x3 convolutions with BatchNorm at full resolution, then pooled 2x2."""

    def __init__(self, num_channels: int, num_blocks: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, num_channels, 3, padding=1)
        self.blocks = nn.ModuleList(self._block(num_channels) for _ in range(num_blocks))
        self.head = nn.Linear(num_channels * SIDE * SIDE // 4, 10)

    @staticmethod
    def _block(num_channels: int) -> nn.Sequential:
        def convolution() -> list[nn.Module]:
            return [nn.Conv2d(num_channels, num_channels, 3, padding=1, bias=False), nn.BatchNorm2d(num_channels)]

        return nn.Sequential(*convolution(), nn.ReLU(), *convolution())

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.stem(pixels.view(-1, 1, SIDE, SIDE))
        for block in self.blocks:
            features = functional.relu(features + block(features))
        return self.head(functional.avg_pool2d(features, 2).flatten(1))


class DepthwiseNet(nn.Module):
    """Residual blocks of a depthwise and a pointwise convolution with GroupNorm, mean over the positions."""

    def __init__(self, num_channels: int, num_blocks: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, num_channels, 2, stride=2)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(num_channels, num_channels, 3, padding=1, groups=num_channels),
                nn.GroupNorm(4, num_channels),
                nn.Conv2d(num_channels, 2 * num_channels, 1),
                nn.GELU(),
                nn.Conv2d(2 * num_channels, num_channels, 1),
            )
            for _ in range(num_blocks)
        )
        self.head = nn.Linear(num_channels, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.stem(pixels.view(-1, 1, SIDE, SIDE))
        for block in self.blocks:
            features = features + block(features)
        return self.head(features.mean((2, 3)))


class VisionTransformer(nn.Module):
    """Square patches, learned positions, pre-norm blocks with GELU, mean over the patches."""

    def __init__(self, width: int, depth: int, patch: int, num_heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, stride=patch)
        self.positions = nn.Parameter(0.1 * torch.randn((SIDE // patch) ** 2, width))
        layer = nn.TransformerEncoderLayer(
            width, num_heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = self.patches(pixels.view(-1, 1, SIDE, SIDE)).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.blocks(tokens).mean(1))


class Recurrent(nn.Module):
    """Reads the rows of the image one after the other; the classes are read off the last state."""

    def __init__(self, cell: str, width: int) -> None:
        super().__init__()
        cells: Mapping[str, Callable[..., nn.Module]] = {"lstm": nn.LSTM, "gru": nn.GRU}
        self.cell = cells[cell](SIDE, width, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.cell(pixels.view(-1, SIDE, SIDE))[0][:, -1])


class _Residual(nn.Module):
    """``x + network(LN x)``; over the patches instead of the channels where ``transposed``."""

    def __init__(self, width: int, mixed: int, *, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        self.norm = nn.LayerNorm(width)
        self.network = nn.Sequential(nn.Linear(mixed, 2 * mixed), nn.GELU(), nn.Linear(2 * mixed, mixed))

    def forward(self, tokens: Tensor) -> Tensor:
        if self.transposed:
            return tokens + self.network(self.norm(tokens).transpose(1, 2)).transpose(1, 2)
        return tokens + self.network(self.norm(tokens))


class Mixer(nn.Module):
    """MLP-Mixer: by turns a network over the patches and one over the channels."""

    def __init__(self, width: int, depth: int, patch: int) -> None:
        super().__init__()
        num_patches = (SIDE // patch) ** 2
        self.patches = nn.Conv2d(1, width, patch, stride=patch)
        halves = ((num_patches, True), (width, False)) * depth
        self.blocks = nn.Sequential(*(_Residual(width, mixed, transposed=across) for mixed, across in halves))
        self.head = nn.Linear(width, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = self.patches(pixels.view(-1, 1, SIDE, SIDE)).flatten(2).transpose(1, 2)
        return self.head(self.blocks(tokens).mean(1))


class GatedResidual(nn.Module):
    """Residual blocks ``x + W (silu(U LN x) * V LN x)``, as in the feed-forward half of recent language models."""

    def __init__(self, num_inputs: int, width: int, depth: int, num_outputs: int) -> None:
        super().__init__()
        self.stem = nn.Linear(num_inputs, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.up = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, num_outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.stem(inputs)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            gate, value = up(norm(features)).chunk(2, dim=1)
            features = features + down(functional.silu(gate) * value)
        return self.head(features)


ARCHITECTURES: Mapping[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "resnet": ResNet,
    "depthwise": DepthwiseNet,
    "vit": VisionTransformer,
    "recurrent": Recurrent,
    "mixer": Mixer,
    "gated": GatedResidual,
}
