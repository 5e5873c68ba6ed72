"""The arrows of the design point down: read from the imports, so that no import has to be run."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sharpness_plugins

PACKAGE = Path(sharpness_plugins.__file__).parent
ADAPTERS = PACKAGE.parent / "adapters" / "sharpness_adapters"

LAYERS = {
    "distributed": 0,
    "errors": 0,
    "expected": 0,
    "interrupts": 0,
    "layout": 0,
    "memory": 0,
    "progress": 0,
    "report": 0,
    "files": 0,
    "sampling": 0,
    "stopping": 0,
    "schema": 0,
    "texts": 0,
    "reductions": 0,
    "accumulation": 1,
    "basis": 1,
    "batches": 1,
    "closed_forms": 1,
    "coupling": 1,
    "kernels": 1,
    "losses": 1,
    "micro_batches": 1,
    "modes": 1,
    "optimizers": 1,
    "pacing": 1,
    "probe": 1,
    "fingerprints": 1,
    "shares": 1,
    "source": 1,
    "sharded": 1,
    "sharded_space": 1,
    "regions": 1,
    "samplers": 1,
    "schedules": 1,
    "space": 1,
    "state_file": 1,
    "steps": 1,
    "subspace": 1,
    "agreement": 2,
    "evaluation": 2,
    "deviations": 2,
    "hvp": 2,
    "noise_scale": 2,
    "krylov": 2,
    "lanczos": 2,
    "maximizers": 2,
    "objective": 2,
    "rounds": 2,
    "streaming": 2,
    "streamed_products": 2,
    "sketch": 2,
    "traces": 2,
    "gauss_newton": 2,
    "operators": 2,
    "krylov_pass": 2,
    "tracking": 3,
    "specs": 3,
    "plugin_loading": 3,
    "registry": 3,
    "metrics": 3,
    "builtin": 4,
    "measure": 4,
    "planning": 4,
    "resuming": 3,
    "monitor": 4,
    "signals": 4,
    "controller": 4,
    "testing": 4,
    "create": 4,
    "plots": 5,
    "experiments": 5,
    "cli": 5,
    "__main__": 6,
}
SAME_LAYER = {  # who may import whom beside itself; everything else in a layer stands alone
    "distributed": {"errors"},
    "layout": {"distributed", "reductions", "sampling"},
    "memory": {"distributed"},
    "report": {"errors", "schema"},
    "reductions": {"sampling"},
    "stopping": {"errors"},
    "steps": {"state_file"},
    "batches": set(),
    "coupling": {"schedules"},
    "losses": {"batches"},
    "micro_batches": {"batches"},
    "deviations": {"noise_scale"},
    "hvp": {"evaluation"},
    "lanczos": {"krylov"},
    "agreement": {"evaluation"},
    "objective": {"agreement", "evaluation", "hvp", "rounds", "sketch", "streamed_products", "streaming"},
    "sharded_space": {"sharded", "space"},
    "streaming": {"evaluation"},
    "streamed_products": {"evaluation", "hvp", "streaming"},
    "regions": {"kernels", "subspace"},
    "sketch": {"evaluation", "rounds"},
    "traces": {"krylov"},
    "gauss_newton": {"evaluation", "objective"},
    "operators": {"gauss_newton", "hvp", "objective"},
    "krylov_pass": {"krylov", "lanczos", "objective", "operators", "traces"},
    "samplers": {"batches", "schedules"},
    "subspace": {"kernels", "space"},
    "plugin_loading": {"specs"},
    "registry": {"plugin_loading", "specs"},
    "builtin": {"signals"},
    "metrics": {"registry", "specs"},
    "resuming": {"registry"},
    "optimizers": {"accumulation", "batches", "kernels"},
    "pacing": {"schedules"},
    "monitor": {"measure"},
    "planning": {"measure"},
    "modes": {"sharded"},
    "fingerprints": {"batches"},
    "probe": {"batches", "source"},
    "shares": {"batches", "source"},
    "source": {"batches", "fingerprints"},
    "signals": {"measure"},
    "controller": {"signals"},
    "testing": {"measure"},
    "cli": {"experiments", "plots"},
    "experiments": {"plots"},
}
NO_TORCH = ("errors", "files", "texts", "report", "schema", "progress", "specs", "plugin_loading", "registry", "cli")
NO_TORCH += ("__main__", "__init__", "expected", "stopping")
NO_TORCH += tuple(f"schedules/{file.stem}" for file in sorted((PACKAGE / "schedules").glob("*.py")))
SHELL_ONLY = {"plots": {"report", "errors"}}


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(file: Path, *, run_at_import: bool = False) -> set[str]:
    """Absolute names of what a file imports; those under TYPE_CHECKING are types and point nowhere."""
    package = ["sharpness_plugins", *file.relative_to(PACKAGE).parts[:-1]]
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if run_at_import and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.update({module} | {f"{module}.{alias.name}" for alias in node.names})
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(file.read_text()))
    return found


def rooms_imported(file: Path) -> set[str]:
    names = [name.split(".") for name in imports_of(file) if name.startswith("sharpness_plugins.")]
    return {parts[1] for parts in names if parts[1] in LAYERS}


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_room_has_a_layer():
    rooms = {room_of(file) for file in FILES} - {"__init__"}
    assert rooms == set(LAYERS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_arrows_point_down(file):
    room = room_of(file)
    if room == "__init__":
        return
    for other in rooms_imported(file) - {room}:
        down = LAYERS[other] < LAYERS[room]
        aside = other in SAME_LAYER.get(room, set())
        assert down or aside, f"{room} (L{LAYERS[room]}) imports {other} (L{LAYERS[other]})"
        if room in SHELL_ONLY:
            assert other in SHELL_ONLY[room], f"{room} imports {other}"


@pytest.mark.parametrize("room", NO_TORCH)
def test_light_rooms_do_not_import_torch(room):
    names = imports_of(PACKAGE / f"{room}.py", run_at_import=True)
    assert not any(name.split(".")[0] in {"torch", "numpy", "scipy"} for name in names)


def test_only_sampling_draws():
    for file in FILES:
        if room_of(file) == "sampling" or "experiments" in file.parts:
            continue
        text = file.read_text()
        for call in ("torch.randn", "torch.rand(", "torch.randint", "torch.randperm", "np.random.", "torch.bernoulli"):
            assert call not in text, f"{file.name} draws with {call}"


def test_the_core_knows_no_trainer_and_no_adapter():
    for file in FILES:
        names = {name.split(".")[0] for name in imports_of(file)}
        assert not names & {"sharpness_adapters", "timm", "lightning", "transformers", "accelerate"}, file.name


def test_import_is_light():
    """Neither torch, timm, lightning, transformers, matplotlib nor rich; and the adapters import no trainer."""
    heavy = ["torch", "timm", "lightning", "transformers", "matplotlib", "rich", "pandas", "sklearn", "numpy", "scipy"]
    code = (
        "import sys, sharpness_plugins, sharpness_adapters\n"
        "assert 'measure_sharpness' in dir(sharpness_plugins)\n"
        "sharpness_plugins.available_metrics()\n"
        f"print([m for m in {heavy!r} if m in sys.modules])\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


def test_measuring_imports_no_optional_package():
    code = (
        "import sys, torch, sharpness_plugins\n"
        "model = torch.nn.Linear(3, 2)\n"
        "batch = (torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))\n"
        "print(sharpness_plugins.measure_sharpness(model, [batch], metrics='epsilon_box'))\n"
        "heavy = ['timm', 'lightning', 'transformers', 'matplotlib', 'rich', 'pandas', 'sklearn']\n"
        "assert not [m for m in heavy if m in sys.modules]\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)


def test_the_adapters_are_a_source_root_and_no_package():
    assert not (ADAPTERS.parent / "__init__.py").exists()
    assert (ADAPTERS / "py.typed").exists()
    assert (PACKAGE / "py.typed").exists()
