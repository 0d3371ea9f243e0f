"""The emulator of tests/emulator itself: right kernels run in any order of their threads, and wrong ones are caught."""

from __future__ import annotations

import ctypes
import functools
import re
import threading
from dataclasses import dataclass

import emulated
import pytest
import torch
from torch import Tensor

SAMPLES = emulated.EMULATOR / "samples"
BUGS = re.findall(r'^    \{"(\w+)",', (SAMPLES / "bugs.cpp").read_text(), flags=re.MULTILINE)
# What goes wrong at once and needs no shadow memory to be seen.
CAUGHT_IN_FAST_MODE = [
    "barrier_in_branch",
    "barrier_nobody_reaches",
    "divergent_shuffle",
    "masks_disagree",
    "not_in_own_mask",
    "shuffle_from_the_gone",
    "mma_without_a_lane",
    "misaligned_ldmatrix",
    "misaligned_copy",
    "copy_not_waited_for",
    "behind_shared",
    "null_pointer",
    "trapped",
]


@dataclass(frozen=True)
class Run:
    """A sample's output, and what the emulator had to say."""

    output: Tensor
    report: str


@functools.cache
def _library(mode: str) -> ctypes.CDLL:
    objects = [emulated.kernel_object(path, mode) for path in sorted(SAMPLES.glob("*.cpp"))]
    return ctypes.CDLL(str(emulated.build_library(f"samples-{mode}", objects + emulated.runtime_objects(mode), [])))


def run(name: str, source: Tensor, outputs: int, *, mode: str, seed: int = 0, count: int = 0) -> Run:
    """Run a sample on ``source``; its float32 output starts from zeros."""
    library = _library(mode)
    output = torch.zeros(outputs)
    report = ctypes.create_string_buffer(8192)
    library.prefix_kernels_emulator_seed(ctypes.c_uint64(seed))
    status = library.run_sample(
        name.encode(),
        *(ctypes.c_void_p(source.data_ptr()), ctypes.c_size_t(source.nbytes)),
        *(ctypes.c_void_p(output.data_ptr()), ctypes.c_size_t(output.nbytes)),
        *(ctypes.c_int(count), report, ctypes.c_size_t(len(report))),
    )
    assert status in (0, 1), f"there is no sample {name}"
    return Run(output, report.value.decode())


def marked_lines(bug: str) -> list[str]:
    """The places that bugs.cpp marks, as reports print them."""
    lines = (SAMPLES / "bugs.cpp").read_text().splitlines()
    return [f"samples/bugs.cpp:{number}" for number, line in enumerate(lines, 1) if line.endswith(f"// BUG {bug}")]


modes = pytest.mark.parametrize("mode", emulated.MODES)
seeds = pytest.mark.parametrize("seed", range(6))


@modes
@seeds
def test_threads_of_several_blocks_each_write_their_element(mode: str, seed: int) -> None:
    source = torch.randn(150)
    result = run("add_one", source, 150, mode=mode, seed=seed, count=150)
    assert result.report == ""
    assert torch.equal(result.output, source + 1)


@modes
@seeds
def test_a_tree_in_shared_memory_and_atomics_of_blocks_give_the_sum(mode: str, seed: int) -> None:
    source = torch.randint(-9, 9, (600,)).float()
    result = run("sum", source, 1, mode=mode, seed=seed, count=600)
    assert result.report == ""
    assert result.output.item() == source.sum().item()


@modes
@seeds
def test_the_last_block_to_arrive_adds_what_all_blocks_wrote(mode: str, seed: int) -> None:
    source = torch.randn(64)
    result = run("last_block_adds", source, 2, mode=mode, seed=seed)
    assert result.report == ""
    # The order of the sum is that of the blocks' numbers, whichever arrives last.
    assert result.output.tolist() == [run("last_block_adds", source, 2, mode="fast").output[0].item(), 0.0]


def test_blocks_on_two_host_threads_give_the_same_sum() -> None:
    source = torch.randint(-9, 9, (600,)).float()
    _library("fast").prefix_kernels_emulator_threads(2)
    result = run("sum", source, 1, mode="fast", seed=4, count=600)
    _library("fast").prefix_kernels_emulator_threads(1)
    assert result.report == ""
    assert result.output.item() == source.sum().item()


def test_a_launch_that_a_gpu_would_refuse_is_refused() -> None:
    report = run("too many threads", torch.zeros(1), 1, mode="fast").report
    assert report == "launch: expected 1 to 1024 threads per block, got 2048"


