"""The CUDA kernels that merge partial attentions, in the emulator, against float64."""

import pytest
import torch
from emulated import load
from merge_samples import check_merge, make_parts

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

SAMPLES = {
    "two parts": {},
    "one part": {"parts": 1},
    "as many parts as a warp has lanes": {"parts": 32, "shape": (1, 2, 3, 8)},
    "odd rows": {"shape": (2, 2, 3, 67), "layout": "poisoned"},
    "long rows in the order of a transpose": {"parts": 3, "shape": (2, 2, 5, 130), "layout": "transposed"},
    "aligned rows of a larger tensor": {"shape": (2, 2, 3, 64), "layout": "aligned"},
    "rows without batch": {"shape": (7, 16)},
    "five dimensions": {"shape": (2, 1, 2, 3, 16), "layout": "transposed"},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sample", SAMPLES)
def test_results_and_gradients(sample, dtype):
    library = load()
    check_merge(make_parts(**SAMPLES[sample], dtype=dtype), library.merge, library.merge_backward)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("sample", "dtype"), [("odd rows", torch.bfloat16), ("two parts", torch.float32)])
def test_no_races_or_stray_accesses(sample, dtype, seed):
    library = load("check")
    library.seed(seed)
    check_merge(make_parts(**SAMPLES[sample], dtype=dtype), library.merge, library.merge_backward)


def test_several_rows_per_warp():
    library = load()
    library.device(80, 4, max_grid_yz=1)
    try:
        check_merge(make_parts(), library.merge, library.merge_backward)
    finally:
        library.device(80, 4)


def test_an_lse_wider_than_out():
    parts = make_parts(dtype=torch.bfloat16)
    lses = [parts.lses[0].double(), parts.lses[1]]
    out, lse = load().merge(parts.outs, lses)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float64)
    gradients = load().merge_backward(parts.dout, parts.dlse, parts.outs, lses, [True] * 4)
    assert [x.dtype for x in gradients[2:]] == [torch.float64, torch.float32]
    torch.testing.assert_close(out, load().merge(parts.outs, parts.lses)[0])
