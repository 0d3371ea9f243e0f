"""Runs a function in two processes that talk to each other through gloo."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

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


def run_on_two_processes(function: Callable[..., None], folder: Path, *arguments: object) -> None:
    """``function(*arguments)`` in both; what fails in one of them is raised here."""
    mp.spawn(_worker, (function, str(folder / "rendezvous"), arguments), nprocs=WORLD)
