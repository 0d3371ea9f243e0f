"""Builds of the CPU kernels of one source tree, as a shared library that is called without PyTorch's operator.

The tool depends on little of a tree's layout: the sources are the ``.cpp`` files below ``csrc/cpu`` that instantiate
kernels for ``PREFIX_KERNELS_SCALAR``, the parameters are in an ``attention_params.h`` below ``csrc``, and the Python
files that build the tree have lists of compiler flags. Objects are kept under a name made from the preprocessed
source and the command, so that only files whose meaning has changed are compiled again.
"""

from __future__ import annotations

import ast
import ctypes
import hashlib
import os
import shlex
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

_ADAPTER = Path(__file__).with_name("kernel_adapter.cpp")
_SCALAR = "PREFIX_KERNELS_SCALAR"  # stands in the sources that are compiled once per element type
_FLAG_LISTS = ("CXX_FLAGS", "KERNEL_FLAGS", "ISA_FLAGS")


class Tensor(ctypes.Structure):
    """A tensor ``[batch, heads, rows, head_dim]`` of ``kernel_adapter.cpp``, its strides in elements."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        *[(f"{dim}_stride", ctypes.c_int64) for dim in ("batch", "head", "row")],
    ]


class Call(ctypes.Structure):
    """The arguments of one call, as ``kernel_adapter.cpp`` describes them."""

    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("batch", "q_heads", "kv_heads", "q_len", "k_len", "head_dim")],
        *[(name, ctypes.c_int64) for name in ("prefix_len", "dtype", "is_causal", "dropout_threshold", "dropout_seed")],
        ("scale", ctypes.c_double),
        ("key_mask", ctypes.c_void_p),
        *[(name, Tensor) for name in ("query", "key", "value", "prefix_key", "prefix_value", "out", "dout")],
        ("gradients", Tensor * 5),
        ("lse", ctypes.c_void_p),
    ]


class Kernels:
    """The loaded library of one tree.

    Raises:
        ValueError: the tree's own ``kernel_adapter.cpp`` means another `Call` than this file.
    """

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.call_size.restype = self._library.run.restype = ctypes.c_int64
        if (size := self._library.call_size()) != ctypes.sizeof(Call):
            raise ValueError(
                f"{library}: expected a kernel_adapter.cpp with a Call of {ctypes.sizeof(Call)} bytes, got {size}; "
                "compare with the script of the tree that has the newer one"
            )

    def run(self, call: Call, forward: bool, backward: bool, threads: int, repeats: int = 1) -> int:
        """Nanoseconds of ``repeats`` times the kernels that are asked for."""
        arguments = ctypes.byref(call), int(forward), int(backward), threads, ctypes.c_int64(repeats)
        return self._library.run(*arguments)


@dataclass(frozen=True)
class _Unit:
    """One source file and the command that compiles it, without ``-c`` and ``-o``."""

    source: Path
    command: tuple[str, ...]

    def object_in(self, folder: Path) -> Path:
        """The object's path, named after the preprocessed source and the command."""
        text = _output_of([*self.command, "-E", "-P", str(self.source)])
        flags = [flag for flag in self.command if not flag.startswith("-I")]
        return folder / f"{hashlib.sha256(shlex.join(flags).encode() + text).hexdigest()[:20]}.o"

    def compile(self, target: Path) -> None:
        if target.exists():
            return
        partial = target.with_suffix(f".{os.getpid()}.o")
        _output_of([*self.command, "-c", str(self.source), "-o", str(partial)])
        partial.replace(target)  # an interrupted run leaves no half of an object


def _output_of(command: list[str]) -> bytes:
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}: exit status {done.returncode}\n{done.stderr.decode()}")
    return done.stdout


def _header(tree: Path) -> Path:
    """The one ``attention_params.h`` of the tree."""
    found = sorted(tree.glob("csrc/**/attention_params.h"))
    if len(found) != 1:
        names = [str(path.relative_to(tree)) for path in found]
        raise ValueError(f"{tree}: expected one file csrc/**/attention_params.h, got {names}")
    return found[0]


