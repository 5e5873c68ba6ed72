"""The comparison: every solver at every budget on every problem of a half, as shares of the best known maximum."""

from __future__ import annotations

import argparse
import concurrent.futures
import fnmatch
import hashlib
import importlib.util
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import sharpness_plugins
from sharpness_plugins import sampling

from .networks import HALVES, one_thread
from .problems import Problem, check_answer, problems_of
from .references import NUM_GRADIENTS, References, search, share
from .solvers import SOLVERS, Solver

__all__ = ["Row", "Summary", "main", "run_problem", "solvers_from", "summaries", "table"]

BUDGETS = (12, 24, 48)
LOG = Path(__file__).parent / "confirmation_log.jsonl"
NEARLY = 0.99
RESAMPLES = 2000


@dataclass(frozen=True)
class Row:
    """One solver's answer at one budget on one problem; ``forwards``: passes that the model itself saw."""

    problem: str
    solver: str
    budget: int
    value: float
    gradients: float
    equivalents: float
    forwards: float
    seconds: float


@dataclass(frozen=True)
class Summary:
    """One solver at one budget over all problems.

    Attributes:
        mean, worst, nearly: share of the best known rise: mean, worst, and how often above .99.
        low, high: 95 % of the means when networks (not problems: those of one network resemble each other) are drawn anew.
        equivalents, most: gradient-equivalents, mean and largest.
    """

    solver: str
    budget: int
    problems: int
    mean: float
    low: float
    high: float
    worst: float
    worst_problem: str
    nearly: float
    gradients: float
    most_gradients: float
    equivalents: float
    most: float
    seconds: float


# ---------------------------------------------------------------------- running


def run_problem(problem: Problem, solvers: Mapping[str, Solver], budgets: Sequence[int], *, seed: int = 0) -> list[Row]:
    """Every solver at every budget; each answer checked by plain torch, each cost against the passes that the model saw.

    Raises:
        AssertionError: an answer is wrong, or claims less work than the objective counted, or hides passes from it.
    """
    rows = []
    objective, made = problem.objective, problem.network
    seen = 0

    def count(module: torch.nn.Module, inputs: Any) -> None:
        nonlocal seen
        seen += len(inputs[0])

    for name, solver in solvers.items():
        for budget in budgets:
            solve = solver(budget)
            if solve is None:
                continue
            seen, before, began = 0, objective.cost, time.process_time()
            handle = made.model.register_forward_pre_hook(count)
            try:
                answer = solve(objective, problem.epsilon, sampling.generator_for(seed, problem.name))
            finally:
                handle.remove()
            if answer is None:
                continue
            seconds, cost = time.process_time() - began, objective.cost - before
            forwards = seen / len(made.inputs)
            where = f"{name} at {budget} on {problem.name}"
            if answer.gradients < cost.gradients - 1e-6 or answer.equivalents < cost.gradients + cost.values / 3 - 1e-6:
                raise AssertionError(f"{where} claims {answer[1:3]} and used {cost}")
            if forwards > cost.gradients + cost.values + cost.hvps + 1e-6:
                raise AssertionError(f"{where}: the model saw {forwards:.3g} passes, and the objective counted {cost}")
            value = check_answer(problem, answer.value, answer.perturbation)
            rows.append(Row(problem.name, name, budget, value, answer.gradients, answer.equivalents, forwards, seconds))
    return rows


def _work(task: tuple[Problem, Sequence[str], Sequence[int], str | None, int]) -> list[Row]:
    problem, names, budgets, candidates, seed = task
    known = solvers_from(candidates)
    with one_thread():
        return run_problem(problem, {name: known[name] for name in names}, budgets, seed=seed)


def solvers_from(candidates: str | None) -> dict[str, Solver]:
    """Those of ``solvers.py``, and those of a file, which must not have their names."""
    known = dict(SOLVERS)
    if candidates is None:
        return known
    spec = importlib.util.spec_from_file_location("inner_maximisation_candidates", candidates)
    if spec is None or spec.loader is None:
        raise SystemExit(f"--candidates must name a Python file, got {candidates}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    offered: dict[str, Solver] = module.SOLVERS
    if taken := sorted(known.keys() & offered.keys()):
        raise SystemExit(f"{candidates} redefines {', '.join(taken)}; give candidates names of their own")
    return known | offered


def _rows(tasks: Sequence[Any], jobs: int) -> Iterator[list[Row]]:
    if jobs == 1:
        yield from map(_work, tasks)
        return
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_work, tasks)


# ---------------------------------------------------------------------- summing up


