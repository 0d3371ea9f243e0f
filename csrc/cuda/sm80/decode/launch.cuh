// The number of parts that a decode call divides the columns into, and its kernel launches.
#pragma once

#include <algorithm>

#include "../../launch.h"
#include "kernel.cuh"
#include "launch.h"

namespace prefix_kernels::cuda::sm80 {

// Tells if the last block to arrive merges the parts of its rows, which are `rows` at most; otherwise a second kernel
// does. There a warp has one row, and a thread loads kHeadDim / 32 floats of each part; here it loads as many chunks of
// four floats as there are rows for it. Where those are not more, a launch is saved and nothing lost, however many
// parts there are. Of more loads four are under way at once: at 0.2 us from the L2 cache, 48 of them take the 2 to 3 us
// of another launch. Modelled, not measured.
template <typename Traits>
bool merges_itself(int64_t rows, int64_t parts) {
  constexpr int64_t kMoreLoads = 48;
  const int64_t of_block = (rows * (Traits::kHeadDim / 4) + Traits::kThreads - 1) / Traits::kThreads;
  return parts == 1 || (of_block - Traits::kHeadDim / kWarpSize) * parts <= kMoreLoads;
}

template <typename Traits>
void launch_decode(const AttentionParams& p, const Context& context) {
  constexpr int kHeadDim = Traits::kHeadDim;
  DecodeParams params{};
  params.attention = p;
  params.scale = static_cast<float>(p.scale);
  params.softcap = static_cast<float>(p.softcap);
  params.dropout_rescale = static_cast<float>(dropout_rescale(p.dropout_threshold));
  params.aligned_query = has_aligned_chunks(p.query, p.head_dim);
  params.aligned_key = has_aligned_chunks(p.key, p.head_dim);
  params.aligned_value = has_aligned_chunks(p.value, p.value_dim);
  params.aligned_prefix_key = has_aligned_chunks(p.prefix_key, p.head_dim);
  params.aligned_prefix_value = has_aligned_chunks(p.prefix_value, p.value_dim);
  params.plain = p.mask.data == nullptr && !(p.softcap > 0) && p.dropout_threshold == 0;
  params.rows_per_entry = static_cast<int>(p.q_len * (p.q_heads / p.kv_heads));
  params.blocks_per_entry = (params.rows_per_entry + Traits::kRows - 1) / Traits::kRows;

  // The parts give every multiprocessor a few blocks, and every warp of a block a few cells.
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
  const bool shares = p.num_prefixes == 1 || p.prefix_ids != nullptr;
  const int64_t entries_of_block = params.prefix_parts > 0 && shares ? std::min(per_block, entries) : 1;
  const int64_t rows_of_block = std::min<int64_t>(Traits::kRows, entries_of_block * params.rows_per_entry);
  params.merges = merges_itself<Traits>(rows_of_block, params.parts);
  if (params.merges && params.parts > 1) {
    params.arrivals = context.counters(static_cast<size_t>(p.batch * blocks_per_part));
    params.merges = params.arrivals != nullptr;
  }
  launch(decode_kernel<Traits>, grid_of(blocks), dim3(Traits::kThreads), Traits::kSharedBytes, context.stream, params);
  if (params.merges) return;
  constexpr int kMergeThreads = 128, kMergeRows = kMergeThreads / kWarpSize;
  launch(merge_kernel<Traits>, grid_of((rows + kMergeRows - 1) / kMergeRows), dim3(kMergeThreads), 0, context.stream,
         params);
}

template <DType kDType, int kHeadDim>
void decode(const AttentionParams& p, const Context& context) {
  using T = std::conditional_t<kDType == DType::kFloat16, half, bfloat16>;
  using Narrow = DecodeTraits<T, kHeadDim, false>;
  using Wide = DecodeTraits<T, kHeadDim, true>;
  // The rows that share a prefix, on average over the bank.
  const int64_t entries = p.prefix_len > 0 ? p.batch * p.prefix_slots : 0;
  const int64_t sharing = entries / std::max<int64_t>(p.num_prefixes, 1) * p.q_len * (p.q_heads / p.kv_heads);
  if (entries > p.num_prefixes && sharing > Narrow::kRows && Wide::kSharedBytes <= context.shared_bytes)
    launch_decode<Wide>(p, context);
  else
    launch_decode<Narrow>(p, context);
}

}  // namespace prefix_kernels::cuda::sm80
