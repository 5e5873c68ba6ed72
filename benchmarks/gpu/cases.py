"""What is checked and timed: every operation with random data, what it moves at least, and how else torch would do it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sharpness_plugins.kernels import ball, box, noise, sam, signs
from sharpness_plugins.kernels.philox import segment_table

__all__ = ["CASES", "Case"]

Args: TypeAlias = "dict[str, Any]"

SLOPE, OFFSET, RHO, COLUMNS, KEY = 1e-3, 1e-3, 0.05, 100, 2**63 + 12345
NUM_TENSORS = 161  # of a list, as ResNet-50 has
HALF = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One operation on one kind of arguments.

    Attributes:
        make: ``(n, dtype, device) -> args``, random, with NaN in what is only written.
        run: the operation; statistics are returned.
        outputs: names of the arguments written to, tensors or lists.
        bytes_per_element: in float32, at the least: inputs once, or twice where a sum comes first, outputs once.
        peers: other ways to the same result, given the same arguments.
        dtypes: that it is checked in; it is timed in float32.
        max_size: above which it is not timed.
    """

    name: str
    make: Callable[[int, torch.dtype, torch.device], Args]
    run: Callable[[Args], Tensor | None]
    outputs: Sequence[str]
    bytes_per_element: float
    peers: Mapping[str, Callable[[Args], object]] = field(default_factory=dict)
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64, HALF)
    max_size: int = 10**9