@modes
@seeds
def test_shuffles_and_votes_give_what_the_cuda_manual_says(mode: str, seed: int) -> None:
    source = torch.randint(-9, 9, (32,)).float()
    result = run("exchanges", source, 256, mode=mode, seed=seed)
    assert result.report == ""
    rows = result.output.view(8, 32)
    lane = torch.arange(32)
    assert torch.equal(rows[0], source[5].expand(32))
    assert torch.equal(rows[1], source[lane // 8 * 8 + 3])
    assert torch.equal(rows[2], source[lane ^ 9])
    assert torch.equal(rows[3], source[torch.where(lane + 3 < 32, lane + 3, lane)])
    assert torch.equal(rows[4], source[torch.where(lane >= 3, lane - 3, lane)])
    assert rows[5].tolist() == [11.0] * 32
    assert rows[6].tolist() == [1.0] * 32
    assert torch.equal(rows[7], torch.cat([half.sum().expand(16) for half in source.split(16)]))


@modes
@seeds
def test_syncwarp_hands_shared_memory_from_lane_to_lane(mode: str, seed: int) -> None:
    source = torch.randn(96)
    result = run("neighbours", source, 96, mode=mode, seed=seed)
    assert result.report == ""
    assert torch.equal(result.output.view(3, 32), source.view(3, 32).roll(-1, dims=1))


@modes
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_ldmatrix_and_mma_multiply_matrices(mode: str, dtype: torch.dtype) -> None:
    # Small integers: every product and sum is exact.
    source = torch.randint(-8, 8, (512,)).to(dtype)
    a, b, c = source[:256].view(16, 16), source[256:384].view(8, 16), source[384:].view(16, 8)
    result = run(f"products {str(dtype).removeprefix('torch.')}", source, 128, mode=mode, seed=3)
    assert result.report == ""
    assert torch.equal(result.output.view(16, 8), a.float() @ b.float().T + a.float() @ c.float())


@modes
@seeds
def test_asynchronous_copies_feed_a_double_buffer(mode: str, seed: int) -> None:
    source = torch.randint(-9, 9, (7, 256)).float()
    result = run("pipeline", source, 256, mode=mode, seed=seed, count=source.numel())
    assert result.report == ""
    assert torch.equal(result.output, source.sum(0))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("bug", BUGS)
def test_check_mode_catches_the_bug_and_names_its_lines(bug: str, seed: int) -> None:
    report = run(bug, torch.zeros(256), 256, mode="check", seed=seed, count=300).report
    lines = marked_lines(bug)
    assert lines, f"bugs.cpp does not mark {bug}"
    assert all(re.search(rf"{re.escape(line)}\b", report) for line in lines), report or "no report"


@pytest.mark.parametrize("bug", CAUGHT_IN_FAST_MODE)
def test_fast_mode_catches_what_needs_no_shadow(bug: str) -> None:
    report = run(bug, torch.zeros(256), 256, mode="fast", seed=1).report
    assert all(re.search(rf"{re.escape(line)}\b", report) for line in marked_lines(bug)), report or "no report"


def test_a_deadlock_names_every_waiter() -> None:
    report = run("barrier_nobody_reaches", torch.zeros(256), 256, mode="fast").report
    barrier, warp_barrier = marked_lines("barrier_nobody_reaches")
    assert f"warp 0 lanes 0-15 wait at __syncthreads() {barrier}" in report
    assert f"warp 0 lanes 16-31 wait at __syncwarp {warp_barrier}" in report


def test_equal_seeds_give_equal_runs() -> None:
    reports = [run("two_warps_one_output", torch.zeros(256), 256, mode="check", seed=5).report for _ in range(2)]
    assert reports[0] == reports[1] != ""


def test_the_page_stops_at_the_line_that_it_shows() -> None:
    page = (emulated.EMULATOR / "README.md").read_text()
    file, number = re.search(r"\(gdb\) break (\S+):(\d+) ", page).groups()
    shown = re.search(rf"^    {number}\t(.*)$", page, flags=re.MULTILINE).group(1)
    lines = (emulated.CHECKOUT / "csrc" / "cuda" / file).read_text().splitlines()
    assert lines[int(number) - 1] == shown


def test_an_object_is_made_again_when_its_source_changed_while_it_was_compiled(tmp_path, monkeypatch):
    source, compiler = tmp_path / "kernels.cpp", tmp_path / "compiler"
    source.write_text("int number = 1;\n")
    # The first time, somebody saves another text while the compiler is at work.
    compiler.write_text('#!/bin/sh\ng++ "$@" && if ! test -e saved; then touch saved; echo "//" >> kernels.cpp; fi\n')
    compiler.chmod(0o755)
    monkeypatch.setattr(emulated, "CHECKOUT", tmp_path)
    monkeypatch.setenv("CXX", str(compiler))
    kernels = emulated.kernel_object(source, "fast", tmp_path / "objects")
    kernels.compile(threading.Event())
    assert (tmp_path / "saved").exists() and not kernels.is_current()
    kernels.compile(threading.Event())
    assert kernels.is_current()
