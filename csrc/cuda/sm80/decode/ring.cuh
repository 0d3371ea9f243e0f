// The cells of keys and values that a warp of the decode kernel has in flight, and the block's queries.
#pragma once

#include "../../common/kv_tiles.cuh"
#include "part.cuh"

namespace prefix_kernels::cuda::sm80 {

// Every warp has its own ring of stages. Cells of the block's part go round: warp w takes cells w, w + kWarps, ...
template <typename Traits>
struct DecodeRing {
  using T = typename Traits::T;
  static constexpr int kHeadDim = Traits::kHeadDim, kStages = Traits::kStages;
  static constexpr int kLanes = kLanesPerRow<kHeadDim>;
  static constexpr int kValues = Traits::CellPiece::kStride / static_cast<int>(sizeof(T));

  // Stage i of a warp's ring: a cell of keys, then, kValues elements on, one of values.
  static __device__ __forceinline__ T* stage(int ring, int i) {
    return Traits::Shared::template at<typename Traits::CellPiece>(shared_memory(), (ring * kStages + i % kStages) * 2);
  }

  // The first column of the cell in stage i of a ring.
  static __device__ __forceinline__ int first_column(const DecodePart& part, int ring, int i) {
    return part.begin + (ring + i * Traits::kWarps) * kCell;
  }

  // Tile `of` of the block's queries.
  static __device__ __forceinline__ T* query_tile(int of) {
    return Traits::kQueryInRegisters ? stage(of, kStages - 1)
                                     : Traits::Shared::template at<typename Traits::QueryPiece>(shared_memory(), of);
  }

  // Starts to copy the queries of all rows; surplus rows of the last tile become zero.
  static __device__ __forceinline__ void load_queries(const DecodeParams& params, const DecodeRow* rows, int row_count,
                                                      int tiles, int thread) {
    const AttentionParams& p = params.attention;
#pragma unroll 1
    for (int row = thread / kLanes; row < tiles * kCell; row += Traits::kThreads / kLanes) {
      const bool valid = row < row_count;
      const DecodeRow& source = rows[row];
      const HeadRows head(p.query, source.batch, source.head, params.aligned_query);
      copy_row<T, kHeadDim>(query_tile(row / kCell), row % kCell, head.row(source.query), head.dtype,
                            head.aligned_chunks, thread % kLanes, static_cast<int>(p.head_dim), valid);
    }
    ptx::cp_async_commit();
  }

  // Starts to copy the rows of one operand from column `first` of the part on into a cell.
  static __device__ __forceinline__ void copy_cell(T* cell, const HeadRows& source, int columns, const DecodePart& part,
                                                   int first, int lane) {
    const bool aligned_chunks = source.aligned_chunks;
    if (aligned_chunks && !goes_async<T>(source.dtype, true)) {
      convert_rows<T, kHeadDim, kCell, kWarpSize>(cell, source, first, part.end, lane, columns);
      return;
    }
#pragma unroll 1
    for (int row = lane / kLanes; row < kCell; row += kWarpSize / kLanes) {
      const bool valid = first + row < part.end;
      copy_row<T, kHeadDim>(cell, row, source.row(first + (valid ? row : 0)), source.dtype, aligned_chunks,
                            lane % kLanes, columns, valid);
    }
  }

  // Starts to copy stage i of the warp's ring.
  static __device__ __forceinline__ void load(const DecodeParams& params, const DecodePart& part, int warp, int lane,
                                              int i) {
    const AttentionParams& p = params.attention;
    lane = pin_to_register(lane);  // every stage computes its addresses anew, which takes fewer registers
    const int first = first_column(part, warp, i);
    if (first < part.end) {
      const HeadRows keys(part.is_prefix ? p.prefix_key : p.key, part.owner, part.kv_head,
                          part.is_prefix ? params.aligned_prefix_key : params.aligned_key);
      copy_cell(stage(warp, i), keys, static_cast<int>(p.head_dim), part, first, lane);
      const HeadRows values(part.is_prefix ? p.prefix_value : p.value, part.owner, part.kv_head,
                            part.is_prefix ? params.aligned_prefix_value : params.aligned_value);
      copy_cell(stage(warp, i) + kValues, values, static_cast<int>(p.value_dim), part, first, lane);
    }
    ptx::cp_async_commit();
  }
};

}  // namespace prefix_kernels::cuda::sm80
