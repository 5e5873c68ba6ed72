"""The quality suite of the inner maximisation: its networks, its peers, its bookkeeping. No comparison is run."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import math
import mmap
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from sharpness_plugins import sampling
from sharpness_plugins.maximizers import LBFGSB
from sharpness_plugins.metrics import EpsilonBox
from sharpness_plugins.objective import Objective
from sharpness_plugins.regions import Box

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
NAME = "benchmarks_under_test"


def load(module: str) -> ModuleType:
    """By its path: another package on this machine may be called ``benchmarks``."""
    if NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(NAME, BENCHMARKS / "__init__.py")
        assert spec is not None
        sys.modules[NAME] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{NAME}.inner_maximisation.{module}")


networks, problems, peers = load("networks"), load("problems"), load("peers")
quadratics, references, run, solvers = load("quadratics"), load("references"), load("run"), load("solvers")
cost, end_to_end, frozen, memory = load("cost"), load("end_to_end"), load("frozen"), load("memory")

TINY = networks.Recipe(
    name="tiny",
    architecture="mlp",
    settings=(("widths", (13, 6, 3)), ("activation", "tanh")),
    data="wine",
    num_samples=60,
    batch_size=16,
    target_loss=0.5,
    seed=5,
    learning_rate=1e-2,
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Nothing is read from, or left in, the folder of the real networks; and no real reference is changed."""
    monkeypatch.setenv("SHARPNESS_BENCH_CACHE", str(tmp_path / "networks"))
    networks._network.cache_clear()
    problems._objective.cache_clear()
    monkeypatch.setattr(run, "References", lambda: references.References(tmp_path / "references.json"))
    monkeypatch.setattr(run, "LOG", tmp_path / "log.jsonl")
    yield tmp_path / "networks"
    networks._network.cache_clear()
    problems._objective.cache_clear()


def tiny_problem(epsilon=5e-3):
    return problems.Problem(TINY, epsilon)


# ---------------------------------------------------------------------- networks


def test_a_recipe_gives_one_network_to_the_last_bit_and_leaves_the_random_state(cache):
    state = torch.get_rng_state()
    first = networks.network(TINY)
    assert torch.equal(torch.get_rng_state(), state)
    for trained in (networks._untrained(TINY), networks._untrained(replace(TINY, batch_size=networks.FULL))):
        networks.train(trained)
        assert torch.equal(trained.weights(), first.weights()) == (trained.recipe == TINY)
    assert first.weights().dtype == torch.float32
    assert not first.model.training
    assert all(parameter.grad is None for parameter in first.model.parameters())


def test_the_cache_gives_what_training_gave_and_is_keyed_by_all_of_the_recipe(cache):
    trained = networks.network(TINY).weights()
    (file,) = cache.iterdir()
    assert TINY.key in file.name
    networks._network.cache_clear()
    before = file.stat().st_mtime_ns
    assert torch.equal(networks.network(TINY).weights(), trained)
    assert file.stat().st_mtime_ns == before
    changed = [replace(TINY, **{name: value}) for name, value in (("seed", 6), ("target_loss", 0.4), ("num_samples", 61))]
    assert len({recipe.key for recipe in (TINY, *changed)}) == 4


def test_training_that_misses_its_loss_is_an_error(cache):
    with pytest.raises(ArithmeticError, match="after 2 epochs"):
        networks.network(replace(TINY, target_loss=1e-9, max_epochs=2))
    assert not cache.exists()


def kind(recipe):
    """What the architecture is, without its sizes."""
    settings = dict(recipe.settings)
    return recipe.architecture, settings.get("cell"), settings.get("batch_norm", False)


