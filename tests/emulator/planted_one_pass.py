"""Bugs of the backward kernel that forms all gradients in one pass."""

from __future__ import annotations

from mutation import BACKWARD, Mutation

ONE_PASS_KERNEL, STEP = "sm80/backward/one_pass.cuh", "sm80/backward/one_pass_step.cuh"
TURNS = "sm80/backward/turns.cuh"
BANK = "backward in one pass of a bank"
STAGE_BARRIER = "      ptx::cp_async_wait<0>();\n      __syncthreads();\n"
PASSED_TURN = "      int* const passing = thread == 0 ? shared.turn(1 - stage).count : nullptr;\n"
LAST_TURN = "    if (thread == 0) pass_turn(shared.turn(1 - stage).count);\n"


def one_pass(name: str, file: str, old: str, new: str, *probes: str) -> Mutation:
    return Mutation(f"one pass: {name}", file, old, new, BACKWARD, probes or ("backward in one pass", BANK))


ONE_PASS = [
    one_pass("no barrier before a stage is read", ONE_PASS_KERNEL, STAGE_BARRIER, "      ptx::cp_async_wait<0>();\n"),
    one_pass("no wait for a stage", ONE_PASS_KERNEL, STAGE_BARRIER, "      __syncthreads();\n"),
    one_pass(
        "no barrier before P and dS are read",
        ONE_PASS_KERNEL,
        "      __syncthreads();\n      if (passing",
        "      if (passing",
    ),
    one_pass(
        "the last turn is read when the next one may be there",
        ONE_PASS_KERNEL,
        PASSED_TURN + "      __syncthreads();\n",
        "      __syncthreads();\n" + PASSED_TURN,
    ),
    one_pass("the last turn is not passed on", ONE_PASS_KERNEL, LAST_TURN, ""),
    one_pass(
        "the next stage into the one in use",
        ONE_PASS_KERNEL,
        "fetch_queries(block, next, 1 - stage",
        "fetch_queries(block, next, stage",
    ),
    one_pass("tickets in another order than the turns", TURNS, " - 2 * (ticket % sequence_tiles)", ""),
    one_pass(
        "a slot that names a prefix again has no turn of its own", TURNS, " * same + same_before", " * same", BANK
    ),
    one_pass("turns of hidden columns of a prefix", TURNS, "valid_prefix_length(p, prefix)", "p.prefix_len", BANK),
    one_pass("the last tile's sums are not cleared whole", TURNS, "i + 1 == q_len ? rows : i + 1", "i + 1"),
    one_pass("the diagonal one column to the right", STEP, "at >= info.end", "at > info.end"),
    one_pass(
        "P written over a row of its cell",
        STEP,
        "to + 8 * kWidth) = pack2<T>(cell[n][2]",
        "to + 7 * kWidth) = pack2<T>(cell[n][2]",
    ),
    one_pass(
        "dvalue stored by the queries' head dim",
        ONE_PASS_KERNEL,
        "kDPrefixValue : kDValue, static_cast<int>(p.value_dim)",
        "kDPrefixValue : kDValue, static_cast<int>(p.head_dim)",
        "backward in one pass of wide values",
    ),
    one_pass("dquery without its scale", ONE_PASS_KERNEL, "params.scale, sums, lane", "1.0f, sums, lane"),
]
