"""Loads the compiled module, or says in one sentence why it cannot be loaded and what to run.

A compiled module that meets another PyTorch than its own fails with an undefined symbol or worse, so everything that
can be known before loading it is checked before.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.metadata
import json
import re
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

_PACKAGE = Path(__file__).parent


def _failure(sentence: str) -> ImportError:
    # The name makes `python -m prefix_kernels` print the sentence without a traceback.
    return ImportError(sentence, name=__package__)


def _release(version: str) -> str:
    """``major.minor`` of a version: what an extension compiled against it depends on."""
    return ".".join(re.findall(r"\d+", version)[:2])


def _source() -> str:
    """The folder that pip installed this package from, as far as it is known."""
    if (_PACKAGE.parent / "setup.py").is_file():
        return str(_PACKAGE.parent)
    try:
        origin = importlib.metadata.distribution(__package__).read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        origin = None
    url = json.loads(origin)["url"] if origin else ""
    return unquote(url.removeprefix("file://")) if url.startswith("file://") else "<source folder of prefix_kernels>"


def _rebuild() -> str:
    # pip's cache of wheels does not know which PyTorch one was compiled against.
    return f"`pip install --force-reinstall --no-deps --no-cache-dir {_source()}`"


def _compiled_torch() -> str:
    """The version of PyTorch that the compiled module was built against."""
    try:
        version: str = importlib.import_module("prefix_kernels._compiled_torch").VERSION
    except ModuleNotFoundError:
        source = _source()
        raise _failure(
            f"prefix_kernels in {_PACKAGE} has not been built: run `pip install {source}` and start Python from "
            f"another folder, or `pip install -e {source}` to use it in place."
        ) from None
    return version


def _check_torch(compiled: str) -> None:
    wanted = f"`pip install 'torch=={_release(compiled)}.*'`"
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise _failure(f"prefix_kernels needs PyTorch, which is not installed: run {wanted}.") from None
    if _release(torch.__version__) != _release(compiled):
        raise _failure(
            f"prefix_kernels was compiled against PyTorch {compiled}, but PyTorch {torch.__version__} is installed: "
            f"run {_rebuild()} to compile it anew, or {wanted}."
        )


def _check_file() -> None:
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    if not any((_PACKAGE / f"_C{suffix}").is_file() for suffix in suffixes):
        raise _failure(f"prefix_kernels was not compiled for this Python (no _C{suffixes[0]}): run {_rebuild()}.")


@functools.cache
def load() -> ModuleType:
    """Load ``prefix_kernels._C``, which registers ``torch.ops.prefix_kernels``, and return it.

    Raises:
        ImportError: the package was imported from its source folder without being built, was compiled for another
            Python or another minor version of PyTorch, or PyTorch is missing. The message says what to run.
    """
    _check_torch(_compiled_torch())
    _check_file()
    try:
        return importlib.import_module("prefix_kernels._C")
    except ImportError as error:
        raise _failure(f"prefix_kernels could not load its compiled module ({error}): run {_rebuild()}.") from None
