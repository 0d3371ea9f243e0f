// The random bits of a tile, [rows][kBlockQ], 16 per element.
#pragma once

#include "../philox.h"
#include "tiles.h"

namespace prefix_kernels::PREFIX_KERNELS_ISA {

// Rows [first, first + count) of the segment against the block's lanes; both start at multiples of 16 of their axis,
// so that the tile is made of whole Philox cells. The block holds one head.
inline void dropout_bits(const QueryBlock& block, const Segment& segment, int64_t first, int count, uint16_t* bits) {
  const AttentionParams& p = *block.params;
  constexpr int kRowGroups = kBlockQ / 2;  // one Philox call serves lanes r and r + 8 of a cell
  const uint32_t head = static_cast<uint32_t>(block.batch * p.q_heads + block.head(0));
  const uint32_t segment_id = static_cast<uint32_t>(segment.id);
  const uint32_t row_group = static_cast<uint32_t>(block.query(0) / 2);
  const int groups = (block.count + kCell - 1) / kCell * (kCell / 2);
  for (int cell = 0; cell < count; cell += kCell) {
    for (uint32_t t = 0; t < 4; ++t) {
      const uint32_t column_group = static_cast<uint32_t>((first + cell) / 4) + t;
      uint32_t words[4][kRowGroups];
      for (int g = 0; g < groups; ++g) {
        const PhiloxWords w = philox(p.dropout_seed, row_group + g, column_group, head, segment_id);
        for (int i = 0; i < 4; ++i) words[i][g] = w.word[i];
      }
      for (int i = 0; i < 4; ++i) {
        uint16_t* row = bits + (cell + (i & 1) * 8 + 2 * t) * kBlockQ + (i >> 1) * 8;
        for (int g = 0; g < groups; g += 8) {
          for (int r = 0; r < 8; ++r) {
            row[g * 2 + r] = static_cast<uint16_t>(words[i][g + r]);
            row[g * 2 + r + kBlockQ] = static_cast<uint16_t>(words[i][g + r] >> 16);
          }
        }
      }
    }
  }
}

}  // namespace prefix_kernels::PREFIX_KERNELS_ISA
