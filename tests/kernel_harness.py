"""Proof of Triton kernels without a GPU: their interpreter, in a process of its own, and what they compile to.

A test file writes what the interpreter shall run as functions ``case_*``, parametrized like tests. pytest does not collect
them by itself; ``run_in_interpreter(__file__)`` runs them with ``TRITON_INTERPRET=1`` set before Triton is imported, which
is why they need another process than compiling. There a case may start at most 20 programs per kernel.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
ARCHITECTURES = (80, 90, 100)  # A100, H100 and H200, B200
TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
MAX_PROGRAMS = 20  # the interpreter takes up to tens of milliseconds for one
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run_in_interpreter(test_file: str) -> int:
    """Run the cases of a test file in the interpreter; how many passed. Fails with their output if one does not."""
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "SHARPNESS_PLUGINS_KERNELS": "triton",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
    }
    options = ["-q", "-x", "-p", "kernel_harness", "-o", "python_functions=case_*"]
    options += ["-W", "ignore::RuntimeWarning"]  # its arithmetic is NumPy's, which warns where a GPU gives infinity or NaN
    command = [sys.executable, "-m", "pytest", *options, test_file]
    done = subprocess.run(command, env=environment, cwd=HERE.parent, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout
    assert "skipped" not in done.stdout, done.stdout
    return int(passed.group(1))


if INTERPRETED:  # this file is then a plugin of pytest

    @pytest.fixture(autouse=True)
    def few_programs(monkeypatch):
        """Fails a case that starts many programs: larger blocks or fewer elements prove the same in less time."""
        from sharpness_plugins.kernels import dispatch

        def counted(kernel, programs, *args, **settings):
            assert programs <= MAX_PROGRAMS, f"{kernel.__name__} started as {programs} programs"
            started.append(kernel.__name__)
            return launch(kernel, programs, *args, **settings)

        started: list[str] = []
        launch = dispatch.launch
        monkeypatch.setattr(dispatch, "launch", counted)
        yield
        assert started, "no kernel was started: the case compared the reference with itself"


@dataclass(frozen=True)
class Compiled:
    """What a kernel became: registers a thread, bytes a thread on the stack (where spills go), memory instructions.

    ``ptx_loads`` and ``ptx_stores`` count the instructions on global memory that the PTX asks for, by their width in bits;
    the assembler keeps them. What is read from the machine code takes a hundred times as long, once for each kernel.
    """

    registers: int
    stack_bytes: int
    narrow_offsets: int  # vectors of 32-bit offsets, which wrap beyond 2^31 elements
    ptx_loads: Counter[int]
    ptx_stores: Counter[int]
    binary: bytes = field(repr=False)

    def assert_sound(self) -> None:
        """Nothing spilled, no offset of 32 bits."""
        assert self.stack_bytes == 0, self
        assert self.narrow_offsets == 0, self

    @functools.cached_property
    def instructions(self) -> list[str]:
        """Of the machine code, without operands."""
        assembly = _tool("nvdisasm", "-c", self.binary)
        found = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", assembly, flags=re.MULTILINE)
        assert found, assembly
        return found

    @property
    def loads(self) -> Counter[int]:
        """From global memory, by their width in bits."""
        return self._accesses("LDG")

    @property
    def stores(self) -> Counter[int]:
        return self._accesses("STG")

    @property
    def spilled(self) -> int:
        """Loads and stores of what did not fit into registers."""
        return self._accesses("LDL").total() + self._accesses("STL").total()

    @property
    def fused(self) -> int:
        """Multiply-adds rounded once; divisions and roots are made of them too."""
        return sum(name.split(".")[0] in {"FFMA", "FFMA2", "DFMA"} for name in self.instructions)

    def _accesses(self, kind: str) -> Counter[int]:
        parts = [name.split(".") for name in self.instructions]
        return Counter(_width(modifiers) for name, *modifiers in parts if name == kind)


def compile_for(
    kernel: Any, architecture: int, signature: dict[str, str], constants: dict[str, Any], *, num_warps: int = 8
) -> Compiled:
    """Compile a kernel ahead of time, without a GPU, by the tools that Triton brings with it.

    Args:
        kernel: a function under ``triton.jit``.
        architecture: 80, 90 or 100.
        signature: Triton's type of every argument (``"*fp32"``, ``"i64"``); pointers are taken as aligned to 16 bytes, as
            those of torch's allocator are. Constants may be left out.
        constants: the compile-time arguments; others than the kernel's are ignored.
    Fails the test, saying so, where the tools are missing or do not know the architecture.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind.startswith("*")}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    options = {"num_warps": num_warps, "enable_fp_fusion": False}
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    except RuntimeError as error:
        pytest.fail(f"Triton {triton.__version__} cannot compile for sm_{architecture}: {error}")
    return _read(compiled.asm["cubin"], compiled.asm["ptx"], compiled.asm["ttir"])


def _read(binary: bytes, ptx: str, intermediate: str) -> Compiled:
    usage = _tool("cuobjdump", "-res-usage", binary)
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    assert {"REG", "STACK", "LOCAL"} <= set(used), usage
    accesses = re.findall(r"\b(ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx)
    assert accesses, ptx
    loads, stores = (
        Counter(int(count or 1) * int(bits) for kind, count, bits in accesses if kind == name) for name in ("ld", "st")
    )
    return Compiled(
        registers=used["REG"],
        stack_bytes=used["STACK"] + used["LOCAL"],
        narrow_offsets=len(re.findall(r"tt\.addptr [^\n]*, tensor<\d+xi32>", intermediate)),
        ptx_loads=loads,
        ptx_stores=stores,
        binary=binary,
    )


def _width(modifiers: list[str]) -> int:
    widths = [modifier.lstrip("USB") for modifier in modifiers]
    return next((int(width) for width in widths if width in {"8", "16", "64", "128", "256"}), 32)


def _tool(name: str, option: str, binary: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        done = subprocess.run([_tool_path(name), option, str(path)], capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"{name} failed: {done.stderr or done.stdout}")
    return done.stdout


@functools.cache
def _tool_path(name: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        pytest.fail(f"Triton {triton.__version__} does not bring {name}, so what the kernel compiles to cannot be read")
    return str(path)


def wide_accesses(block: int, dtype: torch.dtype, *, num_warps: int = 8) -> int:
    """128-bit instructions that a thread needs to read or write one block of one array."""
    return math.ceil(block * dtype.itemsize / (32 * num_warps * 16))
