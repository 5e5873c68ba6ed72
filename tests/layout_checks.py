"""What every rank of a group does in ``test_layout``: checks by name that return JSON.

Each check does the same on whole vectors and on shards of them and tells how far apart the answers are.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import rank_checks
import shard_checks
from sharpness_plugins import maximizers, measure_sharpness, sharded
from sharpness_plugins.basis import STORAGES, Basis
from sharpness_plugins.distributed import Ranks
from sharpness_plugins.krylov import WHICH, LanczosRequest
from sharpness_plugins.lanczos import lanczos
from sharpness_plugins.layout import WHOLE, Layout, Shards
from sharpness_plugins.memory import MemoryBudget
from sharpness_plugins.metrics import (
    AdaptiveTopK,
    EpsilonBox,
    HessianBottom,
    HessianFrobenius,
    HessianTopK,
    HessianTrace,
    SpectralDensity,
)
from sharpness_plugins.operators import Curvature
from sharpness_plugins.regions import Ball, Box, stepped
from sharpness_plugins.report import MetricResult
from sharpness_plugins.traces import Probes, hutch_pp, xtrace

F64 = torch.float64
BLOCKS = {"weight": 30_000, "bias": 10_003}
DIM = sum(BLOCKS.values())
CUTS: dict[int, list[list[tuple[int, int]]]] = {  # of both blocks; unequal, one rank has nothing, one a single number
    2: [[(0, 25_000), (30_000, 30_001)], [(25_000, 30_000), (30_001, DIM)]],
    4: [[(0, 10_000), (30_000, 35_000)], [(10_000, 10_001)], [], [(10_001, 30_000), (35_000, DIM)]],
}
SMALL_BLOCKS = {"weight": 200, "bias": 0, "scale": 100}
SMALL: dict[int, list[list[tuple[int, int]]]] = {
    2: [[(0, 150), (200, 201)], [(150, 200), (201, 300)]],
    4: [[(0, 90)], [(90, 91), (200, 290)], [], [(91, 200), (290, 300)]],
}
TINY_BLOCKS = {"weight": 30, "bias": 0, "scale": 10}
TINY: dict[int, list[list[tuple[int, int]]]] = {
    2: [[(0, 20), (30, 31)], [(20, 30), (31, 40)]],
    4: [[(0, 9)], [(9, 10), (30, 39)], [], [(10, 30), (39, 40)]],
}
GLOBS = ("bias", "scale")


def shards(rank: int, world_size: int, cuts: Mapping[int, list[list[tuple[int, int]]]] = CUTS) -> Shards:
    ranges = cuts[world_size][rank]
    return Shards(Ranks("same data", rank, world_size), max(b for cut in cuts[world_size] for _, b in cut), ranges)


def own(vector: Tensor, layout: Layout) -> Tensor:
    """What lies here of a whole vector, or of rows of them."""
    if not isinstance(layout, Shards):
        return vector
    parts = [vector[..., a:b] for a, b in layout.ranges]
    return torch.cat(parts, dim=-1) if parts else vector[..., :0].clone()


def apart(found: Any, expected: Any, layout: Layout) -> float:
    """Largest difference, relative to the largest entry of a vector, and to a number or to one; infinite where the answers
    are not of one kind.
    """
    if isinstance(expected, Tensor):
        there = own(expected, layout)
        if expected.dtype == torch.bool:
            return 0.0 if torch.equal(found, there) and bool(there.all()) else torch.inf
        if found.shape != there.shape or found.dtype != there.dtype:
            return torch.inf
        scale = expected.abs().max().clamp_min(1e-300) if expected.numel() else 1.0
        return float(((found - there).abs() / scale).max()) if found.numel() else 0.0
    if isinstance(expected, Mapping):
        if list(found) != list(expected):
            return torch.inf
        return max((apart(found[key], expected[key], layout) for key in expected), default=0.0)
    if isinstance(expected, (list, tuple)):
        if len(found) != len(expected):
            return torch.inf
        return max((apart(one, other, layout) for one, other in zip(found, expected, strict=True)), default=0.0)
    if isinstance(expected, float):
        if math.isnan(expected) or math.isnan(found):
            return 0.0 if math.isnan(expected) and math.isnan(found) else torch.inf
        return 0.0 if found == expected else abs(found - expected) / max(abs(expected), 1.0)
    return 0.0 if found == expected else torch.inf


def numbers(count: int, dim: int = DIM, *, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(dim, generator=generator, dtype=F64) for _ in range(count)]


# ---------------------------------------------------------------------- draws and sums


def check_draws(rank: int, world_size: int) -> dict[str, Any]:
    layout, found = shards(rank, world_size), {}
    for dtype in (torch.float32, F64):
        for name in ("normal", "uniform"):
            here, whole = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
            like = own(torch.zeros(DIM, dtype=dtype), layout)
            for turn in ("first", "second"):  # the generators went on alike
                drawn = getattr(layout, name)(here, like)
                expected = getattr(WHOLE, name)(whole, torch.zeros(DIM, dtype=dtype))
                found[f"{name} {dtype} {turn}"] = bool(torch.equal(drawn, own(expected, layout)))
    return found


def check_sums(rank: int, world_size: int) -> dict[str, Any]:
    layout = shards(rank, world_size)
    x, y = numbers(2)
    rows = torch.stack(numbers(6, seed=1))
    told = torch.arange(6.0, dtype=F64)
    layout.sums(told)
    return {
        "dot": apart(float(layout.dot(own(x, layout), own(y, layout))), float(WHOLE.dot(x, y)), layout),
        "norm": apart(float(layout.norm(own(x, layout))), float(WHOLE.norm(x)), layout),
        "matvec": apart(layout.matvec(own(rows, layout), own(x, layout)).tolist(), WHOLE.matvec(rows, x).tolist(), layout),
        "length": float(layout.length(own(x, layout)) - DIM),
        "largest": layout.largest(-float(rank)),
        "nowhere else": float(layout.everywhere(rank != world_size - 1)),
        "everywhere": 1.0 - layout.everywhere(True),
        "argument": apart(told.tolist(), torch.arange(6.0).tolist(), layout),
    }


def check_blocks(rank: int, world_size: int) -> dict[str, Any]:
    """Vectors of some blocks only are drawn and lie as whole ones of those blocks would be cut."""
    layout = shards(rank, world_size, SMALL)
    x = numbers(1, layout.dim)[0]
    names, starts, found = list(SMALL_BLOCKS), [0, 200, 200, 300], {}
    lengths = [len(own(torch.arange(300.0)[a:b], of_range(layout, a, b))) for a, b in itertools.pairwise(starts)]
    for chosen in ([0], [1, 2], [2], [0, 2], [0, 1, 2]):
        part = layout.of_blocks(lengths, chosen)
        expected = torch.cat([x[starts[i] : starts[i + 1]] for i in chosen])
        here = torch.cat([own(x[starts[i] : starts[i + 1]], of_range(layout, starts[i], starts[i + 1])) for i in chosen])
        found["+".join(names[i] for i in chosen)] = [part.length(here) - len(expected), apart(here, expected, part)]
    return found


def of_range(layout: Shards, first: int, last: int) -> Shards:
    """Cut by hand."""
    inside = [(max(a, first) - first, min(b, last) - first) for a, b in layout.ranges if max(a, first) < min(b, last)]
    return Shards(Ranks(), last - first, inside)


# ---------------------------------------------------------------------- regions


class Plain:
    """A third party's set: a box without steps of its own."""

    def __init__(self, box: Box) -> None:
        self._box, self.layout = box, box.layout

    def project(self, perturbation: Tensor) -> Tensor:
        return self._box.project(perturbation)

    def ascent_vertex(self, gradient: Tensor) -> Tensor:
        return self._box.ascent_vertex(gradient)

    def contains(self, perturbation: Tensor) -> bool:
        return self._box.contains(perturbation)


