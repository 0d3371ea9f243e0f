"""The machine that the build runs on: PyTorch, the CUDA toolkit, the C++ compiler, free memory.

The module needs the standard library alone, so that it works before setuptools or torch are imported. A missing part
ends the build with one sentence that says what to run.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MINIMUM_TORCH = (2, 11)
TORCH_REQUIREMENT = f"torch>={MINIMUM_TORCH[0]}.{MINIMUM_TORCH[1]}"
DEFAULT_CUDA_ARCHITECTURES = "8.0;9.0+PTX"

# One compiler process on a torch header needs 1.2 GB at its peak.
_BYTES_PER_JOB = 2 * 2**30


class BuildError(SystemExit):
    """Ends the build: setuptools and pip show the one sentence and no traceback."""

    def __init__(self, sentence: str) -> None:
        super().__init__(f"prefix_kernels: {sentence}")


@dataclass(frozen=True)
class Torch:
    """The PyTorch to compile against, read from its files without importing it."""

    folder: Path
    version: str
    cuda: str | None

    @property
    def release(self) -> tuple[int, int]:
        """``(major, minor)``: extensions compiled against one minor version do not load with another."""
        found = re.match(r"(\d+)\.(\d+)", self.version)
        if found is None:
            raise BuildError(
                f"version of the PyTorch in {self.folder}: expected one like 2.13.0, got {self.version!r}."
            )
        return int(found[1]), int(found[2])

    @property
    def requirement(self) -> str:
        """The pin that the built wheel carries."""
        return "torch=={}.{}.*".format(*self.release)

    @property
    def include_folders(self) -> list[Path]:
        include = self.folder / "include"
        return [include, include / "torch" / "csrc" / "api" / "include"]

    @property
    def library_folder(self) -> Path:
        return self.folder / "lib"

    @property
    def cuda_include_folder(self) -> Path:
        """The headers that torch's own CUDA headers include and that a small toolkit may lack, such as cusparse.h."""
        assert self.cuda is not None, "a CUDA build of PyTorch"
        return self.folder.parent / "nvidia" / f"cu{self.cuda.split('.')[0]}" / "include"


def _read_torch(folder: Path) -> Torch | None:
    version_file = folder / "version.py"
    if not version_file.is_file():
        return None
    facts = runpy.run_path(str(version_file))
    return Torch(folder, facts["__version__"], facts.get("cuda"))


def _torch_of_interpreter() -> Path | None:
    """Find the folder of torch that a plain run of this interpreter imports.

    A build front end that isolates the build hides the target environment by environment variables, but runs the
    target's own interpreter: without those variables it tells where the target's torch is.
    """
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    question = (
        "import importlib.util; spec = importlib.util.find_spec('torch'); print(spec.origin if spec else '', end='')"
    )
    answer = subprocess.run(
        [sys.executable, "-c", question], env=environment, cwd=sys.prefix, capture_output=True, text=True, check=False
    )
    return Path(answer.stdout).parent if answer.returncode == 0 and answer.stdout else None


@functools.cache
def find_torch() -> Torch | None:
    """The torch of the target environment, else the one that the front end installed for this build, else None."""
    folder = _torch_of_interpreter()
    torch = _read_torch(folder) if folder else None
    if torch is None:
        folders = [Path(entry or os.curdir) / "torch" for entry in sys.path]
        torch = next((found for found in map(_read_torch, folders) if found), None)
    return torch


def require_torch(torch: Torch | None) -> Torch:
    """``torch``, unless it is missing or too old to compile against."""
    if torch is None:
        raise BuildError(
            f"no PyTorch to compile against was found for {sys.executable}: run "
            f"`{sys.executable} -m pip install '{TORCH_REQUIREMENT}'` first, then the same command again."
        )
    if torch.release < MINIMUM_TORCH:
        raise BuildError(
            f"PyTorch {torch.version} in {torch.folder} is too old to compile against: run "
            f"`{sys.executable} -m pip install '{TORCH_REQUIREMENT}'` first, then the same command again."
        )
    return torch


@dataclass(frozen=True)
class CudaToolkit:
    home: Path
    version: str


def find_cuda_toolkit(environ: Mapping[str, str] = os.environ) -> CudaToolkit | None:
    """The toolkit named by CUDA_HOME or CUDA_PATH, else the one whose nvcc is on PATH or in /usr/local/cuda."""
    named = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    on_path = shutil.which("nvcc", path=environ.get("PATH"))
    if named:
        homes = [Path(named)]
    else:
        homes = [Path(on_path).resolve().parent.parent] if on_path else []
        homes.append(Path("/usr/local/cuda"))
    for home in homes:
        # An nvcc on PATH may be a script that calls the one of a toolkit elsewhere.
        if (home / "bin" / "nvcc").is_file() and (home / "include" / "cuda_runtime_api.h").is_file():
            nvcc = [str(home / "bin" / "nvcc"), "--version"]
            answer = subprocess.run(nvcc, capture_output=True, text=True, check=False)
            release = re.search(r"release (\d+\.\d+)", answer.stdout)
            return CudaToolkit(home, release.group(1)) if release else None
    return None


@dataclass(frozen=True)
class CudaPlan:
    """The CUDA kernels to build: none if ``architectures`` is empty, and ``reason`` says why."""

    reason: str
    toolkit: CudaToolkit | None = None
    architectures: tuple[str, ...] = ()

    @property
    def gencode_flags(self) -> list[str]:
        """nvcc's flags for ``architectures``, in the notation of TORCH_CUDA_ARCH_LIST: "9.0a", "8.6+PTX"."""
        flags = []
        for architecture in self.architectures:
            number = architecture.removesuffix("+PTX").replace(".", "")
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if architecture.endswith("+PTX"):
                flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        return flags


