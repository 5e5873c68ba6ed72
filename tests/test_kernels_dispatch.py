"""Which implementation runs, and what is said where none can."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

import kernel_harness as harness
from sharpness_plugins import errors
from sharpness_plugins.kernels import box, dispatch

CPU = torch.device("cpu")


def step() -> torch.Tensor:
    return box.box_gap(torch.zeros(3), torch.ones(3), torch.ones(3), 1.0, 0.0)


@pytest.mark.parametrize("choice", [None, "auto", "torch"])
def test_tensors_on_a_cpu_take_plain_torch(monkeypatch, choice):
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    if choice is not None:
        monkeypatch.setenv(dispatch.VARIABLE, choice)
    assert not dispatch.uses_triton(CPU)
    assert step()[0] == 3


@pytest.mark.parametrize("choice", ["", "Triton", "cuda"])
def test_another_value_is_refused_with_the_three(monkeypatch, choice):
    monkeypatch.setenv(dispatch.VARIABLE, choice)
    with pytest.raises(ValueError, match=f"SHARPNESS_PLUGINS_KERNELS must be one of auto, torch, triton, got '{choice}'"):
        step()


@harness.needs_triton
def test_triton_on_a_cpu_needs_its_interpreter(monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="tensors are on cpu: Triton kernels need a GPU, or TRITON_INTERPRET=1"):
        step()


@pytest.mark.parametrize(
    ("choice", "capability", "installed", "expected"),
    [
        ("auto", (9, 0), True, True),
        ("auto", (7, 0), True, True),
        ("auto", (6, 1), True, False),  # Pascal, which Triton refuses
        ("auto", (9, 0), False, False),
        ("torch", (9, 0), True, False),
        ("triton", (9, 0), True, True),
    ],
)
def test_tensors_on_a_gpu_take_triton_where_they_can(monkeypatch, choice, capability, installed, expected):
    monkeypatch.setenv(dispatch.VARIABLE, choice)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed or None)
    monkeypatch.setattr(errors, "missing_dependency", lambda *args, **settings: None)
    dispatch._supported.cache_clear()
    assert dispatch.uses_triton(torch.device("cuda", 0)) is expected
    dispatch._supported.cache_clear()


def test_without_triton_everything_but_triton_works():
    code = (
        "import os, sys\n"
        "sys.modules['triton'] = None\n"  # as if it were not installed
        "import torch\n"
        "from sharpness_plugins.kernels import ball, box, dispatch, sam\n"
        "assert box.box_gap(torch.zeros(3), torch.ones(3), torch.ones(3), 1.0, 0.0)[0] == 3\n"
        "assert sam.global_norm([torch.ones(4)]) == 2\n"
        "os.environ[dispatch.VARIABLE] = 'triton'\n"
        "try:\n"
        "    sam.global_norm([torch.ones(4)])\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != dispatch.VARIABLE}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "SHARPNESS_PLUGINS_KERNELS=triton needs triton, which is not installed" in told.stdout, told.stderr


def test_importing_the_operations_does_not_import_triton():
    code = (
        "import sys, torch\n"
        "before = 'triton' in sys.modules\n"
        "from sharpness_plugins.kernels import ball, box, dispatch, sam\n"
        "assert before or 'triton' not in sys.modules\n"
        "assert not [name for name in sys.modules if name.endswith('_triton') and 'sharpness' in name]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_operation_is_found_by_name():
    assert [way.name for way in dispatch.available("box_gap")] == ["torch"]
    (reference,) = dispatch.available("box_gap")
    args = (torch.zeros(3), torch.ones(3), torch.ones(3), torch.tensor(1.0), torch.tensor(0.0))
    assert torch.equal(reference(*args), dispatch.operation("box_gap")(*args))
    with pytest.raises(errors.UnknownNameError, match="Did you mean 'box_gap'"):
        dispatch.operation("box_gab")


def test_operations_have_no_derivative_and_need_none():
    gradient = torch.ones(3, requires_grad=True)
    found = box.box_gap(torch.zeros(3), gradient, torch.ones(3), 1.0, 0.0)
    assert not found.requires_grad


def test_nothing_is_started_for_no_programs():
    dispatch.launch(None, 0, torch.empty(0))


def case_two_implementations_where_the_interpreter_runs():
    ways = dispatch.available("box_gap")
    assert [way.name for way in ways] == ["torch", "triton"]
    args = (torch.zeros(3), torch.ones(3), torch.ones(3), torch.tensor(1.0), torch.tensor(0.0))
    assert torch.equal(ways[0](*args), ways[1](*args))


@harness.needs_triton
def test_the_interpreter_agrees():
    assert harness.run_in_interpreter(__file__) == 1


class TestHarness:
    """The proof must be able to fail."""

    def test_a_failing_case_is_told(self, tmp_path):
        file = tmp_path / "test_cases.py"
        file.write_text("def case_wrong():\n    assert 1 == 2\n")
        with pytest.raises(AssertionError, match="assert 1 == 2"):
            harness.run_in_interpreter(str(file))

    def test_a_case_without_a_kernel_is_told(self, tmp_path):
        file = tmp_path / "test_cases.py"
        file.write_text("def case_idle():\n    pass\n")
        with pytest.raises(AssertionError, match="no kernel was started"):
            harness.run_in_interpreter(str(file))

    @harness.needs_triton
    def test_narrow_accesses_spills_and_wrapping_offsets_are_seen(self, tmp_path):
        file = tmp_path / "poor_kernels.py"
        file.write_text(
            "import triton\n"
            "import triton.language as tl\n"
            "@triton.jit\n"
            "def masked(x, y, length, BLOCK: tl.constexpr):\n"
            "    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)\n"
            "    tl.store(y + at, tl.load(x + at, mask=at < length) * 2.0 + 1.0, mask=at < length)\n"
            "@triton.jit\n"
            "def hungry(x, y, length, BLOCK: tl.constexpr):\n"
            "    at = tl.arange(0, BLOCK).to(tl.int64)\n"
            "    a = tl.load(x + at)\n"
            "    b = tl.load(x + at + BLOCK)\n"
            "    c = tl.load(x + at + 2 * BLOCK)\n"
            "    tl.store(y + at, tl.cumsum(a) * tl.cumsum(b) * tl.cumsum(c) * a * b * c)\n"
        )
        spec = importlib.util.spec_from_file_location("poor_kernels", file)
        poor = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(poor)
        signature = {"x": "*fp32", "y": "*fp32", "length": "i64"}
        masked = harness.compile_for(poor.masked, 90, signature, {"BLOCK": 2048})
        assert (masked.loads[128], masked.loads[32]) == (0, 8)
        assert masked.ptx_loads == {32: 8}
        assert masked.narrow_offsets == 2
        with pytest.raises(AssertionError):
            masked.assert_sound()
        hungry = harness.compile_for(poor.hungry, 90, signature, {"BLOCK": 2**14})
        assert hungry.stack_bytes > 0
        assert hungry.spilled > 0
        with pytest.raises(AssertionError):
            hungry.assert_sound()