def regions(layout: Layout) -> dict[str, Any]:
    origin = own(numbers(1, seed=5)[0], layout)
    axes = own(numbers(1, seed=6)[0].clamp_min(0), layout)  # half of them zero
    return {
        "keskar": Box.keskar(origin, 0.05, layout=layout),
        "uniform": Box.infinity_ball(origin, 0.05, layout=layout),
        "adaptive box": Box.infinity_ball(origin, 0.05, adaptive=True, eta=0.01, layout=layout),
        "half widths": Box(axes, layout=layout),
        "ball": Ball(0.3, layout=layout),
        "ellipsoid": Ball(0.3, axes, layout),
        "adaptive ball": Ball.adaptive(origin, 0.3, eta=0.01, layout=layout),
        "plain": Plain(Box.keskar(origin, 0.05, layout=layout)),
    }


def answers(region: Any, layout: Layout, slope: Tensor) -> dict[str, Any]:
    """Everything that a region tells, at points inside and outside."""
    far, near, other, other_slope = (own(x, layout) for x in numbers(4, seed=7))
    slope, steps = own(slope, layout), stepped(region)
    y, previous = region.project(0.02 * near), region.project(0.01 * far)
    found: dict[str, Any] = {
        "project": region.project(far),
        "project a little": region.project(1e-6 * near),
        "vertex": region.ascent_vertex(slope),
        "contains": [region.contains(x) for x in (far, y, region.project(far), 0 * far, region.ascent_vertex(slope))],
        "gap": list(steps.vertex_step(None, y, slope)),
    }
    for share in (0.3, 1.0):
        out = torch.full_like(y, torch.nan)
        found[f"vertex step {share}"] = [list(steps.vertex_step(out, y, slope, share)), out]
    for fraction in (0.05, 1.0):
        out = torch.full_like(y, torch.nan)
        found[f"linear point {fraction}"] = [steps.linear_point(out, slope, fraction), out]
    for signed in (True, False):
        for before in (None, previous):
            out = torch.full_like(y, torch.nan)
            told = steps.projected_step(out, y, before, slope, 0.7, 0.75, signed=signed)
            found[f"projected step {signed} {before is None}"] = [list(told), out]
    found["secant"] = list(steps.secant(y, region.project(0.02 * other), slope, other_slope))
    out = torch.full_like(y, torch.nan)
    if steps.model_step(out, y, slope, region.project(0.02 * other), other_slope):
        found["model step"] = out
    if isinstance(region, Box):
        found["at bound"] = region.share_at_bound(region.project(0.05 * far))
    return found


