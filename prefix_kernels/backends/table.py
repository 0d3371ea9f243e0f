"""The table of the backend ``"auto"``: its rows for each kind of device, and the model of those that nobody measured.

CPU, measured (``benchmarks/results/backends_cpu_*.csv``): the fused kernels are faster than the split in every cell on
processors with AVX2 and AVX-512, in float32 and bfloat16. Where there is AMX, PyTorch's flash attention multiplies
16-bit matrices with it and the kernels of this package do not: modelled.

GPU, modelled. A pass over ``N`` visible cells of the sequence takes ``c N D / rate`` seconds, c = 4 forward and 10
backward, at the rates below, of this package's kernels and of FlashAttention-2. The former follow from counts of
machine instructions (``tests/cuda/sass_report.csv``), the latter are published for an H100 and stand for the slowest
library that PyTorch may take. The split adds memory traffic and launches: forward reads the queries once more, and
reads and writes the result; backward reads queries, result and its gradient once more, and adds one gradient of the
queries to another. The prefix costs the same in both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_TERA = 1e12


@dataclass(frozen=True)
class Rates:
    """Floating-point operations per second on one kind of GPU with heads of up to ``head_dim``, forward and backward.

    Attributes:
        ours: of this package's kernels.
        library: of PyTorch's.
    """

    head_dim: int
    ours: tuple[float, float]
    library: tuple[float, float]


# Modelled (ours) and published (FlashAttention-2) for an H100 in 16 bits.
RATES = (
    Rates(64, ours=(270 * _TERA, 230 * _TERA), library=(320 * _TERA, 291 * _TERA)),
    Rates(128, ours=(340 * _TERA, 200 * _TERA), library=(370 * _TERA, 322 * _TERA)),
    Rates(256, ours=(260 * _TERA, 150 * _TERA), library=(326 * _TERA, 260 * _TERA)),
)
# Of an H100's rate of matrix products: compute capability -> share.
DEVICE_SHARES = {8: 0.32, 9: 1.0, 10: 1.0, 12: 0.25}
# Bytes per second of memory traffic, by compute capability.
BANDWIDTHS = {8: 1.5e12, 9: 3.0e12, 10: 6.0e12, 12: 1.5e12}
# Seconds of one more kernel and one more operator, on the host and on the device.
LAUNCH = 20e-6

# A CPU's matrix unit pays from this many keys on.
AMX_KEY_LEN = 256
HAS_AMX = torch.cpu._is_amx_tile_supported()
CPU_MEASURED = "measured: the fused kernels are the faster ones on CPUs without AMX"


@dataclass(frozen=True)
class Shape:
    """Sizes of one call, as :func:`prefix_kernels.prefix_attention` names them.

    Attributes:
        key_len: keys of the sequence that a query sees, on average.
        trains: True if a gradient flows into query, key or value.
    """

    batch: int
    heads: int
    query_len: int
    key_len: float
    head_dim: int
    trains: bool


def split_gain(shape: Shape, capability: int) -> float:
    """Seconds that the split is modelled to save over the fused kernels on a GPU; negative: it costs."""
    row = next(row for row in RATES if shape.head_dim <= row.head_dim)
    share = DEVICE_SHARES[capability]
    rows = shape.batch * shape.heads * shape.query_len
    gain, traffic, launches = 0.0, 6.0, 1
    passes = [4, 10] if shape.trains else [4]
    for flops, ours, library in zip(passes, row.ours, row.library, strict=False):
        gain += flops * rows * shape.key_len * shape.head_dim / share * (1 / ours - 1 / library)
    if shape.trains:
        traffic, launches = traffic + 12.0, launches + 2
    return gain - traffic * rows * shape.head_dim / BANDWIDTHS[capability] - launches * LAUNCH


def prefers_split(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """``auto``'s choice for a call that both backends can serve, and what it rests on."""
    if device.type == "cpu":
        return _prefers_split_on_cpu(shape, dtype)
    if device.type != "cuda" or not torch.cuda.is_available():
        return False, f"no row for device {device.type!r} here"
    if dtype not in (torch.bfloat16, torch.float16) or shape.head_dim % 8 != 0:
        return False, "PyTorch's fast kernels take 16-bit heads whose dim is a multiple of 8"
    capability = torch.cuda.get_device_properties(device).major
    if capability not in DEVICE_SHARES:
        return False, f"no row for compute capability {capability}"
    return bool(split_gain(shape, capability) > 0), "modelled (prefix_kernels.backends.table)"


def _prefers_split_on_cpu(shape: Shape, dtype: torch.dtype) -> tuple[bool, str]:
    if not HAS_AMX:
        return False, CPU_MEASURED
    if dtype is not torch.bfloat16:
        return False, f"{CPU_MEASURED}, and AMX does not multiply {dtype}"
    return shape.key_len >= AMX_KEY_LEN, f"modelled: with AMX the split pays from {AMX_KEY_LEN} keys on"
