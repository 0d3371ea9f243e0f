"""Every instruction of ``ptx.cuh``, on random data: a GPU against the emulator, the emulator against torch.

What the emulator cannot see is whether the inline assembly is right: its operands, its constraints, the layout of the
fragments. The GPU's half is skipped where there is none.
"""

import ctypes
import re
import subprocess
from pathlib import Path

import pytest
import torch
from emulated import build_library, kernel_object, runtime_objects

from build_tools.environment import find_compiler, find_cuda_toolkit

CHECKOUT = Path(__file__).parent.parent.parent
SOURCE = Path(__file__).with_name("ptx_conformance.cu")
INSTRUCTIONS = (
    "cp_async_16",
    "cp_async_wait",
    "ldmatrix_x4",
    "ldmatrix_x4_trans",
    "mma_16816_half",
    "mma_16816_bfloat16",
    "exp2_approx",
    "load_relaxed",
    "wait_for_value",
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="session")
def emulated():
    """The kernels in the emulator, in check mode."""
    objects = [kernel_object(SOURCE, "check"), *runtime_objects("check")]
    return ctypes.CDLL(str(build_library("ptx_conformance", objects, [])))


@pytest.fixture(scope="session")
def gpu(tmp_path_factory):
    """The kernels for the GPU at hand."""
    from build_tools.extension import CUDA_FLAGS

    toolkit = find_cuda_toolkit()
    assert toolkit is not None, "nvcc is neither on PATH nor in CUDA_HOME"
    library = tmp_path_factory.mktemp("gpu") / "ptx_conformance.so"
    major, minor = torch.cuda.get_device_capability()
    command = [
        str(toolkit.home / "bin" / "nvcc"),
        "-ccbin",
        find_compiler()[0],
        *CUDA_FLAGS,
        f"-arch=sm_{major}{minor}",
    ]
    subprocess.run([*command, "-shared", str(SOURCE), "-o", str(library)], check=True, cwd=CHECKOUT)
    return ctypes.CDLL(str(library))


def execute(library, name: str, data: torch.Tensor, out_bytes: int) -> torch.Tensor:
    """The bytes that the kernel writes."""
    out = torch.zeros(out_bytes, dtype=torch.uint8)
    call = library.ptx_conformance_run
    call.restype = ctypes.c_char_p
    size = ctypes.c_size_t
    failure = call(
        name.encode(),
        ctypes.c_void_p(data.data_ptr()),
        size(data.numel()),
        ctypes.c_void_p(out.data_ptr()),
        size(out_bytes),
    )
    assert failure is None, failure.decode()
    return out


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8).flatten()


def fragments(matrix: torch.Tensor, rows: list, columns: list) -> torch.Tensor:
    """What each lane holds of a matrix, given the positions as functions of g = lane / 4 and t = lane % 4."""
    lanes = [(lane // 4, lane % 4) for lane in range(32)]
    return torch.stack(
        [torch.stack([matrix[r(g, t), c(g, t)] for r, c in zip(rows, columns, strict=True)]) for g, t in lanes]
    )


def low(g, t):
    return g


def high(g, t):
    return g + 8


def pair(first):
    return [lambda g, t: 2 * t + first, lambda g, t: 2 * t + 1 + first]


def a_fragments(a):
    return fragments(a, [low, low, high, high] * 2, [*pair(0), *pair(0), *pair(8), *pair(8)])


def b_fragments(b):
    return fragments(b, [*pair(0), *pair(8)], [low] * 4)


def d_fragments(d):
    return fragments(d, [low, low, high, high], [*pair(0), *pair(0)])


def case(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The bytes that go in, and what should come out: bytes, or floats where rounding may differ."""
    if name == "cp_async_16":
        data, valid = torch.randint(256, (32, 16), dtype=torch.uint8), torch.arange(32, dtype=torch.int32) % 3 != 0
        expected = torch.where(valid[:, None], data, torch.zeros_like(data))
        return torch.cat([data.flatten(), as_bytes(valid.int())]), expected.flatten()
    if name == "cp_async_wait":
        data = torch.randint(256, (1024,), dtype=torch.uint8)
        return data, data
    if name.startswith("ldmatrix"):
        matrices = torch.randint(-(2**15), 2**15, (4, 8, 8), dtype=torch.int16)
        seen = matrices.transpose(1, 2) if name.endswith("trans") else matrices
        held = torch.stack([fragments(seen[i], [low] * 2, pair(0)) for i in range(4)], dim=1)
        return as_bytes(matrices), as_bytes(held)
    if name.startswith("mma"):
        dtype = torch.float16 if name.endswith("half") else torch.bfloat16
        a, b, d = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
        result = d.double() + a.double() @ b.double()
        data = torch.cat([as_bytes(d_fragments(d)), as_bytes(a_fragments(a)), as_bytes(b_fragments(b))])
        return data, d_fragments(result).float().flatten()
    if name in ("load_relaxed", "wait_for_value"):
        values = torch.randint(2**30, (32,), dtype=torch.int32)
        return as_bytes(values), as_bytes(values.view(16, 2).flip(1))
    values = torch.cat([torch.tensor([0.0, 1.0, -1.0, -torch.inf, 127.0, -150.0]), 20 * torch.randn(26)])
    return as_bytes(values), torch.exp2(values)


def assert_same(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-6) -> None:
    if expected.dtype == torch.uint8:
        assert torch.equal(got, expected)
    else:
        torch.testing.assert_close(got.view(torch.float32), expected, rtol=tolerance, atol=tolerance)


def test_every_instruction_has_its_case():
    wrappers = set(
        re.findall(r"__device__ __forceinline__ \w+ (\w+)\(", (CHECKOUT / "csrc/cuda/common/ptx.cuh").read_text())
    )
    tested = {name.removesuffix("_half").removesuffix("_bfloat16") for name in INSTRUCTIONS}
    # Both are part of every copy that is tested.
    assert wrappers - tested == {"shared_address", "cp_async_commit"}


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_the_emulated_twin_does_what_the_manual_says(emulated, name):
    data, expected = case(name)
    assert_same(execute(emulated, name, data, expected.numel() * expected.element_size()), expected)


@needs_gpu
@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_the_gpu_does_what_the_emulated_twin_does(gpu, emulated, name):
    for _ in range(10):
        data, expected = case(name)
        size = expected.numel() * expected.element_size()
        got, twin = execute(gpu, name, data, size), execute(emulated, name, data, size)
        # A tensor core cuts off what its adders do not hold; an element in a wrong place is off by more than 0.01.
        assert_same(got, twin if expected.dtype == torch.uint8 else twin.view(torch.float32), 5e-5)
