"""Builds the extension module and pins the PyTorch that the package asks for; the rest is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent))

from build_tools.environment import TORCH_REQUIREMENT, find_torch
from build_tools.extension import BuildKernelExtension, KernelExtension
from build_tools.sources import CUDA_SOURCES, KERNEL_SOURCES, TORCH_SOURCES

# A source distribution is made without torch; compiling without one is refused by the build_ext command.
torch = find_torch()

setup(
    ext_modules=[KernelExtension("prefix_kernels._C", TORCH_SOURCES, KERNEL_SOURCES, CUDA_SOURCES)],
    cmdclass={"build_ext": BuildKernelExtension},
    # safetensors writes torch tensors by way of numpy, which it does not ask for itself.
    install_requires=[torch.requirement if torch else TORCH_REQUIREMENT, "numpy", "safetensors>=0.4"],
)
