"""The comparison of two builds of the CPU kernels: results, ratios, and trees that cannot be built."""

from __future__ import annotations

import csv
import dataclasses
import math
import shutil
from pathlib import Path

import pytest
import torch
from scripts import run_script

from benchmarks.common.cells import Cell
from benchmarks.common.contenders import make_dout, make_inputs, prepare
from benchmarks.kernels.cpu.baselines import ours
from benchmarks.kernels.cpu.builds import Kernels, build, kernel_sources, read_flags
from benchmarks.kernels.cpu.turns import Comparison, Problem, compare

CHECKOUT = Path(__file__).parent.parent.parent
SCRIPT = CHECKOUT / "benchmarks" / "kernels" / "cpu" / "compare_builds.py"
CELL = Cell(1, 4, 2, 32, 96, 96, 20, True, "forward", "float32")

# A kernel that computes everything twice.
TWICE = """
#define attention_forward attention_forward_once
#include "once.h"
#undef attention_forward

namespace prefix_kernels::PREFIX_KERNELS_ISA {
template <class T>
void attention_forward(const AttentionParams& params, int threads, RunWorkers run) {
  attention_forward_once<T>(params, threads, run);
  attention_forward_once<T>(params, threads, run);
}
template void attention_forward<PREFIX_KERNELS_SCALAR>(const AttentionParams&, int, RunWorkers);
}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Objects and libraries of this module's builds."""
    return tmp_path_factory.mktemp("builds")


