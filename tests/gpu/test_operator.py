"""The operator on a GPU: the oracle's results, and what only a GPU has: streams, graphs, large grids, large tensors."""

import functools
import itertools
import subprocess
import sys
from functools import partial

import pytest
import torch
from extended import extended
from helpers import INPUT_NAMES, Call, assert_repeats, check, lay_out, make_call, repeat_batch, run
from merge_samples import check_merge, make_parts
from torch.nn.attention import SDPBackend, sdpa_kernel

from prefix_kernels import prefix_attention
from prefix_kernels.merge_operator import merge, merge_backward

DEVICE = torch.device("cuda")
pytestmark = pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="needs a GPU")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPE = dict(q_heads=4, kv_heads=2, q_len=70, k_len=75, prefix_len=20, head_dim=64)
OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"window_size": (7, 3)},
    "window over the prefix": {"window_size": (20, 0), "window_includes_prefix": True},
    "offsets": {"is_causal": True, "query_offset": torch.tensor([3, -90], dtype=torch.int32)},
    "softcap": {"softcap": 1.5},
    "padding": {"attn_mask": torch.arange(75)[None, None, None] < torch.tensor([40, 75])[:, None, None, None]},
    "additive mask": {"attn_mask": torch.linspace(-3, 3, 4 * 70 * 75).view(4, 70, 75)},
    "rows that see nothing": {"attn_mask": torch.arange(70)[:, None] % 3 != 0},
    "dropout": {"dropout_p": 0.3, "dropout_seed": torch.tensor([-5])},
    "composed bank": {
        "num_prefixes": 3,
        "prefix_ids": torch.tensor([[2, 0, 2], [-1, 1, 1]]),
        "prefix_lens": torch.tensor([20, 9, 17]),
    },
    "float32 prefix": {"prefix_dtype": torch.float32},
    "narrow values": {"value_dim": 24},
    "wide values": {"value_dim": 128},
    "no prefix": {"prefix_len": None},
    "prefix alone": {"k_len": 0},
    "decode": {"q_len": 1, "k_len": 3000, "is_causal": True},
    "long": {"batch": 1, "q_len": 1100, "k_len": 1100, "prefix_len": 300, "is_causal": True},
}


def to_gpu(call: Call, layout: str = "aligned") -> Call:
    def move(value):
        return value.to(DEVICE) if isinstance(value, torch.Tensor) else value

    inputs = {name: tensor if tensor is None else lay_out(move(tensor), layout) for name, tensor in call.inputs.items()}
    options = {name: move(value) for name, value in call.options.items()}
    return Call(inputs, options, move(call.dout), move(call.dlse))


def gpu_call(option: str = "plain", layout: str = "aligned", **shape) -> Call:
    return to_gpu(make_call(**{**SHAPE, **OPTIONS[option], **shape}, layout=layout), layout)


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option(option, dtype):
    check(gpu_call(option, dtype=dtype))


SPLIT = {
    "plain": {},
    "causal": {"k_len": 70},
    "composed bank": {},
    "float32 prefix": {},
    "no prefix": {},
    "long": {"prefix_len": 600},  # folded
}
LIBRARIES = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("option", SPLIT)
def test_pytorch_on_the_sequence_and_ours_on_the_prefix(option, head_dim, library, dtype):
    call = gpu_call(option, "transposed", head_dim=head_dim, dtype=dtype, with_dlse=False, **SPLIT[option])
    with sdpa_kernel(LIBRARIES[library]):
        check(call, function=functools.partial(prefix_attention, backend="split"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 32, 40, 64, 80, 96, 100, 128, 192, 255, 256])
