"""The conditions of a measurement: machine, versions, commit and date."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch

import prefix_kernels

REPOSITORY = Path(__file__).parents[2]


def environment(device: str) -> dict[str, object]:
    """Columns that all rows of a table share: the conditions under which they were measured.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
    """
    commit = _git("rev-parse", "--short=10", "HEAD") or os.environ.get("COMMIT", "unknown")
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": _processor(),
        "threads": torch.get_num_threads(),
        "isa": torch.ops.prefix_kernels.cpu_isa(),
        "torch": torch.__version__,
        "prefix_kernels": prefix_kernels.__version__,
        "python": platform.python_version(),
        "commit": commit + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else ""),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M"),
    }


def _git(*arguments: str) -> str:
    """The output of a git command in the checkout; empty in a copy without history or on a machine without git."""
    try:
        done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def _processor() -> str:
    """The processor's model name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
