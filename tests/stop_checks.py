"""What ranks do in ``test_ranks_stopped``: measurements that are stopped, killed and resumed on all of them together."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rank_checks
from rank_checks import network, own_part, quiet, raised, sharded, told, whole
from sharpness_plugins import basis, distributed, measure_sharpness, state_file, steps, stopping
from sharpness_plugins.errors import LostRankError
from sharpness_plugins.metrics import EpsilonBox, HessianTopK, HessianTrace, RandomSubspace
from sharpness_plugins.objective import Objective
from sharpness_plugins.report import MetricResult, SharpnessReport

LONG = HessianTopK(k=4, tolerance=1e-12, max_basis=9, num_matvecs=50)
METRICS = {"box": EpsilonBox(maximizer="lbfgsb_published"), "topk": LONG, "subspace": RandomSubspace(dim=5, draws=2)}
PRODUCTS = (1, 5, 14)


class Presses:
    """A progress listener that presses Ctrl-C in a batch of a metric, and makes some ranks slower than others."""

    def __init__(self, rank: int, who: list[int], metric: str, batches: int) -> None:
        self.rank, self.who, self.metric, self.batches, self.seen = rank, who, metric, batches, 0

    def __call__(self, event: Any) -> None:
        self.seen += event.metric == self.metric
        time.sleep(0.001 * self.rank)
        if event.metric == self.metric and self.seen == self.batches and self.rank in self.who:
            signal.raise_signal(signal.SIGINT)


def ending(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        "value": entry["value"],
        "kind": entry["status"]["kind"],
        "message": entry["status"]["message"],
        "details": entry["details"],
        "hvps": entry["cost"] and entry["cost"]["hvps"],
    }


def check_ctrl_c(rank: int, world_size: int) -> list[dict[str, Any]]:
    """Pressed on the first rank, on the last one, and on all, in the middle of an evaluation."""
    found = []
    for who in ([0], [world_size - 1], list(range(world_size))):
        for products in PRODUCTS:
            stopping._last_interrupt = -math.inf
            model = network()
            before = [parameter.tolist() for parameter in model.parameters()]
            listener = Presses(rank, who, "topk", 2 * products + 1)
            with quiet() as said:
                report = measure_sharpness(
                    model, whole(-(-90 // (2 * world_size))), METRICS, progress=listener
                )  # two for each rank
            found.append(
                {
                    "report": told(report),
                    "stopped": report.stopped,
                    "topk": ending(told(report)["results"]["topk"]),
                    "products": products,
                    "said": said,
                    "handler": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
                    "untouched": before == [parameter.tolist() for parameter in model.parameters()],
                }
            )
    return found


class Orphaned(list):
    """Its workers are stopped by the same Ctrl-C, on the last rank."""

    def __init__(self, last: bool) -> None:
        super().__init__(whole(20))
        self.last, self.passes = last, 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        for number, batch in enumerate(super().__iter__()):
            if self.last and self.passes == 9 and number == 2:
                signal.raise_signal(signal.SIGINT)
                raise RuntimeError("DataLoader worker (pid 1) exited unexpectedly")
            yield batch


def check_workers_that_die_of_ctrl_c(rank: int, world_size: int) -> dict[str, Any]:
    stopping._last_interrupt = -math.inf
    with quiet():
        report = measure_sharpness(network(), Orphaned(rank == world_size - 1), METRICS, cache_bytes=0)
    return {"stopped": report.stopped, "kinds": [str(result.status.kind) for result in report.values()]}


def check_the_clock_of_the_first(rank: int, world_size: int) -> dict[str, Any]:
    """Others have another limit, or none."""
    many = [HessianTopK(k=2), RandomSubspace(draws=100_000, dim=5)]
    limits = {"time_limit": 0.4} if rank == 0 else {"time_limit": 1e-3} if rank == 1 else {}
    with quiet():
        report = measure_sharpness(network(), whole(20), many, **limits)
        each = measure_sharpness(network(), whole(20), many, metric_time_limit=None if rank else 0.2)
    return {"stopped": [report.stopped, each.stopped], "reports": [told(report), told(each)]}


def check_ctrl_c_is_raised(rank: int, world_size: int) -> dict[str, Any]:
    """On one rank, which asked for that, and the others end, too. Nothing can be measured with these ranks afterwards."""
    try:
        measure_sharpness(
            network(),
            whole(20),
            METRICS,
            progress=Presses(rank, [1], "topk", 5),
            on_interrupt="raise" if rank == 1 else "return",
        )
    except (KeyboardInterrupt, LostRankError) as error:
        return {"lost": str(error) or type(error).__name__}
    return {}


def check_ctrl_c_while_waiting(rank: int, world_size: int) -> dict[str, Any]:
    """Rank 1 waits for the gradient of rank 0 when it is interrupted, and gives it what it needs before it leaves."""

    def slow(objective: Any, rng: Any) -> MetricResult:
        if rank == 0:
            time.sleep(1.0)
        else:
            threading.Timer(0.3, signal.raise_signal, [signal.SIGINT]).start()
        objective.value_and_grad()
        return MetricResult(objective.value())

    try:
        measure_sharpness(network(), whole(20), {"slow": slow}, on_interrupt="raise")
    except (KeyboardInterrupt, LostRankError) as error:
        return {"lost": str(error) or type(error).__name__}
    return {}


# ---------------------------------------------------------------------- state files


RESTARTING = HessianTopK(k=5, max_basis=10, tolerance=1e-6, check_multiplicity=True)
SETS: dict[str, list[Any]] = {
    "box": [EpsilonBox(max_targets=2), EpsilonBox(maximizer="lbfgsb", max_targets=0)],
    "shared": ["hessian_topk", "hessian_trace", "spectral_density"],
    "restarts": [RESTARTING],
    "others": [RandomSubspace(draws=2, dim=5), "gradient_noise_scale", "fisher_trace"],
}


def wider() -> nn.Sequential:
    """With too many weights for a whole basis: 147."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3)).double()


