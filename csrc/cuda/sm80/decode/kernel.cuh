// Few queries against many keys: decoding.
//
// Reading keys and values takes all the time, so every block reads its own part of them once, for all queries that need
// it. A block has up to kRows rows, (entry, query, head of the group), that share a key head. A part that more rows
// need is read by several blocks, next to each other in the grid. A block's entries are
//
//   for a part of a sequence: that batch row alone;
//   for a part of a prefix: up to kRows / (queries * group) of the (batch row, slot) pairs that name it. The pairs are
//   taken in order, in bunches of that size. The first pair of a bunch has a block; the others' blocks return at once.
//   A prefix that the rows of a batch share is thus read once for as many of them as fill a block: 128 rows, or 64
//   above head dim 128.
//
// A part is cut into cells of 16 columns; each of the block's warps has its own ring of cells in flight. The rows are
// cut into tiles of 16, one to a warp. If there are fewer tiles than warps, the warps of one tile divide the cells
// among them, each with its own softmax. The results of warps are merged in the block, those of blocks by the last of
// them to arrive or by merge_kernel, all in fixed order.
#pragma once

#include "../../common/softmax.cuh"
#include "merge.cuh"
#include "ring.cuh"
#include "warp_results.cuh"

namespace prefix_kernels::cuda::sm80 {

// The columns that every row of a tile sees, and to whose scores nothing is done but scaling; none in calls with a
// mask, softcap or dropout. All lanes of a warp call it.
__device__ __forceinline__ Span find_plain_columns(const DecodeParams& params, const DecodeRow* rows, int tile,
                                                   int lane) {
  Span seen = rows[tile * kCell + lane % kCell].seen;
#pragma unroll
  for (int distance = kCell / 2; distance > 0; distance /= 2) {
    seen.begin = max(seen.begin, __shfl_xor_sync(kAllLanes, seen.begin, distance));
    seen.end = min(seen.end, __shfl_xor_sync(kAllLanes, seen.end, distance));
  }
  return params.plain ? seen : Span{0, 0};
}

// S = Q K'^T of a tile of rows and a cell of `count` keys from column `first` on, final and in natural units. `plain`:
// the cell lies in the tile's plain columns.
template <typename Traits, int kQueryBlocks>
__device__ __forceinline__ void decode_scores(float (&scores)[1][2][4], const DecodeParams& params,
                                              const DecodeRow* rows, int tile, const typename Traits::T* key_cell,
                                              uint32_t (&query_blocks)[kQueryBlocks][4], int first, int count,
                                              bool plain, int lane) {
  using T = typename Traits::T;
  const AttentionParams& p = params.attention;
  set_all(scores, 0.0f);
  const BlockReader<T, Traits::kHeadDim, Quarters::kAcross> key(key_cell, lane);
  const BlockReader<T, Traits::kHeadDim, Quarters::kDown> query(DecodeRing<Traits>::query_tile(tile), lane);
#pragma unroll
  for (int k = 0; k < Traits::kHeadDim / kCell; ++k) {
    uint32_t b[4];
    key.load(b, 0, k);
    if constexpr (!Traits::kQueryInRegisters) query.load(query_blocks[0], 0, k);
    mma_block<T>(scores[0][0], scores[0][1], query_blocks[Traits::kQueryInRegisters ? k : 0], b);
  }
  if (plain) {
#pragma unroll
    for (int e = 0; e < 8; ++e) scores[0][e / 4][e % 4] *= params.scale;
    return;
  }
#pragma unroll
  for (int half_row = 0; half_row < 2; ++half_row) {
    const DecodeRow& row = rows[tile * kCell + half_row * 8 + lane / 4];
    float bias[kColumnsPerThread];
    CellMask(p, {row.segment, first, count, 0}).load(bias, row.batch, row.head, row.query, count, lane);
    const Span seen{row.seen.begin - first, min(count, row.seen.end - first)};
    finish_scores(scores[0][0], scores[0][1], 2 * half_row, params.scale, params.softcap, bias, seen, lane);
  }
}

// out += P V' of the same tile and cell; elements of P are dropped before, if any are, which a plain cell does without.
template <typename Traits>
__device__ __forceinline__ void add_decoded(float (&out)[1][2 * Traits::kHeadDim / kCell][4], float (&scores)[1][2][4],
                                            const AttentionParams& p, uint64_t seed, const DecodeRow* rows, int tile,
                                            const typename Traits::T* value_cell, int first, int count, bool plain,
                                            int lane) {
  using T = typename Traits::T;
  if (!plain && p.dropout_threshold > 0) {
#pragma unroll
    for (int half_row = 0; half_row < 2; ++half_row) {
      const DecodeRow& row = rows[tile * kCell + half_row * 8 + lane / 4];
      drop_out_row(scores[0][0], scores[0][1], 2 * half_row, seed, p.dropout_threshold, row.query,
                   row.batch * p.q_heads + row.head, {row.segment, first, count, 0}, lane);
    }
  }
  uint32_t a[4];
  pack_operand<T>(a, scores[0][0], scores[0][1]);
  const BlockReader<T, Traits::kHeadDim, Quarters::kDown> value(value_cell, lane);
#pragma unroll
  for (int n = 0; n < Traits::kHeadDim / kCell; ++n) {
    uint32_t b[4];
    value.load_transposed(b, 0, n);
    mma_block<T>(out[0][2 * n], out[0][2 * n + 1], a, b);
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSM)
    decode_kernel(const __grid_constant__ DecodeParams params) {
  using T = typename Traits::T;
  using Ring = DecodeRing<Traits>;
  constexpr int kWarps = Traits::kWarps, kStages = Traits::kStages;
  constexpr int kRows = Traits::kRows, kBlocksOfHead = Traits::kHeadDim / kCell;
  const AttentionParams& p = params.attention;
  const int thread = threadIdx.x % Traits::kThreads, lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;

  const typename Traits::Shared shared{shared_memory()};
  shared.declare();
  DecodeRow* const rows = shared.template at<typename Traits::RowPiece>();
  int* const entries = Traits::entries();
  Share* const warp_shares = shared.template at<typename Traits::SharePiece>();

  DecodePart part = part_of_block<Traits>(params, blockIdx.x);
  check_prefixes_of_row(p, part.is_prefix ? part.entry / static_cast<int>(p.prefix_slots) : part.entry);
  const int per_block = max(1, kRows / params.rows_per_entry);
  part.entries = part.is_prefix ? gather_entries(p, part.entry, per_block, lane, warp == 0 ? entries : nullptr) : 1;
  if (part.entries == 0) return;
  if (!part.is_prefix && thread == 0) entries[0] = part.entry;
  __syncthreads();
  part.row_count = min(kRows, part.entries * params.rows_per_entry - part.first_row);
  // A warp has one tile of rows and, of every `cell_lanes` rings of cells, one.
  int tiles = 1;
  while (tiles * kCell < part.row_count) tiles *= 2;
  const int cell_lanes = kWarps / tiles;
  const int tile = warp % tiles, cell_lane = warp / tiles;

  find_columns(p, entries, part);
  if (thread < kRows) {
    // Surplus threads repeat the last row.
    const int group = static_cast<int>(p.q_heads) / static_cast<int>(p.kv_heads);
    rows[thread] = describe_row(params, part, entries, min(thread, part.row_count - 1), group);
  }
  __syncthreads();
  Ring::load_queries(params, rows, part.row_count, tiles, thread);
  const auto load = [&](int i) { Ring::load(params, part, warp, lane, i); };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) load(i);

  // Lengths of prefixes that no row has, too: by now the first cells are on their way.
  if (!part.is_prefix) {
    const int64_t block = static_cast<int>(blockIdx.x) - params.prefix_blocks;
    check_prefix_lengths(p, block * Traits::kThreads + thread,
                         (static_cast<int64_t>(gridDim.x) - params.prefix_blocks) * Traits::kThreads);
  }

  uint32_t query_blocks[Traits::kQueryInRegisters ? kBlocksOfHead : 1][4];
  ptx::cp_async_wait<kStages - 1>();
  __syncthreads();  // the queries are there
  if constexpr (Traits::kQueryInRegisters) {
    const BlockReader<T, Traits::kHeadDim, Quarters::kDown> query(Ring::query_tile(tile), lane);
#pragma unroll
    for (int k = 0; k < kBlocksOfHead; ++k) query.load(query_blocks[k], 0, k);
    __syncthreads();  // nobody reads the last stages any more
  }

  const uint64_t seed = p.dropout_threshold > 0 ? dropout_seed(p) : 0;
  const Span plain_columns = find_plain_columns(params, rows, tile, lane);
  OnlineSoftmax<1, true> softmax;
  float out[1][2 * kBlocksOfHead][4];
  set_all(out, 0.0f);
#pragma unroll 1
  for (int i = 0; Ring::first_column(part, tiles == 1 ? warp : 0, i) < part.end; ++i) {
    ptx::cp_async_wait<kStages - 2>();
    // Cells i have arrived for all warps that read them, and no warp reads cells i - 1 any more.
    if (tiles == 1)
      __syncwarp();
    else
      __syncthreads();
    load(i + kStages - 1);
#pragma unroll 1
    for (int ring = cell_lane; ring < kWarps; ring += cell_lanes) {
      const int first = Ring::first_column(part, ring, i), count = min(kCell, part.end - first);
      if (count <= 0 || tile * kCell >= part.row_count) break;
      const bool plain = first >= plain_columns.begin && first + kCell <= plain_columns.end;
      T* const cell = pin_to_register(Ring::stage(ring, i));
      float scores[1][2][4];
      decode_scores<Traits>(scores, params, rows, tile, cell, query_blocks, first, count, plain, lane);
      softmax.update(scores, out, kLog2E);
      add_decoded<Traits>(out, scores, p, seed, rows, tile, cell + Ring::kValues, first, count, plain, lane);
    }
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // nobody reads the ring any more
  WarpResults<Traits>::keep(softmax, out, warp_shares, warp, lane);
  __syncthreads();
  WarpResults<Traits>::merge(params, part, rows, warp_shares, tiles, thread);
  if (params.merges)
    merge_last<Traits>(params, rows, part.entries, part.row_count, part.kv_head, part.first_row, thread);
}

}  // namespace prefix_kernels::cuda::sm80
