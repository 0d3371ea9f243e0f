"""The benchmark of the GPU kernels, as far as it goes without a GPU: the plan, the table, the pictures, the script."""

import argparse
import csv
import itertools
import re
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks.common import baselines
from benchmarks.common.cells import Cell, select
from benchmarks.kernels.cuda import baselines as cuda_baselines
from benchmarks.kernels.cuda import measure
from benchmarks.kernels.cuda.baselines import BASELINES
from benchmarks.kernels.cuda.ceilings import GpuCeilings
from benchmarks.kernels.cuda.plan import BATCHES, HEADS, LENGTHS, PASSES, PREFIX_LENS, plan

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "run_on_gpu.sh"
SMALL = [Cell(2, 4, 2, 16, 24, 24, 5, is_causal, pass_, "float32") for is_causal in (0, 1) for pass_ in PASSES]
SMALL.append(Cell(2, 4, 2, 16, 1, 40, 5, True, "decode", "float32"))


def ticks(calls, rounds):
    """A timer that runs every call, and says that it took 1, 2, 3, ... ms in the order of the calls."""
    for call in calls.values():
        call()
    return {name: [float(i + 1)] * rounds for i, name in enumerate(calls)}


def settings(**changes):
    return argparse.Namespace(
        **{"dtype": "float32", "quick": False, "rounds": 5, "time_limit": None, "flex": False, "where": []} | changes
    )


def test_the_plan_covers_what_was_promised_and_nothing_twice():
    cells = plan()
    assert len(set(cells)) == len(cells)
    assert {cell.pass_ for cell in cells} == {*PASSES, "decode"}
    for cell, expected in itertools.product(PASSES, HEADS):
        lengths = {c.q_len for c in cells if c.pass_ == cell and (c.q_heads, c.kv_heads, c.head_dim) == expected}
        assert lengths == set(LENGTHS)
    assert {cell.prefix_len for cell in cells} == set(PREFIX_LENS)
    assert {cell.is_causal for cell in cells} == {True, False}
    assert {1, 8, 32} == set(BATCHES) <= {cell.batch for cell in cells} and max(cell.batch for cell in cells) == 32


def test_the_most_telling_cells_come_first():
    first = plan()[: len(HEADS) * 2 * 2 * 3 + len(HEADS)]
    assert {cell.pass_ for cell in first} == {"forward", "backward", "prefix_backward", "decode"}
    assert {cell.q_len for cell in first} == {1, *LENGTHS[:2]}
    assert {(cell.q_heads, cell.kv_heads, cell.head_dim) for cell in first} == set(HEADS)


def test_a_part_of_the_plan_can_be_chosen_by_the_columns_of_the_table():
    cells = plan()
    chosen = select(cells, ["pass=forward,decode", "head_dim=64"])
    assert chosen == [cell for cell in cells if cell.pass_ in ("forward", "decode") and cell.head_dim == 64]
    assert {cell.is_causal for cell in select(chosen, ["causal=0"])} == {False}
    with pytest.raises(ValueError, match="a column of batch, q_heads, .*, pass; got 'length=5'"):
        select(cells, ["length=5"])
    with pytest.raises(ValueError, match="--where head_dim=65: no cell left; head_dim is one of 64, 128, 256"):
        select(cells, ["head_dim=65"])


@pytest.mark.parametrize("cell", SMALL, ids=lambda cell: f"{cell.pass_} {'causal' if cell.is_causal else 'full'}")
def test_flops_count_the_visible_pairs(cell):
    rows, columns = torch.meshgrid(torch.arange(cell.q_len), torch.arange(cell.k_len), indexing="ij")
    seen = columns <= rows + cell.k_len - cell.q_len if cell.is_causal else torch.ones_like(rows)
    prefix, sequence = cell.q_len * cell.prefix_len, int(seen.sum())
    pairs = {
        "forward": 4 * (prefix + sequence),
        "decode": 4 * (prefix + sequence),
        "backward": 10 * (prefix + sequence),
        "forward_backward": 14 * (prefix + sequence),
        "prefix_backward": 8 * prefix,
    }[cell.pass_]
    assert cell.flops() == pairs * cell.batch * cell.q_heads * cell.head_dim