def slopes() -> dict[str, Tensor]:
    usual = numbers(1, seed=9)[0]
    usual[::7] = 0
    here_zero, broken = usual.clone(), usual.clone()
    here_zero[25_000:30_000], here_zero[30_001:] = 0, 0  # on one of two ranks nothing
    broken[3] = torch.nan
    return {"usual": usual, "zero on a rank": here_zero, "zero": 0 * usual, "not finite": broken}


def check_regions(rank: int, world_size: int) -> dict[str, Any]:
    layout, found = shards(rank, world_size), {}
    there, here = regions(WHOLE), regions(layout)
    for name in there:
        for kind, slope in slopes().items():
            if world_size > 2 and (kind == "zero" or name not in ("keskar", "half widths", "ball", "ellipsoid", "plain")):
                continue
            if kind == "not finite":
                told = [list(stepped(r).vertex_step(None, own(0 * slope, a), own(slope, a))) for r, a in
                        ((here[name], layout), (there[name], WHOLE))]  # fmt: skip
                found[f"{name}, {kind}"] = {"slope": apart(told[0][1], told[1][1], layout)}
                continue
            expected, answer = answers(there[name], WHOLE, slope), answers(here[name], layout, slope)
            found[f"{name}, {kind}"] = {key: apart(answer[key], expected[key], layout) for key in expected}
    return found


def check_region_errors(rank: int, world_size: int) -> dict[str, str]:
    """What only one rank can see, all of them are told."""
    layout = shards(rank, world_size)
    good = torch.ones(len(own(torch.zeros(DIM), layout)))
    bad = good.clone()
    if rank == 0:
        bad[1] = -2.0
    broken = bad.clone()
    broken[bad < 0] = torch.inf
    return {
        "half width": raised(lambda: Box(bad, layout=layout)),
        "anchor": raised(lambda: Box.keskar(broken, 0.1, layout=layout)),
        "weight": raised(lambda: Ball(0.1, bad, layout)),
        "lbfgsb": raised(lambda: maximizers.LBFGSB().maximize(lambda e: (0.0, e), Box(good, layout=layout), 0 * good)),
    }


