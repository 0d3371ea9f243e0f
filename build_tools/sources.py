"""The files that the extension module is compiled from, relative to the checkout."""

from __future__ import annotations

# Every file of each list is compiled with its own flags, see `extension.BuildKernelExtension`.
TORCH_SOURCES = [
    "csrc/merge.cpp",
    "csrc/module.cpp",
    "csrc/ops.cpp",
    "csrc/packed.cpp",
    "csrc/results.cpp",
    "csrc/validate.cpp",
    "csrc/cpu/api.cpp",
]
KERNEL_SOURCES = [
    "csrc/cpu/backward/instantiations.cpp",
    "csrc/cpu/forward/instantiations.cpp",
    "csrc/cpu/merge/instantiations.cpp",
]
# Compilers run side by side: the files that take longest come first.
CUDA_SOURCES = [
    "csrc/cuda/api.cpp",
    "csrc/cuda/device.cpp",
    "csrc/cuda/dispatch.cpp",
    *(
        f"csrc/cuda/sm80/instantiations/{kernel}_{dtype}_{head_dim}.cu"
        for kernel in ("backward", "forward", "decode")
        for dtype in ("bfloat16", "float16")
        for head_dim in (256, 192, 128, 96, 64, 32)
    ),
    "csrc/cuda/check_range.cu",
    "csrc/cuda/merge.cu",
    "csrc/cuda/padding.cu",
    *(
        f"csrc/cuda/simt/instantiations/{kernel}_{dtype}.cu"
        for kernel in ("backward", "forward")
        for dtype in ("float32", "float64")
    ),
]