def test_the_halves_share_no_network_no_seed_and_no_data():
    tuning, confirmation = networks.TUNING, networks.CONFIRMATION
    for of in (
        lambda recipe: recipe.name,
        lambda recipe: recipe.key,
        lambda recipe: recipe.seed,
        lambda recipe: recipe.data,
        lambda recipe: (recipe.architecture, recipe.settings),
    ):
        assert not set(map(of, tuning)) & set(map(of, confirmation))
    assert len(set(map(kind, confirmation)) - set(map(kind, tuning))) >= 3
    for half in (tuning, confirmation):
        assert len(half) >= 16
        assert len({recipe.name for recipe in half}) == len({recipe.key for recipe in half}) == len(half)
        assert any(recipe.target_loss <= 1e-5 for recipe in half)
        assert any(recipe.target_loss >= 0.1 for recipe in half)
    for name in networks.HALVES:
        assert len(problems.problems_of(name)) == len(problems.EPSILONS) * len(networks.half_named(name)) >= 36


def test_the_two_pools_of_digits_have_no_image_in_common():
    everything = 1797
    pools = [
        networks.DATA[data][0](replace(TINY, data=data, num_samples=count))[0]
        for data, count in (("digits_a", networks.POOL_SIZE), ("digits_b", everything - networks.POOL_SIZE))
    ]
    images = [{bytes(image.numpy()) for image in pool} for pool in pools]
    assert sum(map(len, images)) == everything
    assert not images[0] & images[1]


@pytest.mark.parametrize("recipe", [*networks.TUNING, *networks.CONFIRMATION], ids=lambda recipe: recipe.name)
def test_every_recipe_makes_a_model_whose_loss_fits_its_data(recipe):
    made = networks._untrained(recipe)
    assert len(made.inputs) == recipe.num_samples
    assert 0 < made.dim < 300_000
    loss = made.loss_at(torch.zeros(made.dim))
    assert loss == pytest.approx(made.criterion(made.model(made.inputs).double(), targets_of(made)).item(), rel=1e-6)
    assert 0.1 < loss < 4


def targets_of(made):
    return made.targets.double() if made.targets.is_floating_point() else made.targets


# ---------------------------------------------------------------------- peers

LINEAR = Box(torch.tensor([0.5, 1.0, 2.0, 0.25]))
SLOPE = torch.tensor([3.0, -1.0, 0.5, 0.0])


def linear(e):
    return torch.dot(SLOPE, e).item(), SLOPE.clone()


ANY_LENGTH = {
    "apgd": peers.apgd,
    "apgd_antipode": peers.apgd_antipode,
    "sign_pgd": peers.sign_pgd,
    "sign_pgd_restarts": peers.sign_pgd_restarts,
    "scipy": lambda budget: peers.scipy_call(iterations=1000),
    "scipy_restarts": lambda budget: peers.scipy_restarts(num_random=10),
    **({"pytorch_minimize": lambda budget: peers.pytorch_minimize()} if peers.has_pytorch_minimize() else {}),
}


def counted(fn):
    calls = []

    def counting(e):
        calls.append(e.clone())
        return fn(e)

    return counting, calls


@pytest.mark.parametrize("budget", [1, 2, 5, 12, 25])
@pytest.mark.parametrize("name", ANY_LENGTH)
def test_a_peer_stays_in_its_budget_and_in_the_box_and_hands_back_its_best_point(name, budget):
    quadratic = quadratics.Quadratic.made(50, 3.0, negative=0.5, seed=1)
    box = Box(torch.ones(50))
    fn, calls = counted(quadratic.value_and_grad)
    value, best, gradients = peers.within(ANY_LENGTH[name](budget), budget, fn, box, torch.Generator().manual_seed(0))
    assert gradients == len(calls) <= budget
    assert box.contains(best)
    assert all(box.contains(point) for point in calls)
    assert value == max(quadratic.value_and_grad(point)[0] for point in calls)
    assert value == quadratic.value_and_grad(best)[0]