def raised(work: Callable[[], Any]) -> str:
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


# ---------------------------------------------------------------------- a function that is known


class Quadratic:
    """``loss + <slope, e> + ½ Σ dᵢ eᵢ² + ½ Σ (U e)²``: an objective of few lines, whole or in shards."""

    num_samples, num_batches, has_classes, loss = 100, 1, True, 1.0
    hvp_mode, hvp_check, hvp_error, first_rank = "by hand", "", 0.0, 0

    def __init__(self, layout: Layout, blocks: Mapping[str, int] = BLOCKS, *, noise: float = 1.0) -> None:
        self.layout, self.dim = layout, sum(blocks.values())
        self.origin, self._slope, diagonal, *rows = (own(x, layout) for x in numbers(6, self.dim, seed=11))
        self._slope = 0.1 * self._slope
        self._rows, self._diagonal = (
            torch.stack(rows) / self.dim**0.5 * torch.tensor([[3.0], [2.0], [1.0]]).to(F64),
            noise * diagonal,
        )
        self.ranks = layout._ranks if isinstance(layout, Shards) else Ranks()
        starts, cut = [0, *torch.tensor(list(blocks.values())).cumsum(0).tolist()], layout
        numels = [
            len(own(torch.arange(a, b), of_range(cut, a, b))) if isinstance(cut, Shards) else b - a
            for a, b in itertools.pairwise(starts)
        ]
        self.space = SimpleNamespace(names=list(blocks), numels=numels)
        self.memory = MemoryBudget("4GB", device=torch.device("cpu"), vector_bytes=self.origin.nbytes)
        self.gradients, self.products = 0, 0

    @property
    def cost(self) -> Any:
        return SimpleNamespace(gradients=float(self.gradients))

    def value_and_grad(self, e: Tensor | None = None) -> tuple[float, Tensor]:
        self.gradients += 1
        e = torch.zeros_like(self.origin) if e is None else e
        inner = self.layout.matvec(self._rows, e)
        local = torch.stack([(self._slope * e).sum(), 0.5 * (self._diagonal * e * e).sum()])
        value = self.loss + float(self.layout.sums(local).sum()) + 0.5 * float(inner @ inner)
        return value, self._slope + self._diagonal * e + self._rows.T @ inner

    def value(self, e: Tensor | None = None) -> float:
        self.gradients -= 1
        return self.value_and_grad(e)[0]

    def hvp(self, v: Tensor) -> Tensor:
        self.products += 1
        return self._diagonal * v + self._rows.T @ self.layout.matvec(self._rows, v)

    def sketch(self, max_samples: int) -> Any:
        return SimpleNamespace(
            share=0.1,
            probabilities=lambda: torch.tensor([0.5, 0.3, 0.2]),
            gradient=lambda direction: direction.to(F64) @ self._rows,
        )

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        with self.ranks.measuring():
            yield

    def hvp_by(self, mode: str | None) -> Any:
        return self.session()


SOLVERS: dict[str, Any] = {
    f"{direction} {rule}": maximizers.Ascent(along(), by(), max_gradients=7)
    for direction, along in {
        "vertex": maximizers.ToVertex,
        "sign": maximizers.AlongSign,
        "gradient": maximizers.AlongGradient,
    }.items()
    for rule, by in {
        "backtracking": maximizers.Backtracking,
        "halving": maximizers.Halving,
        "spectral": maximizers.Spectral,
    }.items()
} | {
    "several starts": maximizers.MultiStart(),
    "several starts by apgd": maximizers.MultiStart(maximizers.apgd(), max_gradients=40),
    "best so far": maximizers.BestSoFar(maximizers.apgd(10)),
}  # fmt: skip
FEW_SOLVERS = ("vertex backtracking", "sign halving", "gradient spectral", "several starts", "best so far")


