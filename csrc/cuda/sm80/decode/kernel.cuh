// Few queries against many keys: decoding.
//
// Reading keys and values is all the work, so every block reads its own part of them, once, for all queries that want
// it. A block has up to kRows rows, (entry, query, head of the group), that share a key head; what has more rows than
// that is read by several blocks, next to each other in the grid. A block's entries are
//
//   of a part of a sequence: that batch row alone;
//   of a part of a prefix: up to kRows / (queries * group) of the (batch row, slot) pairs that name it. Of all that do,
//   in order, the first of each such bunch has a block; the others' blocks have nothing to do. A prefix that the rows
//   of a batch share is thus read once for as many of them as fill a block: 128 rows, or 64 above head dim 128.
//
// A part is cut into cells of 16 columns; each of the block's warps has its own ring of cells in flight. The rows are
// cut into tiles of 16, one to a warp: where there are fewer tiles than warps, the warps of one tile divide the cells
// among them, each with its own softmax. Their results are merged in the block, the blocks' by merge_kernel, both in
// fixed order.
#pragma once

#include <algorithm>

#include "../../common/softmax.cuh"
#include "../../launch.h"
#include "../forward/launch.h"

namespace prefix_kernels::cuda::sm80 {

// What a part of a row's columns weighs among the others: sum * exp(maximum).
struct Share {
  float maximum;
  float sum;

  __device__ __forceinline__ float relative_to(float most) const {
    return ptx::exp2_approx((maximum - most) * kLog2E) * sum;
  }
};

struct DecodeParams {
  AttentionParams attention;
  float scale;
  float softcap;
  float dropout_rescale;
  int rows_per_entry;    // queries * heads of a group
  int blocks_per_entry;  // of kRows rows each
  int prefix_parts;      // parts of each prefix
  int sequence_parts;    // parts of each sequence
  int parts;             // of a row: prefix_slots * prefix_parts + sequence_parts
  int prefix_blocks;     // they come first
  float* partial_out;    // [batch * q_heads * q_len, parts, kHeadDim]
  Share* partial_share;  // [batch * q_heads * q_len, parts]
  bool whole_query;      // has_whole_chunks
  bool whole_key;
  bool whole_value;
  bool whole_prefix_key;
  bool whole_prefix_value;
};

// One of the block's rows.
struct DecodeRow {
  int batch;
  int head;
  int query;
  int segment;  // as in Cell
  Span seen;    // columns of the segment
};

// Wide blocks, of twice the rows, are for prefixes that more rows share than fill a narrow one, on GPUs that give a
// block the shared memory.
template <typename Element, int kHeadDim_, bool kWide_>
struct DecodeTraits {
  using T = Element;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kWide = kWide_;
  static constexpr int kWarps = (kHeadDim <= 128 ? 4 : 2) * (kWide ? 2 : 1);
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kRows = kWarps * kCell;
  static constexpr int kStages = kHeadDim <= 64 && !kWide ? 4 : 2;
  // As many as the host code plans for.
  static constexpr int kBlocksPerSM = kHeadDim <= 64 ? (kWide ? 2 : 3) : (kWide ? 1 : 2);
  static constexpr bool kQueryInRegisters = kHeadDim <= 128;