@pytest.mark.parametrize("name", sorted(ANY_LENGTH.keys() - {"pytorch_minimize"}))
def test_a_peer_finds_the_maximum_of_a_linear_function(name):
    value, _, _ = peers.within(ANY_LENGTH[name](12), 12, linear, LINEAR, torch.Generator().manual_seed(0))
    assert value == pytest.approx((LINEAR.half_width * SLOPE.abs()).sum().item(), rel=1e-6)


def test_a_peer_that_never_ends_is_stopped_and_its_best_point_kept():
    def wandering(fn, box, rng):
        for size in itertools.chain([0.1, 0.9], itertools.repeat(0.2)):
            fn(size * box.half_width)

    value, best, gradients = peers.within(wandering, 7, linear, LINEAR, torch.Generator())
    assert gradients == 7
    assert torch.equal(best, 0.9 * LINEAR.half_width)
    assert value == linear(best)[0]


def test_apgd_halves_its_step_where_the_paper_says():
    assert peers.checkpoints(100) == [0, 22, 41, 57, 70, 80, 87, 93, 99]


def test_apgd_shortens_its_step_at_a_maximum_inside_of_the_box():
    centre = torch.tensor([0.31, -0.17, 0.05])

    def bowl(e):
        return -0.5 * (e - centre).square().sum().item(), centre - e

    _, best, _ = peers.within(peers.apgd(200), 200, bowl, Box(torch.ones(3)), torch.Generator())
    torch.testing.assert_close(best, centre, atol=1e-2, rtol=0)


# ---------------------------------------------------------------------- quadratics


@pytest.mark.parametrize("seed", range(3))
def test_the_maximum_of_a_convex_quadratic_is_that_of_its_vertices(seed):
    quadratic = quadratics.Quadratic.made(10, 2.0, seed=seed)
    vertices = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=10)))
    assert max(map(quadratic.value, vertices)) == pytest.approx(1, rel=1e-6)
    assert quadratic.maximum() == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("negative", [0.5, 1.0])
def test_the_maximum_of_an_indefinite_quadratic_is_reached_and_never_passed(negative):
    quadratic = quadratics.Quadratic.made(12, 1.0, negative=negative, seed=3)
    rng = torch.Generator().manual_seed(0)
    found, best, _ = peers.within(
        peers.scipy_restarts(iterations=200, num_random=30), None, quadratic.value_and_grad, Box(torch.ones(12)), rng
    )
    assert quadratic.value(best) <= 1 + 1e-7
    assert found == pytest.approx(1, rel=1e-4)


def test_a_quadratic_and_the_objective_made_of_it_agree_with_autograd():
    quadratic = quadratics.Quadratic.made(301, 10.0, negative=0.3, seed=2)
    e = torch.rand(301, generator=torch.Generator().manual_seed(1)) * 2 - 1
    leaf = e.double().requires_grad_()
    slope, diagonal, direction = (part.double() for part in (quadratic.slope, quadratic.diagonal, quadratic.direction))
    value = quadratic.scale * (slope @ leaf + (diagonal * leaf) @ leaf / 2 + (direction @ leaf) ** 2 / 2)
    (gradient,) = torch.autograd.grad(value, leaf)
    assert quadratic.value(e) == pytest.approx(value.item(), rel=1e-12)
    objective = quadratic.objective()
    assert objective.dim == 301
    for found, slopes in (quadratic.value_and_grad(e), objective.value_and_grad(e)):
        assert found == pytest.approx(value.item(), rel=1e-5)
        torch.testing.assert_close(slopes, gradient.float(), rtol=1e-4, atol=1e-7)


# ---------------------------------------------------------------------- answers and references


def test_an_answer_is_checked_by_plain_torch():
    problem = tiny_problem()
    half_width = problem.box.half_width
    inside = 0.5 * half_width
    value = problem.network.loss_at(inside)
    assert problem.objective.value(inside) == pytest.approx(value, rel=1e-6)
    assert problems.check_answer(problem, value, inside) == value
    with pytest.raises(AssertionError, match="was claimed"):
        problems.check_answer(problem, value * (1 + 1e-4), inside)
    with pytest.raises(AssertionError, match="leaves the box"):
        problems.check_answer(problem, problem.network.loss_at(1.01 * half_width), 1.01 * half_width)
    for broken in (inside[1:], math.nan * inside):
        with pytest.raises(AssertionError, match="not a finite point"):
            problems.check_answer(problem, value, broken)