def check_maximizers(rank: int, world_size: int) -> dict[str, Any]:
    layout, found = shards(rank, world_size), {}
    for region in ("keskar", "ball", "ellipsoid", "plain") if world_size == 2 else ("keskar", "ball"):
        for name, solver in SOLVERS.items():
            if (world_size > 2 or region != "keskar") and name not in FEW_SOLVERS:
                continue
            for start in (0.0, 0.01) if region == "keskar" and world_size == 2 else (0.0,):
                here, there = (climbed(solver, region, start, a) for a in (layout, WHOLE))
                found[f"{name}, {region}, {start}"] = {key: apart(here[key], there[key], layout) for key in there}
    return found


def climbed(solver: Any, name: str, start: float, layout: Layout) -> dict[str, Any]:
    objective, region = Quadratic(layout), regions(layout)[name]
    first, *others = (own(x, layout) for x in numbers(4, seed=12))
    proposals = [(f"proposal {i}", region.ascent_vertex(other)) for i, other in enumerate(others)]
    best = solver.maximize(objective.value_and_grad, region, region.project(start * first), iter(proposals))
    return {
        "value": best.value,
        "point": best.perturbation,
        "gap": best.gap,
        "message": best.status.message,
        "counts": [best.steps, best.gradients, best.rejections, best.non_finite, objective.gradients],
        "starts": [list(best.start_values), list(best.start_names), list(best.start_gradients)],
        "rises": float(best.value > objective.loss),
    }


# ---------------------------------------------------------------------- Krylov


def check_lanczos(rank: int, world_size: int) -> dict[str, Any]:
    found = {}
    settings = {which: {"which": which} for which in WHICH}
    settings |= {f"in {storage}": {"storage": storage, "max_basis": 8} for storage in STORAGES}
    settings |= {"small basis": {"max_basis": 6, "tolerance": 1e-9}, "copies": {"check_multiplicity": True}}
    settings |= {"whole space": {"k": 40, "guard": 0, "max_basis": 42}}
    if world_size > 2:
        settings = {name: settings[name] for name in ("LA", "in half", "copies", "whole space")}
    for name, setting in settings.items():
        request = LanczosRequest(**{"k": 3, "num_matvecs": 600, "keep_basis": True, **setting})
        blocks = TINY_BLOCKS if name == "whole space" else SMALL_BLOCKS
        layout = shards(rank, world_size, TINY if name == "whole space" else SMALL)
        (here, basis), (there, _) = (krylov(request, a, blocks) for a in (layout, WHOLE))
        if name == "whole space":  # of which nothing but rounding is left
            here["removed"] = here["removed"].abs() < 1e-12
            there["removed"] = there["removed"].abs() < 1e-12
        found[name] = {key: apart(here[key], there[key], layout) for key in there}
        found[name] |= {"found": here["values"], "bytes": basis.nbytes, "size": len(basis)}
    return found


def krylov(request: LanczosRequest, layout: Layout, blocks: Mapping[str, int]) -> tuple[dict[str, Any], Basis]:
    objective = Quadratic(layout, blocks)
    with objective.session():
        start = layout.normal(torch.Generator().manual_seed(1), objective.origin)
        run = lanczos(objective.hvp, start, request, layout=layout)
        removed = run.remove(objective.origin)
        vectors = run.vectors
    assert run._basis is not None
    signs = [1.0 if layout.dot(vector, objective.origin) > 0 else -1.0 for vector in vectors]
    return {
        "values": run.values.tolist(),
        "converged": [run.converged, run.num_matvecs, run.num_hidden, run.basis_size, objective.products],
        "small residuals": [bool((run.residuals <= request.tolerance * run.values.abs()).all())],
        "vectors": vectors * torch.tensor(signs, dtype=F64)[:, None],
        "removed": removed,
    }, run._basis


def check_invariant_space(rank: int, world_size: int) -> dict[str, Any]:
    """Of low rank: the Krylov space ends before enough pairs are found, and goes on from a new random vector."""
    layout, found = shards(rank, world_size, SMALL), {}
    for name, a in (("shards", layout), ("whole", WHOLE)):
        objective = Quadratic(a, SMALL_BLOCKS, noise=0.0)
        with objective.session():
            start = a.normal(torch.Generator().manual_seed(1), objective.origin)
            run = lanczos(objective.hvp, start, LanczosRequest(k=5, num_matvecs=100), layout=a)
        found[name] = [*run.values[:3].tolist(), run.num_matvecs, run.converged]
    return found


