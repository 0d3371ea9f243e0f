// The sums of dquery that several blocks of columns add to, one after another in a fixed order.
//
// Every tile of queries has a place in global memory and a counter of the blocks that have added to it. A block adds
// when the counter has reached its rank, the number of blocks before it in the tile's order. A block draws a ticket
// when it starts, and its ticket says which columns it owns. Blocks with smaller tickets come first in the order of
// every tile, so the blocks that a block waits for have started before it, and the one with the smallest ticket never
// waits: whatever the order in which a GPU starts blocks, all of them end. The order is the same in every run, and so
// is the result, bit for bit.
#pragma once

#include "query_tiles.cuh"

namespace prefix_kernels::cuda::sm80 {

// Memory of one launch; row_delta clears it.
struct Turns {
  float* sums;   // [batch, q_heads, tiles, kBlockM * kHeadDim]: a thread's elements are kThreads apart
  int* counts;   // [batch, q_heads, tiles]
  int* tickets;  // tickets drawn
  int tiles;     // query tiles of a head
  int tile_rows;
};

// Clears the memory of row `i` of head `head`, of q_len; the last row's call clears what follows in its tile as well.
// kLanes lanes call it together.
template <int kHeadDim, int kLanes>
__device__ __forceinline__ void clear_turns(const Turns& turns, int64_t head, int i, int q_len, int lane) {
  static_assert(kLanes * 8 >= kHeadDim);
  const int rows = turns.tiles * turns.tile_rows;
  const int end = i + 1 == q_len ? rows : i + 1;
  if (lane * 8 < kHeadDim) {
    float4* const sums = reinterpret_cast<float4*>(turns.sums + head * rows * kHeadDim) + lane * 2;
    for (int row = i; row < end; ++row) {
      sums[row * (kHeadDim / 4)] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      sums[row * (kHeadDim / 4) + 1] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
  }
  if (lane != 0 || i % turns.tile_rows != 0) return;
  turns.counts[head * turns.tiles + i / turns.tile_rows] = 0;
  if (head == 0 && i == 0) *turns.tickets = 0;
}

// One visit's turn.
struct Turn {
  float* sums;
  int* count;
  int rank;
};

// The rank of the owner's block among those that visit query tile `tile` of a batch row. Blocks of the sequence come
// first, the last columns before the others, as they are the first to meet a tile under a causal mask; then those of
// prefixes, by number of prefix and column.
template <int kBlockM, int kBlockN, bool kGeneral>
__device__ __forceinline__ int rank_of_visit(const AttentionParams& p,
                                             const QueryTiles<kBlockM, kBlockN, kGeneral>& visit) {
  static_assert(!kGeneral,
                "no padding, no window over the prefix: every query tile of a row visits its prefixes whole");
  const int64_t first = visit.first_query() + row_query_offset(p, visit.batch);
  const int64_t last =
      min(visit.first_query() + kBlockM, static_cast<int>(p.q_len)) - 1 + row_query_offset(p, visit.batch);
  const int begin = to_span(visible_sequence(p, first)).begin, end = to_span(visible_sequence(p, last)).end;
  const int end_block = (end + kBlockN - 1) / kBlockN;
  const int own_block = visit.owner.first / kBlockN;
  if (!visit.owner.is_prefix) return end_block - 1 - own_block;
  int rank = begin < end ? end_block - begin / kBlockN : 0;
  int same = 0, same_before = 0;  // slots that name the owner's prefix, and those before the visited one
  for (int slot = 0; slot < static_cast<int>(p.prefix_slots); ++slot) {
    const int prefix = static_cast<int>(prefix_of_row(p, visit.batch, slot));
    if (prefix == visit.owner.index) {
      same_before += slot < visit.segment - 1;
      ++same;
    } else if (prefix >= 0 && prefix < visit.owner.index) {
      rank += (static_cast<int>(valid_prefix_length(p, prefix)) + kBlockN - 1) / kBlockN;
    }
  }
  return rank + own_block * same + same_before;
}

// The number of a block among those of the columns kernel, for the ticket that it drew: `prefix_blocks` of prefixes and
// then those of sequences, `sequence_blocks` in all.
__device__ __forceinline__ int64_t block_of_ticket(int64_t ticket, int64_t prefix_blocks, int64_t sequence_blocks,
                                                   int sequence_tiles) {
  if (ticket >= sequence_blocks) return ticket - sequence_blocks;
  return prefix_blocks + ticket + sequence_tiles - 1 - 2 * (ticket % sequence_tiles);
}

// Tells the blocks after this one that it has added its part. One thread calls it, behind a barrier after the additions
// of all.
__device__ __forceinline__ void pass_turn(int* count) {
  __threadfence();
  atomicAdd(count, 1);
}

}  // namespace prefix_kernels::cuda::sm80
