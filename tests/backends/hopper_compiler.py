"""Compiles kernels in Gluon for Hopper, where there need not be one.

Compiling is a process of its own: other tests have Triton interpret kernels, which cannot be undone.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SHARED_BYTES_MAX = 227 << 10


def run_alone(file: str, case: str) -> None:
    """The test file as a program, with the case as its argument. Raises AssertionError where it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, file, case]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def ptx_for_hopper(kernel: Any, types: dict[str, str], constants: tuple[Any, ...], registers_max: int) -> str:
    """The assembly of a kernel whose constants are those in capitals; what ``types`` lacks are integers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    names = kernel.arg_names
    capitals = [name for name in names if name.isupper()]
    signature = {name: "constexpr" if name in capitals else types.get(name, "i32") for name in names}
    places = {(names.index(name),): value for name, value in zip(capitals, constants, strict=True)}
    compiled = triton.compile(
        GluonASTSource(kernel, signature, places),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 4, "maxnreg": registers_max},
    )
    assert compiled.metadata.shared <= SHARED_BYTES_MAX
    ptx: str = compiled.asm["ptx"]
    return ptx
