"""The benchmark of the CPU kernels: plan, contenders, the work of a cell, ceilings, script, pictures and goals.

Nothing about time is asserted. The times of a small grid are for ``pytest-benchmark`` to store and compare:
``pytest --benchmark-enable`` on this file.
"""

import csv
import dataclasses

import pytest
import torch

from benchmarks.common.cells import Cell, select
from benchmarks.common.contenders import make_dout, make_inputs, prepare
from benchmarks.kernels.cpu import bench_attention, measure
from benchmarks.kernels.cpu.baselines import ALTERNATIVES, BASELINES, CAT, baselines_of, ours
from benchmarks.kernels.cpu.caches import last_level_cache
from benchmarks.kernels.cpu.callgrind import read_profile, row_of
from benchmarks.kernels.cpu.ceilings import CeilingLoops, CpuCeilings, measure_ceilings
from benchmarks.kernels.cpu.goals import judge
from benchmarks.kernels.cpu.plan import DECODE, DROPOUT, PASSES, SHAPES, one_of_each, plan

# Every pass with grouped heads, with a short and a long prefix; decoding; dropout and padding.
SMALL = [
    Cell(2, 4, 2, 16, 24, 24, prefix_len, is_causal, pass_, "float32")
    for prefix_len in (5, 600)
    for is_causal in (False, True)
    for pass_ in PASSES
]
SMALL.append(Cell(2, 4, 2, 16, 1, 40, 5, True, "decode", "float32"))
SMALL.append(Cell(3, 4, 4, 16, 24, 24, 5, False, "forward_backward", "float32", 0.1, is_padded=True))
CEILINGS = CpuCeilings(
    "avx512", 1, 100.0, 200.0, 90.0, read_gbps=10.0, copy_gbps=8.0, cache_gbps=50.0, cache_bytes=2**20
)


def name_of(cell):
    return f"{cell.pass_} P={cell.prefix_len} {'causal' if cell.is_causal else 'full'}"


@pytest.mark.parametrize("contender", ["ours", "cat_sdpa", "merged_sdpa"])
@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", [(4, 4, 4, 32, 128, 128, 20), (2, 2, 2, 64, 256, 256, 20)], ids=str)
def test_time_of(benchmark, shape, is_causal, pass_, contender):
    cell = Cell(*shape, is_causal=is_causal, pass_=pass_, dtype="float32")
    benchmark.group = f"{shape} {'causal' if is_causal else 'full'} {pass_}"
    inputs = make_inputs(cell, "cpu")
    function = {"ours": ours(cell), **baselines_of(cell)}[contender]
    result = benchmark(prepare(cell, function, inputs, make_dout(inputs[0])))
    first = result if isinstance(result, torch.Tensor) else result[0]
    assert first.isfinite().all()


def test_the_plan_covers_the_grid_and_nothing_twice():
    cells = plan()
    assert len(set(cells)) == len(cells) == len(SHAPES) * 2 * len(PASSES) + len(DECODE) + len(DROPOUT)
    assert {(cell.pass_, cell.is_causal) for cell in one_of_each(cells)} == {
        (cell.pass_, cell.is_causal) for cell in cells
    }
    assert all(cell.q_len == 1 for cell in cells if cell.pass_ == "decode")
    assert all(cell.dropout_p and cell.is_padded for cell in cells if cell.pass_ == "forward_backward")
    assert {cell.dtype for cell in plan("bfloat16")} == {"bfloat16"}


def test_every_baseline_has_a_cell_and_every_cell_a_baseline():
    cells = [*plan(), *plan("bfloat16")]
    assert {name for cell in cells for name in baselines_of(cell)} == set(BASELINES)
    for cell in cells:
        assert any(name in CAT for name in baselines_of(cell))
        assert cell.dropout_p or any(name in ALTERNATIVES for name in baselines_of(cell))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("cell", SMALL, ids=name_of)
