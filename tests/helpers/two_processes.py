"""Runs a function in two processes that talk to each other through gloo, and compares what comes out with one's."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

WORLD = 2


def _worker(rank: int, function: Callable[..., None], rendezvous: str, arguments: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    try:
        function(*arguments)
    finally:
        dist.destroy_process_group()
    # Not through the interpreter's own exit: gloo's threads may still hold tensors, and one that is freed while Python
    # shuts down aborts the process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run_on_two_processes(function: Callable[..., None], folder: Path, *arguments: object) -> None:
    """``function(*arguments)`` in both; what fails in one of them is raised here."""
    mp.spawn(_worker, (function, str(folder / "rendezvous"), arguments), nprocs=WORLD)


def own_rows(count: int) -> slice:
    """This process's part of a batch of ``count`` rows."""
    share = count // WORLD
    return slice(share * dist.get_rank(), share * (dist.get_rank() + 1))


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_gradients_of_one(model: nn.Module, whole: nn.Module, case: str = "") -> None:
    """Every gradient that ``whole`` has in one process, ``model`` has too, in parts or copies, and it is not zero."""
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    for (name, parameter), expected in zip(inner.named_parameters(), whole.parameters(), strict=True):
        if expected.requires_grad:
            assert expected.grad.abs().max() > 0, (case, name)
            torch.testing.assert_close(full(parameter.grad), expected.grad, rtol=1e-4, atol=1e-6, msg=f"{case} {name}")