def check_orthogonal(rank: int, world_size: int) -> dict[str, float]:
    """A vector nearly in the span: what is left has the length that is told, and no part in the span."""
    layout = shards(rank, world_size)
    basis = Basis(6, own(torch.zeros(DIM, dtype=F64), layout), layout=layout)
    rows, _ = torch.linalg.qr(torch.stack(numbers(6, seed=2)).T)
    for i, row in enumerate(rows.T):
        basis.store(i, own(row, layout))
    found = {}
    for rest in (1.0, 1e-3, 1e-6):
        whole = rows @ torch.ones(6, dtype=F64) + rest * numbers(1, seed=3)[0] / DIM**0.5
        left, lacked, square = basis.orthogonalize(own(whole, layout), 6, torch.zeros(6, dtype=F64), 6)
        expected = whole - rows @ (rows.T @ whole)
        found[f"{rest} square"] = apart(float(square), float(expected @ expected), layout)
        found[f"{rest} left"] = float((left - own(expected, layout)).abs().max()) if len(left) else 0.0
        found[f"{rest} lacked"] = float((lacked - rows.T @ whole).abs().max())
    return found


def check_traces(rank: int, world_size: int) -> dict[str, Any]:
    layout, found = shards(rank, world_size, SMALL), {}
    here, there = traces(layout), traces(WHOLE)
    for name in there:
        found[name] = apart(here[name], there[name], layout)
    return found


def traces(layout: Layout) -> dict[str, Any]:
    objective = Quadratic(layout, SMALL_BLOCKS)
    with objective.session():
        operator = Curvature().on(objective)
        start = layout.normal(torch.Generator().manual_seed(1), operator.like)
        run = lanczos(operator.matvec, start, LanczosRequest(k=3, keep_basis=True), layout=layout)
        found: dict[str, Any] = {}
        for name, basis in (("deflated", run), ("plain", None)):
            rng = torch.Generator().manual_seed(2)
            probes = Probes(operator.matvec, operator.like, rng, run=basis, blocks=operator.blocks, layout=layout)
            found[f"{name} trace"] = estimate(probes.trace(6))
            found[f"{name} norm"] = estimate(probes.squared_norm(6))
            found[f"{name} blocks"] = {block: estimate(e) for block, e in probes.traces_of_blocks(6).items()}
        for name, method in (("hutch++", hutch_pp), ("xtrace", xtrace)):
            rng = torch.Generator().manual_seed(3)
            found[name] = estimate(method(operator.matvec, operator.like, 24, rng, layout=layout))
    return found


def estimate(found: Any) -> list[float]:
    return [found.value, found.standard_error]


def check_operators(rank: int, world_size: int) -> dict[str, Any]:
    """Blocks and scales: of the whole operator's matrix."""
    layout, found = shards(rank, world_size, SMALL), {}
    for name, curvature in {
        "whole": Curvature(),
        "block": Curvature(select=GLOBS),
        "empty block": Curvature(select=("weight", "bias")),
        "adaptive": Curvature(adaptive=True),
        "adaptive block": Curvature(select="weight", adaptive=True),
    }.items():
        here, there = (curvature.on(Quadratic(a, SMALL_BLOCKS)) for a in (layout, WHOLE))
        v = numbers(1, there.dim, seed=4)[0]
        product, inner = here.matvec(own(v, here.layout)), here.layout
        draws = [o.layout.normal(torch.Generator().manual_seed(5), o.like) for o in (here, there)]
        found[name] = [
            apart(here.dim, there.dim, inner),
            apart(product, there.matvec(v), inner),
            apart(draws[0], draws[1], inner),
            apart([sum(gathered(part.stop - part.start) for part in here.blocks.values())], [there.dim], inner),
        ]
    return found


def gathered(count: int) -> int:
    total = torch.tensor(count)
    dist.all_reduce(total)
    return int(total)