def test_a_reference_only_ever_rises(tmp_path):
    problem, other = tiny_problem(1e-3), tiny_problem(5e-3)
    kept = references.References(tmp_path / "r.json")
    assert kept.of(problem) is None
    kept.offer(other, 9.0, "another problem")
    for value, how in ((2.0, "first"), (1.5, "worse"), (3.0, "better"), (3.0, "equal")):
        kept.offer(problem, value, how)
    found = references.References(tmp_path / "r.json").of(problem)
    assert (found.value, found.how) == (3.0, "better")
    assert found.origin_loss == problem.origin_loss
    kept.offer(problem, 2.5, "a search that found less", gradients=1200)
    found = kept.of(problem)
    assert (found.value, found.how, found.gradients) == (3.0, "better", 1200)
    assert kept.of(other).value == 9.0


def test_a_reference_of_another_network_does_not_count(tmp_path):
    problem = tiny_problem()
    kept = references.References(tmp_path / "r.json")
    kept.offer(problem, 5.0, "this network")
    retrained = problems.Problem(replace(TINY, seed=6), problem.epsilon)
    assert kept.of(retrained) is None
    stored = json.loads((tmp_path / "r.json").read_text())
    stored[problem.name]["origin_loss"] *= 1.01  # the same recipe, trained to another rounding
    (tmp_path / "r.json").write_text(json.dumps(stored))
    assert kept.of(problem) is None
    assert kept.offer(problem, 1.0, "again").value == 1.0


def test_the_search_uses_its_gradients_and_finds_what_every_peer_finds():
    problem = tiny_problem()
    before = problem.objective.cost.gradients
    value, best, how, used = references.search(problem, num_gradients=700)
    assert used == 700 == problem.objective.cost.gradients - before
    assert problem.network.loss_at(best) == value
    assert problem.box.contains(best)
    assert how
    for name, make in ANY_LENGTH.items():
        rng = torch.Generator().manual_seed(0)
        found, _, _ = peers.within(make(48), 48, problem.objective.value_and_grad, problem.box, rng)
        assert found <= value * (1 + 1e-6), name


def test_the_stored_references_are_of_these_recipes():
    stored = references.References().all()
    known = {p.name: p.recipe.key for half in networks.HALVES for p in problems.problems_of(half)}
    assert set(stored) <= set(known)
    assert {p.name for p in problems.problems_of("tuning")} <= set(stored)
    for name, reference in stored.items():
        assert reference.recipe == known[name]
        assert reference.value > reference.origin_loss
        assert reference.gradients >= 1000


# ---------------------------------------------------------------------- the comparison


def row(problem, value, *, solver="ours", budget=12, gradients=10.0, equivalents=11.0):
    return run.Row(problem, solver, budget, value, gradients, equivalents, forwards=0.0, seconds=0.0)


def test_shares_are_of_the_best_known_rise():
    best = {"a@1": (3.0, 1.0), "a@2": (5.0, 1.0), "b@1": (2.0, 0.0)}
    rows = [row("a@1", 3.0, gradients=12.0, equivalents=13.0), row("a@2", 3.0), row("b@1", 1.99)]
    (found,) = run.summaries(rows, best)
    assert found.mean == pytest.approx((1 + 0.5 + 0.995) / 3)
    assert (found.worst, found.worst_problem) == (0.5, "a@2")
    assert found.nearly == pytest.approx(2 / 3)
    assert (found.gradients, found.most_gradients) == (pytest.approx(32 / 3), 12)
    assert (found.equivalents, found.most) == (pytest.approx(35 / 3), 13)
    # networks are drawn anew, so a's two problems stay together: the means lie between b alone and a alone
    assert found.low == pytest.approx(0.75)
    assert found.high == pytest.approx(0.995)
    assert "13.0 (over)" in run.table([found])
    assert "(over)" not in run.table(run.summaries(rows[1:], best))


