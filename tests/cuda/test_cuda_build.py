"""nvcc compiles every kernel for sm_80 and sm_90: no register spills, and the instructions that make the kernels fast.

What a build of the extension left in ``build`` is looked at where it is current; else the kernels are compiled here.

The number of tensor core, ``ldmatrix`` and ``cp.async`` instructions of each file is compared with
``sass_instructions.json``; after a change that is meant, ``python tests/cuda/test_cuda_build.py`` writes that file
anew, all or the files with a word in their path. It needs cuobjdump, from the CUDA toolkit or from triton's wheel.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent.parent
# Last, because an installed package comes before the checkout's folder of its source.
sys.path.append(str(CHECKOUT))

from build_tools.environment import CudaToolkit, find_compiler, find_cuda_toolkit, parallel_jobs  # noqa: E402
from build_tools.extension import CUDA_FLAGS, Unit  # noqa: E402
from build_tools.sass.kernels import Kernel, kernel_constants  # noqa: E402
from build_tools.sass.tools import find_cuobjdump  # noqa: E402
from build_tools.sass_report import Row, read_table, report_object, report_sources  # noqa: E402
from build_tools.sources import CUDA_SOURCES  # noqa: E402

FIGURES = Path(__file__).with_name("sass_instructions.json")
ARCHITECTURES = ("sm_80", "sm_90")
# mma.sync, ldmatrix, cp.async
INSTRUCTIONS = ("HMMA", "LDSM", "LDGSTS")

# Kernels that may spill: a pattern of the compiler's name and architecture, and how many bytes at most. With a head dim
# of 256 the accumulators of one gradient alone are 128 of a thread's 255 registers.
MAY_SPILL = {
    r"backward_columns\w*Li256ELb1ELb0ELb0ELb0E\w* for sm_80": 8,
    r"backward_columns\w*Li256ELb1ELb0ELb0ELb0E\w* for sm_90": 16,
    r"backward_rows\w*Li256ELb1E\w* for sm_90": 4,
}


def kernel_sources() -> list[str]:
    """The .cu files of the build, relative to the checkout."""
    return [source for source in CUDA_SOURCES if source.endswith(".cu")]


def kernel_flags() -> list[str]:
    """nvcc's, as a build of the extension for both architectures has them."""
    architectures = [architecture.removeprefix("sm_") for architecture in ARCHITECTURES]
    return [*CUDA_FLAGS, *(f"-gencode=arch=compute_{number},code=sm_{number}" for number in architectures)]


