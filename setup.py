"""What makes the extension module, and which PyTorch the built package asks for; the rest is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent / "csrc"))

from build_environment import TORCH_REQUIREMENT, find_torch
from build_extension import BuildKernelExtension, KernelExtension

TORCH_SOURCES = [
    "csrc/module.cpp",
    "csrc/ops.cpp",
    "csrc/results.cpp",
    "csrc/validate.cpp",
    "csrc/cpu/api.cpp",
]
KERNEL_SOURCES = [
    "csrc/cpu/kernels_backward.cpp",
    "csrc/cpu/kernels_forward.cpp",
]
CUDA_SOURCES = [
    "csrc/cuda/api.cpp",
    "csrc/cuda/device.cpp",
    "csrc/cuda/dispatch.cpp",
    # The slowest to compile come first.
    "csrc/cuda/sm80/instantiations/backward_bfloat16_256.cu",
    "csrc/cuda/sm80/instantiations/backward_bfloat16_192.cu",
    "csrc/cuda/sm80/instantiations/backward_bfloat16_128.cu",
    "csrc/cuda/sm80/instantiations/backward_bfloat16_96.cu",
    "csrc/cuda/sm80/instantiations/backward_bfloat16_64.cu",
    "csrc/cuda/sm80/instantiations/backward_bfloat16_32.cu",
    "csrc/cuda/sm80/instantiations/backward_float16_256.cu",
    "csrc/cuda/sm80/instantiations/backward_float16_192.cu",
    "csrc/cuda/sm80/instantiations/backward_float16_128.cu",
    "csrc/cuda/sm80/instantiations/backward_float16_96.cu",
    "csrc/cuda/sm80/instantiations/backward_float16_64.cu",
    "csrc/cuda/sm80/instantiations/backward_float16_32.cu",
    "csrc/cuda/sm80/instantiations/forward_bfloat16_256.cu",
    "csrc/cuda/sm80/instantiations/forward_bfloat16_192.cu",
    "csrc/cuda/sm80/instantiations/forward_bfloat16_128.cu",
    "csrc/cuda/sm80/instantiations/forward_bfloat16_96.cu",
    "csrc/cuda/sm80/instantiations/forward_bfloat16_64.cu",
    "csrc/cuda/sm80/instantiations/forward_bfloat16_32.cu",
    "csrc/cuda/sm80/instantiations/forward_float16_256.cu",
    "csrc/cuda/sm80/instantiations/forward_float16_192.cu",
    "csrc/cuda/sm80/instantiations/forward_float16_128.cu",
    "csrc/cuda/sm80/instantiations/forward_float16_96.cu",
    "csrc/cuda/sm80/instantiations/forward_float16_64.cu",
    "csrc/cuda/sm80/instantiations/forward_float16_32.cu",
    "csrc/cuda/sm80/instantiations/decode_bfloat16_256.cu",
    "csrc/cuda/sm80/instantiations/decode_bfloat16_192.cu",
    "csrc/cuda/sm80/instantiations/decode_bfloat16_128.cu",
    "csrc/cuda/sm80/instantiations/decode_bfloat16_96.cu",
    "csrc/cuda/sm80/instantiations/decode_bfloat16_64.cu",
    "csrc/cuda/sm80/instantiations/decode_bfloat16_32.cu",
    "csrc/cuda/sm80/instantiations/decode_float16_256.cu",
    "csrc/cuda/sm80/instantiations/decode_float16_192.cu",
    "csrc/cuda/sm80/instantiations/decode_float16_128.cu",
    "csrc/cuda/sm80/instantiations/decode_float16_96.cu",
    "csrc/cuda/sm80/instantiations/decode_float16_64.cu",
    "csrc/cuda/sm80/instantiations/decode_float16_32.cu",
    "csrc/cuda/check_range.cu",
    "csrc/cuda/padding.cu",
    "csrc/cuda/simt/instantiations/backward_float32.cu",
    "csrc/cuda/simt/instantiations/backward_float64.cu",
    "csrc/cuda/simt/instantiations/forward_float32.cu",
    "csrc/cuda/simt/instantiations/forward_float64.cu",
]

# A source distribution is made without torch; compiling without one is refused by the build_ext command.
torch = find_torch()

setup(
    ext_modules=[KernelExtension("prefix_kernels._C", TORCH_SOURCES, KERNEL_SOURCES, CUDA_SOURCES)],
    cmdclass={"build_ext": BuildKernelExtension},
    # safetensors writes torch tensors by way of numpy, which it does not ask for itself.
    install_requires=[torch.requirement if torch else TORCH_REQUIREMENT, "numpy", "safetensors>=0.4"],
)