  static constexpr int kCellBytes = SharedTile<kHeadDim>::bytes(kCell);
  static constexpr int kCellStride = kCellBytes + kSharedGap;
  static constexpr int kRingBytes = kWarps * kStages * 2 * kCellStride;
  // Queries that go into registers come by way of the rings' last stages.
  static constexpr int kQueryOffset = kRingBytes;
  static constexpr int kQueryBytes = kQueryInRegisters ? 0 : kWarps * kCellStride;
  static constexpr int kRowsOffset = kQueryOffset + kQueryBytes;
  static constexpr int kRowsBytes = kRows * sizeof(DecodeRow);
  // First the entries, then the warps' shares.
  static constexpr int kSharesOffset = kRowsOffset + kRowsBytes + kSharedGap;
  static constexpr int kSharesBytes = kRows * sizeof(Share);
  static_assert(sizeof(int) <= sizeof(Share), "the entries, at most one a row, fit where the shares go");
  static constexpr int kSharedBytes = kSharesOffset + kSharesBytes + kSharedGap;
  static_assert(kSharedGap > 0 || (kWide ? 1 : 2) * (kSharedBytes + 1024) <= 164 * 1024,
                "sm_80, with its share of each");
  static_assert(kSharedGap > 0 || kWide || kSharedBytes <= 99 * 1024, "8.6 and 8.9 give a block no more");
  // The warps' results take the place of the cells.
  static constexpr int kOutBytes = kRows * kHeadDim * sizeof(float);
  static_assert(kOutBytes <= kRingBytes, "the warps' results fit where the cells were");
};

// The (batch row, slot) pairs that take part in entry's block, or none. All lanes of a warp call it; `entries` is
// written where not null.
__device__ __forceinline__ int gather_entries(const AttentionParams& p, int entry, int per_block, int lane,
                                              int* entries) {
  const int slots = static_cast<int>(p.prefix_slots), count = static_cast<int>(p.batch) * slots;
  if (p.prefix_ids == nullptr) {
    // All name the same prefix, or each another.
    const int bunch = p.num_prefixes == 1 ? per_block : 1;
    const int found = entry % bunch == 0 ? min(bunch, count - entry) : 0;
    for (int i = lane; entries != nullptr && i < found; i += kWarpSize) entries[i] = entry + i;
    return found;
  }
  const int64_t prefix = prefix_of_row(p, entry / slots, entry % slots);
  if (prefix < 0) return 0;
  const auto naming = [&](int first) {
    const int other = first + lane;
    return __ballot_sync(kAllLanes, other < count && prefix_of_row(p, other / slots, other % slots) == prefix);
  };
  int before = 0;
  for (int first = 0; first < entry; first += kWarpSize) {
    const unsigned earlier = entry - first < kWarpSize ? (1u << (entry - first)) - 1 : kAllLanes;
    before += __popc(naming(first) & earlier);
  }
  if (before % per_block != 0) return 0;
  int found = 0;
  for (int first = entry; first < count && found < per_block; first += kWarpSize) {
    const unsigned named = naming(first);
    const int place = found + __popc(named & ((1u << lane) - 1));
    if (entries != nullptr && (named >> lane & 1) != 0 && place < per_block) entries[place] = first + lane;
    found += __popc(named);
  }
  return min(found, per_block);
}

// The columns of a prefix of `length` that padding leaves to some of the rows that share it.
__device__ __forceinline__ Span shown_to_any(const AttentionParams& p, const int* entries, int count, int length) {
  if (p.mask.prefix_columns == 0) return {0, length};
  const int slots = static_cast<int>(p.prefix_slots);
  Span any{length, 0};
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    const Span shown = shown_prefix(p, entries[i] / slots, entries[i] % slots).within({0, length});
    if (shown.begin < shown.end) any = {min(any.begin, shown.begin), max(any.end, shown.end)};
  }
  return any;
}

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

  // Which part of which columns this is, and who wants it.
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
  // This warp has a tile of rows, and its share of the cells: all of one warp's ring in `cell_lanes`.
  int tiles = 1;
  while (tiles * kCell < row_count) tiles *= 2;
  const int cell_lanes = kWarps / tiles;
  const int tile = warp % tiles, cell_lane = warp / tiles;

  const int batch = is_prefix ? entry / slots : entry;
  const int64_t owner = is_prefix ? prefix_of_row(p, batch, entry % slots) : batch;
  Span columns;  // all parts together
  if (is_prefix) {
    columns = shown_to_any(p, entries, entries_here, static_cast<int>(prefix_length(p, owner)));
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
    const int number_of_row = first_row + min(thread, row_count - 1);  // what is left over repeats the last row
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
  // A warp's ring: stage i holds a cell of keys, then one of values.
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
    const HeadRows head(p.query, source.batch, source.head, params.whole_query);
    copy_row<T, kHeadDim>(query_tile(row / kCell), row % kCell, head.row(source.query), head.dtype, head.whole_chunks,
                          thread % kLanes, head_dim, valid);
  }
  ptx::cp_async_commit();

  const auto load = [&](int i) {
    const int first = first_column(warp, i);
    if (first < part_end) {
      const auto copy_cell = [&](T* cell, const Operand& x, bool whole_chunks) {
        const HeadRows source(x, owner, kv_head, whole_chunks);
        if (whole_chunks && !goes_async<T>(source.dtype, true)) {
          convert_rows<T, kHeadDim, kCell, kWarpSize>(cell, source, first, part_end, lane, head_dim);
          return;
        }
#pragma unroll 1
        for (int row = lane / kLanes; row < kCell; row += kWarpSize / kLanes) {
          const bool valid = first + row < part_end;
          copy_row<T, kHeadDim>(cell, row, source.row(first + (valid ? row : 0)), source.dtype, whole_chunks,
                                lane % kLanes, head_dim, valid);
        }
      };
      copy_cell(stage(warp, i), is_prefix ? p.prefix_key : p.key,
                is_prefix ? params.whole_prefix_key : params.whole_key);
      copy_cell(stage(warp, i) + kValues, is_prefix ? p.prefix_value : p.value,
                is_prefix ? params.whole_prefix_value : params.whole_value);
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
    // All who read cells i have them, and none reads cells i - 1 any more.
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
    // Of this row, as the warps of its tile have it.
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

// One warp per row: the parts' results, in their order.
template <typename Traits>
__global__ void __launch_bounds__(128) merge_kernel(const DecodeParams params) {
  using T = typename Traits::T;
  constexpr int kHeadDim = Traits::kHeadDim;
  const AttentionParams& p = params.attention;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  if (row >= p.batch * p.q_heads * p.q_len) return;
  const int64_t query = row % p.q_len, head = row / p.q_len % p.q_heads, batch = row / p.q_len / p.q_heads;
  const Share* const shares = params.partial_share + row * params.parts;
  // Of a slot without a prefix nothing was written.
  const auto exists = [&](int part) {
    const int slot = part / max(1, params.prefix_parts);
    return slot >= p.prefix_slots || params.prefix_parts == 0 || prefix_of_row(p, batch, slot) >= 0;
  };

  float most = minus_infinity(), sum = 0.0f;
  for (int part = 0; part < params.parts; ++part) {
    if (exists(part)) most = fmaxf(most, shares[part].maximum);
  }
  const float reference = most == minus_infinity() ? 0.0f : most;
  for (int part = 0; part < params.parts; ++part) {
    if (exists(part)) sum += shares[part].relative_to(reference);
  }
  const float factor = sum > 0.0f ? params.dropout_rescale / sum : 0.0f;
  if (lane == 0) static_cast<float*>(p.lse)[row] = sum > 0.0f ? most + logf(sum) : minus_infinity();

  T* const out =
      static_cast<T*>(p.out.data) + batch * p.out.batch_stride + head * p.out.head_stride + query * p.out.row_stride;
  for (int column = lane; column < p.head_dim; column += kWarpSize) {
    float total = 0.0f;
    for (int part = 0; part < params.parts; ++part) {
      if (!exists(part)) continue;
      const float weight = shares[part].relative_to(reference);
      total += weight * params.partial_out[(row * params.parts + part) * kHeadDim + column];
    }
    out[column] = from_float<T>(total * factor);
  }
}

template <typename Traits>
void decode_by(const AttentionParams& p, const Context& context) {
  constexpr int kHeadDim = Traits::kHeadDim;
  DecodeParams params{};
  params.attention = p;
  params.scale = static_cast<float>(p.scale);
  params.softcap = static_cast<float>(p.softcap);
  params.dropout_rescale = static_cast<float>(dropout_rescale(p.dropout_threshold));
  params.whole_query = has_whole_chunks(p.query, p.head_dim);
  params.whole_key = has_whole_chunks(p.key, p.head_dim);
  params.whole_value = has_whole_chunks(p.value, p.head_dim);
  params.whole_prefix_key = has_whole_chunks(p.prefix_key, p.head_dim);
  params.whole_prefix_value = has_whole_chunks(p.prefix_value, p.head_dim);
  params.rows_per_entry = static_cast<int>(p.q_len * (p.q_heads / p.kv_heads));
  params.blocks_per_entry = (params.rows_per_entry + Traits::kRows - 1) / Traits::kRows;

  // Enough parts for a few blocks on every multiprocessor, of a few cells for every warp.
  constexpr int64_t kLeastColumns = kHeadDim <= 128 ? 256 : 128;
  const auto parts = [&](int64_t columns, int64_t owners) {
    const int64_t wanted = (int64_t{context.sm_count} * Traits::kBlocksPerSM + owners - 1) / owners;
    return static_cast<int>(std::max<int64_t>(1, std::min(wanted, columns / kLeastColumns)));
  };
  const int64_t entries = p.prefix_len > 0 && p.num_prefixes > 0 ? p.batch * p.prefix_slots : 0;
  const int64_t per_block = std::max(1, Traits::kRows / params.rows_per_entry);
  const int64_t bunches = p.num_prefixes == 1 ? (entries + per_block - 1) / per_block : entries;
  const int64_t blocks_per_part = p.kv_heads * params.blocks_per_entry;
  params.prefix_parts = entries > 0 ? parts(p.prefix_len, bunches * blocks_per_part) : 0;
  params.sequence_parts = parts(p.k_len, p.batch * blocks_per_part);
  params.parts = static_cast<int>(p.prefix_slots) * params.prefix_parts + params.sequence_parts;
  params.prefix_blocks = static_cast<int>(entries * blocks_per_part * params.prefix_parts);

  const int64_t rows = p.batch * p.q_heads * p.q_len;
  params.partial_out =
      static_cast<float*>(context.allocate(static_cast<size_t>(rows * params.parts) * kHeadDim * sizeof(float)));
  params.partial_share =
      static_cast<Share*>(context.allocate(static_cast<size_t>(rows * params.parts) * sizeof(Share)));
  const int64_t blocks = params.prefix_blocks + p.batch * blocks_per_part * params.sequence_parts;
  launch(decode_kernel<Traits>, grid_of(blocks), dim3(Traits::kThreads), Traits::kSharedBytes, context.stream, params);
  constexpr int kMergeThreads = 128, kMergeRows = kMergeThreads / kWarpSize;
  launch(merge_kernel<Traits>, grid_of((rows + kMergeRows - 1) / kMergeRows), dim3(kMergeThreads), 0, context.stream,
         params);
}

template <DType kDType, int kHeadDim>
void decode(const AttentionParams& p, const Context& context) {
  using T = std::conditional_t<kDType == DType::kFloat16, half, bfloat16>;
  using Narrow = DecodeTraits<T, kHeadDim, false>;
  using Wide = DecodeTraits<T, kHeadDim, true>;
  // Rows that share a prefix, on average over the bank.
  const int64_t entries = p.prefix_len > 0 ? p.batch * p.prefix_slots : 0;
  const int64_t sharing = entries / std::max<int64_t>(p.num_prefixes, 1) * p.q_len * (p.q_heads / p.kv_heads);
  if (entries > p.num_prefixes && sharing > Narrow::kRows && Wide::kSharedBytes <= context.shared_bytes)
    decode_by<Wide>(p, context);
  else
    decode_by<Narrow>(p, context);
}

}  // namespace prefix_kernels::cuda::sm80
