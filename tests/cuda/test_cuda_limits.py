"""What only large calls and other GPUs reach: grids, offsets, and the architectures that the kernels run on."""

import mmap
import os
import shlex
import subprocess

import pytest
import torch
from emulated import CHECKOUT, emulated_prefix_attention
from helpers import INPUT_NAMES, assert_repeats, make_call, repeat_batch, run

DTYPES = [torch.bfloat16, torch.float32]


@pytest.mark.parametrize(
    ("dtype", "q_len", "needs"),
    [(torch.bfloat16, 1, INPUT_NAMES[:3]), (torch.bfloat16, 17, ()), (torch.float32, 1, INPUT_NAMES[:3])],
    ids=["few queries and gradients", "many queries", "float32"],
)
def test_more_batch_rows_than_a_grid_has_blocks_along_y_or_z(dtype, q_len, needs):
    """66,000 rows, three over and over."""
    shape = dict(q_heads=1, q_len=q_len, k_len=2, head_dim=8, prefix_len=None, dtype=dtype)
    few, times = make_call(batch=3, **shape, layout="contiguous"), 22000
    many = run(repeat_batch(few, times), emulated_prefix_attention, needs=needs)
    assert_repeats(many, run(few, emulated_prefix_attention, needs=needs), times)


@pytest.fixture(scope="module")
def far_apart():
    """13 GB of addresses; memory is only behind the pages that are written."""
    no_reserve = 0x4000  # which Python names from 3.13 on
    memory = mmap.mmap(-1, 3 * 2**32 + 2**20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    return torch.frombuffer(memory, dtype=torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("q_len", [1, 20], ids=["few queries", "many queries"])
@pytest.mark.parametrize("far", ["batch rows", "heads", "rows"])
def test_offsets_beyond_2_31_elements(far, q_len, dtype, far_apart):
    call = make_call(
        batch=2, q_heads=2, q_len=q_len, k_len=30, num_prefixes=2, head_dim=16, dtype=dtype, is_causal=True
    )
    expected = run(call, emulated_prefix_attention).tensors()
    elements, dimension = far_apart.view(dtype), {"batch rows": 0, "heads": 1, "rows": 2}[far]
    for i, name in enumerate(INPUT_NAMES):
        tensor = call.inputs[name]
        strides = [1 << 16, 1 << 12, 1 << 5, 1]
        strides[dimension] = 2**31 // max(1, tensor.shape[dimension] - 1) // 64 * 64 + 64
        moved = elements.as_strided(tensor.shape, strides, i << 20)
        moved.copy_(tensor)
        call.inputs[name] = moved
    for name, tensor in run(call, emulated_prefix_attention).tensors().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.fixture(scope="module")
def architecture_check(tmp_path_factory):
    """What the check of csrc/cuda/architectures.h says of a GPU, or nothing."""
    folder = tmp_path_factory.mktemp("architectures")
    (folder / "check.cpp").write_text(
        f'#include "{CHECKOUT}/csrc/cuda/architectures.h"\n'
        "#include <cstdio>\n"
        "int main(int, char** a) try {\n"
        '  prefix_kernels::cuda::check_architecture(a[1], std::stoi(a[2]), std::stoi(a[3]), "cuda:0");\n'
        "} catch (const std::runtime_error& error) { std::puts(error.what()); }\n"
    )
    program = folder / "check"
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    subprocess.run([*compiler, "-std=c++20", str(folder / "check.cpp"), "-o", str(program)], check=True)

    def check(compiled, capability):
        command = [str(program), compiled, *capability.split(".")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    return check


@pytest.mark.parametrize(
    ("compiled", "runs", "refused"),
    [
        ("8.0", ["8.0", "8.6", "8.9"], ["7.5", "9.0", "10.0"]),
        ("8.6", ["8.6", "8.9"], ["8.0", "9.0"]),
        ("8.0;9.0+PTX", ["8.0", "8.6", "9.0", "10.0", "12.0"], ["7.5"]),
        ("9.0", ["9.0"], ["8.0", "10.0"]),
        ("9.0a", ["9.0"], ["8.0", "10.0"]),
        ("10.0+PTX", ["10.0", "10.3", "12.0"], ["9.0"]),
        ("10.0f", ["10.0", "10.3"], ["9.0", "12.0"]),
        ("10.0f+PTX", ["10.0"], ["12.0"]),
    ],
)
def test_a_gpu_runs_what_was_compiled_for_it_or_says_what_to_run(architecture_check, compiled, runs, refused):
    for capability in runs:
        assert architecture_check(compiled, capability) == ""
    for capability in refused:
        message = architecture_check(compiled, capability)
        seen = f"cuda:0 has compute capability {capability}, the CUDA kernels were compiled for {compiled}"
        too_old = float(capability) < 8
        remedy = "the CUDA kernels need 8.0" if too_old else f"run `TORCH_CUDA_ARCH_LIST={capability} pip install"
        assert message.startswith(f"prefix_kernels: {seen}: {remedy}")
