"""The setuptools command that compiles and links ``prefix_kernels._C``.

setuptools knows one set of flags per extension module and compiles one file after the other; this module is made of the
same kernel sources compiled for several instruction sets and element types, side by side.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import environ
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext

from .environment import (
    BuildError,
    CudaPlan,
    Torch,
    cpu_isas,
    find_compiler,
    find_cuda_toolkit,
    find_torch,
    parallel_jobs,
    plan_cuda,
    require_torch,
)

_CXX_FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-Wall", "-DNDEBUG"]
CUDA_FLAGS = ["-std=c++20", "-O3", "-DNDEBUG", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall", "-Xptxas", "-v"]
_TORCH_FLAGS = ["-O2", "-DTORCH_EXTENSION_NAME=_C", "-D_GLIBCXX_USE_CXX11_ABI=1"]
# Results must not depend on -march=native: the flags name what each ISA has, tuned for no particular processor.
_KERNEL_FLAGS = ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
_AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
_ISA_FLAGS = {
    "portable": [],
    "avx2": _AVX2_FLAGS,
    "avx512": [*_AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"],
}
_SCALARS = ("float", "double")


class KernelExtension(Extension):
    """An extension module of torch-including sources and of kernels that are compiled once per ISA and scalar.

    Args:
        name: dotted name of the module.
        torch_sources: the files that include torch headers.
        kernel_sources: the files compiled with ``PREFIX_KERNELS_ISA`` and ``PREFIX_KERNELS_SCALAR`` defined.
        cuda_sources: ``.cu`` kernels and the ``.cpp`` files that call them; empty in a version without any.
    """

    def __init__(
        self, name: str, torch_sources: Sequence[str], kernel_sources: Sequence[str], cuda_sources: Sequence[str]
    ) -> None:
        # setuptools copies its `sources` into a source distribution.
        super().__init__(name, [*torch_sources, *kernel_sources, *cuda_sources], language="c++")
        self.torch_sources, self.kernel_sources, self.cuda_sources = torch_sources, kernel_sources, cuda_sources


@dataclass(frozen=True)
class Unit:
    """A compiler call. Beside the object it leaves its command and the compiler's messages."""

    source: str
    object: Path
    command: tuple[str, ...]

    @property
    def report(self) -> Path:
        return self.object.with_suffix(".log")

    def is_current(self) -> bool:
        """Tell if this very command made the object, after the last change of every file it was made from."""
        record, dependencies = self.object.with_suffix(".cmd"), self.object.with_suffix(".d")
        try:
            if record.read_text() != shlex.join(self.command):
                return False
            made = self.object.stat().st_mtime
            # A make rule: "object: source header header", long lines continued by a backslash; nvcc writes "object :".
            rule = dependencies.read_text().replace("\\\n", " ")
            files = shlex.split(rule.partition(": ")[2])
            return all(Path(file).stat().st_mtime <= made for file in files)
        except OSError:
            return False

    def compile(self, stop: threading.Event) -> None:
        if stop.is_set() or self.is_current():
            return
        record = self.object.with_suffix(".cmd")
        record.unlink(missing_ok=True)
        self.object.parent.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        run = subprocess.run(self.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        print(f"{time.monotonic() - start:6.1f} s  {self.object.parent.name}/{self.object.name}\n{run.stdout}", end="")
        if run.returncode != 0:
            stop.set()
            raise BuildError(f"{self.command[0]} could not compile {self.source} (its messages stand above).")
        self.report.write_text(run.stdout)
        record.write_text(shlex.join(self.command))


def define(name: str, text: str) -> str:
    """Make a -D flag that defines ``name`` as a string literal."""
    return f'-D{name}="{text}"'


def cxx_flags() -> list[str]:
    """Flags of every C++ file. The user's come first: some environments ask for -O2 or an -march of their own."""
    users = shlex.split(environ.get("CPPFLAGS", "")) + shlex.split(environ.get("CXXFLAGS", ""))
    return [*users, *_CXX_FLAGS]


class BuildKernelExtension(build_ext):
    """``build_ext`` for `KernelExtension`; leaves beside the module which torch it was compiled against."""

    def run(self) -> None:
        torch = require_torch(find_torch())
        super().run()
        for extension in self.extensions:
            record = Path(self.get_ext_fullpath(extension.name)).with_name("_compiled_torch.py")
            record.write_text(f'VERSION = "{torch.version}"\n')

    def build_extension(self, extension: KernelExtension) -> None:
        torch, compiler = require_torch(find_torch()), find_compiler()
        cuda = plan_cuda(torch, find_cuda_toolkit(), extension.cuda_sources)
        if self.editable_mode:
            # setuptools would use a folder that it deletes, and compile everything anew after every change.
            self.build_temp = str(Path("build") / f"temp.{self.plat_name}-{sys.implementation.cache_tag}")
        print(f"prefix_kernels: compiling against PyTorch {torch.version} in {torch.folder}; {cuda.reason}.")
        units = [
            *self._torch_units(extension, compiler, torch, cuda),
            *self._kernel_units(extension, compiler),
            *self._cuda_units(extension, compiler, cuda),
        ]
        self._compile(units)
        self._link(extension, compiler, torch, cuda, units)

    def _unit(self, source: str, folder: str, compiler: list[str], flags: list[str], suffix: str = "") -> Unit:
        # Not with_suffix: files of different languages may share a stem.
        target = Path(self.build_temp) / folder / (source.removeprefix("csrc/").replace("/", "_") + suffix + ".o")
        dependencies = ["-MMD", "-MF", str(target.with_suffix(".d"))]
        command = [*compiler, *flags, *dependencies, "-c", source, "-o", str(target)]
        return Unit(source, target, tuple(command))

    def _torch_units(self, extension: KernelExtension, compiler: list[str], torch: Torch, cuda: CudaPlan) -> list[Unit]:
        isas = cpu_isas()
        flags = [
            *cxx_flags(),
            *_TORCH_FLAGS,
            define("PREFIX_KERNELS_TORCH_VERSION", torch.version),
            define("PREFIX_KERNELS_CPU_ISAS", ";".join(isas)),
            define("PREFIX_KERNELS_CUDA_ARCHITECTURES", ";".join(cuda.architectures)),
        ]
        if "avx2" in isas:
            flags.append("-DPREFIX_KERNELS_WITH_X86=1")
        folders = [*torch.include_folders, Path(sysconfig.get_path("include"))]
        sources = [*extension.torch_sources]
        if cuda.toolkit:
            flags += ["-DPREFIX_KERNELS_WITH_CUDA=1", define("PREFIX_KERNELS_CUDA_TOOLKIT", cuda.toolkit.version)]
            folders += [cuda.toolkit.home / "include", torch.cuda_include_folder]
            sources += [source for source in extension.cuda_sources if not source.endswith(".cu")]
        for folder in folders:
            # -isystem keeps the warnings of other people's headers out of ours.
            flags += ["-isystem", str(folder)]
        return [self._unit(source, "torch", compiler, flags) for source in sources]

    def _kernel_units(self, extension: KernelExtension, compiler: list[str]) -> list[Unit]:
        def unit(source: str, isa: str, scalar: str) -> Unit:
            which = [f"-DPREFIX_KERNELS_ISA={isa}", f"-DPREFIX_KERNELS_SCALAR={scalar}"]
            flags = [*cxx_flags(), *_KERNEL_FLAGS, *_ISA_FLAGS[isa], *which]
            return self._unit(source, isa, compiler, flags, f".{scalar}")

        # The portable objects come first, here and therefore at link time. An inline function of the standard library
        # that several objects define is taken from the first: code that any processor can run.
        return [
            unit(source, isa, scalar)
            for isa in cpu_isas()
            for source in extension.kernel_sources
            for scalar in _SCALARS
        ]

    def _cuda_units(self, extension: KernelExtension, compiler: list[str], cuda: CudaPlan) -> list[Unit]:
        if not cuda.toolkit:
            return []
        nvcc = [str(cuda.toolkit.home / "bin" / "nvcc"), "-ccbin", compiler[0]]
        flags = [*CUDA_FLAGS, *cuda.gencode_flags]
        return [self._unit(source, "cuda", nvcc, flags) for source in extension.cuda_sources if source.endswith(".cu")]

    @staticmethod
    def _compile(units: list[Unit]) -> None:
        stop = threading.Event()
        with ThreadPoolExecutor(parallel_jobs()) as pool:
            for finished in [pool.submit(unit.compile, stop) for unit in units]:
                finished.result()

    def _link(
        self, extension: KernelExtension, compiler: list[str], torch: Torch, cuda: CudaPlan, units: list[Unit]
    ) -> None:
        module = Path(self.get_ext_fullpath(extension.name))
        module.parent.mkdir(parents=True, exist_ok=True)
        # No run path: importing torch has loaded these libraries before this module is.
        libraries = [f"-L{torch.library_folder}", "-ltorch_cpu", "-lc10"]
        if cuda.toolkit:
            libraries += ["-ltorch_cuda", "-lc10_cuda", f"-L{cuda.toolkit.home / 'lib64'}", "-lcudart"]
        command = [
            *[*compiler, "-shared", "-fopenmp", *shlex.split(environ.get("LDFLAGS", ""))],
            *[str(unit.object) for unit in units],
            *[*libraries, "-o", str(module)],
        ]
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        print(run.stdout, end="")
        if run.returncode != 0:
            raise BuildError(f"{compiler[0]} could not link {module} (its messages stand above).")
