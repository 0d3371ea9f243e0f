"""``python -m prefix_kernels``: what a bug report needs, and a check of every usable device against the reference."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefix_kernels._library import load
from prefix_kernels._version import __version__
from prefix_kernels.functional import prefix_attention
from prefix_kernels.reference import prefix_attention_reference

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_BATCH, _Q_HEADS, _KV_HEADS, _Q_LEN, _K_LEN, _PREFIX_LEN, _HEAD_DIM = 2, 4, 2, 37, 45, 20, 32
_INPUTS = ("query", "key", "value", "prefix_key", "prefix_value")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _openmp_runtimes() -> list[str]:
    """The OpenMP libraries in this process; with more than one, each keeps a pool of threads of its own."""
    try:
        mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    except OSError:
        return []
    return sorted(path for path in mapped if any(name in Path(path).name for name in ("libgomp", "libomp", "libiomp")))


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def report() -> dict[str, str]:
    """Versions, compilers, instruction sets and devices, by name."""
    build = load().build_info()
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    lines = {
        "prefix_kernels": f"{__version__} in {Path(__file__).parent}",
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__} (compiled against {build['torch']}), CUDA {torch.version.cuda or 'none'}",
        "compiler": f"{build['compiler']}, C++ {build['cxx_standard']}, ABI {build['abi']}",
        "processor": f"{_processor()}, {os.cpu_count()} logical cores",
        "CPU kernels": f"{torch.ops.prefix_kernels.cpu_isa()} (compiled: {', '.join(build['cpu_isas'])})",
        "threads": f"{torch.get_num_threads()}, OpenMP {'on' if build['openmp'] else 'OFF: kernels run serially'}",
        "OpenMP runtime": ", ".join(_openmp_runtimes()) or "unknown",
        "CUDA kernels": ", ".join(build["cuda_architectures"]) or "none compiled",
        "CUDA toolkit": build["cuda_toolkit"] or "none",
        "CUDA devices": ", ".join(gpus) or "none",
    }
    for package in ("transformers", "peft"):
        lines[package] = _installed(package)
    settings = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("PREFIX_KERNELS_")]
    lines["settings"] = ", ".join(settings) or "none"
    return lines


def _options(device: torch.device) -> dict[str, dict[str, Any]]:
    padding = torch.ones(_BATCH, 1, 1, _K_LEN, dtype=torch.bool, device=device)
    padding[1, ..., -7:] = False
    seed = torch.tensor([7], device=device)
    return {
        "plain": {},
        "causal, window": {"is_causal": True, "window_size": (16, 0)},
        "padding, dropout": {"attn_mask": padding, "dropout_p": 0.1, "dropout_seed": seed},
        "prefix bank, softcap": {
            "prefix_ids": torch.tensor([[2, 0], [-1, 1]], device=device),
            "prefix_lens": torch.tensor([20, 3, 11], device=device),
            "softcap": 5.0,
        },
    }


def _results(function: Any, inputs: list[Tensor], options: dict[str, Any], dout: Tensor) -> list[Tensor]:
    """The output and all five gradients in float64."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = function(*leaves, **options)
    return [tensor.double() for tensor in (out, *torch.autograd.grad(out, leaves, dout.to(out.dtype)))]


def _compare(device: torch.device, dtype: torch.dtype, options: dict[str, Any]) -> tuple[float, bool]:
    """The largest error against the reference in float64, and whether each is what rounding explains.

    That is: at most 3 times the error of the same attention written in PyTorch in this dtype (float32 for float64,
    scaled), plus a few units in the last place.
    """
    generator = torch.Generator().manual_seed(0)
    bank = (3,) if "prefix_ids" in options else ()
    shapes = [(_BATCH, _Q_HEADS, _Q_LEN, _HEAD_DIM)] + [(_BATCH, _KV_HEADS, _K_LEN, _HEAD_DIM)] * 2
    shapes += [(*bank, _KV_HEADS, _PREFIX_LEN, _HEAD_DIM)] * 2
    inputs = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    dout = torch.randn(shapes[0], generator=generator).to(device)

    eager_dtype = torch.float32 if dtype == torch.float64 else dtype
    scale = torch.finfo(dtype).eps / torch.finfo(eager_dtype).eps
    ours = _results(prefix_attention, inputs, options, dout)
    exact = _results(prefix_attention_reference, [tensor.double() for tensor in inputs], options, dout)
    eager = _results(prefix_attention_reference, [tensor.to(eager_dtype) for tensor in inputs], options, dout)

    largest, fine = 0.0, True
    for got, want, plain in zip(ours, exact, eager, strict=True):
        error = (got - want).abs().max().item()
        rounded = want.to(dtype)
        bound = 3 * scale * (plain - want).abs().max().item() + 2 * (rounded + 0.3 - 0.3 - rounded).abs().max().item()
        # Written so that NaN fails.
        fine = fine and error <= bound
        largest = max(largest, error) if error == error else error
    return largest, fine


def compare_devices() -> bool:
    """Compare every usable device with the reference and print the errors; True if all are right."""
    devices = [torch.device("cpu")]
    if load().build_info()["cuda_architectures"]:
        devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    all_fine = True
    for device in devices:
        for dtype in _DTYPES:
            for name, options in _options(device).items():
                error, fine = _compare(device, dtype, options)
                all_fine = all_fine and fine
                kind = str(dtype).removeprefix("torch.")
                print(f"{device!s:8}{kind:10}{name:22}max error {error:.1e}  {'OK' if fine else 'FAILED'}")
    return all_fine


def main() -> int:
    for name, value in report().items():
        print(f"{name + ':':16}{value}")
    print("\nforward and gradients against the reference in float64:")
    all_fine = compare_devices()
    print("OK" if all_fine else "FAILED")
    return 0 if all_fine else 1


if __name__ == "__main__":
    sys.exit(main())
