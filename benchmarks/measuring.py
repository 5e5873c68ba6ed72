"""How work, time and memory are taken, the same way in every benchmark."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

from .problems import Problem

__all__ = ["GRADIENTS_PER_HVP", "GRADIENTS_PER_VALUE", "clock", "peak_bytes", "repeat"]

# what the work would cost at the best: a forward pass is a third of a gradient; a product differentiates a gradient once
# more, which is two gradients at best and three without sharing anything
GRADIENTS_PER_VALUE = 1 / 3
GRADIENTS_PER_HVP = 3.0

clock = time.process_time
"""Seconds of the processor on one thread: unlike wall time, they do not count what other programs took."""


def repeat(benchmark: Any, work: Callable[[], object], problem: Problem, *, rounds: int) -> None:
    """Time ``work``, and before every run the plain torch gradient of the problem, so that both see the same machine.

    Stores the median seconds of both and the median over the rounds of their ratio; nothing under
    ``--benchmark-disable``. The caller has run ``work`` once already: the first run allocates and chooses kernels.
    """
    if not benchmark.enabled:
        work()
        return
    reference: list[float] = []
    ratios: list[float] = []

    def take_reference() -> None:
        reference.append(_median_seconds(problem.reference_gradient, repeats=5))
        problem.take_gradient()

    def timed() -> None:
        began = clock()
        work()
        ratios.append((clock() - began) / reference[-1])

    problem.reference_gradient()
    benchmark.pedantic(timed, setup=take_reference, rounds=rounds)
    benchmark.extra_info.update(
        seconds=benchmark.stats.stats.median,
        reference_seconds=statistics.median(reference),
        ratios={"reference_gradients": statistics.median(ratios)},
    )


def _median_seconds(work: Callable[[], object], *, repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        began = clock()
        work()
        seconds.append(clock() - began)
    return statistics.median(seconds)


def peak_bytes(work: Callable[[], object]) -> int:
    """The most memory that torch held at once for ``work``, above what it held before.

    Adds up every allocation and release that torch's profiler saw on the CPU: the same number every time, unlike the
    resident set, which depends on what ran before. What torch did not allocate (NumPy, Python) is not in it.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    assert recorded.profiler is not None
    held = peak = 0
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
