"""Reading files whose content is not trusted, and writing files that are never seen half-written.

Whatever is wrong with the content of a file becomes a ValueError with the path, what was expected and what was found,
the original exception as its cause. A file that the system does not open stays the system's OSError, which names the
path too (FileNotFoundError, PermissionError).
"""

from __future__ import annotations

import errno
import json
import os
import reprlib
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open

# No size that a file names may be larger: the bytes of a float64 matrix of two such sizes can still be counted, so that
# it can be described without memory (device "meta").
LARGEST_SIZE = 2**30 - 1

_JSON_NAMES = {dict: "a JSON object", list: "a JSON array"}
_JsonType = TypeVar("_JsonType", dict[str, Any], list[Any])


@contextmanager
def open_safetensors(path: str | os.PathLike[str], expected: str) -> Iterator[Any]:
    """Open a safetensors file, as ``safetensors.safe_open`` does for torch.

    Args:
        expected: the kind of file in words, for messages.

    Raises:
        ValueError: ``path`` is a folder, or no such file, or one of sizes above :data:`LARGEST_SIZE`; also where
            reading it fails while it is open.
        FileNotFoundError: there is nothing at ``path``.
        TypeError: ``path`` is no path.
    """
    check_is_file(path, expected)
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                shape = file.get_slice(name).get_shape()
                if max(shape, default=0) > LARGEST_SIZE:
                    raise ValueError(f"{path}: {name}: expected sizes up to {LARGEST_SIZE}, got {reprlib.repr(shape)}")
            yield file
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: expected {expected}, got one that safetensors cannot read ({error})") from error


def check_is_file(path: str | os.PathLike[str], expected: str) -> None:
    """Raise where ``path`` cannot be opened as a file; errors as in :func:`open_safetensors`."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path: expected a str or an os.PathLike, got {type(path).__name__}")
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "something that is no file"
        raise ValueError(f"{path}: expected {expected}, got {kind}")
    with open(path, "rb"):
        pass


def parse_json(text: str | bytes, kind: type[_JsonType], origin: object) -> _JsonType:
    """The JSON object (``kind`` dict) or array (list) that ``text`` holds.

    Args:
        origin: where the text is from, for messages.

    Raises:
        ValueError: it is no JSON, nested too deeply, or something else than ``kind``.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{origin}: expected {_JSON_NAMES[kind]}, got {reprlib.repr(text)} ({error})") from error
    if not isinstance(value, kind):
        raise ValueError(f"{origin}: expected {_JSON_NAMES[kind]}, got {reprlib.repr(value)}")
    return value


@contextmanager
def blaming(origin: object) -> Iterator[None]:
    """Put ``origin`` before the message of a ValueError of the block, which becomes the cause of another."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to, of a name that no other call has; what is there takes the place of ``path`` after the block.

    Where the block fails, ``path`` is left as it is. A symbolic link stays one: the file that it leads to is replaced.

    Raises:
        OSError: the system refuses to write there, or links lead round in a circle.
    """
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    unfinished = target.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        yield unfinished
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