def summaries(rows: Sequence[Row], best: Mapping[str, tuple[float, float]]) -> list[Summary]:
    """One for every (solver, budget), in the order of the rows; ``best``: problem to (best value, loss at the origin)."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.solver, row.budget), []).append(row)
    return [_summary(solver, budget, group, best) for (solver, budget), group in groups.items()]


def _summary(solver: str, budget: int, rows: Sequence[Row], best: Mapping[str, tuple[float, float]]) -> Summary:
    shares = {row.problem: share(row.value, *best[row.problem]) for row in rows}
    low, high = _interval(shares)
    worst = min(shares, key=lambda name: shares[name])
    return Summary(
        solver=solver,
        budget=budget,
        problems=len(shares),
        mean=_mean(shares.values()),
        low=low,
        high=high,
        worst=shares[worst],
        worst_problem=worst,
        nearly=_mean(float(s > NEARLY) for s in shares.values()),
        gradients=_mean(row.gradients for row in rows),
        most_gradients=max(row.gradients for row in rows),
        equivalents=_mean(row.equivalents for row in rows),
        most=max(row.equivalents for row in rows),
        seconds=_mean(row.seconds for row in rows),
    )


def _mean(numbers: Any) -> float:
    listed = list(numbers)
    return math.fsum(listed) / len(listed)


def _interval(shares: Mapping[str, float]) -> tuple[float, float]:
    groups: dict[str, list[float]] = {}
    for name, value in shares.items():
        groups.setdefault(name.rpartition("@")[0], []).append(value)
    sums = torch.tensor([[math.fsum(group), len(group)] for group in groups.values()], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(sums), (RESAMPLES, len(sums)), generator=generator)
    totals = sums[drawn].sum(1)
    low, high = torch.quantile(totals[:, 0] / totals[:, 1], torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def table(found: Sequence[Summary]) -> str:
    """Markdown, one budget after the other, the best mean first."""
    head = ["solver", "mean", "95 %", "worst", "on", "> .99", "gradients", "max", "equivalents", "max", "problems"]
    lines = []
    for budget in sorted({s.budget for s in found}):
        lines += [f"Budget {budget}:", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for s in sorted((s for s in found if s.budget == budget), key=lambda s: -s.mean):
            cells = [s.solver, f"{s.mean:.4f}", f"{s.low:.3f}–{s.high:.3f}", f"{s.worst:.3f}", s.worst_problem]
            cells += [f"{s.nearly:.2f}", f"{s.gradients:.1f}", f"{s.most_gradients:.1f}", f"{s.equivalents:.1f}"]
            cells += [f"{s.most:.1f}" + (" (over)" if s.most > budget + 1e-6 else ""), str(s.problems)]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


# ---------------------------------------------------------------------- the command


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inner_maximisation", description=__doc__)
    parser.add_argument("--half", choices=tuple(HALVES), default="tuning")
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS))
    parser.add_argument("--solvers", help="names, separated by commas; default: all")
    parser.add_argument("--problems", default="*", help="a glob on names such as mlp-small@0.001")
    parser.add_argument("--candidates", help="a Python file with more solvers in a dictionary SOLVERS")
    parser.add_argument("--json", type=Path, help="where to write every answer and the summaries")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--seed", type=int, default=0, help="of the solvers' random starts")
    parser.add_argument("--search", action="store_true", help="search for references; compares nothing")
    parser.add_argument("--gradients", type=int, default=NUM_GRADIENTS, help="of --search, for each problem")
    options = parser.parse_args(arguments)
    chosen = [problem for problem in problems_of(options.half) if fnmatch.fnmatch(problem.name, options.problems)]
    if not chosen:
        parser.error(f"no problem of the {options.half} half matches {options.problems}")
    if options.search:
        return _search(chosen, options.gradients, options.seed)
    known = solvers_from(options.candidates)
    names = options.solvers.split(",") if options.solvers else list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no solver is called {', '.join(unknown)}; there are {', '.join(known)}")
    references = References()
    if missing := [problem.name for problem in chosen if references.of(problem) is None]:
        said = f"no reference for {', '.join(missing[:3])}{' and others' * (len(missing) > 3)}"
        if options.half == "confirmation":
            parser.error(f"{said}, or this machine's networks are others. Run --half confirmation --search first")
        print(f"{said}: the best of this run is taken for one. Run --search", file=sys.stderr)
    if options.half == "confirmation":
        _log(names, options)
    tasks = [(problem, names, options.budgets, options.candidates, options.seed) for problem in chosen]
    rows = []
    for done, found in enumerate(_rows(tasks, options.jobs), 1):
        rows += found
        print(f"\r{done} of {len(tasks)} problems", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    best = {}
    for problem in chosen:
        found_best = max((row for row in rows if row.problem == problem.name), key=lambda row: row.value)
        reference = references.offer(problem, found_best.value, f"{found_best.solver} at {found_best.budget}")
        best[problem.name] = (reference.value, reference.origin_loss)
    found_summaries = summaries(rows, best)
    print(table(found_summaries))
    if options.json is not None:
        report = {
            "half": options.half,
            "versions": {"torch": torch.__version__, "sharpness_plugins": sharpness_plugins.__version__},
            "summaries": [asdict(s) for s in found_summaries],
            "rows": [asdict(row) | {"share": share(row.value, *best[row.problem])} for row in rows],
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _search(problems: Sequence[Problem], num_gradients: int, seed: int) -> int:
    """Prints nothing about what found what: the confirmation half must not be looked at."""
    references = References()
    with one_thread():
        for done, problem in enumerate(problems, 1):
            known = references.of(problem)
            if known is None or known.gradients < num_gradients:
                value, _, how, used = search(problem, num_gradients=num_gradients, seed=seed)
                references.offer(problem, value, how, gradients=used)
            print(f"\r{done} of {len(problems)} references", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return 0


def _log(names: Sequence[str], options: argparse.Namespace) -> None:
    """A line for every look at the confirmation half: it confirms only what was fixed before the first one."""
    digest = hashlib.sha256()
    for file in sorted(Path(sharpness_plugins.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    if options.candidates is not None:
        digest.update(Path(options.candidates).read_bytes())
    entry = {
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "solvers": list(names),
        "budgets": options.budgets,
        "problems": options.problems,
        "seed": options.seed,
        "code": digest.hexdigest()[:16],
    }
    with LOG.open("a") as log:
        log.write(json.dumps(entry) + "\n")