METRICS: dict[str, tuple[Any, Mapping[str, int], Mapping[int, Any]]] = {
    "epsilon_box": (EpsilonBox(), BLOCKS, CUTS),
    "epsilon_box by eigenvectors": (EpsilonBox(eigenvectors=1, max_targets=0), BLOCKS, CUTS),
    "epsilon_box of few": (EpsilonBox(max_targets=0), SMALL_BLOCKS, SMALL),
    "epsilon_box by apgd": (EpsilonBox(maximizer="apgd"), BLOCKS, CUTS),
    "hessian_topk": (HessianTopK(k=2), SMALL_BLOCKS, SMALL),
    "hessian_topk of a block": (HessianTopK(k=2, select="weight"), SMALL_BLOCKS, SMALL),
    "hessian_topk of half": (HessianTopK(k=2, storage="half"), SMALL_BLOCKS, SMALL),
    "hessian_topk of few": (HessianTopK(k=2, select="scale"), SMALL_BLOCKS, SMALL),
    "hessian_bottom": (HessianBottom(), SMALL_BLOCKS, SMALL),
    "hessian_bottom certified": (HessianBottom(certify=True), SMALL_BLOCKS, SMALL),
    "adaptive_topk": (AdaptiveTopK(k=2), SMALL_BLOCKS, SMALL),
    "spectral_density": (SpectralDensity(), SMALL_BLOCKS, SMALL),
    "hessian_trace": (HessianTrace(), SMALL_BLOCKS, SMALL),
    "hessian_trace of hutchinson": (HessianTrace(method="hutchinson", adaptive=True), SMALL_BLOCKS, SMALL),
    "hessian_trace of xtrace": (HessianTrace(method="xtrace", select=GLOBS), SMALL_BLOCKS, SMALL),
    "hessian_trace of hutch++": (HessianTrace(method="hutch++"), SMALL_BLOCKS, SMALL),
    "hessian_frobenius": (HessianFrobenius(), SMALL_BLOCKS, SMALL),
}


def check_metrics(rank: int, world_size: int) -> dict[str, Any]:
    found = {}
    for name, (metric, blocks, cuts) in METRICS.items():
        if world_size > 2 and name not in ("epsilon_box", "hessian_topk of a block", "hessian_trace"):
            continue
        layout = shards(rank, world_size, cuts)
        here, there = (told(metric(Quadratic(a, blocks), torch.Generator().manual_seed(0))) for a in (layout, WHOLE))
        found[name] = {key: apart(here[key], there[key], layout) for key in there}
    return found


def told(result: MetricResult) -> dict[str, Any]:
    return {"value": result.value, "error": result.standard_error, "kind": str(result.status.kind), **result.details}


REAL: dict[str, Any] = {
    "epsilon_box": EpsilonBox(sketch_samples=40),
    "epsilon_box_eigenvectors": EpsilonBox(max_targets=0, eigenvectors=1),
    "epsilon_box_spectral": EpsilonBox(maximizer="spectral_projected_gradient"),
    "hessian_topk": HessianTopK(k=2),
    "block": HessianTopK(k=2, select=("2.*", "4.bias")),
    "adaptive_topk": AdaptiveTopK(k=1),
    "hessian_bottom": HessianBottom(),
    "hessian_trace": HessianTrace(),
    "xtrace": HessianTrace(method="xtrace"),
    "hessian_frobenius": HessianFrobenius(),
    "spectral_density": SpectralDensity(),
    "gauss_newton_topk": "gauss_newton_topk",
    "random_subspace": "random_subspace",
    "lbfgsb": EpsilonBox(maximizer="lbfgsb"),
}


def check_real(rank: int, world_size: int) -> dict[str, Any]:
    """A network of ``fully_shard``, as if its gathered weights did not fit."""
    model = shard_checks.sharded("blocks")
    fits, sharded.fits_gathered = sharded.fits_gathered, lambda *args: False
    try:
        with rank_checks.quiet():
            return rank_checks.told(measure_sharpness(model, rank_checks.whole(45), REAL))
    finally:
        sharded.fits_gathered = fits