class Kill(KeyboardInterrupt):
    """As sudden as a kill, on all ranks at the same evaluation: nothing catches it."""


class Counter:
    """Counts the evaluations that are made, and kills in the middle of one of them."""

    def __init__(self) -> None:
        self.count, self.limit = 0, math.inf

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        batches, counter = Objective._batches, self

        def counted(self: Objective, **settings: Any) -> Iterator[Any]:
            counter.count += 1
            if counter.count >= counter.limit:
                raise Kill
            return batches(self, **settings)

        Objective._batches = counted  # type: ignore[method-assign]
        try:
            yield
        finally:
            Objective._batches = batches  # type: ignore[method-assign]


@contextlib.contextmanager
def keeping_all(*, allowance: float = math.inf) -> Iterator[None]:
    """However long it takes to keep a step on a busy machine."""
    steps._ALLOWANCE, before = allowance, steps._ALLOWANCE
    try:
        yield
    finally:
        steps._ALLOWANCE = before


def folder_of_all() -> Path:
    return Path(distributed.from_rank_zero(tempfile.mkdtemp()))


def place(folder: Path, rank: int, name: str = "state") -> Path:
    """The disk of the first rank is that of no other."""
    return folder / name if rank == 0 else Path("/proc/no such place") / str(rank)


def numbers(report: SharpnessReport) -> dict[str, Any]:
    """All that a report says of its metrics but the seconds."""
    found = told(report)["results"]
    for entry in found.values():
        entry["cost"] = {**entry["cost"], "seconds": None}
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def killed_again_and_again(path: Path, model: Any, loader: Any, metrics: list[Any], lives: list[int]) -> dict[str, Any]:
    counter, kills, made = Counter(), 0, 0
    with counter.counting(), keeping_all():
        uninterrupted = measure_sharpness(model, loader, metrics)
        needed = counter.count
        for limit in [*lives, math.inf]:
            counter.count, counter.limit = 0, limit
            try:
                report = measure_sharpness(model, loader, metrics, state_file=path)
                break
            except Kill:
                kills += 1
            finally:
                made += counter.count
        counter.count, counter.limit = 0, math.inf
        again = measure_sharpness(model, loader, metrics, state_file=path)
    return {
        "same": [numbers(one) == numbers(uninterrupted) for one in (report, again)],
        "numbers": numbers(uninterrupted),
        "kills": kills,
        "more": made - needed,
        "loss": report.loss == uninterrupted.loss,
        "evaluations of what is done": counter.count,
        "file": path.exists(),
    }


