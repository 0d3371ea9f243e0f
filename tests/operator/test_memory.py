"""Peak memory of a process: nothing of size Sq x Sk, no copy of the prefix or of its gradient per batch row."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"), reason="peak memory is read from Linux's /proc"
)

# Peak resident memory in MiB above what the process held before, of forward and backward, by the kernel's account.
MEASURE = """
import json, sys
import torch
from prefix_kernels import prefix_attention

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024

shape, needs, options, threads = json.loads(sys.argv[1])
torch.set_num_threads(threads)

def tensors(q_len, k_len, prefix_len, batch, heads, kv_heads, head_dim):
    made = dict(
        query=torch.randn(batch, heads, q_len, head_dim), key=torch.randn(batch, kv_heads, k_len, head_dim),
        value=torch.randn(batch, kv_heads, k_len, head_dim), prefix_key=torch.randn(kv_heads, prefix_len, head_dim),
        prefix_value=torch.randn(kv_heads, prefix_len, head_dim),
    )
    return {name: tensor.requires_grad_(name in needs) for name, tensor in made.items()}

def attend(made, options):
    if options.get("attn_mask") == "padding":
        k_len = made["key"].shape[2]
        options = {**options, "attn_mask": (torch.arange(k_len) < k_len - 5)[None, None, None]}
    return prefix_attention(**made, **options)

def measured(call):
    with open("/proc/self/clear_refs", "w") as control:
        control.write("5")  # the peak starts again from here
    before = peak()
    result = call()
    return result, peak() - before

small = tensors(8, 8, 4, 1, shape["heads"], shape["kv_heads"], shape["head_dim"])
out = attend(small, options)
if needs:
    out.backward(torch.ones_like(out))

made = tensors(**shape)
out, forward = measured(lambda: attend(made, options))
backward = 0.0
if needs:
    dout = torch.ones_like(out)
    _, backward = measured(lambda: out.backward(dout))
print(json.dumps([forward, backward]))
"""

LONG = dict(batch=1, heads=1, kv_heads=1, q_len=8192, k_len=8192, prefix_len=20, head_dim=16)
MANY_ROWS = dict(batch=64, heads=4, kv_heads=4, q_len=8, k_len=8, prefix_len=2048, head_dim=64)
EVERYTHING = ["query", "key", "value", "prefix_key", "prefix_value"]
PREFIX = ["prefix_key", "prefix_value"]
NEEDS = pytest.mark.parametrize("needs", [[], PREFIX, EVERYTHING], ids=["inference", "prefix", "all"])


def peaks_above_inputs(
    shape: dict[str, int], needs: list[str], options: dict[str, object], threads: int = 2
) -> list[float]:
    """MiB that forward and backward held at most, above what was there before."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", MEASURE, json.dumps([shape, needs, options, threads])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@NEEDS
@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"attn_mask": "padding", "dropout_p": 0.1}],
    ids=["full", "causal", "padding dropout"],
)
def test_no_buffer_of_queries_times_keys(options, needs):
    """Inputs, out and gradients are half a MiB each; scores would be 256 MiB in float32 and 64 MiB in bytes."""
    assert max(peaks_above_inputs(LONG, needs, options)) < 40


@NEEDS
def test_no_copy_of_the_prefix_or_of_its_gradient_per_row(needs):
    """The prefix is 4 MiB, its gradient as much for each of two workers; a copy per row would be 256 MiB."""
    assert max(peaks_above_inputs(MANY_ROWS, needs, {})) < 64


def test_partial_sums_of_many_threads_are_no_buffer_of_queries_times_keys():
    """Every thread may hold a partial sum of the gradients, 1 MiB here; more of them would grow with Sq * Sk."""
    assert max(peaks_above_inputs(LONG, EVERYTHING, {}, threads=32)) < 80


def test_repeated_calls_do_not_leak():
    from helpers import make_call, run

    def resident() -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    call = make_call(batch=4, q_heads=4, q_len=128, k_len=128, prefix_len=64, head_dim=64, is_causal=True)
    for _ in range(10):
        run(call)
    before = resident()
    for _ in range(100):
        run(call)
    assert resident() - before < 32 * 2**20, "100 calls of 6 MiB each"


def test_query_layout_of_a_model_is_read_in_place():
    """Inputs seen through a transpose are not copied: the peak of the tensors that torch allocates is out and lse."""
    from prefix_kernels import prefix_attention

    query, key, value = (torch.randn(4, 256, 8, 64).transpose(1, 2) for _ in range(3))
    prefix = torch.randn(8, 20, 64)
    with torch.profiler.profile(profile_memory=True) as profile:
        prefix_attention(query, key, value, prefix, prefix)
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    out_bytes, lse_bytes = query.nbytes, query.nbytes // 64
    assert allocated < 1.5 * (out_bytes + lse_bytes)