@pytest.mark.parametrize("cell", SMALL, ids=lambda cell: f"{cell.pass_} {'causal' if cell.is_causal else 'full'}")
def test_baselines_that_run_here_compute_what_ours_does(cell):
    calls, refused = measure.prepare_all(cell, "cpu")
    assert {*calls, *refused} == {"ours", *BASELINES} - {"cat_flex"}
    # Each needs its GPU, and none may be left out for another reason.
    assert not any("differs" in reason for reason in refused.values()), refused
    results = {name: call() for name, call in calls.items()}
    for name, result in results.items():
        torch.testing.assert_close(
            result, results["ours"], atol=1e-4, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.fixture
def merged_here(monkeypatch):
    """The split with SDPA's kernel for the CPU in place of the GPU's."""
    merged = cuda_baselines._merged
    monkeypatch.setitem(BASELINES, "merged_flash", lambda *cell: merged(baselines.CPU_KERNEL, *cell))


@pytest.mark.parametrize("pass_", [*PASSES, "decode"])
def test_a_baseline_is_compared_before_it_is_timed(merged_here, monkeypatch, pass_):
    cell = Cell(2, 4, 4, 16, 24, 24, 5, False, pass_, "float32")
    assert "merged_flash" in measure.prepare_all(cell, "cpu")[0]
    right = BASELINES["merged_flash"]
    monkeypatch.setitem(BASELINES, "merged_flash", lambda *cell: lambda *inputs: right(*cell)(*inputs) * 1.2)
    calls, refused = measure.prepare_all(cell, "cpu")
    assert "merged_flash" not in calls
    assert refused["merged_flash"] == "ValueError: differs from ours by 0.2 of its size"


@pytest.mark.parametrize("kernel", [cuda_baselines._FLASH, cuda_baselines._CUDNN], ids=["flash", "cudnn"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_kernels_of_sdpa_take_what_the_split_gives_them(kernel, kv_heads):
    """Their schemas and layouts, as far as tensors without contents tell."""
    query, key, value, dout = (
        torch.empty(2, 24, heads, 64, device="meta", dtype=torch.bfloat16).transpose(1, 2)
        for heads in (4, kv_heads, kv_heads, 4)
    )
    out, lse = kernel.forward(query, key, value, 0.0, True)
    assert (out.shape, out.stride()) == (query.shape, query.stride())
    assert (lse.shape, lse.dtype) == (query.shape[:3], torch.float32)
    lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
    gradients = kernel.backward(dout, query, key, value, out, lse, 0.0, True)
    assert [each.shape for each in gradients] == [query.shape, key.shape, value.shape]


def test_every_cell_becomes_a_row_and_the_rows_a_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "plan", lambda dtype: SMALL)
    table = tmp_path / "folder" / "table.csv"
    shared = {"device": "none", "torch": "0"}
    ceilings = GpuCeilings(tflops=100.0, gbps=1000.0)
    rows = measure.run(settings(), shared, table, ticks, ceilings, "cpu")
    with table.open(newline="") as file:
        assert list(csv.DictReader(file)) == [{name: str(value) for name, value in row.items()} for row in rows]
    assert len(rows) == len(SMALL)
    for row, cell in zip(rows, SMALL, strict=True):
        assert row["ours_ms"] == "1.0000"
        assert float(row["ours_tflops"]) == pytest.approx(cell.flops() / 1e9, abs=0.06)
        if row["best"]:
            assert row["best_ratio"] == row[f"{row['best']}_ratio"] == "2.000"
    assert "forward_backward" in capsys.readouterr().out

    pytest.importorskip("matplotlib")
    from benchmarks.kernels.cuda import plot

    plot.plot(table, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_a_cell_that_fails_does_not_cost_the_others(monkeypatch, tmp_path, capsys):
    def fail_once(*inputs, **options):
        monkeypatch.undo()
        raise RuntimeError("launch of a kernel")

    monkeypatch.setattr(measure, "prefix_attention", fail_once)
    wishes = ["pass=decode", "k_len=1024", "prefix_len=128", "head_dim=64"]
    with pytest.raises(SystemExit, match="1 cells failed"):
        measure.run(settings(where=wishes), {}, tmp_path / "table.csv", ticks, GpuCeilings(1.0, 1.0), "cpu")
    assert "FAILED: launch of a kernel" in capsys.readouterr().out
    assert len((tmp_path / "table.csv").read_text().splitlines()) == len(BATCHES)


def test_a_run_stops_at_its_time_limit(monkeypatch, capsys):
    monkeypatch.setattr(measure, "plan", lambda dtype: SMALL)
    rows = measure.run(settings(time_limit=1e-9), {}, None, ticks, GpuCeilings(1.0, 1.0), "cpu")
    assert rows == []
    assert f"stopped by --time-limit after 0 of {len(SMALL)} cells" in capsys.readouterr().out


@pytest.fixture
def script(tmp_path):
    """Runs the script with a stub for an interpreter, whose body is given, and another for compute-sanitizer."""

    def stub(name, body):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def run(*arguments, body='echo "$TORCH_CUDA_ARCH_LIST: $*"', **environment):
        stub("compute-sanitizer", 'echo "$@"')
        stub("python3", f'case "$*" in *get_device_capability*) echo 9.0; exit;; esac\n{body}')
        environment["PATH"] = f"{tmp_path / 'bin'}:/usr/bin:/bin"
        return subprocess.run(
            [SCRIPT, *arguments], env=environment, capture_output=True, text=True, timeout=500, check=False
        )

    return run


def texts(folder):
    """What each part of the script has left, by name."""
    return {path.stem: path.read_text() for path in folder.glob("*.txt")}


def test_the_script_asks_for_a_folder_and_knows_its_parts(script, tmp_path):
    for arguments in ((), ("--",), (tmp_path / "out", "tests", "everything")):
        run = script(*arguments)
        assert run.returncode == 2
        assert "OUTDIR [PART...]" in run.stderr


def test_the_script_asks_for_a_gpu(script, tmp_path):
    run = script(tmp_path / "out", PYTHON="/bin/false")
    assert run.returncode == 1
    assert "no GPU that /bin/false's PyTorch can use" in run.stderr


def test_the_script_runs_every_part_and_names_those_that_fail(script, tmp_path):
    run = script(tmp_path / "out", body='case "$*" in *--flex*) exit 3;; esac\necho "$TORCH_CUDA_ARCH_LIST: $*"')
    assert run.returncode == 1
    assert run.stdout.splitlines()[-1] == "failed: benchmark_flex"
    written = texts(tmp_path / "out")
    for part, expected in {
        "build": "9.0: -m pip install --no-deps --no-build-isolation",
        "report": "-m prefix_kernels",
        "tests": "tests/gpu",
        "memcheck": "--tool memcheck --error-exitcode 9",
        "racecheck": "--tool racecheck",
        "synccheck": "--tool synccheck",
        "initcheck": "--tool initcheck",
        "benchmark": "kernels/cuda/bench_attention.py --time-limit",
        "benchmark_flex": "",
    }.items():
        assert expected in written[part]


def test_the_script_runs_the_parts_that_are_named(script, tmp_path):
    run = script(tmp_path / "out", "report", "benchmark", "--", "--where", "pass=decode")
    assert run.returncode == 0, run.stderr
    written = texts(tmp_path / "out")
    assert set(written) == {"gpu", "report", "benchmark"}
    assert written["benchmark"].endswith("attention_cuda.csv --where pass=decode\n")


def test_the_script_gives_up_where_the_build_fails(script, tmp_path):
    run = script(tmp_path / "out", body='case "$*" in *"pip install"*) exit 1;; esac')
    assert run.returncode == 1
    assert "the build failed" in run.stderr
    assert set(texts(tmp_path / "out")) == {"gpu", "build"}


def test_the_script_keeps_to_its_time(script, tmp_path):
    """A part that does not come to an end is stopped, and those behind it are not begun."""
    body = 'case "$*" in *"-m pytest"*) exec sleep 10000;; esac'
    run = script(tmp_path / "out", "tests", "benchmark", TIME_LIMIT="3", body=body)
    assert run.stdout.splitlines()[-1] == "failed: tests benchmark"
    written = texts(tmp_path / "out")
    assert "stopped after at most" in written["tests"]
    assert written["benchmark"] == "no time is left for this\n"
    assert int(re.search(r"TIME_LIMIT:-(\d+)", SCRIPT.read_text()).group(1)) < 600