def check_kills(rank: int, world_size: int) -> dict[str, Any]:
    folder = folder_of_all()
    lives = torch.randint(7, 20, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    sets = SETS if world_size == 2 else {name: SETS[name] for name in ("box", "restarts")}
    found = {}
    for name, metrics in sets.items():
        # of two, the first rank has no data, so that the work that counts is not its own
        loader = own_part(world_size - 1 - rank, world_size) if name in ("box", "restarts") else whole(20)
        model = wider() if name in ("shared", "restarts") else network()
        found[name] = killed_again_and_again(place(folder, rank, name), model, loader, metrics, lives)
    return found


def check_kills_with_a_spread_basis(rank: int, world_size: int) -> dict[str, Any]:
    """Of which each rank has a part, that no file holds."""
    basis.WORTH_SHARING, before = 0, basis.WORTH_SHARING
    try:
        return killed_again_and_again(place(folder_of_all(), rank), wider(), whole(20), [RESTARTING], [9, 17, 25, 40])
    finally:
        basis.WORTH_SHARING = before


def check_kills_of_a_sharded_model(rank: int, world_size: int) -> dict[str, Any]:
    return killed_again_and_again(
        place(folder_of_all(), rank), sharded(network()), whole(20), SETS["shared"], [9, 17, 25, 40]
    )


def check_slices_of_time(rank: int, world_size: int) -> dict[str, Any]:
    """Ctrl-C on another rank in turn, until all is measured."""
    metrics, path = ["epsilon_box", "hessian_topk", HessianTrace()], place(folder_of_all(), rank)
    uninterrupted = numbers(measure_sharpness(network(), whole(20), metrics))
    for slices in range(40):
        stopping._last_interrupt = -math.inf
        listener = Presses(rank, [slices % world_size], "", 0)
        listener.metric, listener.batches = ("epsilon_box" if slices < 5 else "hessian_topk"), 20 + 2 * slices
        with quiet():
            report = measure_sharpness(network(), whole(20), metrics, progress=listener, state_file=path)
        if report.stopped is None:
            break
    return {"same": numbers(report) == uninterrupted, "slices": slices}


def check_whose_file_it_is(rank: int, world_size: int) -> dict[str, Any]:
    folder = folder_of_all()
    metric = HessianTopK(k=2)

    def resumed(name: str, loader: Any = None, *, chosen: Any = metric, **settings: Any) -> str:
        return raised(
            lambda: measure_sharpness(
                network(),
                whole(20) if loader is None else loader,
                chosen,
                **{"state_file": place(folder, rank, name)} | settings,
            )
        )

    if rank == 0:
        measure_sharpness(network(), whole(20), metric, ranks="alone", state_file=folder / "of one")
    found = {"of one": resumed("of one"), "of all": resumed("of all"), "of all again": resumed("of all")}
    inputs, targets = rank_checks.data()
    other = inputs + (inputs == inputs[-1]) * 1e-3  # the last sample, which another rank reads
    found["data"] = resumed("of all", list(zip(other.split(20), targets.split(20), strict=True)))
    found["metrics"] = resumed("of all", chosen=HessianTopK(k=3))
    found["alone"] = resumed("of all", ranks="alone") if rank == 0 else ""
    if rank == 0:
        content = (folder / "of all").read_bytes()
        (folder / "damaged").write_bytes(content[:40])
        (folder / "foreign").write_bytes(b"my thesis")
    for name in ("damaged", "foreign", "nowhere/state"):
        found[name] = resumed(name)
    found["not on the first"] = resumed("", state_file=None if rank == 0 else "/proc/no such place/x")
    found["on the first"] = resumed("", state_file=folder / "first" if rank == 0 else None)
    return found


def check_a_full_disk(rank: int, world_size: int) -> dict[str, Any]:
    """Of the first rank."""
    metrics, path = ["hessian_topk", "epsilon_box"], place(folder_of_all(), rank)
    uninterrupted = numbers(measure_sharpness(network(), whole(20), metrics))
    write, left = state_file._write, [20_000]

    def limited(file: Any, content: Any) -> None:
        if len(content) > left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= len(content)
        write(file, content)

    state_file._write = limited
    try:
        with quiet() as said:
            report = measure_sharpness(network(), whole(20), metrics, state_file=path)
    finally:
        state_file._write = write
    again = measure_sharpness(network(), whole(20), metrics, state_file=path)
    return {"said": said, "same": [numbers(one) == uninterrupted for one in (report, again)]}


def check_another_path(rank: int, world_size: int) -> dict[str, Any]:
    """A metric that is not deterministic, as none should be."""
    path, counter, shift = place(folder_of_all(), rank), Counter(), [0.0]

    def moody(objective: Any, rng: Any) -> MetricResult:
        return MetricResult(sum(objective.value(torch.full_like(objective.origin, 1e-3 * i + shift[0])) for i in range(8)))

    with counter.counting(), contextlib.suppress(Kill):
        counter.limit = 8
        measure_sharpness(network(), whole(20), {"moody": moody}, state_file=path)
    shift[0] = 1e-4
    with quiet() as said:
        report = measure_sharpness(network(), whole(20), {"moody": moody}, state_file=path)
    return {
        "said": said,
        "same": report["moody"].value == measure_sharpness(network(), whole(20), {"moody": moody})["moody"].value,
    }


def check_what_cannot_be_afforded(rank: int, world_size: int) -> dict[str, Any]:
    """Is not kept, on any rank, and is computed again."""
    path, counter = place(folder_of_all(), rank), Counter()

    def descends(objective: Any, rng: Any) -> MetricResult:
        point = torch.zeros_like(objective.origin)
        for _ in range(15):
            value, gradient = objective.value_and_grad(point)
            point = point - 0.1 * gradient
        return MetricResult(value, details={"norm": gradient.norm().item()})

    uninterrupted = numbers(measure_sharpness(wider(), whole(20), {"descends": descends}))
    with keeping_all(allowance=-math.inf), counter.counting():
        counter.limit = 12
        with contextlib.suppress(Kill):
            measure_sharpness(wider(), whole(20), {"descends": descends}, state_file=path)
        kept = path.stat().st_size if rank == 0 else 0
        counter.count, counter.limit = 0, math.inf
        report = measure_sharpness(wider(), whole(20), {"descends": descends}, state_file=path)
    return {"kept": kept, "same": numbers(report) == uninterrupted, "evaluations": counter.count}


def check_what_one_rank_evaluates_by_itself(rank: int, world_size: int) -> dict[str, Any]:
    """Is its own, and in no file that all of them read."""
    path, counter = place(folder_of_all(), rank), Counter()

    def own_losses(objective: Any, rng: Any) -> MetricResult:
        alone = Objective(network(), own_part(0, 2) if rank == 0 else whole(20)[: 1 + rank], ranks="alone")
        return MetricResult(sum(objective.ranks.gather(sum(alone.value() for _ in range(rank + 2)))) + objective.value())

    expected = measure_sharpness(network(), whole(20), {"own": own_losses})["own"].value
    with counter.counting(), contextlib.suppress(Kill):
        counter.limit = 4
        measure_sharpness(network(), whole(20), {"topk": "hessian_topk", "own": own_losses}, state_file=path)
    values = [
        measure_sharpness(network(), whole(20), {"topk": "hessian_topk", "own": own_losses}, state_file=path)["own"].value
        for _ in range(2)
    ]
    return {"same": values == [expected, expected]}


# ---------------------------------------------------------------------- lives that end by real signals


def lived(rank: int, world_size: int) -> dict[str, Any]:
    """Measures with a state file beside the folder where it is; the parent kills it."""
    metrics = [EpsilonBox(maximizer="lbfgsb_published"), "hessian_topk", "hessian_trace", RandomSubspace(draws=6, dim=10)]
    try:
        report = measure_sharpness(
            wider(), own_part(rank, world_size), metrics, state_file="../state" if rank == 0 else "/proc/no such place/x"
        )
    except LostRankError as error:
        return {"lost": str(error)}
    return {"numbers": numbers(report), "stopped": report.stopped}


def interrupted(rank: int, world_size: int) -> dict[str, Any]:
    """Measures without an end; the parent sends signals once it has begun."""
    metrics = {"box": EpsilonBox(maximizer="lbfgsb_published"), "endless": RandomSubspace(draws=100_000, dim=10)}
    with quiet():
        report = measure_sharpness(network(), whole(20), metrics, progress=begins(rank))
    return {"report": told(report), "stopped": report.stopped}


def begins(rank: int) -> Any:
    """A listener that makes a file once the endless metric has come to its tenth batch."""
    seen = Counter()

    def listen(event: Any) -> None:
        seen.count += event.metric == "endless"
        if seen.count == 10:
            Path(f"begun {rank}").touch()

    return listen


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}
ENDING = ("ctrl_c_is_raised", "ctrl_c_while_waiting")
IN_PROCESS = [name for name in CHECKS if name not in ENDING]
CHECKS |= {"lived": lived, "interrupted": interrupted}
