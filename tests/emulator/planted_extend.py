"""Bugs of calls that add prefixes to attention over other keys."""

from __future__ import annotations

from mutation import float32, forward

RESUME = "sm80/forward/resume.cuh"
EXTENDS, WIDE, FLOAT32 = "forward that extends", "forward of wide values that extends", "float32 that extends"

EXTEND = [
    forward(
        "every one of the four threads of a row begins with a sum of 1",
        "common/softmax.cuh",
        "lane % 4 == 0 ? 1.0f : 0.0f",
        "1.0f",
        EXTENDS,
    ),
    forward(
        "lse taken for a score before its scale",
        RESUME,
        "Traits::kGeneral ? lse : __fdividef(lse, params.scale)",
        "lse",
        EXTENDS,
    ),
    forward(
        "lse divided by a scale so small that it overflows",
        "sm80/forward/launch.cuh",
        "p.extends ? 1e-30 : 0.0",
        "0.0",
        "forward of a tiny scale that extends",
    ),
    forward("out of a row that saw nothing", RESUME, "      if (is_infinite(lse)) continue;\n", "", EXTENDS),
    forward("lse of rows beyond the last", RESUME, "      if (row > rows.last) continue;\n", "", EXTENDS),
    forward("out of rows beyond the last", RESUME, "warp_row + i <= rows.last;", "true;", EXTENDS),
    forward("out of other warps' rows", RESUME, "valid ? warp_row + i : 0;", "valid ? i : 0;", EXTENDS),
    forward(
        "out read before other lanes' copies", RESUME, "  ptx::cp_async_wait<0>();\n  __syncwarp();\n", "", EXTENDS
    ),
    forward("out copied by the queries' head dim", RESUME, "p.value_dim), valid", "p.head_dim), valid", WIDE),
    float32("out of a row that saw nothing", "simt/forward.cuh", "  if (is_infinite(lse)) return;\n", "", FLOAT32),
    float32("a sum that begins without what was there", "simt/forward.cuh", "  sum = 1;\n", "", FLOAT32),
    float32(
        "lse written over while other lanes read it",
        "simt/forward.cuh",
        "    if (p.extends) resume(p, q, max, sum, out);\n    __syncwarp();\n",
        "    __syncwarp();\n    if (p.extends) resume(p, q, max, sum, out);\n",
        FLOAT32,
    ),
]