def plan_cuda(
    torch: Torch, toolkit: CudaToolkit | None, sources: Sequence[str], environ: Mapping[str, str] = os.environ
) -> CudaPlan:
    """Decide by toolkit and torch build, never by a visible GPU: packages are built on machines without one.

    Args:
        torch: the PyTorch compiled against.
        toolkit: result of `find_cuda_toolkit`.
        sources: the CUDA sources of this version.
        environ: read for ``PREFIX_KERNELS_CUDA`` (0: no CUDA kernels, 1: fail rather than leave them out) and
            ``TORCH_CUDA_ARCH_LIST``.

    Raises:
        BuildError: ``PREFIX_KERNELS_CUDA`` is 1 and cannot be honoured, or is neither 0 nor 1.
    """
    wish = environ.get("PREFIX_KERNELS_CUDA", "")
    if wish not in ("", "0", "1"):
        raise BuildError(f"PREFIX_KERNELS_CUDA: expected 0, 1 or unset, got {wish!r}.")
    if wish == "0":
        return CudaPlan("no CUDA kernels: PREFIX_KERNELS_CUDA is 0")

    cuda_build = f"`{sys.executable} -m pip install` a CUDA build of PyTorch"
    if not sources:
        obstacle, remedy = "this version has CPU kernels only", "unset PREFIX_KERNELS_CUDA or set it to 0"
    elif torch.cuda is None:
        obstacle, remedy = f"PyTorch {torch.version} is not a CUDA build", cuda_build
    elif toolkit is None:
        obstacle = "no CUDA toolkit was found (nvcc on PATH, or CUDA_HOME)"
        remedy = f"install the CUDA {torch.cuda} toolkit and set CUDA_HOME to its folder"
    elif toolkit.version.split(".")[0] != torch.cuda.split(".")[0]:
        obstacle = f"the CUDA toolkit in {toolkit.home} is {toolkit.version}, PyTorch was built with {torch.cuda}"
        remedy = f"set CUDA_HOME to the folder of a CUDA {torch.cuda} toolkit"
    else:
        architectures = environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_CUDA_ARCHITECTURES
        return CudaPlan(f"CUDA {toolkit.version} kernels", toolkit, tuple(re.split(r"[;\s]+", architectures.strip())))

    if wish == "1":
        raise BuildError(f"PREFIX_KERNELS_CUDA=1 cannot be honoured, because {obstacle}: {remedy}.")
    return CudaPlan(f"no CUDA kernels: {obstacle}")


def cpu_isas(machine: str | None = None) -> tuple[str, ...]:
    """The instruction sets to compile the CPU kernels for; the one to run is chosen at import."""
    x86 = (machine or platform.machine()).lower() in ("x86_64", "amd64")
    return ("portable", "avx2", "avx512") if x86 else ("portable",)


def find_compiler(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The C++ compiler's command: ``CXX``, else the first of g++, c++ and clang++ on PATH.

    Raises:
        BuildError: there is none, or it lacks C++20, OpenMP or Python's headers.
    """
    if sys.platform == "win32":
        raise BuildError("there is no Windows build: run `wsl --install` and install it inside WSL.")
    command = shlex.split(environ.get("CXX", ""))
    candidates = [command[0]] if command else ["g++", "c++", "clang++"]
    path = next(filter(None, (shutil.which(name, path=environ.get("PATH")) for name in candidates)), None)
    install = "run `apt-get install g++` (Debian, Ubuntu) or `dnf install gcc-c++` (Fedora, RHEL)"
    if path is None:
        raise BuildError(f"no C++ compiler was found (looked for {', '.join(candidates)}): {install}, or set CXX.")
    compiler = [path, *command[1:]]
    if not _compiles(compiler, ["-std=c++20"], "#include <concepts>\nstatic_assert(std::integral<int>);"):
        raise BuildError(f"{path} cannot compile C++20: {install} of GCC 10 or newer, or set CXX.")
    if not _compiles(compiler, ["-fopenmp"], "#include <omp.h>"):
        raise BuildError(f"{path} lacks OpenMP: {install}, or `apt-get install libomp-dev` for clang.")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        raise BuildError(
            f"Python.h is not in {sysconfig.get_path('include')}: run `apt-get install python3-dev` (Debian, Ubuntu) "
            "or `dnf install python3-devel` (Fedora, RHEL)."
        )
    return compiler


def _compiles(compiler: list[str], flags: list[str], source: str) -> bool:
    command = [*compiler, *flags, "-x", "c++", "-fsyntax-only", "-"]
    return subprocess.run(command, input=source, text=True, capture_output=True, check=False).returncode == 0


def parallel_jobs(environ: Mapping[str, str] = os.environ) -> int:
    """Number of compilers to run side by side: ``MAX_JOBS``, else as many as cores and free memory carry."""
    asked = environ.get("MAX_JOBS", "")
    if asked:
        if not asked.isdigit() or asked == "0":
            raise BuildError(f"MAX_JOBS: expected a positive integer, got {asked!r}.")
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = _free_memory()
    return cores if memory is None else max(1, min(cores, memory // _BYTES_PER_JOB))


def _free_memory() -> int | None:
    """Bytes that this process can still use, by the kernel's estimate and by its control group's limit."""
    limits = []
    try:
        available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        if available:
            limits.append(int(available.group(1)) * 1024)
        group = Path("/sys/fs/cgroup")
        ceiling = (group / "memory.max").read_text().strip()
        if ceiling != "max":
            limits.append(int(ceiling) - int((group / "memory.current").read_text()))
    except OSError:
        # Not Linux, or no version 2 control group: the limits read so far have to do.
        pass
    return min(limits) if limits else None
