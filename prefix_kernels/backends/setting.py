"""The backend of calls that name none."""

from __future__ import annotations

from types import TracebackType
from typing import Literal, get_args

Backend = Literal["auto", "fused", "split", "benchmark"]
BACKENDS: tuple[str, ...] = get_args(Backend)

_default: Backend = "auto"


def checked_backend(backend: object) -> Backend:
    """Return ``backend``.

    Raises:
        ValueError: it is not the name of one.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    return backend  # type: ignore[return-value]


def resolved_backend(backend: Backend | None) -> Backend:
    """The backend that a call with this argument asks for."""
    return _default if backend is None else checked_backend(backend)


class attention_backend:  # noqa: N801  (as torch.set_grad_enabled)
    """Set the backend of calls of :func:`prefix_kernels.prefix_attention` that name none, in all threads.

    Like :class:`torch.set_grad_enabled`, it takes effect where it is called, and a ``with`` statement ends it::

        prefix_kernels.attention_backend("split")  # from here on

        with prefix_kernels.attention_backend("fused"):  # within
            ...

    A backward pass uses the backend of its forward pass.

    Args:
        backend: ``"auto"``, the faster of the two by a table, measured or modelled, and ``"fused"`` where ``"split"``
            cannot serve; ``"fused"``, the kernels of this package; ``"split"``, PyTorch's own kernel for the sequence
            and ours for the prefix, or an error; ``"benchmark"``, the one that was faster when a call of that shape was
            made first and both were timed.

    Raises:
        ValueError: another name.
    """

    def __init__(self, backend: Backend) -> None:
        global _default
        checked_backend(backend)
        self.backend = backend
        self._before = _default
        _default = backend

    def __enter__(self) -> attention_backend:
        global _default
        _default = self.backend
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        global _default
        _default = self._before
