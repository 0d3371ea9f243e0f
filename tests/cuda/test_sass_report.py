"""The counts of build_tools/sass_report.py: loops, paths and occupancy, on machine code made up for it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
# Last, because an installed package comes before the checkout's folder of its source.
sys.path.append(str(CHECKOUT))

from build_tools import sass_report  # noqa: E402
from build_tools.sass.control_flow import (  # noqa: E402
    Counts,
    build_blocks,
    find_loops,
    hot_loops,
    parse_functions,
)
from build_tools.sass.kernels import Kernel  # noqa: E402
from build_tools.sass.paths import Walker  # noqa: E402

KERNEL = Kernel("forward", 64, "plain", 128, 51360, stage_trips=1, copy_trips=4, mask_trips=2, scores=1)

# A loop from 0x20 to 0xd0 around a loop of copies; the branch at 0x70 leads past Philox.
LOOP = """
    Function : made_up
    /*0000*/  MOV R1, c[0x0][0x28] ;
    /*0010*/  @P0 BRA 0xe0 ;
    /*0020*/  LDSM.16.M88.4 R4, [R2] ;
    /*0030*/  @P1 BRA 0x60 ;
    /*0040*/  LDGSTS.E.BYPASS.LTC128B.128 [R3], [R6.64] ;
    /*0050*/  @P2 BRA 0x40 ;
    /*0060*/  HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
    /*0070*/  @!P3 BRA 0xa0 ;
    /*0080*/  IMAD.WIDE.U32 R12, R10, -0x2daee0ad, RZ ;
    /*0090*/  IMAD.WIDE.U32 R14, R11, 0xcd9e8d57, RZ ;
    /*00a0*/  @P4 BRA 0xc0 ;
    /*00b0*/  MUFU.EX2 R9, R9 ;
    /*00c0*/  @P5 CALL.REL.NOINC 0xe0 ;
    /*00d0*/  BRA 0x20 ;
    /*00e0*/  EXIT ;
"""


def counts(sass: str, path: str) -> Counts:
    [instructions] = parse_functions(sass).values()
    blocks = build_blocks(instructions)
    [(loop, _)] = hot_loops(blocks, find_loops(blocks))
    return Walker(blocks, KERNEL, path).iteration(loop)


def test_the_plain_path_copies_and_exponentiates_but_leaves_the_options_out():
    plain = counts(LOOP, "plain")
    # Two blocks of two, four rounds of the copy loop, the exponential behind its branch, the loop's end.
    assert plain.instructions == 2 + 4 * 2 + 2 + 2 + 2
    assert (plain.hmma, plain.ldsm, plain.copies, plain.exponentials, plain.philox) == (1, 1, 4, 1, 0)


def test_the_path_of_dropout_goes_through_philox():
    plain, dropout = counts(LOOP, "plain"), counts(LOOP, "dropout")
    assert dropout.philox == 2
    assert dropout.instructions == plain.instructions + 2


def test_the_hot_loop_is_the_innermost_one_with_tensor_core_instructions():
    assert counts(LOOP.replace("HMMA", "FFMA").replace("LDGSTS", "HMMA"), "plain").instructions == 2


def test_a_called_function_is_counted_by_its_best_path():
    function = """
    /*00f0*/  @P0 BRA 0x110 ;
    /*0100*/  FADD R9, R9, R9 ;
    /*0110*/  MUFU.EX2 R9, R9 ;
    /*0120*/  RET.REL.NODEC R2 0x0 ;
"""
    called = counts(LOOP.replace("MUFU.EX2 R9, R9", "CALL.REL.NOINC 0xf0") + function, "plain")
    assert called.instructions == counts(LOOP, "plain").instructions + 3


@pytest.mark.parametrize(
    ("architecture", "registers", "shared_bytes", "expected"),
    [
        ("8.0", 255, 51360, 2),
        ("8.0", 161, 100512, 1),
        ("9.0", 161, 100512, 2),
        ("8.6", 120, 40000, 2),
        ("8.0", 24, 0, 16),
    ],
)
def test_blocks_per_multiprocessor(architecture, registers, shared_bytes, expected):
    assert sass_report.blocks_per_sm(architecture, 128, registers, shared_bytes) == expected


def test_the_table_has_every_kernel_beside_flash_attention_2():
    table = sass_report.read_table()
    ours = {(row["kernel"], row["head_dim"], row["architecture"]) for row in table if row["source"] == "ours"}
    kernels = ("forward", "decode", "backward columns", "backward rows")
    head_dims = {row[1] for row in ours}
    assert head_dims == {"32", "64", "96", "128", "192", "256"}
    expected = {(k, d) for k in kernels for d in head_dims}
    expected |= {("backward one pass", d) for d in ("64", "96", "128")}
    assert ours == {(*kernel, a) for kernel in expected for a in sass_report.ARCHITECTURES}
    theirs = {(row["kernel"], row["path"]) for row in table if row["source"] == "FlashAttention-2"}
    assert theirs == {(kernel, path) for kernel in ("forward", "backward") for path in ("plain", "dropout")}


def test_one_pass_stays_near_the_counts_of_flash_attention_2():
    """Both form five products; bounds of instructions per tensor core instruction, by head dim."""
    plain = [row for row in sass_report.read_table() if row["kernel"] == "backward one pass" and row["path"] == "plain"]
    most = {"64": 5.5, "96": 4.5, "128": 4.5}
    assert plain and all(float(row["per_hmma"]) <= most[row["head_dim"]] for row in plain)
    assert all(float(row["ldsm_per_hmma"]) <= 0.5 for row in plain)


def test_general_kernels_have_rows_for_their_options():
    table = [
        row for row in sass_report.read_table() if row["source"] == "ours" and row["variant"].startswith("general")
    ]
    paths = {(row["kernel"], row["path"]) for row in table}
    assert paths >= {("forward", path) for path in sass_report.PATHS}
    # In the backward pass a mask is read as padding is.
    assert paths >= {("backward rows", path) for path in ("plain", "padding", "dropout", "several prefixes")}
    assert paths >= {("backward columns", path) for path in ("plain", "dropout")}