def test_every_head_dim(head_dim, dtype):
    check(gpu_call("causal", head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("out_layout", ["aligned", "poisoned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("options", [{"is_causal": True, "query_offset": -9}, {"scale": -0.3}], ids=str)
def test_prefixes_are_added_to_attention_that_is_there(options, head_dim, dtype, out_layout):
    call = gpu_call(head_dim=head_dim, dtype=dtype, with_dlse=False, **options)
    check(call, needs=(), function=partial(extended, out_layout=out_layout))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", ["plain", "composed bank", "float32 prefix", "wide values", "prefix alone", "long"])
def test_prefixes_of_every_kind_are_added(option, dtype):
    check(gpu_call(option, dtype=dtype, with_dlse=False), needs=(), function=extended)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "poisoned"])
def test_other_layouts(layout):
    check(gpu_call("causal", layout=layout, dtype=torch.bfloat16))


@pytest.mark.parametrize("needs", [("prefix_value",), ("prefix_key", "prefix_value"), ("query",), ("key", "value")])
def test_only_the_gradients_that_are_asked_for(needs):
    check(gpu_call("causal", dtype=torch.bfloat16), needs)


def test_gradcheck():
    call = gpu_call("composed bank", "contiguous", q_len=5, k_len=6, head_dim=3, dtype=torch.float64)
    leaves = [tensor.nan_to_num().requires_grad_() for tensor in call.inputs.values()]
    assert torch.autograd.gradcheck(
        lambda *inputs: prefix_attention(*inputs, **call.options, return_lse=True), leaves, fast_mode=True
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_call_same_bits(dtype):
    call = gpu_call("long", dtype=dtype)
    first = run(call).tensors()
    for name, tensor in run(call).tensors().items():
        assert torch.equal(tensor, first[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_large_grids(dtype):
    """More batch rows, and far more heads of a batch, than a grid may have blocks along y or z: three rows repeated."""
    few = gpu_call("no prefix", batch=3, q_heads=2, kv_heads=2, q_len=17, k_len=18, head_dim=32, dtype=dtype)
    times = 22000
    assert_repeats(run(repeat_batch(few, times)), run(few), times)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_tensors_of_more_than_2_31_elements(dtype):
    head_dim, window = 64, 100
    length = 2**31 // head_dim + 1000
    if torch.cuda.mem_get_info()[0] < 5 * length * head_dim * dtype.itemsize:
        pytest.skip("needs a GPU with more free memory")
    key = torch.zeros(1, 1, length, head_dim, device=DEVICE, dtype=dtype)
    value = torch.zeros_like(key)
    key[:, :, -window:].normal_(), value[:, :, -window:].normal_()
    query = torch.randn(1, 1, 20, head_dim, device=DEVICE, dtype=dtype)
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    # The last query stands at the last key, and none sees further back than the rows that are not zero.
    options = {"is_causal": True, "window_size": (50, 0)}
    out = prefix_attention(*inputs, **options)
    gradients = torch.autograd.grad(out, inputs, torch.ones_like(out))
    ends = [tensor.detach()[:, :, -window:].requires_grad_() for tensor in inputs]
    expected = prefix_attention(*ends, **options)
    torch.testing.assert_close(out, expected)
    for got, want in zip(gradients, torch.autograd.grad(expected, ends, torch.ones_like(out)), strict=True):
        torch.testing.assert_close(got[:, :, -window:], want)
        assert got[:, :, :-window].count_nonzero() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", ["causal", "dropout", "composed bank", "decode"])
def test_nothing_waits_for_the_device(option, dtype):
    call = gpu_call(option, dtype=dtype)
    run(call)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(call)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("option", "dtype", "backend"),
    [
        *itertools.product(["causal", "composed bank", "decode"], [torch.bfloat16, torch.float32], ["fused"]),
        *itertools.product(["plain", "composed bank"], [torch.bfloat16], ["split"]),
    ],
    ids=str,
)
def test_a_cuda_graph_replays_forward_and_backward(option, dtype, backend):
    call = gpu_call(option, dtype=dtype)
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in call.inputs.values()]
    asked = [leaf for leaf in leaves if leaf is not None]
    dout = call.dout.to(dtype)

    def step():
        out = prefix_attention(*leaves, **call.options, backend=backend)
        return [out, *torch.autograd.grad(out, asked, dout)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    with torch.no_grad():
        leaves[0].mul_(1.5)
    graph.replay()
    # The kernels of the libraries add in no fixed order.
    tolerance = {"rtol": 0, "atol": 0} if backend == "fused" else {"rtol": 0.02, "atol": 0.02}
    for got, want in zip(results, step(), strict=True):
        torch.testing.assert_close(got, want, **tolerance)


def test_decoding_gives_the_same_bits_on_streams_side_by_side_and_from_graphs():
    """Blocks count themselves in; calls that run at the same time do not share the counters."""
    call = gpu_call("decode", dtype=torch.bfloat16)

    def step():
        return prefix_attention(*call.inputs.values(), **call.options)

    expected = step()
    streams = [torch.cuda.Stream() for _ in range(3)]
    graphs = [torch.cuda.CUDAGraph() for _ in streams]
    outs = []
    for graph in graphs:
        with torch.cuda.graph(graph):
            outs.append(step())
    eager = []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for _ in range(20):
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
                eager.append(step())
    torch.cuda.synchronize()
    for out in [*outs, *eager]:
        assert torch.equal(out, expected)


def test_the_current_stream_is_used():
    call = gpu_call("causal", dtype=torch.bfloat16)
    inputs = list(call.inputs.values())
    expected = prefix_attention(*inputs, is_causal=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        doubled = inputs[0] * 2
        out = prefix_attention(doubled * 0.5, *inputs[1:], is_causal=True)
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_tensors_is_used():
    call = gpu_call("causal", dtype=torch.bfloat16)
    expected = prefix_attention(**call.inputs, is_causal=True)
    out = prefix_attention(**{name: tensor.to("cuda:1") for name, tensor in call.inputs.items()}, is_causal=True)
    assert out.device == torch.device("cuda:1")
    assert torch.equal(out.to("cuda:0"), expected)


@pytest.mark.parametrize("needs", [INPUT_NAMES, ("prefix_key", "prefix_value")], ids=["all", "prefix"])
def test_compiled_without_graph_breaks(needs):
    torch._dynamo.reset()
    call = gpu_call("causal", "contiguous", dtype=torch.bfloat16)
    expected = run(call, needs=needs).tensors()
    for name, tensor in run(call, torch.compile(prefix_attention, fullgraph=True), needs=needs).tensors().items():
        assert torch.equal(tensor, expected[name]), name


def test_autocast_casts_the_sequence_and_not_the_prefix():
    call = gpu_call("causal", "contiguous", dtype=torch.float32)
    with torch.autocast(DEVICE.type, dtype=torch.float16):
        result = run(call)
    assert result.out.dtype == torch.float16
    assert result.grads["prefix_key"].dtype == torch.float32


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sample",
    [
        {},
        {"parts": 32, "shape": (1, 2, 3, 8)},
        {"parts": 3, "shape": (2, 4, 70, 130), "layout": "transposed"},
        {"shape": (2, 4, 70, 67), "layout": "poisoned"},
        {"shape": (70000, 3, 2, 2)},
    ],
    ids=str,
)
def test_partial_attentions_merge(sample, dtype):
    check_merge(make_parts(**sample, dtype=dtype, device=DEVICE), merge, merge_backward)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("q_len", [4, 300])
def test_an_id_out_of_range_is_refused_on_the_device(q_len, dtype):
    """In a process of its own: a trap leaves the device unusable."""
    code = (
        "import torch, prefix_kernels\n"
        f"x = torch.randn(2, 1, {q_len}, 8, device='cuda', dtype=torch.{dtype})\n"
        f"prefix = torch.randn(3, 1, 5, 8, device='cuda', dtype=torch.{dtype})\n"
        "ids = torch.tensor([0, 3], device='cuda')\n"
        "prefix_kernels.prefix_attention(x, x, x, prefix, prefix, prefix_ids=ids)\n"
        "torch.cuda.synchronize()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert "prefix_ids: expected values from -1 to 2, got 3 at flat index 1" in done.stdout + done.stderr
