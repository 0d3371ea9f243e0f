"""The control flow of a kernel's machine code: instructions, basic blocks, loops."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, field
from functools import cached_property


@dataclass
class Block:
    """Instructions that are executed together; ``successors`` are starts of blocks."""

    start: int
    opcodes: list[str] = field(default_factory=list)
    operands: list[str] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)
    calls: int | None = None  # first instruction of the function that the last instruction calls

    @cached_property
    def counts(self) -> Counts:
        text = list(zip(self.opcodes, self.operands, strict=True))
        return Counts(
            instructions=len(text),
            hmma=sum(opcode.startswith("HMMA") for opcode, _ in text),
            ldsm=sum(opcode.startswith("LDSM") for opcode, _ in text),
            copies=sum(opcode.startswith("LDGSTS") for opcode, _ in text),
            mask_loads=sum(opcode.startswith("LDG.E.U8") for opcode, _ in text),
            philox=sum(
                opcode.startswith("IMAD") and re.search("0x(d2511f53|2daee0ad|cd9e8d57|326172a9)", operand) is not None
                for opcode, operand in text
            ),
            divisions=sum(opcode.startswith("I2F") for opcode, _ in text),
            exponentials=sum(opcode == "MUFU.EX2" for opcode, _ in text),
        )


@dataclass(frozen=True)
class Counts:
    """Instructions on a path, and those of some kinds among them."""

    instructions: int = 0
    hmma: int = 0
    ldsm: int = 0
    copies: int = 0
    mask_loads: int = 0
    philox: int = 0
    divisions: int = 0
    exponentials: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(self.values(), other.values(), strict=True)))

    def times(self, factor: int) -> Counts:
        return Counts(*(factor * value for value in self.values()))

    def values(self) -> tuple[int, ...]:
        return astuple(self)


@dataclass
class Loop:
    """A natural loop: its header, the blocks in it, the loops directly inside."""

    header: int
    blocks: set[int]
    latches: set[int]
    inner: list[Loop] = field(default_factory=list)


_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")


def parse_functions(sass: str) -> dict[str, list[tuple[int, str, str, str]]]:
    """``(address, predicate, opcode, operands)`` of every instruction by function, from ``cuobjdump -sass``."""
    functions: dict[str, list[tuple[int, str, str, str]]] = {}
    current: list[tuple[int, str, str, str]] = []
    for line in sass.split("\n"):
        if "Function : " in line:
            current = functions.setdefault(line.split("Function : ")[1].strip(), [])
        elif found := _INSTRUCTION.search(line):
            address, predicate, opcode, operands = found.groups()
            current.append((int(address, 16), predicate or "", opcode, operands.strip()))
    return functions


def _branch_target(predicate: str, opcode: str, operands: str) -> int | None:
    """The address that a branch goes to. A conditional CALL.REL.NOINC is how ptxas leaves some loops."""
    leaves = bool(predicate) and opcode.startswith("CALL.REL.NOINC")
    if not leaves and (opcode.split(".")[0] not in ("BRA", "JMP") or opcode.startswith(("BRA.DIV", "BRA.CONV"))):
        return None
    return _address(operands)


def _address(operands: str) -> int:
    return int(operands.split("0x")[-1], 16)


def build_blocks(instructions: Sequence[tuple[int, str, str, str]]) -> dict[int, Block]:
    """The basic blocks of a function. Slow paths of divergent warps (BRA.DIV) are not followed."""
    addresses = [address for address, *_ in instructions]
    step = addresses[1] - addresses[0]
    starts = {addresses[0]}
    for address, predicate, opcode, operands in instructions:
        if (target := _branch_target(predicate, opcode, operands)) is not None:
            starts |= {target, address + step}
        elif opcode.split(".")[0] in ("EXIT", "RET", "BRX", "JMX", "KILL"):
            starts.add(address + step)
        elif opcode.startswith("CALL.REL"):
            starts |= {_address(operands), address + step}
    blocks: dict[int, Block] = {}
    block = Block(addresses[0])
    last = ("", "", "")
    for address, predicate, opcode, operands in instructions:
        if address in starts and address != block.start:
            if not block.successors and not _ends(*last[:2]):
                block.successors.append(address)
            block = Block(address)
        blocks.setdefault(block.start, block)
        block.opcodes.append(opcode)
        block.operands.append(operands)
        last = (predicate, opcode, operands)
        if (target := _branch_target(predicate, opcode, operands)) is not None:
            conditional = bool(predicate) or re.search(r"\bU?P\d", operands) is not None
            block.successors = [target, *([address + step] if conditional else [])]
        elif opcode.split(".")[0] in ("EXIT", "RET", "BRX", "JMX", "KILL") and predicate:
            block.successors = [address + step]
        elif opcode.startswith("CALL.REL"):
            block.calls = _address(operands)
    return blocks


def _ends(predicate: str, opcode: str) -> bool:
    return not predicate and opcode.split(".")[0] in ("EXIT", "RET", "BRX", "JMX", "KILL")


def find_loops(blocks: dict[int, Block]) -> list[Loop]:
    """The outermost natural loops of the blocks that the first one reaches."""
    entry = min(blocks)
    order: list[int] = []
    seen = {entry}
    stack = [(entry, iter(blocks[entry].successors))]
    while stack:
        start, successors = stack[-1]
        following = next((s for s in successors if s in blocks and s not in seen), None)
        if following is None:
            order.append(start)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(blocks[following].successors)))
    order.reverse()
    predecessors: dict[int, list[int]] = {start: [] for start in order}
    for start in order:
        for successor in blocks[start].successors:
            if successor in predecessors:
                predecessors[successor].append(start)
    # Dominators by the usual iteration; a function has a few hundred blocks.
    number = {start: i for i, start in enumerate(order)}
    parent = {entry: entry}

    def common(a: int, b: int) -> int:
        while a != b:
            while number[a] > number[b]:
                a = parent[a]
            while number[b] > number[a]:
                b = parent[b]
        return a

    changed = True
    while changed:
        changed = False
        for start in order[1:]:
            known = [p for p in predecessors[start] if p in parent]
            dominator = known[0]
            for other in known[1:]:
                dominator = common(dominator, other)
            if parent.get(start) != dominator:
                parent[start] = dominator
                changed = True

    def dominates(a: int, b: int) -> bool:
        while number[b] > number[a]:
            b = parent[b]
        return a == b

    loops: dict[int, Loop] = {}
    for start in order:
        for successor in blocks[start].successors:
            if successor in number and dominates(successor, start):
                loop = loops.setdefault(successor, Loop(successor, {successor}, set()))
                loop.latches.add(start)
                waiting = [start]
                while waiting:
                    member = waiting.pop()
                    if member not in loop.blocks:
                        loop.blocks.add(member)
                        waiting += predecessors[member]
    outermost: list[Loop] = []
    by_size = sorted(loops.values(), key=lambda loop: len(loop.blocks))
    for i, loop in enumerate(by_size):
        outer = next((other for other in by_size[i + 1 :] if loop.header in other.blocks), None)
        (outer.inner if outer else outermost).append(loop)
    return outermost


def hot_loops(blocks: dict[int, Block], loops: Iterable[Loop]) -> Iterator[tuple[Loop, Loop | None]]:
    """The innermost loops with tensor core instructions, each with the loop around it."""

    def walk(loop: Loop, outer: Loop | None) -> Iterator[tuple[Loop, Loop | None]]:
        inside = [pair for each in loop.inner for pair in walk(each, loop)]
        if inside:
            yield from inside
        elif any(blocks[start].counts.hmma for start in loop.blocks):
            yield loop, outer

    for loop in loops:
        yield from walk(loop, None)