def test_what_a_run_costs_is_what_the_objective_counted():
    (found,) = run.run_problem(tiny_problem(), {"apgd": solvers.SOLVERS["apgd"]}, [12])
    assert found.gradients == found.equivalents == found.forwards == 12
    (found,) = run.run_problem(tiny_problem(), {"default": solvers.SOLVERS["default"]}, [24])
    assert found.equivalents >= found.gradients > 1
    assert found.value > tiny_problem().origin_loss


def hides_forwards(objective, epsilon, rng):
    answer = solvers.peer(peers.apgd(3), 3)(objective, epsilon, rng)
    data = next(iter(tiny_problem().objective._source)).data
    for _ in range(2):
        objective.module(data[0])
    return answer


def claims_less(objective, epsilon, rng):
    return solvers.peer(peers.apgd(3), 3)(objective, epsilon, rng)._replace(equivalents=2.0)


def claims_more_than_it_found(objective, epsilon, rng):
    answer = solvers.peer(peers.apgd(3), 3)(objective, epsilon, rng)
    return answer._replace(value=1.1 * answer.value)


@pytest.mark.parametrize(
    ("cheat", "said"),
    [(hides_forwards, "the model saw"), (claims_less, "and used"), (claims_more_than_it_found, "was claimed")],
)
def test_a_solver_that_hides_work_or_invents_a_value_is_refused(cheat, said):
    with pytest.raises(AssertionError, match=said):
        run.run_problem(tiny_problem(), {"cheat": lambda budget: cheat}, [12])


def test_a_run_is_repeated_to_the_last_bit():
    names = {name: solvers.SOLVERS[name] for name in ("default", "scipy_antipode", "sign_pgd_restarts")}
    first, second = (run.run_problem(tiny_problem(), names, [12, 24]) for _ in range(2))
    assert [replace(found, seconds=0.0) for found in first] == [replace(found, seconds=0.0) for found in second]


CANDIDATES = """
from {package}.solvers import SOLVERS as KNOWN
SOLVERS = {{"{name}": KNOWN["sign_pgd"]}}
"""


def test_candidates_come_from_a_file_and_take_no_known_name(tmp_path):
    file = tmp_path / "candidates.py"
    file.write_text(CANDIDATES.format(package=f"{NAME}.inner_maximisation", name="mine"))
    assert set(run.solvers_from(str(file))) == {*solvers.SOLVERS, "mine"}
    file.write_text(CANDIDATES.format(package=f"{NAME}.inner_maximisation", name="scipy"))
    with pytest.raises(SystemExit, match="redefines scipy"):
        run.solvers_from(str(file))


@pytest.fixture
def tiny_halves(monkeypatch):
    halves = {"tuning": [tiny_problem(e) for e in (1e-3, 5e-3)], "confirmation": [tiny_problem(1e-3)]}
    monkeypatch.setattr(run, "problems_of", halves.__getitem__)


def test_the_command_compares_and_improves_the_references(tiny_halves, tmp_path, capsys):
    report = tmp_path / "report.json"
    arguments = ["--budgets", "12", "--solvers", "default,sign_pgd", "--json", str(report)]
    assert run.main(arguments) == 0
    said = capsys.readouterr()
    assert "the best of this run" in said.err
    assert "| default | " in said.out
    shares = {(r["problem"], r["solver"]): r["share"] for r in json.loads(report.read_text())["rows"]}
    assert len(shares) == 4
    for problem in ("tiny@0.001", "tiny@0.005"):
        assert max(shares[problem, "default"], shares[problem, "sign_pgd"]) == 1
    kept = run.References()
    first = {name: reference.value for name, reference in kept.all().items()}
    assert run.main(["--search", "--gradients", "300"]) == 0
    searched = kept.all()
    assert all(searched[name].value >= first[name] and searched[name].gradients == 300 for name in first)
    capsys.readouterr()
    assert run.main(arguments) == 0
    assert "the best of this run" not in capsys.readouterr().err
    assert max(r["share"] for r in json.loads(report.read_text())["rows"]) <= 1


