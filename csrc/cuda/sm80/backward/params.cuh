// The parameters and copies that the kernels of the backward pass share.
#pragma once

#include "../../common/rows.cuh"

namespace prefix_kernels::cuda::sm80 {

// The operands that may be read 16 bytes at a time.
struct AlignedChunks {
  bool query, out, dout, key, value, prefix_key, prefix_value;

  static AlignedChunks of(const BackwardParams& b) {
    const AttentionParams& p = b.forward;
    const auto keys = [&](const Operand& x) { return has_aligned_chunks(x, p.head_dim); };
    const auto values = [&](const Operand& x) { return has_aligned_chunks(x, p.value_dim); };
    return {keys(p.query),   values(p.out),      values(b.dout),        keys(p.key),
            values(p.value), keys(p.prefix_key), values(p.prefix_value)};
  }
};

// Copies rows [first, first + kRows) of one head into a shared tile; rows from `count` on become zero. It spares
// registers: rows that cannot go by cp.async move one chunk, or one element, after another. kIsT: the rows are known to
// be of type T.
template <typename T, int kHeadDim, int kRows, int kThreads, bool kIsT>
__device__ __forceinline__ void copy_rows(T* tile, const HeadRows& rows, int first, int count, int head_dim) {
  using Tile = SharedTile<kHeadDim>;
  constexpr int kLanes = kLanesPerRow<kHeadDim>, kPassRows = kThreads / kLanes;
  if (rows.aligned_chunks && (kIsT || rows.dtype == kDTypeOf<T>)) {
    const int first_row = threadIdx.x / kLanes, first_chunk = threadIdx.x % kLanes;
    const T* from =
        reinterpret_cast<const T*>(rows.data) + (first + first_row) * rows.row_stride + first_chunk * kChunk;
#pragma unroll
    for (int row = 0; row < kRows; row += kPassRows) {
      const bool exists = first + first_row + row < count;
#pragma unroll
      for (int chunk = 0; chunk < Tile::kChunks; chunk += kLanes) {
        if (kRows % kPassRows != 0 && first_row + row >= kRows) continue;
        const bool valid = exists && (first_chunk + chunk) * kChunk < head_dim;
        ptx::cp_async_16(tile + Tile::offset(first_row + row, first_chunk + chunk),
                         valid ? static_cast<const void*>(from + row * rows.row_stride + chunk * kChunk) : rows.data,
                         valid);
      }
    }
  } else if (!kIsT && rows.aligned_chunks) {
    convert_rows<T, kHeadDim, kRows, kThreads>(tile, rows, first, count, threadIdx.x, head_dim);
  } else {
    const DType dtype = kIsT ? kDTypeOf<T> : rows.dtype;
#pragma unroll 1
    for (int i = threadIdx.x; i < kRows * kHeadDim; i += kThreads) {
      const int row = i / kHeadDim, column = i % kHeadDim;
      const bool valid = first + row < count && column < head_dim;
      tile[Tile::offset(row, column / kChunk) + column % kChunk] =
          from_float<T>(valid ? load_element(rows.row(first + row) + column * dtype_bytes(dtype), dtype) : 0.0f);
    }
  }
}

}  // namespace prefix_kernels::cuda::sm80
