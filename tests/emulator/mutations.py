"""Plants one bug at a time in the CUDA kernels and shows that the emulator, or a wrong result, gives each away.

    python tests/emulator/mutations.py [part of a name]

A mutation is a piece of text that occurs once in a kernel header, and what replaces it. The file of kernels that it
reaches is compiled anew in check mode, linked with the rest of the checked library, and run on a few small calls in a
process of its own.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

# Named here because PYTHONSAFEPATH, which the test suite sets, leaves a script's own folder out.
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "helpers"))

import emulated
import torch
from extended import extended
from helpers import check
from merge_samples import check_merge
from mutation import Mutation
from planted_bugs import MUTATIONS
from probes import IN_TWO_STEPS, MERGES, PROBES, SMALL_GRIDS

SEEDS = (1, 2)
TIME_LIMIT_S = 120


@dataclass(frozen=True)
class Outcome:
    """What became of a mutation: ``caught`` says by what, and is empty where nothing did."""

    name: str
    caught: str
    seconds: float


def mutated_text(mutation: Mutation) -> str:
    """The header with the bug in it.

    Raises:
        ValueError: the text to be replaced does not occur exactly once.
    """
    text = (emulated.CHECKOUT / "csrc" / "cuda" / mutation.file).read_text()
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.name}: expected its text once in {mutation.file}, got {text.count(mutation.old)}")
    return text.replace(mutation.old, mutation.new)


def _build(mutation: Mutation, folder: Path) -> Path:
    """The checked library with the mutation in it."""
    shutil.copytree(emulated.CHECKOUT / "csrc", folder / "csrc")
    (folder / "csrc" / "cuda" / mutation.file).write_text(mutated_text(mutation))
    library = []
    for each in emulated.all_objects("check"):
        if each.source.is_relative_to(emulated.CHECKOUT / "csrc" / "cuda") and each.source.stem in mutation.units:
            each = emulated.kernel_object(folder / each.source.relative_to(emulated.CHECKOUT), "check", folder)
            each.compile(threading.Event())
        library.append(each)
    emulated.link(library, emulated.TORCH_LIBRARIES, folder / "mutant.so")
    return folder / "mutant.so"


def _run_probe(name: str, seed: int) -> None:
    if name in MERGES:
        library = emulated.load("check")
        library.seed(seed)
        check_merge(MERGES[name](), library.merge, library.merge_backward)
        return
    if name in IN_TWO_STEPS:
        function = partial(extended, extend_=partial(emulated.emulated_extend_, mode="check", seed=seed))
    else:
        function = partial(emulated.emulated_prefix_attention, mode="check", seed=seed)
    call, needs = PROBES[name]()
    check(call, needs=needs, function=function)


def _run_probes(library: Path | None, names: tuple[str, ...]) -> Iterator[str]:
    """What goes wrong in the probes, as it is found."""
    if library is not None:
        loaded = emulated.load_library(library, "check")
        emulated.load = lambda mode: loaded
    for seed in SEEDS:
        for name in names:
            emulated.load("check").device(80, 4, max_grid_yz=1 if name in SMALL_GRIDS else 65535)
            try:
                _run_probe(name, seed)
            except AssertionError as error:
                yield f"{name}, seed {seed}: wrong result: {error}"
            except Exception as error:
                yield f"{name}, seed {seed}: {error}"


def _in_another_process(library: Path | None, names: tuple[str, ...], record: Path) -> str:
    """The first thing that goes wrong in the probes."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            # What no kernel writes is NaN.
            torch.use_deterministic_algorithms(True, warn_only=True)
            record.write_text(next(_run_probes(library, names), ""))
        finally:
            os._exit(0)
    end = time.monotonic() + TIME_LIMIT_S
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "does not come to an end"
        time.sleep(0.02)
    return record.read_text() if record.exists() else "the process died"


def try_out(mutation: Mutation) -> Outcome:
    """Plant one bug and see what happens."""
    start = time.monotonic()
    parent = emulated.FOLDER / "mutations"
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as temporary:
        folder = Path(temporary)
        try:
            caught = _in_another_process(_build(mutation, folder), mutation.probes, folder / "outcome.txt")
        except emulated.EmulatedBuildError as error:
            raise ValueError(f"{mutation.name} does not compile:\n{error}") from error
    return Outcome(mutation.name, caught, time.monotonic() - start)


def without_any() -> str:
    """What goes wrong in the probes when no bug is planted: nothing, or the mutations prove nothing."""
    emulated.build("check")
    with tempfile.TemporaryDirectory() as folder:
        return _in_another_process(emulated.build("check"), (*PROBES, *MERGES), Path(folder) / "outcome.txt")


def main(part: str = "") -> int:
    """Try all mutations whose name holds ``part``; the number of those that nothing caught."""
    if wrong := without_any():
        print(f"Without any mutation: {wrong}")
        return 1
    chosen = [each for each in MUTATIONS if part in each.name]
    survivors = 0
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for outcome in pool.map(try_out, chosen):
            survivors += not outcome.caught
            found = " | ".join(line.strip() for line in outcome.caught.splitlines()[:2])
            print(f"{outcome.name:50} {outcome.seconds:5.1f} s  {found or '*** NOT CAUGHT ***'}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} caught")
    return survivors


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
