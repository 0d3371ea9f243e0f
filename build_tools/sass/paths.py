"""Instructions on a path through the loops of a kernel."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .control_flow import Block, Counts, Loop
from .kernels import Kernel


@dataclass(frozen=True)
class Walker:
    """Finds the path of one kind through the loops of one kernel."""

    blocks: dict[int, Block]
    kernel: Kernel
    path: str

    def merit(self, counts: Counts) -> tuple[int, ...]:
        """Lexicographic merit of a path; the best path has the greatest."""
        wanted = 0
        if self.path == "dropout":
            wanted = counts.philox
        elif self.path == "mask":
            wanted = counts.mask_loads
        elif self.path == "padding":
            wanted = min(counts.mask_loads, 1) if self.kernel.name == "forward" else counts.mask_loads
        elif self.path == "several prefixes":
            wanted = counts.divisions
        return counts.hmma, min(counts.exponentials, self.kernel.scores), wanted, counts.copies, -counts.instructions

    def of_block(self, start: int, in_hot_loop: bool) -> Counts:
        """Counts of one block and of the function that it calls."""
        block = self.blocks[start]
        counts = block.counts
        if in_hot_loop and self.kernel.name == "forward":
            counts = replace(counts, divisions=0)
        if block.calls is not None:
            counts += self.of_function(block.calls)
        return counts

    def of_function(self, start: int) -> Counts:
        """Counts of the best path from a function's first instruction to its return; none if it has loops."""
        best: dict[int, Counts | None] = {}

        def visit(node: int) -> Counts | None:
            if node not in best:
                best[node] = None
                block = self.blocks[node]
                if block.opcodes[-1].startswith("RET"):
                    best[node] = block.counts
                elif ways := [rest for s in block.successors if (rest := visit(s)) is not None]:
                    best[node] = block.counts + max(ways, key=self.merit)
            return best[node]

        return visit(start) or Counts()

    def trips(self, loop: Loop) -> int:
        """Iterations of a loop inside the hot one, for a full tile."""
        counts = [self.blocks[start].counts for start in loop.blocks]
        if any(each.hmma for each in counts):
            return self.kernel.stage_trips
        if any(each.copies for each in counts):
            return self.kernel.copy_trips
        if any(each.mask_loads for each in counts):
            return self.kernel.mask_trips
        return 1

    def iteration(self, loop: Loop) -> Counts:
        """Counts of the best path from the header of ``loop`` back to it."""
        inner_of = {start: inner for inner in loop.inner for start in inner.blocks}
        is_hot = any(self.blocks[start].counts.hmma for start in loop.blocks)
        best: dict[int, Counts] = {}

        def visit(node: int) -> Counts | None:
            """Counts from ``node`` (a block's start, or an inner loop's header) to a latch."""
            if node in best:
                return best[node]
            inner = inner_of.get(node)
            if inner is None:
                here, members = self.of_block(node, is_hot), {node}
            else:
                here, members = self.iteration(inner).times(self.trips(inner)), inner.blocks
            ways: list[Counts] = []
            for member in members:
                for successor in self.blocks[member].successors:
                    if successor == loop.header:
                        ways.append(Counts())
                    elif successor in loop.blocks and successor not in members:
                        target = inner_of[successor].header if successor in inner_of else successor
                        if (rest := visit(target)) is not None:
                            ways.append(rest)
            if not ways:
                return None
            best[node] = here + max(ways, key=self.merit)
            return best[node]

        counts = visit(loop.header)
        assert counts is not None, f"the loop at {loop.header:#x} has no way back"
        return counts