@pytest.fixture(scope="module")
def slow_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree whose forward kernel is half as fast, and whose parameters have one more field, in front."""
    tree = tmp_path_factory.mktemp("trees") / "slow"
    for name in ("csrc", "build_tools"):
        if (CHECKOUT / name).exists():
            shutil.copytree(CHECKOUT / name, tree / name)
    (forward,) = [path for path in kernel_sources(tree) if "attention_forward<" in path.read_text()]
    forward.rename(forward.with_name("once.h"))
    forward.write_text(TWICE)
    (header,) = tree.glob("csrc/**/attention_params.h")
    opening = "struct AttentionParams {\n"
    assert opening in header.read_text()
    header.write_text(header.read_text().replace(opening, f"{opening}  double added = 0.0;\n"))
    return tree


@pytest.fixture(scope="module")
def builds(folder: Path, slow_tree: Path) -> list[Kernels]:
    """This checkout, this checkout again, and the slow tree."""
    return build([CHECKOUT, CHECKOUT, slow_tree], "portable", folder)


def test_a_tree_against_itself_is_as_fast_and_a_slowed_one_is_seen(builds: list[Kernels]) -> None:
    base, same, slow = builds
    itself = compare(CELL, base, same, seconds=0.5)
    assert itself.difference == 0.0
    assert 0.8 < itself.ratio < 1.25
    slowed = compare(CELL, base, slow, seconds=0.5)
    assert slowed.difference == 0.0
    assert 0.4 < slowed.ratio < 0.65
    assert slowed.changed_ms > slowed.base_ms
    assert slowed.interval[1] < itself.interval[0]


def test_several_threads_and_empty_caches_are_compared_too(builds: list[Kernels]) -> None:
    evicted = []
    decode = dataclasses.replace(CELL, q_len=1, pass_="decode")
    comparison = compare(decode, *builds[:2], threads=2, seconds=0.0, evict=lambda: evicted.append(1))
    assert len(evicted) == 2 * len(comparison.ratios) == 10


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("pass_", ["forward", "decode", "backward", "prefix_backward", "forward_backward"])
def test_a_build_computes_what_the_operator_does(builds: list[Kernels], pass_: str, dtype: str) -> None:
    cell = dataclasses.replace(CELL, batch=3, k_len=104, pass_=pass_, dtype=dtype)
    if pass_ == "decode":
        cell = dataclasses.replace(cell, q_len=1)
    if pass_ == "forward_backward":
        cell = dataclasses.replace(cell, is_padded=True, is_causal=False)
    out, _, *gradients = Problem(cell, threads=1).results(builds[2])
    torch.manual_seed(0)
    inputs = make_inputs(cell, "cpu")
    expected = prepare(cell, ours(cell), inputs, make_dout(inputs[0]))()
    tolerance = 1e-4 if dtype == "float32" else 0.02
    torch.testing.assert_close(tuple(gradients) or out, expected, atol=tolerance, rtol=tolerance)


def test_dropout_drops_the_same_elements_in_both_builds(builds: list[Kernels]) -> None:
    cell = dataclasses.replace(CELL, is_padded=True, is_causal=False, pass_="forward_backward")
    dropping = dataclasses.replace(cell, dropout_p=0.1)
    assert compare(dropping, *builds[:2], seconds=0.0).difference == 0.0
    results = [Problem(each, threads=1).results(builds[0])[0] for each in (cell, dropping)]
    assert not torch.allclose(*results)


def test_builds_with_other_results_are_not_timed(builds: list[Kernels]) -> None:
    class Idle:
        """Kernels that write nothing."""

        def run(self, *arguments: object) -> int:
            return 1

    with pytest.raises(ValueError, match="the results of the two builds differ by nan of their size in Cell"):
        compare(CELL, builds[0], Idle())


def test_the_script_compares_the_cells_that_are_asked_for(builds: list[Kernels], folder: Path, tmp_path: Path) -> None:
    objects = {path: path.stat().st_mtime_ns for path in folder.glob("*.o")}
    assert len(objects) == 8, "three kernels and the adapter of two different trees"
    wishes = ["--where", "pass=forward,prefix_backward", "q_len=64", "--one-head", "--seconds", "0.1"]
    options = ["--isa", "portable", "--build-folder", str(folder), "--output", str(tmp_path / "table.csv")]
    done = run_script(SCRIPT, str(CHECKOUT), str(CHECKOUT), *wishes, *options)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.o")} == objects, "nothing is compiled again"
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["pass"], row["causal"]) for row in rows] == [
        (pass_, causal) for causal in "01" for pass_ in ("forward", "prefix_backward")
    ]
    for row in rows:
        assert float(row["median_low"]) <= float(row["ratio"]) <= float(row["median_high"])
        assert f"ratio {float(row['ratio']):.3f}" in done.stdout
        assert (row["batch"], row["kv_heads"], row["difference"]) == ("1", "1", "0")


def test_the_spread_of_ratios() -> None:
    comparison = Comparison(1.0, 1.0, [float(n) for n in range(101)], 0.0)
    assert comparison.ratio == 50.0
    assert comparison.middle_half == pytest.approx((24.5, 75.5))
    # 50.5 -+ 1.96 * sqrt(101) / 2
    assert comparison.interval == (40.0, 61.0)


def test_a_tree_without_kernels_or_flags_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected one file csrc/\*\*/attention_params\.h, got \[\]"):
        build([tmp_path], "portable", tmp_path / "builds")
    with pytest.raises(ValueError, match=r"expected files csrc/cpu/\*\*/\*\.cpp that instantiate for .*, got none"):
        kernel_sources(tmp_path)
    with pytest.raises(ValueError, match="expected lists of flags in csrc/.*, got no .*'KERNEL_FLAGS', 'ISA_FLAGS'"):
        read_flags(tmp_path, "portable")
    with pytest.raises(ValueError, match="expected an instruction set of .*'portable', 'avx2', 'avx512'.*, got 'neon'"):
        read_flags(CHECKOUT, "neon")


def test_a_trees_own_flags_are_read() -> None:
    flags = read_flags(CHECKOUT, "avx2")
    assert {"-std=c++20", "-O3", "-mavx2", "-fvisibility=hidden"} <= set(flags)
    assert "-mavx2" not in read_flags(CHECKOUT, "portable")


def test_a_dtype_without_float_kernels_is_refused() -> None:
    with pytest.raises(ValueError, match="dtype: expected one of float32, bfloat16, float16, got 'float64'"):
        Problem(dataclasses.replace(CELL, dtype="float64"), threads=1)
    assert math.isclose(Problem(CELL, threads=1).call.scale, 32**-0.5)