# ---------------------------------------------------------------------- work and failures


def check_collectives(rank: int, world_size: int) -> dict[str, int]:
    """All-reduces of one step each."""
    layout, found = shards(rank, world_size), {}
    calls: Counter[str] = Counter()
    y, slope = (own(0.01 * x, layout) for x in numbers(2, seed=13))
    out, box, ball = torch.empty_like(y), regions(layout)["keskar"], regions(layout)["ball"]
    ellipsoid, like = regions(layout)["ellipsoid"], own(torch.zeros(DIM, dtype=F64), layout)
    steps = {
        "box vertex": lambda: box.vertex_step(out, y, slope),
        "box gap": lambda: box.vertex_step(None, y, slope),
        "box linear": lambda: box.linear_point(out, slope, 0.1),
        "box projected": lambda: box.projected_step(out, y, None, slope, 0.1, signed=True),
        "box secant": lambda: box.secant(y, slope, slope, y),
        "box model": lambda: box.model_step(out, y, slope, slope, y),
        "box project": lambda: box.project(y),
        "ball vertex": lambda: ball.vertex_step(out, y, slope),
        "ellipsoid vertex": lambda: ellipsoid.vertex_step(out, y, slope),
        "ball secant": lambda: ball.secant(y, slope, slope, y),
        "plain vertex": lambda: stepped(regions_plain).vertex_step(out, y, slope),
        "draw": lambda: layout.normal(torch.Generator(), y),
    }
    regions_plain = regions(layout)["plain"]
    basis = Basis(8, like, layout=layout)
    for i, vector in enumerate(torch.linalg.qr(torch.stack(numbers(8, seed=2)).T)[0].T):
        basis.store(i, own(vector, layout))
    steps["rotate"] = lambda: basis.rotate(torch.eye(8, dtype=F64)[:, :3])
    steps["combine"] = lambda: basis.combine(torch.eye(8, dtype=F64))
    for filled in (3, 7):
        known = torch.zeros(filled, dtype=F64)
        steps[f"against {filled}"] = lambda n=filled, e=known: basis.orthogonalize(slope, n, e, n)
    for name, step in steps.items():
        with rank_checks.counted(calls):
            step()
        found[name] = sum(calls.values())
        calls.clear()
    for steps_made in (10, 20):  # of a run, the products included: one all-reduce each
        objective = Quadratic(layout)
        with rank_checks.counted(calls), objective.session():
            request = LanczosRequest(k=steps_made, guard=0, num_matvecs=steps_made, max_basis=22)
            lanczos(objective.hvp, slope, request, layout=layout)
        found[f"run of {steps_made}"] = calls["all_reduce"]
        calls.clear()
    return found


class Broken(Quadratic):
    """Fails in the fourth evaluation of one rank."""

    def value_and_grad(self, e: Tensor | None = None) -> tuple[float, Tensor]:
        self._fail()
        return super().value_and_grad(e)

    def hvp(self, v: Tensor) -> Tensor:
        self._fail()
        return super().hvp(v)

    def _fail(self) -> None:
        if self.ranks.rank == 1 and self.gradients + self.products == 3:
            raise OSError("the disk is full")


def check_failures(rank: int, world_size: int) -> dict[str, str]:
    layout, found = shards(rank, world_size), {}
    ranks = layout._ranks

    def solved(name: str) -> None:
        objective, region = Broken(layout), regions(layout)["keskar"]
        SOLVERS[name].maximize(objective.value_and_grad, region, 0 * objective.origin)

    def run(metric: Any) -> None:
        metric(Broken(layout), torch.Generator().manual_seed(0))

    works: dict[str, Callable[[], None]] = {
        name: lambda n=name: solved(n) for name in ("vertex backtracking", "several starts")
    }
    works |= {"hessian_topk": lambda: run(HessianTopK(k=2)), "hessian_trace": lambda: run(HessianTrace(method="hutch++"))}
    for name, work in works.items():

        def together(work: Callable[[], None] = work) -> None:
            with ranks.together():
                work()

        found[name] = raised(together)
    return found


CHECKS: dict[str, Callable[[int, int], Any]] = {
    name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")
}
