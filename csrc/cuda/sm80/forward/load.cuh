// Copies of queries, keys and values into the shared memory of a forward block. All of its threads take part.
//
// Loaders of tiles are made anew for every tile: they keep no registers from tile to tile.
#pragma once

#include "shared.cuh"

namespace prefix_kernels::cuda::sm80 {

// Starts to copy the queries of all rows of the block; rows that do not exist become zero.
template <typename Traits>
__device__ __forceinline__ void load_queries(const ForwardParams& params, const BlockRows& rows, int thread) {
  constexpr int kHeadDim = Traits::kHeadDim, kLanes = kLanesPerRow<kHeadDim>;
  const AttentionParams& p = params.attention;
#pragma unroll 1
  for (int row = thread / kLanes; row < Traits::kRows; row += Traits::kThreads / kLanes) {
    const bool valid = row <= rows.last;
    const int source = valid ? row : 0;
    const HeadRows head(p.query, rows.batch, rows.head(source), params.aligned_query);
    copy_row<typename Traits::T, kHeadDim>(ForwardShared<Traits>::queries(), row, head.row(rows.query(source)),
                                           head.dtype, head.aligned_chunks, thread % kLanes,
                                           static_cast<int>(p.head_dim), valid);
  }
}

// Starts to copy tile j of the keys.
template <typename Traits>
__device__ __forceinline__ void load_keys(const ForwardParams& params, const BlockRows& rows, const VisitedCells& cells,
                                          int j, int head_dim, int thread) {
  const AttentionParams& p = params.attention;
  const TileLoader<typename Traits::T, Traits::kHeadDim, Traits::kThreads> loader(
      p.key, params.aligned_key, p.prefix_key, params.aligned_prefix_key, rows.batch, rows.kv_head,
      pin_to_register(thread));
  loader.template load<Traits::kCells>(ForwardShared<Traits>::keys(j), p, cells, j * Traits::kCells, head_dim);
}

// Starts to copy tile j of the values.
template <typename Traits>
__device__ __forceinline__ void load_values(const ForwardParams& params, const BlockRows& rows,
                                            const VisitedCells& cells, int j, int head_dim, int thread) {
  const AttentionParams& p = params.attention;
  const TileLoader<typename Traits::T, Traits::kHeadDim, Traits::kThreads> loader(
      p.value, params.aligned_value, p.prefix_value, params.aligned_prefix_value, rows.batch, rows.kv_head,
      pin_to_register(thread));
  loader.template load<Traits::kCells>(ForwardShared<Traits>::values(j), p, cells, j * Traits::kCells, head_dim);
}

}  // namespace prefix_kernels::cuda::sm80
