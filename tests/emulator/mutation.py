"""A planted bug, and short ways to write one for each kernel."""

from __future__ import annotations

from dataclasses import dataclass

# Files of csrc/cuda.
FORWARD_KERNEL, COLUMNS, ROWS = "sm80/forward/kernel.cuh", "sm80/backward/columns.cuh", "sm80/backward/rows.cuh"
FORWARD_LOAD, FORWARD_EPILOGUE = "sm80/forward/load.cuh", "sm80/forward/epilogue.cuh"
DECODE_MERGE = "sm80/decode/merge.cuh"
COLUMNS_BLOCK = "sm80/backward/columns_block.cuh"
# Units that are compiled.
FORWARD = ("forward_float16_64",)
DECODE = ("decode_float16_64",)
BACKWARD = ("backward_float16_64",)
PADDING = ("padding",)
MERGE = ("merge",)
FLOAT32 = ("forward_float32", "backward_float32")


@dataclass(frozen=True)
class Mutation:
    """``old``, which occurs once in csrc/cuda/``file``, becomes ``new``; ``units`` are compiled and ``probes`` run."""

    name: str
    file: str
    old: str
    new: str
    units: tuple[str, ...]
    probes: tuple[str, ...]


def forward(name: str, file: str, old: str, new: str, *probes: str) -> Mutation:
    return Mutation(f"forward: {name}", file, old, new, FORWARD, probes or ("forward", "forward with every option"))


def decode(name: str, old: str, new: str, *probes: str, file: str = "sm80/decode/kernel.cuh") -> Mutation:
    return Mutation(f"decode: {name}", file, old, new, DECODE, probes or ("decode",))


def backward(name: str, file: str, old: str, new: str, *probes: str) -> Mutation:
    return Mutation(f"backward: {name}", file, old, new, BACKWARD, probes or ("backward", "backward of a few columns"))


def float32(name: str, file: str, old: str, new: str, *probes: str) -> Mutation:
    return Mutation(f"float32: {name}", file, old, new, FLOAT32, probes or ("float32",))


def padding(name: str, old: str, new: str) -> Mutation:
    probes = ("forward of padding", "decode of padding", "backward of padding")
    return Mutation(f"padding: {name}", "padding.cu", old, new, PADDING, probes)


def merge(name: str, old: str, new: str) -> Mutation:
    return Mutation(f"merge: {name}", "merge.cu", old, new, MERGE, ("merge", "merge of odd rows"))
