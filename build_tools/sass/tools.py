"""The programs of the CUDA toolkit that the report of machine instructions runs."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from ..environment import BuildError, CudaToolkit, find_compiler
from ..extension import CUDA_FLAGS

CHECKOUT = Path(__file__).parents[2]


def find_cuobjdump(toolkit: CudaToolkit) -> str:
    """The disassembler of the toolkit, of triton's wheel, or of PATH.

    Raises:
        BuildError: there is none.
    """
    candidates = [toolkit.home / "bin" / "cuobjdump"]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        candidates.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    found = next((str(path) for path in candidates if path.is_file()), None) or shutil.which("cuobjdump")
    if found is None:
        raise BuildError("cuobjdump was not found: install the CUDA toolkit's, or run `pip install triton`.")
    return found


def compile_source(toolkit: CudaToolkit, source: str, architectures: Iterable[str], folder: Path) -> Path:
    """Compile one file with the flags of the build."""
    target = folder / (Path(source).stem + ".o")
    numbers = [architecture.replace(".", "") for architecture in architectures]
    command = [str(toolkit.home / "bin" / "nvcc"), "-ccbin", find_compiler()[0], *CUDA_FLAGS]
    command += [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    run([*command, "-c", source, "-o", str(target)])
    return target


def run(command: list[str]) -> str:
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"`{command[0]}` failed: {done.stdout}{done.stderr}")
    return done.stdout