def test_the_confirmation_half_wants_references_first_and_logs_every_look(tiny_halves, tmp_path, capsys):
    arguments = ["--half", "confirmation", "--budgets", "12", "--solvers", "sign_pgd"]
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert "--half confirmation --search first" in capsys.readouterr().err
    assert not run.LOG.exists()
    run.main(["--half", "confirmation", "--search", "--gradients", "60"])
    assert not capsys.readouterr().out  # the search tells nobody what found what
    assert not run.LOG.exists()
    for _ in range(2):
        run.main(arguments)
    entries = [json.loads(line) for line in run.LOG.read_text().splitlines()]
    assert [entry["solvers"] for entry in entries] == [["sign_pgd"], ["sign_pgd"]]
    assert entries[0]["code"] == entries[1]["code"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--solvers", "default,nobody"], "no solver is called nobody"),
        (["--problems", "nothing*"], "no problem of the tuning half matches nothing"),
    ],
)
def test_a_command_that_names_nothing_is_refused(arguments, said, capsys):
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert said in capsys.readouterr().err


# ---------------------------------------------------------------------- time and memory


def test_the_default_thaws_where_sign_steps_from_zero_stay_frozen():
    dim = 20_000
    drawn = (quadratics.Quadratic.made(dim, 10.0, seed=seed) for seed in range(10))
    # the one whose noise lies least along the strong direction
    quadratic = min(drawn, key=lambda q: abs(torch.dot(q.slope.sign(), q.direction).item()))
    shares = {name: frozen.share_found(quadratic, solvers.SOLVERS[name])[0] for name in ("default", "apgd")}
    assert shares["apgd"] < 0.15
    assert shares["default"] > 0.95


def test_what_a_solver_spends_is_split_from_what_the_function_takes():
    quadratic = quadratics.Quadratic.made(20_000, 3.0)
    found = cost.spent(LBFGSB(), quadratic)
    assert found.seconds > found.inside > 0
    assert found.gradients > 1
    assert 0.9 < found.value <= 1 + 1e-6
    assert cost.spent(cost.default_with(6), quadratic).gradients <= 6
    assert cost.peak_bytes_of(LBFGSB(), quadratic) >= 4 * quadratic.dim


def test_the_resident_set_grows_by_what_is_touched():
    before = memory.resident_now()
    with mmap.mmap(-1, 64_000_000) as fresh:  # malloc would give what other tests have freed
        fresh.write(bytes(len(fresh)))
        assert 55e6 < memory.resident_now() - before < 140e6  # the zeros written are in memory for a moment, too
        assert memory.largest_resident() >= memory.resident_now() > len(fresh)


@pytest.mark.parametrize("solver", end_to_end.SOLVERS)
def test_a_timed_call_gives_the_metric_its_own_answer(solver):
    made = tiny_problem().network
    batches = [(made.inputs, made.targets)]
    measured = end_to_end.measured(made.model, batches, end_to_end.SOLVERS[solver]())
    objective = Objective(made.model, batches)
    before = objective.cost
    metric = EpsilonBox(epsilon=end_to_end.EPSILON, maximizer=end_to_end.SOLVERS[solver]())
    alone = metric(objective, sampling.generator_for(0, "end_to_end"))
    assert measured.value == alone.value
    assert measured.gradients == objective.cost.gradients
    assert measured.equivalents == pytest.approx(solvers.equivalents(objective.cost - before))
    assert measured.dim == made.dim
    assert measured.in_objective > 0
    assert measured.in_solver > 0
