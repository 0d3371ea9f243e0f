"""Bugs of decoding whose last block merges, and of its cells without masks."""

from __future__ import annotations

from mutation import DECODE_MERGE, decode

DECODING = [
    decode(
        "a block counts itself in before all of it has written",
        "  __syncthreads();                         // all results of the block are written\n",
        "",
        file=DECODE_MERGE,
    ),
    decode(
        "no fence before a block counts itself in",
        "    __threadfence();  // others see the block's results before they see that it has arrived\n",
        "",
        file=DECODE_MERGE,
    ),
    decode(
        "no fence behind the count",
        "    __threadfence();  // and what is read from here on is not older than the arrivals that were seen\n",
        "",
        file=DECODE_MERGE,
    ),
    decode(
        "a counter that is not zero again",
        "atomicInc(params.arrivals + counter, blocks - 1)",
        "atomicAdd(params.arrivals + counter, 1u)",
        file=DECODE_MERGE,
    ),
    decode(
        "rows merged before their last part has come",
        "is_last[i / kQuads / params.rows_per_entry]",
        "is_last[0]",
        "decode of a shared prefix",
        file=DECODE_MERGE,
    ),
    decode(
        "the blocks of prefixes are not counted",
        "prefix_of_row(p, batch, slot) >= 0 ? params.prefix_parts : 0;",
        "0;",
        file=DECODE_MERGE,
    ),
    decode(
        "all key heads count in one",
        "(batch * p.kv_heads + kv_head) * params.blocks_per_entry",
        "batch * p.kv_heads * params.blocks_per_entry",
        file=DECODE_MERGE,
    ),
    decode("a cell whose end no row sees is plain", "first + kCell <= plain_columns.end", "first < plain_columns.end"),
    decode("cells under a mask are plain", "params.plain ? seen : Span{0, 0}", "seen", "decode of padding"),
]