def test_all_contenders_compute_the_same_results(cell, dtype):
    cell = dataclasses.replace(cell, dtype=dtype, dropout_p=0.0)
    inputs = make_inputs(cell, "cpu")
    dout = make_dout(inputs[0])
    expected = prepare(cell, ours(cell), inputs, dout)()
    tolerance = 1e-4 if dtype == "float32" else 0.05
    for name, function in baselines_of(cell).items():
        result = prepare(cell, function, inputs, dout)()
        torch.testing.assert_close(
            result, expected, atol=tolerance, rtol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_a_baseline_is_compared_before_it_is_timed(monkeypatch):
    right = measure.baselines_of
    monkeypatch.setattr(
        measure, "baselines_of", lambda cell: {"cat_sdpa": lambda *inputs: right(cell)["cat_sdpa"](*inputs) * 1.2}
    )
    with pytest.raises(ValueError, match=r"cat_sdpa differs from ours by 0\.2 of its size in Cell"):
        measure.prepare_all(SMALL[0])


def test_a_slow_baseline_is_called_once(monkeypatch, loops):
    called = []

    def counted(*inputs):
        called.append(inputs)
        return baselines_of(SMALL[0])["cat_sdpa"](*inputs)

    monkeypatch.setattr(measure, "baselines_of", lambda cell: {"cat_sdpa": counted})
    for limit, calls in ((1e9, 1 + 5), (0.0, 1)):
        called.clear()
        monkeypatch.setattr(measure, "SLOW_MS", limit)
        row = measure.measure(SMALL[0], measure.WallTimer(), rounds=5, seconds=100.0, loops=loops)
        assert len(called) == calls
        assert row["rounds"] == 5
        assert float(row["cat_ratio"]) > 0


@pytest.mark.parametrize("contender", ["ours", "cat_sdpa"])
def test_what_is_timed_with_dropout_drops(contender):
    cell = next(cell for cell in SMALL if cell.dropout_p)
    without = dataclasses.replace(cell, dropout_p=0.0)
    inputs = make_inputs(cell, "cpu")
    results = [{"ours": ours(each), **baselines_of(each)}[contender](*inputs) for each in (cell, cell, without)]
    assert not torch.allclose(results[0], results[1])
    assert not torch.allclose(results[0], results[2])


def test_flops_and_bytes_of_a_cell_counted_by_hand():
    # B = 2, Hq = 4, Hkv = 2, D = 16, Sq = 3, Sk = 5, P = 7; float32.
    forward = Cell(2, 4, 2, 16, 3, 5, 7, False, "forward", "float32")
    rows, keys, prefix, lse = 2 * 4 * 3 * 16 * 4, 2 * 2 * 5 * 16 * 4, 2 * 7 * 16 * 4, 2 * 4 * 3 * 4
    assert forward.flops() == 4 * 16 * 2 * 4 * (3 * 7 + 3 * 5)
    assert forward.bytes() == 2 * rows + 2 * keys + 2 * prefix + lse  # query, out; key, value; the prefix; lse

    causal = dataclasses.replace(forward, is_causal=True)
    assert causal.flops() == 4 * 16 * 2 * 4 * (3 * 7 + 3 + 4 + 5)  # the last query sees all five keys

    backward = dataclasses.replace(causal, pass_="backward")
    assert backward.flops() == causal.flops() // 4 * 10
    assert backward.bytes() == 4 * rows + 4 * keys + 4 * prefix + lse

    prefix_backward = dataclasses.replace(causal, pass_="prefix_backward", dtype="bfloat16")
    assert prefix_backward.flops() == 8 * 16 * 2 * 4 * 3 * 7
    assert prefix_backward.bytes() == (3 * rows + 4 * prefix) // 2 + lse

    padded = dataclasses.replace(forward, is_padded=True)
    assert padded.key_lengths() == [5, 4]
    assert padded.flops() == 4 * 16 * 4 * (2 * 3 * 7 + 3 * (5 + 4))
    assert padded.bytes() == 2 * rows + 2 * keys * 9 // 10 + 2 * prefix + lse


@pytest.fixture(scope="module")
def loops():
    return CeilingLoops(threads=1)


def test_the_floor_does_the_work_of_a_cell_and_nothing_else(loops):
    flops, moved = 10**8, 10**6
    floors = loops.floors(flops, moved, "float32")
    assert floors["floor_flops"]() == pytest.approx(flops, rel=1e-4)
    assert floors["floor_bytes"]() == pytest.approx(moved, rel=1e-3)
    assert loops.floors(flops, moved, "float16")["floor_flops"]() == pytest.approx(flops, rel=1e-4)
    assert loops.floors(flops, moved, "bfloat16")["floor_flops"]() == pytest.approx(flops, rel=1e-4)
    # A vector holds half as many.
    assert loops.floors(flops, moved, "float64")["floor_flops"]() == pytest.approx(2 * flops, rel=1e-4)
    large = 3 * 2**29  # more than the buffer holds
    assert loops.read(large) == pytest.approx(large, rel=1e-3)


def test_a_row_takes_the_longer_floor_of_each_round():
    times = {"ours": [4.0, 2.0, 8.0], "floor_flops": [1.0, 1.0, 6.0], "floor_bytes": [2.0, 0.5, 1.0]}
    row = measure.row_of(SMALL[0], times)
    assert (row["floor_ms"], row["of_floor"]) == ("2.0000", "0.500")


def test_the_ceilings_of_this_machine_are_plausible(loops):
    ceilings = measure_ceilings(loops, repeats=2)
    assert ceilings.isa == torch.ops.prefix_kernels.cpu_isa()
    lanes = {"portable": 4, "avx2": 8, "avx512": 16}[ceilings.isa]
    # Two multiply-adds per cycle of at most 7 GHz.
    assert 0.01 < ceilings.fma_gflops < 2 * 2 * lanes * 7
    assert ceilings.bfloat16_dot_gflops is None or 0.01 < ceilings.bfloat16_dot_gflops < 2 * 4 * lanes * 7
    assert ceilings.matmul_gflops > 0.01
    assert min(ceilings.read_gbps, ceilings.copy_gbps, ceilings.cache_gbps) > 0.01
    assert max(ceilings.read_gbps, ceilings.copy_gbps) < 1000
    assert ceilings.cache_bytes == last_level_cache() > 2**18


def run_script(monkeypatch, *arguments):
    monkeypatch.setattr(measure, "plan", lambda dtype: SMALL)
    monkeypatch.setattr(measure, "measure_ceilings", lambda *_: CEILINGS)
    monkeypatch.setattr("sys.argv", ["bench_attention.py", "--threads", "1", *map(str, arguments)])
    bench_attention.main()


def test_the_script_writes_a_table_that_the_plots_and_goals_read(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    from benchmarks.kernels.cpu import plot, plot_roofline

    table = tmp_path / "folder" / "table.csv"
    run_script(monkeypatch, "--cell-seconds", "0", "--output", table)
    printed = capsys.readouterr().out
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(SMALL)
    for row, cell in zip(rows, SMALL, strict=True):
        assert {name: row[name] for name in cell.columns()} == {k: str(v) for k, v in cell.columns().items()}
        assert (int(row["flops"]), int(row["bytes"])) == (cell.flops(), cell.bytes())
        assert float(row["of_floor"]) > 0
        assert float(row["cat_ratio"]) == min(float(row[f"{name}_ratio"]) for name in CAT if row[f"{name}_ratio"])
        assert bool(row["dropout_cost"]) == bool(cell.dropout_p) == (row["alternative"] == "")
        assert row["cold"] == str(int(cell.pass_ == "decode"))
    assert {"fma_gflops", "read_gbps", "cpu", "isa", "commit", "date"} <= rows[0].keys()
    assert "\n".join(judge(rows)) in printed
    for module in (plot, plot_roofline):
        module.plot(table, tmp_path / "picture.png")
        assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.fixture
def outputs(monkeypatch):
    """The paths that tables are written to; None is nowhere."""
    paths, table = [], measure.Table
    monkeypatch.setattr(measure, "Table", lambda path: paths.append(path) or table(path))
    return paths


def test_the_script_measures_one_cell_of_each_kind_when_asked_to_be_quick(monkeypatch, capsys, outputs):
    run_script(monkeypatch, "--quick")
    assert f"{len(one_of_each(SMALL))} cells in" in capsys.readouterr().out
    assert outputs == [None]


def test_the_script_measures_a_part_of_the_plan(monkeypatch, capsys, outputs):
    assert select(SMALL, ["pass=decode"]) == [cell for cell in SMALL if cell.pass_ == "decode"]
    run_script(monkeypatch, "--where", "pass=decode,backward", "prefix_len=5", "--cell-seconds", "0")
    assert "3 cells in" in capsys.readouterr().out
    assert outputs == [None]
    with pytest.raises(SystemExit, match="--where head_dim=65: no cell left; head_dim is one of 16"):
        run_script(monkeypatch, "--where", "head_dim=65")


def goal_row(**changes):
    row = {"pass": "forward", "dtype": "float32", "causal": 0, "q_len": 512, "k_len": 512, "prefix_len": 20}
    row |= {"batch": 1, "q_heads": 2, "kv_heads": 2, "head_dim": 64, "dropout_cost": ""}
    return row | {"cat_ratio": "2.5", "alternative_ratio": "1.3", "of_floor": "0.83"} | changes


def test_goals_are_judged_by_their_own_cells():
    assert all(line.startswith("met ") for line in judge([goal_row()]))
    assert len(list(judge([goal_row()]))) == 4
    slow = goal_row(batch=7, alternative_ratio="1.19")
    missed = [line for line in judge([goal_row(), slow]) if not line.startswith("met ")]
    assert missed == [
        "MISSED float32 forward, lowest times faster than the alternative in plain PyTorch: 1.19, goal 1.2 (2 cells); "
        "at the floor 1.43",
        "           1.19  (7,2/2,512,20,64) full; at the floor 1.43",
    ]
    costly = goal_row(
        **{"pass": "forward_backward", "dropout_cost": "1.130", "cat_ratio": "9", "alternative_ratio": ""}
    )
    assert [line for line in judge([costly]) if line.startswith("MISSED")] == [
        "MISSED float32 forward_backward, highest times the time without dropout: 1.13, goal 1.12 (1 cells)"
    ]


PROFILE = """\
events: Ir

fl=???
fn=void prefix_kernels::avx2::gemm_block<float, (prefix_kernels::avx2::ALayout)0, 6, 2, AddTo<float> >(long)
0 100
0 20

fn=prefix_kernels::avx2::forward_step(prefix_kernels::avx2::Prefetcher&)
0 7
cfn=void prefix_kernels::avx2::gemm_block<float, (prefix_kernels::avx2::ALayout)0, 6, 2, AddTo<float> >(long)
calls=3 0
0 120

fn=prefix_kernels::avx2::Prefetcher::advance()
0 5

totals: 132
"""


def test_instructions_are_counted_once_and_by_what_a_function_is_for():
    counts = read_profile(PROFILE)
    assert counts == {"products and softmax": 120, "the rest": 7, "prefetches": 5}
    row = row_of(Cell(1, 1, 1, 8, 4, 5, 0, False, "forward", "float32"), counts)
    assert row["multiply_adds"] == 4 * 4 * 5 * 8 // 2 // 8
    assert row["all"] == round(132 / 40, 3) and row["prefetches"] == round(5 / 40, 3)
