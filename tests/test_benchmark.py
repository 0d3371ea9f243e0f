"""Times of a small grid, for ``pytest-benchmark`` to store and compare: ``pytest --benchmark-enable`` on this file.

Nothing about time is asserted; ``benchmarks/bench_attention.py`` is where the figures come from.
"""

import bench_attention
import pytest
import torch
from bench_attention import PASSES, Cell, contenders, make_inputs, prepare


@pytest.mark.parametrize("contender", ["ours", "cat_sdpa", "merged_sdpa"])
@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", [(4, 4, 128, 20, 32), (2, 2, 256, 20, 64)], ids=str)
def test_time_of(benchmark, shape, is_causal, pass_, contender):
    cell = Cell(*shape, dtype="float32", is_causal=is_causal, pass_=pass_)
    benchmark.group = f"{shape} {'causal' if is_causal else 'full'} {pass_}"
    result = benchmark(prepare(cell, contenders(cell, "cpu")[contender], make_inputs(cell, "cpu")))
    first = result if isinstance(result, torch.Tensor) else result[0]
    assert first.isfinite().all()


def test_all_contenders_compute_the_same_results():
    for is_causal in (False, True):
        for pass_ in PASSES:
            cell = Cell(2, 3, 40, 7, 32, dtype="float32", is_causal=is_causal, pass_=pass_)
            inputs = make_inputs(cell, "cpu")
            results = {name: prepare(cell, function, inputs)() for name, function in contenders(cell, "cpu").items()}
            for name, result in results.items():
                torch.testing.assert_close(result, results["ours"], atol=1e-4, rtol=1e-4, msg=f"{name} {cell}")


def test_the_script_writes_a_table_that_the_plot_reads(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    import plot

    table, picture = tmp_path / "table.csv", tmp_path / "picture.png"
    monkeypatch.setattr(bench_attention, "GRID", [(1, 2, 16, 4, 8), (1, 1, 20, 3, 16)])
    monkeypatch.setattr("sys.argv", ["bench_attention.py", "--quick", "--threads", "1", "--output", str(table)])
    bench_attention.main()
    plot.plot(table, picture)
    header, *rows = table.read_text().splitlines()
    assert len(rows) == 2 * 2 * len(PASSES)
    assert {"ours_ms", "cat_sdpa_ratio", "ours_gflops", "cpu", "isa", "commit", "date"} <= set(header.split(","))
    assert picture.stat().st_size > 10_000
    assert "forward" in capsys.readouterr().out