def kernel_sources(tree: Path) -> list[Path]:
    """The files of the tree that are compiled once per instruction set and element type.

    Raises:
        ValueError: there is none.
    """
    found = [path for path in sorted(tree.glob("csrc/cpu/**/*.cpp")) if _SCALAR in path.read_text(encoding="utf-8")]
    if not found:
        raise ValueError(f"{tree}: expected files csrc/cpu/**/*.cpp that instantiate for {_SCALAR}, got none")
    return found


def read_flags(tree: Path, isa: str) -> list[str]:
    """The flags with which the tree compiles its kernels for ``isa``.

    They are the values of the assignments to ``_CXX_FLAGS``, ``_KERNEL_FLAGS`` and ``_ISA_FLAGS``, with or without the
    underscore, in the Python files of ``csrc`` or ``build_tools``: nothing else of these files is run.

    Raises:
        ValueError: a list of flags is missing, or has nothing for ``isa``.
    """
    values: dict[str, object] = {}
    for path in sorted([*tree.glob("csrc/*.py"), *tree.glob("build_tools/*.py")]):
        for node in ast.parse(path.read_text()).body:
            name = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else ""
            if name.endswith("_FLAGS"):
                values[name] = eval(compile(ast.Expression(node.value), str(path), "eval"), {}, values)
    lists = {name.lstrip("_"): value for name, value in values.items()}
    if missing := [name for name in _FLAG_LISTS if name not in lists]:
        raise ValueError(f"{tree}: expected lists of flags in csrc/*.py or build_tools/*.py, got no {missing}")
    if isa not in lists["ISA_FLAGS"]:
        raise ValueError(f"{tree}: expected an instruction set of {[*lists['ISA_FLAGS']]}, got {isa!r}")
    return [*lists["CXX_FLAGS"], *lists["KERNEL_FLAGS"], *lists["ISA_FLAGS"][isa]]


def _units(tree: Path, isa: str) -> list[_Unit]:
    header = _header(tree)
    own = tree / "benchmarks" / "kernels" / "cpu" / _ADAPTER.name
    sources = [*kernel_sources(tree), own if own.exists() else _ADAPTER]
    flags = [*read_flags(tree, isa), f"-DPREFIX_KERNELS_ISA={isa}", f"-D{_SCALAR}=float"]
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    command = (*compiler, *flags, f"-I{header.parent}", f"-I{tree / 'csrc'}")
    return [_Unit(source, command) for source in sources]


def build(trees: Iterable[Path], isa: str, folder: Path) -> list[Kernels]:
    """The kernels of every tree for one instruction set, compiled by ``$CXX`` (default ``g++``) and loaded.

    Each tree becomes a library of its own with hidden symbols. In one program the linker would merge the inline
    functions outside of the instruction set's namespace, such as those of ``visibility.h``, and a change to them would
    not be seen; as libraries, two equal trees have equal code at equal offsets in a page.

    Args:
        folder: receives objects and libraries; those that are current are used again.

    Raises:
        ValueError: a tree lacks a file or flags that are needed.
        RuntimeError: a file does not compile.
    """
    folder.mkdir(parents=True, exist_ok=True)
    objects: list[list[Path]] = []
    units: dict[Path, _Unit] = {}
    for tree in trees:
        found = {unit.object_in(folder): unit for unit in _units(tree.resolve(), isa)}
        objects.append([*found])
        units |= found
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for finished in [pool.submit(unit.compile, target) for target, unit in units.items()]:
            finished.result()
    loaded = []
    for number, parts in enumerate(objects):
        library = folder / f"tree{number}.{os.getpid()}.so"
        compiler = shlex.split(os.environ.get("CXX", "g++"))
        _output_of([*compiler, "-shared", "-fopenmp", "-Wl,-z,defs", *map(str, parts), "-o", str(library)])
        loaded.append(Kernels(library))
        library.unlink()  # stays loaded
    return loaded
