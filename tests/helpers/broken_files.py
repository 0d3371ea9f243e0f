"""Wrong file contents, the functions that read tasks, and how each of them must refuse."""

from __future__ import annotations

import functools
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import prepared, tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from prefix_kernels.checkpoint import load_prefix, read_prefix_metadata
from prefix_kernels.integrations.transformers import (
    delete_named_prefix,
    initialize_from_prefix,
    load_named_prefix,
    load_prefix_model,
    remove_prefix,
)

DEEP = "[" * 100_000 + "]" * 100_000
NO_JSON = ("", "{", "\\", DEEP, "9" * 5000)
Reader = Callable[[Path], object]


@functools.cache
def bert() -> PreTrainedModel:
    return tiny_model("bert")


@functools.cache
def prepared_bert() -> PreTrainedModel:
    return prepared(bert())


def load_as_only(path: Path) -> None:
    remove_prefix(load_prefix_model(bert(), path))


def load_as_named(path: Path) -> None:
    load_named_prefix(prepared_bert(), "task", path)
    delete_named_prefix(prepared_bert(), "task")


# None of them changes a model that is shared by the tests, or not for long, whether it fails or not.
METADATA_READERS: dict[str, Reader] = {
    "read_prefix_metadata": read_prefix_metadata,
    "load_prefix": lambda path: load_prefix(prepared_bert(), path),
}
TASK_READERS: dict[str, Reader] = {
    "load_prefix_model": load_as_only,
    "load_named_prefix": load_as_named,
    "initialize_from_prefix": lambda path: initialize_from_prefix(prepared_bert(), path),
}
READERS = METADATA_READERS | TASK_READERS


def reading_with(readers: dict[str, Reader]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("read", readers.values(), ids=readers)


def refused(read: Reader, path: Path, *message: str, cause: type[Exception] | tuple | None = None) -> None:
    """Reading raises a ValueError that begins with the path, or one in it, and has all of ``message``."""
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}[:/ ]") as caught:
        read(path)
    assert type(caught.value) is ValueError
    assert len(str(caught.value)) < 1500
    for part in ("expected ", "got ", *message):
        assert part in str(caught.value)
    if cause is not None:
        assert isinstance(caught.value.__cause__, cause)


def written(header: dict[str, object] | bytes, body: bytes = b"") -> bytes:
    """A safetensors file of this header."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + body


NO_SAFETENSORS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "a few bytes": lambda content: b"abc",
    "text": lambda content: b"a task, but in words\n" * 40,
    "zeros": lambda content: bytes(1000),
    "a pickle": lambda content: b"\x80\x02}q\x00." * 10,
    "cut in the header": lambda content: content[:60],
    "cut in the values": lambda content: content[:-100],
    "longer": lambda content: content + b"more",
    "a header that is no JSON": lambda content: written(b"{" * 50),
    "a header nested too deeply": lambda content: written(b'{"__metadata__":' + DEEP.encode() + b"}"),
    "numbers as metadata": lambda content: written({"__metadata__": {"prefix_kernels_format": 1}}),
    "tensors that overlap": lambda content: written(
        {name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for name in "ab"}, bytes(8)
    ),
    "a shape larger than the values": lambda content: written(
        {"a": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 8]}}, bytes(8)
    ),
}


class NoLargeTensors(TorchDispatchMode):
    """Fails where an operation makes a tensor of more than a megabyte."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                assert tensor.nbytes < 2**20, f"{func} made {list(tensor.shape)}"
        return result