def compile_kernels(toolkit: CudaToolkit, source: str, target: Path) -> str:
    """Compile one file for both architectures with the flags of the build; what ptxas says of the kernels."""
    command = [nvcc_of(toolkit), "-ccbin", find_compiler()[0], *kernel_flags()]
    run = subprocess.run(
        [*command, "-c", source, "-o", str(target)], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stderr


def nvcc_of(toolkit: CudaToolkit) -> str:
    return str(toolkit.home / "bin" / "nvcc")


def find_built(toolkit: CudaToolkit, source: str, folder: Path) -> Unit | None:
    """The file's object in ``folder``, where builds of the extension leave theirs, if it is current and for both."""
    name = source.removeprefix("csrc/").replace("/", "_") + ".o"
    for target in folder.glob(f"temp.*/cuda/{name}"):
        record = target.with_suffix(".cmd")
        unit = Unit(source, target, tuple(shlex.split(record.read_text())) if record.is_file() else ())
        if unit.is_current() and unit.report.is_file() and {nvcc_of(toolkit), *kernel_flags()} <= set(unit.command):
            return unit
    return None


def spilling_kernels(report: str) -> dict[str, int]:
    """Every kernel, and every function that one calls, that spills, by ptxas's report; how many bytes at most."""
    spills: dict[str, int] = {}
    architecture = ""
    for entry, name, stored, loaded in re.findall(
        r"Compiling entry function '\w+' for '(\w+)'"
        r"|Function properties for (\w+)\n.*?(\d+) bytes spill stores, (\d+) bytes spill loads",
        report,
    ):
        if entry:
            architecture = entry
        elif size := max(int(stored), int(loaded)):
            key = f"{name} for {architecture}"
            spills[key] = max(size, spills.get(key, 0))
    return spills


def may_spill(name: str, size: int) -> bool:
    return any(size <= most and re.search(pattern, name) for pattern, most in MAY_SPILL.items())


def count_instructions(cuobjdump: str, target: Path) -> dict[str, dict[str, int]]:
    """How often each of INSTRUCTIONS stands in the machine code, by architecture."""
    counts = {}
    for architecture in ARCHITECTURES:
        command = [cuobjdump, "-sass", "-arch", architecture, str(target)]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "Function" in sass, f"{target}: no machine code for {architecture}"
        found = Counter(re.findall(rf"\b({'|'.join(INSTRUCTIONS)})\b", sass))
        counts[architecture] = {name: found[name] for name in INSTRUCTIONS}
    return counts


@pytest.fixture(scope="module")
def toolkit() -> CudaToolkit:
    found = find_cuda_toolkit()
    if found is None:
        pytest.skip("no CUDA toolkit: nvcc is neither on PATH nor in CUDA_HOME")
    return found


@pytest.fixture(scope="module")
def constants(toolkit: CudaToolkit) -> dict[tuple[str, ...], Kernel]:
    return kernel_constants(toolkit)


@pytest.mark.slow
@pytest.mark.parametrize("source", kernel_sources(), ids=lambda source: Path(source).stem)
def test_kernels_do_not_spill_and_have_the_instructions_that_were_counted(
    toolkit, constants, source, tmp_path, monkeypatch
):
    monkeypatch.chdir(CHECKOUT)  # what a build notes down is relative to it
    if (built := find_built(toolkit, source, Path("build"))) is not None:
        target, report = built.object, built.report.read_text()
    else:
        target = tmp_path / "kernels.o"
        report = compile_kernels(toolkit, source, target)
    assert report.count("Compiling entry function") >= len(ARCHITECTURES)
    assert not {name: size for name, size in spilling_kernels(report).items() if not may_spill(name, size)}

    figures = json.loads(FIGURES.read_text())
    expected, got = figures["counts"][source], count_instructions(find_cuobjdump(toolkit), target)
    same_compiler = toolkit.version == figures["nvcc"]
    if not same_compiler:
        # Another compiler unrolls differently, but leaves no kind of instruction out.
        expected, got = (
            {name: {key: n > 0 for key, n in counts.items()} for name, counts in each.items()}
            for each in (expected, got)
        )
    assert got == expected
    if source in report_sources():
        compare_with_table(report_object(find_cuobjdump(toolkit), target, constants, ("8.0", "9.0")), same_compiler)


def compare_with_table(rows: list[Row], same_compiler: bool) -> None:
    """Compare what was counted in one object with the committed table of ``build_tools/sass_report.py``."""
    table = {tuple(list(line.values())[:6]): tuple(line.values()) for line in read_table()}
    assert rows
    for row in rows:
        line = tuple(str(value) for value in vars(row).values())
        # Another compiler may leave a path out that differs in nothing, but no kernel.
        assert line[:6] in table or not same_compiler, line
        assert not same_compiler or table[line[:6]] == line


def test_a_change_of_a_count_in_the_table_is_seen() -> None:
    """The comparison must be able to fail."""
    ours = next(line for line in read_table() if line["source"] == "ours")
    types = {name: field.type for name, field in Row.__dataclass_fields__.items()}
    row = Row(**{name: int(value) if types[name] == "int" else value for name, value in ours.items()})
    compare_with_table([row], True)
    with pytest.raises(AssertionError):
        compare_with_table([replace(row, instructions=row.instructions + 1)], True)
    compare_with_table([replace(row, instructions=row.instructions + 1)], False)


def test_a_spill_is_seen(toolkit, tmp_path):
    """The check must be able to fail: 1000 values that are all live cannot stand in 255 registers."""
    source = tmp_path / "spills.cu"
    source.write_text(
        "__global__ void spills(float* x) {\n  float y[1000];\n"
        "#pragma unroll\n  for (int i = 0; i < 1000; ++i) y[i] = x[i];\n  __syncthreads();\n"
        "#pragma unroll\n  for (int i = 0; i < 1000; ++i) x[i] = y[999 - i] * y[i];\n}\n"
    )
    assert spilling_kernels(compile_kernels(toolkit, str(source), tmp_path / "spills.o"))


@pytest.mark.parametrize("colon", [":", " :"], ids=["g++", "nvcc"])
def test_a_build_is_looked_at_while_it_is_current(toolkit, tmp_path, monkeypatch, colon):
    monkeypatch.chdir(tmp_path)
    source, header, target = Path("kernels.cu"), Path("header.cuh"), Path("temp.x/cuda/kernels.cu.o")
    target.parent.mkdir(parents=True)
    for path in (source, header, target, target.with_suffix(".log")):
        path.touch()

    def leave(*flags: str) -> None:
        target.with_suffix(".d").write_text(f"{target}{colon} {source} \\\n {header}")
        target.with_suffix(".cmd").write_text(shlex.join([*flags, "-c", str(source)]))

    def found() -> bool:
        return find_built(toolkit, str(source), Path()) is not None

    flags = [nvcc_of(toolkit), *kernel_flags()]
    assert not found()
    leave(*flags, "-gencode=arch=compute_90,code=compute_90")
    assert found()
    os.utime(header, (target.stat().st_mtime + 10,) * 2)
    assert not found()
    os.utime(header, (target.stat().st_mtime,) * 2)
    assert found()
    leave(*flags[:-1])
    assert not found()
    leave("another/nvcc", *kernel_flags())
    assert not found()


def test_every_kernel_has_its_figures():
    assert sorted(json.loads(FIGURES.read_text())["counts"]) == sorted(kernel_sources())


def write_figures(parts: list[str]) -> None:
    """Compile every file, or those with one of ``parts`` in their path, and write what was found."""
    toolkit = find_cuda_toolkit()
    assert toolkit is not None, "no CUDA toolkit: nvcc is neither on PATH nor in CUDA_HOME"
    cuobjdump = find_cuobjdump(toolkit)

    def figures(source: str) -> dict[str, dict[str, int]]:
        target = CHECKOUT / "build" / "sass" / (Path(source).stem + ".o")
        target.parent.mkdir(parents=True, exist_ok=True)
        for name, size in spilling_kernels(compile_kernels(toolkit, source, target)).items():
            print(f"{source}: {name}: {size}")
        return count_instructions(cuobjdump, target)

    known = json.loads(FIGURES.read_text())["counts"] if FIGURES.is_file() else {}
    counts = {source: known.get(source, {}) for source in sorted(kernel_sources())}
    wanted = [source for source in kernel_sources() if not parts or any(part in source for part in parts)]
    with ThreadPoolExecutor(parallel_jobs()) as pool:
        counts |= zip(wanted, pool.map(figures, wanted), strict=True)
    lines = ",\n".join(f"    {json.dumps(source)}: {json.dumps(count)}" for source, count in counts.items())
    FIGURES.write_text(f'{{\n  "nvcc": {json.dumps(toolkit.version)},\n  "counts": {{\n{lines}\n  }}\n}}\n')


if __name__ == "__main__":
    write_figures(sys.argv[1:])
