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
// among them, each with its own softmax. The results of warps are merged in the block, those of blocks by merge_kernel,
// both in fixed order.
#pragma once

#include "../../common/softmax.cuh"
#include "entries.cuh"
#include "params.cuh"

namespace prefix_kernels::cuda::sm80 {

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSM) decode_kernel(const DecodeParams params) {
  using T = typename Traits::T;
  constexpr int kHeadDim = Traits::kHeadDim, kWarps = Traits::kWarps, kStages = Traits::kStages;
  constexpr int kRows = Traits::kRows;
  constexpr int kBlocksOfHead = kHeadDim / kCell, kLanes = kLanesPerRow<kHeadDim>;
  const AttentionParams& p = params.attention;
  const int thread = threadIdx.x % Traits::kThreads, lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int head_dim = static_cast<int>(p.head_dim), kv_heads = static_cast<int>(p.kv_heads);
  const int group = static_cast<int>(p.q_heads) / kv_heads;

  DecodeRow* const rows = reinterpret_cast<DecodeRow*>(shared_memory() + Traits::kRowsOffset);
  int* const entries = reinterpret_cast<int*>(shared_memory() + Traits::kSharesOffset);
  Share* const warp_shares = reinterpret_cast<Share*>(shared_memory() + Traits::kSharesOffset);
  shared_buffer(shared_memory(), Traits::kRingBytes + Traits::kQueryBytes);
  shared_buffer(rows, Traits::kRowsBytes);
  shared_buffer(warp_shares, Traits::kSharesBytes);

  // The block's part of the columns, and the entries that need it.
  const bool is_prefix = static_cast<int>(blockIdx.x) < params.prefix_blocks;
  const int block = is_prefix ? blockIdx.x : blockIdx.x - params.prefix_blocks;
  const int first_row = block % params.blocks_per_entry * kRows, number = block / params.blocks_per_entry;
  const int slots = static_cast<int>(p.prefix_slots);
  const int parts = is_prefix ? params.prefix_parts : params.sequence_parts;
  const int num_entries = static_cast<int>(p.batch) * (is_prefix ? slots : 1);
  const int entry = number % num_entries, part = number / num_entries % parts, kv_head = number / num_entries / parts;
  const int per_block = max(1, kRows / params.rows_per_entry);
  const int entries_here = is_prefix ? gather_entries(p, entry, per_block, lane, warp == 0 ? entries : nullptr) : 1;
  if (entries_here == 0) return;
  if (!is_prefix && thread == 0) entries[0] = entry;
  __syncthreads();
  const int row_count = min(kRows, entries_here * params.rows_per_entry - first_row);
  // A warp has one tile of rows and, of every `cell_lanes` rings of cells, one.
  int tiles = 1;
  while (tiles * kCell < row_count) tiles *= 2;
  const int cell_lanes = kWarps / tiles;
  const int tile = warp % tiles, cell_lane = warp / tiles;

  const int batch = is_prefix ? entry / slots : entry;
  const int64_t owner = is_prefix ? prefix_of_row(p, batch, entry % slots) : batch;
  Span columns;  // columns of all parts together
  if (is_prefix) {
    columns = shown_to_any(p, entries, entries_here, static_cast<int>(valid_prefix_length(p, owner)));
  } else {
    const int64_t first = row_query_offset(p, batch);
    columns =
        Span{to_span(visible_sequence(p, first)).begin, to_span(visible_sequence(p, first + p.q_len - 1)).end}.within(
            shown_sequence(p, batch));
  }
  columns.begin = columns.begin / kCell * kCell;
  columns.end = max(columns.begin, columns.end);
  const int cells_per_part = ((columns.end - columns.begin + kCell - 1) / kCell + parts - 1) / parts;
  const int part_begin = columns.begin + part * cells_per_part * kCell;
  const int part_end = min(columns.end, part_begin + cells_per_part * kCell);

  if (thread < kRows) {
    const int number_of_row = first_row + min(thread, row_count - 1);  // surplus threads repeat the last row
    const int of_entry = number_of_row % params.rows_per_entry, taken = entries[number_of_row / params.rows_per_entry];
    DecodeRow row;
    row.batch = is_prefix ? taken / slots : taken;
    row.query = of_entry / group;
    row.head = kv_head * group + of_entry % group;
    row.segment = is_prefix ? 1 + taken % slots : 0;
    const PrefixSlots prefixes(p, row.batch);
    const QueryView view(p, prefixes, row.query + row_query_offset(p, row.batch));
    row.seen = view.sequence;
    if (is_prefix) {
      const int before = view.prefix_begin > 0 ? prefixes.columns_before(p, row.batch, row.segment - 1) : 0;
      row.seen = {view.prefix_begin - before, columns.end};
    }
    rows[thread] = row;
  }
  __syncthreads();
  // Stage i of a warp's ring: a cell of keys, then one of values.
  const auto stage = [&](int ring, int i) {
    return reinterpret_cast<T*>(shared_memory() + (ring * kStages + i % kStages) * 2 * Traits::kCellStride);
  };
  constexpr int kValues = Traits::kCellStride / static_cast<int>(sizeof(T));
  const auto first_column = [&](int ring, int i) { return part_begin + (ring + i * kWarps) * kCell; };
  const auto query_tile = [&](int of) {
    return Traits::kQueryInRegisters
               ? stage(of, kStages - 1)
               : reinterpret_cast<T*>(shared_memory() + Traits::kQueryOffset + of * Traits::kCellStride);
  };
#pragma unroll 1
  for (int row = thread / kLanes; row < tiles * kCell; row += Traits::kThreads / kLanes) {
    const bool valid = row < row_count;
    const DecodeRow& source = rows[row];
    const HeadRows head(p.query, source.batch, source.head, params.aligned_query);
    copy_row<T, kHeadDim>(query_tile(row / kCell), row % kCell, head.row(source.query), head.dtype, head.aligned_chunks,
                          thread % kLanes, head_dim, valid);
  }
  ptx::cp_async_commit();

  const auto load = [&](int i) {
    const int first = first_column(warp, i);
    if (first < part_end) {
      const auto copy_cell = [&](T* cell, const Operand& x, bool aligned_chunks, int columns) {
        const HeadRows source(x, owner, kv_head, aligned_chunks);
        if (aligned_chunks && !goes_async<T>(source.dtype, true)) {
          convert_rows<T, kHeadDim, kCell, kWarpSize>(cell, source, first, part_end, lane, columns);
          return;
        }
#pragma unroll 1
        for (int row = lane / kLanes; row < kCell; row += kWarpSize / kLanes) {
          const bool valid = first + row < part_end;
          copy_row<T, kHeadDim>(cell, row, source.row(first + (valid ? row : 0)), source.dtype, aligned_chunks,
                                lane % kLanes, columns, valid);
        }
      };
      copy_cell(stage(warp, i), is_prefix ? p.prefix_key : p.key,
                is_prefix ? params.aligned_prefix_key : params.aligned_key, head_dim);
      copy_cell(stage(warp, i) + kValues, is_prefix ? p.prefix_value : p.value,
                is_prefix ? params.aligned_prefix_value : params.aligned_value, static_cast<int>(p.value_dim));
    }
    ptx::cp_async_commit();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) load(i);

  using QueryReader = BlockReader<T, kHeadDim, Quarters::kDown>;
  uint32_t query_blocks[Traits::kQueryInRegisters ? kBlocksOfHead : 1][4];
  ptx::cp_async_wait<kStages - 1>();
  __syncthreads();  // the queries are there
  if constexpr (Traits::kQueryInRegisters) {
    const QueryReader query(query_tile(tile), lane);
#pragma unroll
    for (int k = 0; k < kBlocksOfHead; ++k) query.load(query_blocks[k], 0, k);
    __syncthreads();  // nobody reads the last stages any more
  }

  const uint64_t seed = p.dropout_threshold > 0 ? dropout_seed(p) : 0;
  OnlineSoftmax<1, true> softmax;
  float out[1][2 * kBlocksOfHead][4];
  set_all(out, 0.0f);
#pragma unroll 1
  for (int i = 0; first_column(tiles == 1 ? warp : 0, i) < part_end; ++i) {
    ptx::cp_async_wait<kStages - 2>();
    // Cells i have arrived for all warps that read them, and no warp reads cells i - 1 any more.
    if (tiles == 1)
      __syncwarp();
    else
      __syncthreads();
    load(i + kStages - 1);
#pragma unroll 1
    for (int ring = cell_lane; ring < kWarps; ring += cell_lanes) {
      const int first = first_column(ring, i), count = min(kCell, part_end - first);
      if (count <= 0 || tile * kCell >= row_count) break;

      // S = Q K'^T
      float scores[1][2][4];
      set_all(scores, 0.0f);
      const BlockReader<T, kHeadDim, Quarters::kAcross> key(stage(ring, i), lane);
      const QueryReader query(query_tile(tile), lane);
#pragma unroll
      for (int k = 0; k < kBlocksOfHead; ++k) {
        uint32_t b[4];
        key.load(b, 0, k);
        if constexpr (!Traits::kQueryInRegisters) query.load(query_blocks[0], 0, k);
        mma_block<T>(scores[0][0], scores[0][1], query_blocks[Traits::kQueryInRegisters ? k : 0], b);
      }
#pragma unroll
      for (int half_row = 0; half_row < 2; ++half_row) {
        const DecodeRow& row = rows[tile * kCell + half_row * 8 + lane / 4];
        float bias[kColumnsPerThread];
        CellMask(p, {row.segment, first, count, 0}).load(bias, row.batch, row.head, row.query, count, lane);
        const Span seen{row.seen.begin - first, min(count, row.seen.end - first)};
        finish_scores(scores[0][0], scores[0][1], 2 * half_row, params.scale, params.softcap, bias, seen, lane);
      }
      softmax.update(scores, out, kLog2E);

      // out += P V'
      if (p.dropout_threshold > 0) {
#pragma unroll
        for (int half_row = 0; half_row < 2; ++half_row) {
          const DecodeRow& row = rows[tile * kCell + half_row * 8 + lane / 4];
          drop_out_row(scores[0][0], scores[0][1], 2 * half_row, seed, p.dropout_threshold, row.query,
                       row.batch * p.q_heads + row.head, {row.segment, first, count, 0}, lane);
        }
      }
      uint32_t a[4];
      pack_operand<T>(a, scores[0][0], scores[0][1]);
      const BlockReader<T, kHeadDim, Quarters::kDown> value(stage(ring, i) + kValues, lane);
#pragma unroll
      for (int n = 0; n < kBlocksOfHead; ++n) {
        uint32_t b[4];
        value.load_transposed(b, 0, n);
        mma_block<T>(out[0][2 * n], out[0][2 * n + 1], a, b);
      }
    }
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // nobody reads the ring any more

  float* const warp_out = reinterpret_cast<float*>(shared_memory());  // [warp, row of its tile, kHeadDim]
#pragma unroll
  for (int half_row = 0; half_row < 2; ++half_row) {
    const int row = warp * kCell + half_row * 8 + lane / 4;
    const RowResult result = softmax.finish(0, half_row, 1.0f);
    if (lane % 4 == 0) warp_shares[row] = {result.maximum, result.sum};
#pragma unroll
    for (int n = 0; n < 2 * kBlocksOfHead; ++n) {
      *reinterpret_cast<float2*>(warp_out + row * kHeadDim + n * 8 + 2 * (lane % 4)) =
          make_float2(out[0][n][2 * half_row] * result.factor, out[0][n][2 * half_row + 1] * result.factor);
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int i = thread; i < row_count * (kHeadDim / 4); i += Traits::kThreads) {
    const int number_of_row = i / (kHeadDim / 4), column = i % (kHeadDim / 4) * 4;
    const DecodeRow& row = rows[number_of_row];
    float most = minus_infinity(), sum = 0.0f;
    // Index of this row in the results of warp w.
    const auto row_of = [&](int w) { return w * kCell + number_of_row % kCell; };
    const int first_warp = number_of_row / kCell;
    for (int w = first_warp; w < kWarps; w += tiles) most = fmaxf(most, warp_shares[row_of(w)].maximum);
    float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int w = first_warp; w < kWarps && most > minus_infinity(); w += tiles) {
      const float weight = warp_shares[row_of(w)].relative_to(most);
      const float4 from = *reinterpret_cast<const float4*>(warp_out + row_of(w) * kHeadDim + column);
      sum += weight;
      total.x += weight * from.x;
      total.y += weight * from.y;
      total.z += weight * from.z;
      total.w += weight * from.w;
    }
    const float factor = sum > 0.0f ? 1.0f / sum : 0.0f;
    total = make_float4(total.x * factor, total.y * factor, total.z * factor, total.w * factor);
    const int64_t result = ((row.batch * p.q_heads + row.head) * p.q_len + row.query) * params.parts +
                           (is_prefix ? (row.segment - 1) * parts : slots * params.prefix_parts) + part;
    *reinterpret_cast<float4*>(params.partial_out + result * kHeadDim + column) = total;
    if (column == 0) params.partial_share[result] = {most, sum};
  }
}

}  // namespace prefix_kernels::cuda::sm80
