"""The CUDA kernels on a machine without a GPU: ``csrc/cuda`` compiled for the emulator of ``tests/emulator``.

The same kernels, and the same host code that chooses and launches them, are compiled by g++ into a shared library that
registers ``prefix_kernels_emulated::forward``, ``extend_`` and ``backward`` (fast mode) or
``prefix_kernels_checked::...`` (check mode) for CPU tensors. Objects are kept in ``build/emulated`` and made anew when
a file they were made from has changed.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from prefix_kernels import autograd, functional

CHECKOUT = Path(__file__).parent.parent.parent
# Last, because an installed package comes before the checkout's folder of its source.
sys.path.append(str(CHECKOUT))

from build_tools.sources import CUDA_SOURCES  # noqa: E402

EMULATOR = CHECKOUT / "tests" / "emulator"
# "debug": kernels that a debugger can step through line by line; "coverage": gcov counts the lines that ran.
VARIANT = os.environ.get("PREFIX_KERNELS_EMULATOR", "")
FOLDER = CHECKOUT / "build" / f"emulated{VARIANT and '-' + VARIANT}"
MODES = ("fast", "check")
NAMESPACES = {"fast": "prefix_kernels_emulated", "check": "prefix_kernels_checked"}

_FLAGS = [
    *("-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-mavx2", "-mfma", "-mf16c"),
    f"-I{EMULATOR}",
]
# An accumulator that nobody initialised must not be zero by luck. Fast mode fills it with a large number; in check mode
# it finds the 0xFF of a fresh stack, which is NaN, where no other variable has been before.
_KERNEL_FLAGS = {
    "fast": ["-O2", "-g1", "-ftrivial-auto-var-init=pattern"],
    "check": [
        "-O1",
        "-g1",
        "-fsanitize=thread",
        "-fno-tree-vectorize",
        "-fno-tree-sra",
        "-fstack-reuse=none",
        "-DPREFIX_KERNELS_CHECKED",
    ],
}
_VARIANT_FLAGS = {"": [], "debug": ["-O0", "-g"], "coverage": ["-O1", "--coverage", "-fprofile-update=atomic"]}
_RUNTIME_FLAGS = {"fast": ["-O3", "-g1"], "check": ["-O3", "-g1", "-DPREFIX_KERNELS_CHECKED"]}


TORCH_LIBRARIES = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]


class EmulatedBuildError(RuntimeError):
    """The compiler refused a file; its messages are the text."""


def kernel_sources() -> list[Path]:
    """Every kernel of the CUDA build, in the order of build_tools/sources.py."""
    return [CHECKOUT / source for source in CUDA_SOURCES if source.endswith(".cu")]


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return "missing"


@dataclass(frozen=True)
class _Object:
    source: Path
    target: Path
    command: tuple[str, ...]

    @property
    def _record(self) -> Path:
        return self.target.with_suffix(".json")

    def is_current(self) -> bool:
        try:
            record = json.loads(self._record.read_text())
        except OSError:
            return False
        files = record["files"]
        current = record["command"] == shlex.join(self.command) and self.target.is_file()
        return current and all(_digest(Path(file)) == digest for file, digest in files.items())

    def compile(self, stop: threading.Event) -> None:
        if stop.is_set() or self.is_current():
            return
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self._record.unlink(missing_ok=True)
        start = time.time()
        run = subprocess.run(self.command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
        if run.returncode != 0:
            stop.set()
            raise EmulatedBuildError(f"{self.source.relative_to(CHECKOUT)}:\n{run.stderr}")
        # A make rule: "object: source header header", long lines continued by a backslash.
        rule = self.target.with_suffix(".d").read_text().replace("\\\n", " ")
        files = [CHECKOUT / file for file in shlex.split(rule)[1:]]
        if any(file.stat().st_mtime > start for file in files):
            return  # nobody knows which text of it the compiler read: without a record, the next build compiles again
        digests = {str(file): _digest(file) for file in files}
        self._record.write_text(json.dumps({"command": shlex.join(self.command), "files": digests}))

    def key(self) -> str:
        return _digest(self.target)


def _object(source: Path, mode: str, flags: list[str], folder: Path | None = None) -> _Object:
    name = str(source.relative_to(CHECKOUT)).replace("/", "_") + ".o"
    target = (folder or FOLDER / mode) / name
    depend = ["-MMD", "-MF", str(target.with_suffix(".d"))]
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    command = (*compiler, "-x", "c++", *flags, *depend, "-c", str(source), "-o", str(target))
    return _Object(source, target, command)


def _torch_flags() -> list[str]:
    include = Path(torch.__file__).parent / "include"
    return ["-isystem", str(include), "-isystem", str(include / "torch" / "csrc" / "api" / "include")]


def all_objects(mode: str) -> list[_Object]:
    """Everything that the library of ``mode`` is linked from."""
    host = [*_FLAGS, *_RUNTIME_FLAGS[mode], "-O1", f"-DPREFIX_KERNELS_EMULATED={NAMESPACES[mode]}", *_torch_flags()]
    # The slowest first.
    objects = [_object(EMULATOR / "host_code.cpp", mode, host)]
    return objects + [kernel_object(source, mode) for source in kernel_sources()] + runtime_objects(mode)


def kernel_object(source: Path, mode: str, folder: Path | None = None) -> _Object:
    """A file of kernels, compiled for the emulator; the object is in ``folder`` or with those of the library."""
    return _object(source, mode, [*_FLAGS, *_KERNEL_FLAGS[mode], *_VARIANT_FLAGS[VARIANT]], folder)


def runtime_objects(mode: str) -> list[_Object]:
    """The emulator itself."""
    runtime = [
        path for path in sorted(EMULATOR.glob("*.cpp")) if path.name not in ("host_code.cpp", "device_on_host.cpp")
    ]
    if mode == "check":
        runtime += sorted((EMULATOR / "check").glob("*.cpp"))
    flags = [*_FLAGS, *_RUNTIME_FLAGS[mode], *(["-g"] if VARIANT == "debug" else [])]
    return [_object(source, mode, flags) for source in runtime]


@contextmanager
def _only_one_process() -> Iterator[None]:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build(mode: str) -> Path:
    """Compile what has changed and link it; returns the library.

    Raises:
        EmulatedBuildError: a file does not compile or the library does not link.
    """
    return build_library(mode, all_objects(mode), TORCH_LIBRARIES)


def build_library(name: str, objects: list[_Object], libraries: list[str]) -> Path:
    """`build` of other objects."""
    with _only_one_process():
        stop = threading.Event()
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for finished in [pool.submit(each.compile, stop) for each in objects]:
                finished.result()
        # A library that a process has loaded is never written over.
        key = hashlib.sha256("".join(each.key() for each in objects).encode()).hexdigest()[:16]
        library = FOLDER / f"{name}-{key}.so"
        if not library.is_file():
            for old in FOLDER.glob(f"{name}-{16 * '?'}.so"):
                old.unlink()
            link(objects, libraries, library)
    return library


def link(objects: list[_Object], libraries: list[str], library: Path) -> None:
    """The last step of `build_library`.

    Raises:
        EmulatedBuildError: what the linker said.
    """
    unfinished = library.with_suffix(".tmp")
    # In check mode the emulator itself defines what -fsanitize=thread calls. It comes first: of a function that several
    # files define the linker takes the first, and its own must not be instrumented ones.
    files = [str(each.target) for each in reversed(objects)]
    command = ["g++", "-shared", "-Wl,-Bsymbolic", "-Wl,-z,defs", *files]
    command += ["--coverage"] if VARIANT == "coverage" else []
    command += [*libraries, "-lpthread", "-ldl", "-o", str(unfinished)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise EmulatedBuildError(run.stderr)
    unfinished.rename(library)


@dataclass(frozen=True)
class Library:
    """The operators of one mode, and the emulator behind them."""

    forward: Any
    extend_: Any
    backward: Any
    merge: Any
    merge_backward: Any
    emulator: ctypes.CDLL

    def seed(self, seed: int) -> None:
        """The order of blocks, warps and lanes: 0 is the natural one, every other number another random one."""
        self.emulator.prefix_kernels_emulator_seed(ctypes.c_uint64(seed))

    def threads(self, count: int) -> None:
        """Spread the blocks of a launch over so many threads of the host; check mode uses one."""
        self.emulator.prefix_kernels_emulator_threads(ctypes.c_int(count))

    def take_copied_bytes(self) -> int:
        """What ``cp.async`` read from global memory since the last call, in bytes."""
        take = self.emulator.prefix_kernels_emulator_take_copied_bytes
        take.restype = ctypes.c_int64
        return take()

    def take_launches(self) -> int:
        """Kernels that were launched since the last call."""
        take = self.emulator.prefix_kernels_emulator_take_launches
        take.restype = ctypes.c_int64
        return take()

    def device(self, architecture: int, sm_count: int, max_grid_yz: int = 65535, counters: int = 1024) -> None:
        """Set the GPU that the host code sees.

        Args:
            architecture: its compute capability, 80 for 8.0.
            sm_count: number of multiprocessors.
            max_grid_yz: the most blocks along y, and along z, of a grid. With few of them a warp of the float32 and
                float64 kernels takes several rows, as on a GPU in a batch of more than 65,535.
            counters: how many a call gets for blocks that count themselves in; with fewer than it asks for, the
                decode kernel's parts are merged by a second kernel.
        """
        self.emulator.prefix_kernels_emulated_device(architecture, sm_count, max_grid_yz, counters)


def load(mode: str = "fast") -> Library:
    """Build and load the operators of ``mode``, differentiable like those of the package."""
    return _load(mode)


@functools.cache
def _load(mode: str) -> Library:
    return load_library(build(mode), mode)


def load_library(path: Path, mode: str) -> Library:
    """The operators of a library that `build_library` made; only one of each mode fits into a process."""
    torch.ops.load_library(path)
    namespace = getattr(torch.ops, NAMESPACES[mode])
    torch.library.register_autograd(
        f"{NAMESPACES[mode]}::forward",
        functools.partial(autograd.gradients_from_saved, operator=namespace.backward),
        setup_context=autograd.save_for_backward,
    )
    operators = (namespace.forward, namespace.extend_, namespace.backward, namespace.merge, namespace.merge_backward)
    return Library(*operators, ctypes.CDLL(str(path)))


def emulated_prefix_attention(
    *arguments: Any, mode: str = "fast", seed: int = 0, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """`prefix_kernels.prefix_attention` of CPU tensors by the CUDA kernels, with its arguments.

    Args:
        mode: ``fast``, or ``check``: every load and store of the kernels is checked.
        seed: the order of blocks, warps and lanes, in the backward pass too unless another call changes it.
    """
    library = load(mode)
    library.seed(seed)
    with mock.patch.object(functional, "ops", SimpleNamespace(forward=library.forward)):
        return functional.prefix_attention(*arguments, **options)


def emulated_extend_(*arguments: Any, mode: str = "fast", seed: int = 0) -> None:
    """`torch.ops.prefix_kernels.extend_` of CPU tensors by the CUDA kernels.

    ``mode`` and ``seed`` are those of `emulated_prefix_attention`.
    """
    library = load(mode)
    library.seed(seed)
    library.extend_(*arguments)