def _normal(n: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    return torch.randn(n, dtype=torch.float32, device=device).mul_(scale).to(dtype)


def _poisoned(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((n,), torch.nan, dtype=dtype, device=device)


def _number(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=torch.float32 if dtype is HALF else dtype, device=device)


def _box(n: int, dtype: torch.dtype, device: torch.device) -> Args:
    """A point within half the box, a gradient with zeros."""
    anchor = _normal(n, dtype, device)
    gradient = _normal(n, dtype, device, 1e-2)
    gradient[::7] = 0
    y = (torch.rand(n, device=device) - 0.5).mul_(anchor.float().abs().mul_(SLOPE).add_(OFFSET)).to(dtype)
    numbers = {"slope": SLOPE, "offset": OFFSET, "share": 0.3, "length": 0.5, "momentum": 0.75}
    scalars = {name: _number(value, dtype, device) for name, value in numbers.items()}
    return {"out": _poisoned(n, dtype, device), "y": y, "g": gradient, "a": anchor, **scalars}


def _box_with_previous(n: int, dtype: torch.dtype, device: torch.device) -> Args:
    return {**_box(n, dtype, device), "before": _normal(n, dtype, device, 1e-4)}


def _box_secant(n: int, dtype: torch.dtype, device: torch.device) -> Args:
    """Two points, and gradients that bend along the step, so that nothing cancels."""
    args = _box(n, dtype, device)
    args["z"] = _normal(n, dtype, device, 1e-4)
    args["h"] = (args["g"].float() + 3.0 * (args["z"].float() - args["y"].float())).to(dtype)
    return args


def _ball(n: int, dtype: torch.dtype, device: torch.device) -> Args:
    numbers = {name: _number(value, dtype, device) for name, value in {"rho": RHO, "share": 0.3}.items()}
    y = _normal(n, dtype, device, 0.5 * RHO / n**0.5)
    weight = torch.rand(n, device=device).add_(0.1).to(dtype)
    return {"out": _poisoned(n, dtype, device), "y": y, "g": _normal(n, dtype, device), "t": weight, **numbers}


def _outside(n: int, dtype: torch.dtype, device: torch.device) -> Args:
    return {"out": _normal(n, dtype, device), "rho": _number(RHO, dtype, device)}


def _list(n: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> list[Tensor]:
    """Tensors of unequal sizes, n elements together."""
    size = n // NUM_TENSORS
    sizes = [n - size * (NUM_TENSORS - 1), *([size] * (NUM_TENSORS - 1))]
    return [_normal(numel, dtype, device, scale) for numel in sizes]


def _sam(n: int, dtype: torch.dtype, device: torch.device) -> Args:
    weights = _list(n, dtype, device)
    lists = {"w": weights, "g": _list(n, dtype, device, 1e-2), "m": _list(n, dtype, device)}
    numbers = {"rho": RHO, "eta": 0.01, "lr": 0.1}
    scalars = {name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in numbers.items()}
    return {**lists, "b": [torch.full_like(w, torch.nan) for w in weights], **scalars}


def _restoring(n: int, dtype: torch.dtype, device: torch.device) -> Args:
    args = _sam(n, dtype, device)
    args["w"], args["b"] = args["b"], args["w"]
    return args


def _columns(n: int, dtype: torch.dtype, device: torch.device) -> Args:
    parts = [n // 3, n - n // 3]
    segments = segment_table([0, 2], parts, device=device)
    packed = torch.empty(signs.num_bytes(COLUMNS) * n, dtype=torch.uint8, device=device)
    signs.sign_pack(packed, segments, KEY, COLUMNS)
    coefficients = torch.randn(COLUMNS, dtype=torch.float64).to(device)
    vectors = {"out": _poisoned(n, dtype, device), "x": _normal(n, dtype, device)}
    return {**vectors, "segments": segments, "packed": packed, "c": coefficients, "scale": _number(0.1, dtype, device)}


def _with_dense(n: int, dtype: torch.dtype, device: torch.device) -> Args:
    """The dense matrix only has to have the right size to be timed."""
    return {**_columns(n, dtype, device), "dense": torch.ones(COLUMNS, n, device=device)}


def eager_vertex_step(args: Args) -> Tensor:
    """Whole vectors at once, as one would write it down."""
    y, g = args["y"], args["g"]
    width = args["slope"] * args["a"].abs() + args["offset"]
    vertex = torch.where(g == 0, y, width * g.sign())
    way = vertex - y
    out = vertex - (1 - args["share"]) * way
    args["out"].copy_(out)
    sums = [
        (way * g).sum(),
        (width * g.abs()).sum(),
        (vertex.sign() != y.sign()).sum(),
        (way * way).sum(),
        (out * out).sum(),
    ]
    return torch.stack([x.double() for x in sums])


def foreach_vertex_step(args: Args) -> Tensor:
    """The step alone, with its gap, on a list of views: as optimizers are written."""
    n = len(args["y"])
    y, g, a, out = (list(args[name].split(-(-n // NUM_TENSORS))) for name in ("y", "g", "a", "out"))
    width = torch._foreach_abs(a)
    torch._foreach_mul_(width, args["slope"])
    torch.ops.aten._foreach_add_.Tensor(width, args["offset"])
    torch._foreach_mul_(width, torch._foreach_sign(g))
    way = torch._foreach_sub(width, y)
    products = torch._foreach_mul(way, g)
    torch._foreach_mul_(way, args["share"])
    torch._foreach_copy_(out, torch._foreach_add(y, way))
    return torch.stack([x.sum() for x in products]).sum()


def eager_linear_step(args: Args) -> None:
    width = args["slope"] * args["a"].abs() + args["offset"]
    slopes = width * args["g"]
    args["out"].copy_(args["share"] * width * (slopes / (2 * slopes.abs().mean())).clamp(-1, 1))


def eager_projected_step(args: Args) -> Tensor:
    y, g = args["y"], args["g"]
    width = args["slope"] * args["a"].abs() + args["offset"]
    moved = torch.clamp(y + args["length"] * width * g.sign(), -width, width)
    moved = moved - (1 - args["momentum"]) * ((moved - y) - (y - args["before"]))
    moved = torch.clamp(moved, -width, width)
    args["out"].copy_(moved)
    way = moved - y
    return torch.stack([(way * g).sum(), ((way / width) ** 2).sum(), (way * way).sum(), (moved * moved).sum()])


def eager_ball_step(args: Args) -> Tensor:
    y, g = args["y"], args["g"]
    vertex = args["rho"] / torch.linalg.vector_norm(g) * g
    way = vertex - y
    out = vertex - (1 - args["share"]) * way
    args["out"].copy_(out)
    return torch.stack([(way * g).sum(), (way * way).sum(), (out * out).sum()])


def loop_ascent(args: Args) -> None:
    """Tensor by tensor, as the best-known public implementation works."""
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(1.0 * g) for g in args["g"]]))
    scale = (args["rho"] / (norm + 1e-12)).float()
    for w, g, b in zip(args["w"], args["g"], args["b"], strict=True):
        b.copy_(w)
        w.add_(1.0 * g * scale)


def foreach_ascent(args: Args) -> None:
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(args["g"])))
    torch._foreach_copy_(args["b"], args["w"])
    torch._foreach_add_(args["w"], torch._foreach_mul(args["g"], (args["rho"] / norm).float()))


def copy_and_fused_sgd(args: Args) -> None:
    torch._foreach_copy_(args["w"], args["b"])
    torch._fused_sgd_(
        args["w"], args["g"], args["m"], weight_decay=1e-4, momentum=0.9, lr=0.1, dampening=0.0, nesterov=False,
        maximize=False, is_first_step=False,
    )  # fmt: skip


CASES: tuple[Case, ...] = (
    Case(
        "box_vertex_step",
        _box,
        lambda x: box.box_vertex_step(x["out"], x["y"], x["g"], x["a"], x["slope"], x["offset"], x["share"]),
        ("out",),
        16,
        {"eager": eager_vertex_step, "foreach": foreach_vertex_step},
    ),
    Case("box_gap", _box, lambda x: box.box_gap(x["y"], x["g"], x["a"], x["slope"], x["offset"]), (), 12),
    Case(
        "box_linear_step",
        _box,
        lambda x: box.box_linear_step(x["out"], x["g"], x["a"], x["slope"], x["offset"], x["share"]),
        ("out",),
        20,
        {"eager": eager_linear_step},
    ),
    Case(
        "box_projected_step",
        _box_with_previous,
        lambda x: box.box_projected_step(
            x["out"], x["y"], x["before"], x["g"], x["a"], x["slope"], x["offset"], x["length"], x["momentum"], signed=True
        ),
        ("out",),
        20,
        {"eager": eager_projected_step},
    ),
    Case(
        "box_secant",
        _box_secant,
        lambda x: box.box_secant(x["y"], x["z"], x["g"], x["h"], x["a"], x["slope"], x["offset"]),
        (),
        20,
    ),
    Case(
        "ball_step",
        _ball,
        lambda x: ball.ball_step(x["out"], x["y"], x["g"], None, x["rho"], x["share"]),
        ("out",),
        16,
        {"eager": eager_ball_step},
    ),
    Case(
        "ball_step adaptive",
        _ball,
        lambda x: ball.ball_step(x["out"], x["y"], x["g"], x["t"], x["rho"], x["share"]),
        ("out",),
        24,
    ),
    Case("ball_project_", _outside, lambda x: ball.ball_project_(x["out"], x["rho"]), ("out",), 12),
    Case(
        "sam_ascent_",
        _sam,
        lambda x: sam.sam_ascent_(x["w"], x["g"], x["b"], x["rho"]),
        ("w", "b"),
        20,
        {"loop": loop_ascent, "foreach": foreach_ascent},
    ),
    Case(
        "sam_ascent_ adaptive",
        _sam,
        lambda x: sam.sam_ascent_(x["w"], x["g"], x["b"], x["rho"], eta=x["eta"]),
        ("w", "b"),
        24,
    ),
    Case("sam_restore_", _restoring, lambda x: sam.restore_(x["w"], x["b"]), ("w",), 8),
    Case(
        "sam_restore_sgd_",
        _restoring,
        lambda x: sam.restore_sgd_(x["w"], x["b"], x["g"], x["m"], lr=x["lr"], momentum=0.9, weight_decay=1e-4),
        ("w", "m"),
        20,
        {"copy and fused SGD": copy_and_fused_sgd},
    ),
    Case(
        "sign_lift",
        _columns,
        lambda x: signs.sign_lift(x["out"], x["c"], x["segments"], KEY, origin=x["x"], packed=x["packed"]),
        ("out",),
        8 + signs.num_bytes(COLUMNS),
    ),
    Case(
        "sign_lift regenerated",
        _columns,
        lambda x: signs.sign_lift(x["out"], x["c"], x["segments"], KEY, origin=x["x"]),
        ("out",),
        8,
    ),
    Case(
        "sign_lift against a dense matrix",
        _with_dense,
        lambda x: signs.sign_lift(x["out"], x["c"], x["segments"], KEY, packed=x["packed"]),
        ("out",),
        4 + signs.num_bytes(COLUMNS),
        {"dense": lambda x: torch.mv(x["dense"].T, x["c"].float())},
        dtypes=(torch.float32,),
        max_size=124_000_000,
    ),
    Case(
        "sign_restrict",
        _columns,
        lambda x: signs.sign_restrict(x["x"], x["segments"], KEY, COLUMNS, packed=x["packed"]),
        (),
        4 + signs.num_bytes(COLUMNS),
    ),
    Case(
        "sign_restrict regenerated",
        _columns,
        lambda x: signs.sign_restrict(x["x"], x["segments"], KEY, COLUMNS),
        (),
        4,
    ),
    Case(
        "sign_restrict against a dense matrix",
        _with_dense,
        lambda x: signs.sign_restrict(x["x"], x["segments"], KEY, COLUMNS, packed=x["packed"]),
        (),
        4 + signs.num_bytes(COLUMNS),
        {"dense": lambda x: torch.mv(x["dense"], x["x"])},
        dtypes=(torch.float32,),
        max_size=124_000_000,
    ),
    Case(
        "perturb_normal",
        _columns,
        lambda x: noise.perturb_normal(x["out"], x["scale"], x["segments"], KEY, origin=x["x"]),
        ("out",),
        8,
        {"randn": lambda x: torch.add(x["x"], torch.randn_like(x["x"]) * x["scale"], out=x["out"])},
    ),
    Case(
        "perturb_rademacher",
        _columns,
        lambda x: noise.perturb_rademacher(x["out"], x["scale"], x["segments"], KEY, origin=x["x"]),
        ("out",),
        8,
    ),
)
