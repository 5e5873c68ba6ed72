"""Check every kernel on a GPU, then time it as a share of the rate at which the GPU copies memory.

``python -m benchmarks.gpu.run --out results.json`` from the top folder. First the copy rate, on more than 4 GB and rotating
buffers; then every operation on random data with NaN in its outputs, against plain torch in float64 on the CPU; then the
times, at three sizes, of the Triton kernel, plain torch piece by piece, and what the case names as peers, also compiled.

Exits with 2 where there is no CUDA device, with 1 if a result is wrong. ``--dry-run`` runs all of it on the CPU, tiny and
with plain torch only: it proves the script, not the kernels, and its times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharpness_plugins.kernels import dispatch

from .cases import CASES, HALF, Args, Case

__all__ = ["main"]

SIZES = (25_557_032, 124_000_000, 1_000_000_000)  # ResNet-50, GPT-2 small, a billion
CHECKED = (1, 4099, 1_000_003)
COPIED_BYTES = 2**32
TOLERANCES = {torch.float32: 2e-6, torch.float64: 1e-12, HALF: 2**-7}
STATISTICS_TOLERANCE = 1e-5
COMPILED = ("eager",)  # the peers that torch.compile is tried on


@dataclass(frozen=True)
class Check:
    """How far an implementation is from float64, relative to the largest element of each output."""

    case: str
    implementation: str
    dtype: str
    size: int
    error: float
    statistics_error: float
    repeatable: bool
    right: bool


@dataclass(frozen=True)
class Timing:
    """Median milliseconds, and the rate of the least bytes as a share of the rate of a copy."""

    case: str
    implementation: str
    size: int
    milliseconds: float | None
    share_of_copy: float | None
    note: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="where to write the JSON; default: standard output")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=480.0, help="begin no further timing after this long")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU, plain torch only")
    options = parser.parse_args(argv)
    if not options.dry_run and not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.dry_run else "cuda")
    torch.manual_seed(0)
    deadline = time.monotonic() + options.seconds
    cases = [case for case in CASES if options.only in case.name]
    if not cases:
        parser.error(f"no case has {options.only!r} in its name; there are: {', '.join(case.name for case in CASES)}")
    rate = copy_rate(2**20 if options.dry_run else COPIED_BYTES, device)
    sizes, checked = ((2000, 5000), (1, 4099)) if options.dry_run else (SIZES, CHECKED)
    checks = [check for case in cases for check in checks_of(case, checked, device)]
    timings = [timing for size in sizes for case in cases for timing in timings_of(case, size, device, rate, deadline)]
    report = {
        **machine(device),
        "dry_run": options.dry_run,
        "copy_gigabytes_per_second": rate / 1e9,
        "checks": [asdict(check) for check in checks],
        "timings": [asdict(timing) for timing in timings],
    }
    text = json.dumps(report, indent=1)
    if options.out is None:
        print(text)
    else:
        options.out.write_text(text + "\n")
    for check in checks:
        if not check.right:
            print(f"WRONG: {check}", file=sys.stderr)
    return 0 if all(check.right for check in checks) else 1


def machine(device: torch.device) -> dict[str, Any]:
    triton = importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else None
    found: dict[str, Any] = {"torch": torch.__version__, "triton": triton, "python": platform.python_version()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"device": properties.name, "cuda": torch.version.cuda, "memory_gb": properties.total_memory / 1e9}
        found |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
        }
    else:
        found["device"] = "cpu"
    return found


def copy_rate(num_bytes: int, device: torch.device) -> float:
    """Bytes read and written per second by ``copy_``, in turn between buffers that no cache holds."""
    buffers = [torch.randn(num_bytes // 4, device=device) for _ in range(3)]
    turn = 0

    def copy() -> None:
        nonlocal turn
        buffers[(turn + 1) % 3].copy_(buffers[turn % 3])
        turn += 1

    return 2 * num_bytes / median_seconds(copy, device)


@contextlib.contextmanager
def implementation(name: str) -> Iterator[None]:
    before = os.environ.get(dispatch.VARIABLE)
    os.environ[dispatch.VARIABLE] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[dispatch.VARIABLE]
        else:
            os.environ[dispatch.VARIABLE] = before


def implementations(device: torch.device) -> list[str]:
    return ["triton", "torch"] if device.type == "cuda" else ["torch"]


def checks_of(case: Case, sizes: Sequence[int], device: torch.device) -> Iterator[Check]:
    for size in sizes:
        for dtype in case.dtypes:
            args = case.make(size, dtype, device)
            exact = {name: moved(value, torch.device("cpu"), torch.float64) for name, value in args.items()}
            with implementation("torch"):
                expected = case.run(exact)
            for name in implementations(device):
                first, second = copied(args), copied(args)
                with implementation(name):
                    found, again = case.run(first), case.run(second)
                error = max((off_by(first[output], exact[output]) for output in case.outputs), default=0.0)
                statistics_error = 0.0 if found is None or expected is None else relative(found, expected)
                repeatable = same(found, again) and all(same(first[output], second[output]) for output in case.outputs)
                # statistics of one element may be differences of rounded numbers
                sound = statistics_error <= STATISTICS_TOLERANCE or (size == 1 and statistics_error < 1)
                right = error <= TOLERANCES[dtype] and (sound or dtype is HALF) and repeatable
                yield Check(case.name, name, str(dtype), size, error, statistics_error, repeatable, right)


def timings_of(case: Case, size: int, device: torch.device, rate: float, deadline: float) -> Iterator[Timing]:
    if size > case.max_size:
        return
    ways: dict[str, Callable[[Args], object]] = {name: chosen(case, name) for name in implementations(device)}
    ways |= case.peers
    if device.type == "cuda":
        ways |= {f"{name} compiled": torch.compile(case.peers[name]) for name in COMPILED if name in case.peers}
        torch.cuda.empty_cache()
    try:
        args = case.make(size, torch.float32, device)
    except torch.OutOfMemoryError:
        yield Timing(case.name, "all", size, None, None, "not enough memory")
        return
    for name, way in ways.items():
        if time.monotonic() > deadline:
            yield Timing(case.name, name, size, None, None, "no time left")
            continue
        try:
            seconds = median_seconds(lambda way=way: way(args), device)
        except torch.OutOfMemoryError:
            yield Timing(case.name, name, size, None, None, "not enough memory")
            continue
        yield Timing(case.name, name, size, 1e3 * seconds, case.bytes_per_element * size / seconds / rate)


def chosen(case: Case, name: str) -> Callable[[Args], object]:
    def run(args: Args) -> object:
        with implementation(name):
            return case.run(args)

    return run


def median_seconds(work: Callable[[], object], device: torch.device, *, budget: float = 0.3) -> float:
    """Median over as many runs as take ``budget`` seconds, at least 5; the first three are not counted."""
    for _ in range(3):
        work()
    if device.type != "cuda":
        return statistics.median(_wall_seconds(work) for _ in range(5))
    torch.cuda.synchronize(device)
    once = _wall_seconds(lambda: (work(), torch.cuda.synchronize(device)))
    runs = max(5, min(200, int(budget / once)))
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
    for begin, end in marks:
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize(device)
    return statistics.median(begin.elapsed_time(end) for begin, end in marks) / 1e3


def _wall_seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A copy; whole numbers keep their dtype."""
    if isinstance(value, list):
        return [moved(item, device, dtype) for item in value]
    return value.to(device, dtype if value.is_floating_point() else value.dtype, copy=True)


def copied(args: Args) -> Args:
    return {name: [x.clone() for x in value] if isinstance(value, list) else value.clone() for name, value in args.items()}


def off_by(found: Any, exact: Any) -> float:
    """The largest difference relative to the largest element; infinite for NaN."""
    if isinstance(found, list):
        return max(off_by(a, b) for a, b in zip(found, exact, strict=True)) if found else 0.0
    if found.numel() == 0:
        return 0.0
    difference = (found.cpu().double() - exact).abs().max().item()
    scale = exact.abs().max().item() or 1.0
    return difference / scale if difference == difference else float("inf")


def relative(found: Tensor, expected: Tensor) -> float:
    expected = expected.double().cpu()
    scale = expected.abs().clamp(min=1e-300)
    error = ((found.double().cpu() - expected).abs() / scale).masked_fill(found.cpu() == expected, 0).max().item()
    return error if error == error else float("inf")


def same(a: Any, b: Any) -> bool:
    if isinstance(a, list):
        return all(same(x, y) for x, y in zip(a, b, strict=True))
    return a is b or torch.equal(a, b)


if __name__ == "__main__":
    sys.exit(main())
