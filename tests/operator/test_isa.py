"""The kernels of every instruction set that this machine has, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import prefix_kernels  # noqa: F401  (registers the operators)

LEVELS = ["portable", "avx2", "avx512"]
AVAILABLE = {"DEFAULT": 1, "AVX2": 2, "AVX512": 3}.get(torch.backends.cpu.get_cpu_capability(), 1)

CHECKS = """
import itertools, sys
import torch
from helpers import check, make_call
from merge_samples import check_merge, make_parts
from prefix_kernels.merge_operator import merge, merge_backward

isa = torch.ops.prefix_kernels.cpu_isa()
assert isa == sys.argv[1], isa
dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
seed = torch.tensor([3])
options = [
    {}, {"is_causal": True}, {"window_size": (20, 3)}, {"attn_mask": torch.arange(150) < 99, "softcap": 2.0},
    {"is_causal": True, "dropout_p": 0.2, "dropout_seed": seed},
]
for dtype, head_dim, each in itertools.product(dtypes, [20, 32, 128], options):
    check(make_call(q_heads=4, kv_heads=2, q_len=100, k_len=150, prefix_len=20, head_dim=head_dim, dtype=dtype, **each))
for dtype, prefix_dtype in itertools.product(dtypes, dtypes):
    shape = dict(q_len=17, k_len=33, prefix_len=129, head_dim=33, dtype=dtype, prefix_dtype=prefix_dtype)
    check(make_call(**shape))
    check(make_call(**shape), needs=("prefix_key", "prefix_value"))
for length in [0, 1, 15, 16, 17, 127, 128, 129]:
    check(make_call(q_len=length, k_len=40, prefix_len=20, head_dim=32))
    check(make_call(q_len=40, k_len=length, prefix_len=20, head_dim=32))
    check(make_call(q_len=40, k_len=40, prefix_len=length, head_dim=32, is_causal=True))
for dtype, width in itertools.product(dtypes, [1, 33, 64]):
    check_merge(make_parts(3, (2, 3, 5, width), dtype), merge, merge_backward)
"""

# Two keys with scores 0 and -x: the ratio of their weights is e^-x.
EXPONENTIALS = """
import torch
from prefix_kernels import prefix_attention

for dtype, least_normal in ((torch.float32, 87.3), (torch.float64, 708.3)):
    x = torch.cat([torch.linspace(0, 1, 10001, dtype=dtype), torch.linspace(1, least_normal, 10001, dtype=dtype)[:-1]])
    beyond = torch.tensor([1.01 * least_normal, 1e4], dtype=dtype)
    query, key = torch.zeros(1, 1, len(x) + 2, 8, dtype=dtype), torch.zeros(1, 1, 2, 8, dtype=dtype)
    query[..., 0], key[..., 1, 0] = torch.cat([x, beyond]), -1
    value, nothing = torch.eye(2, 8, dtype=dtype)[None, None], torch.zeros(1, 0, 8, dtype=dtype)
    weights = prefix_attention(query, key, value, nothing, nothing, scale=1.0)[0, 0, :, :2].double()
    error = (weights[: len(x), 1] / weights[: len(x), 0] / (-x.double()).exp() - 1).abs()
    # Some last bits of e^-x, and as many of x.
    worst = (error / (1 + x)).max().item() / torch.finfo(dtype).eps
    assert worst < 1.5, (dtype, worst)
    assert (weights[len(x) :, 1] == 0).all(), weights[len(x) :]
"""


def run_in_process(script: str, isa: str, *arguments: str) -> subprocess.CompletedProcess:
    helpers = Path(__file__).parent.parent / "helpers"
    environment = {**os.environ, "PREFIX_KERNELS_CPU_ISA": isa, "PYTHONPATH": str(helpers)}
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.parametrize("isa", LEVELS[:AVAILABLE])
def test_kernels_of_every_instruction_set_match_the_oracle(isa):
    done = run_in_process(CHECKS, isa, isa)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("isa", LEVELS[:AVAILABLE])
def test_exponentials_are_right_to_the_last_bits_and_zero_where_they_would_be_subnormal(isa):
    done = run_in_process(EXPONENTIALS, isa)
    assert done.returncode == 0, done.stderr


def test_an_unknown_instruction_set_is_refused_by_name():
    done = run_in_process("import prefix_kernels, torch; torch.ops.prefix_kernels.cpu_isa()", "sse9")
    assert done.returncode != 0
    message = done.stderr.splitlines()[-1]
    assert "PREFIX_KERNELS_CPU_ISA" in message and "sse9" in message and "avx2" in message, message


def test_the_best_instruction_set_is_chosen_without_being_told():
    if "PREFIX_KERNELS_CPU_ISA" in os.environ:
        pytest.skip("the environment chooses")
    assert torch.ops.prefix_kernels.cpu_isa() == LEVELS[AVAILABLE - 1]
