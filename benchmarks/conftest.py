"""Collects ``bench_*.py`` and pins what the counts and ratios depend on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    named = parent.session.isinitpath(file_path)  # on the command line: then pytest collects it itself
    if file_path.match("bench_*.py") and not named and "bench_*.py" not in parent.config.getini("python_files"):
        module: pytest.Module = pytest.Module.from_parent(parent, path=file_path)
        return module
    return None


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """One thread of torch: seconds of the processor then mean work, and sums are always added in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process: benchmarks side by side would time each other."""
    return 0
