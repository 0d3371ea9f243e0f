// Rows of global memory into a shared tile, whatever their dtype and alignment, and finished rows back.
//
// Rows of the tile's own type whose chunks are all aligned to 16 bytes go by cp.async. All others take the narrow path:
// they are loaded element by element, converted and stored. Chunks beyond the head dim, and rows that do not exist, are
// zero.
#pragma once

#include "../attention_params.h"
#include "shared_tile.cuh"

namespace prefix_kernels::cuda {

// Threads that share a row when a tile is copied: they move 64 or 128 adjacent bytes.
template <int kHeadDim>
inline constexpr int kLanesPerRow = kHeadDim % 64 == 0 ? 8 : 4;

template <typename T>
inline constexpr DType kDTypeOf = std::is_same_v<T, half> ? DType::kFloat16 : DType::kBFloat16;

// Whether an operand's rows may be copied 16 bytes at a time.
template <typename T>
__host__ __device__ inline bool has_whole_chunks(const Operand& x, int64_t head_dim) {
  const int64_t any = x.batch_stride | x.head_stride | x.row_stride | head_dim;
  return x.dtype == kDTypeOf<T> && any % kChunk == 0 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

__device__ __forceinline__ int dtype_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

__device__ __forceinline__ float load_element(const char* data, DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return to_float(*reinterpret_cast<const double*>(data));
    case DType::kFloat32:
      return *reinterpret_cast<const float*>(data);
    case DType::kBFloat16:
      return to_float(*reinterpret_cast<const bfloat16*>(data));
    default:
      return to_float(*reinterpret_cast<const half*>(data));
  }
}

// One head of an operand.
struct HeadRows {
  const char* data;
  int64_t row_stride;  // in elements
  DType dtype;
  bool whole_chunks;  // has_whole_chunks

  __device__ __forceinline__ HeadRows(const Operand& x, int64_t batch, int64_t head, bool whole)
      : data(static_cast<const char*>(x.data) + (batch * x.batch_stride + head * x.head_stride) * dtype_bytes(x.dtype)),
        row_stride(x.row_stride),
        dtype(x.dtype),
        whole_chunks(whole) {}

  __device__ __forceinline__ const char* row(int64_t i) const { return data + i * row_stride * dtype_bytes(dtype); }
};

// The narrow path for one chunk.
template <typename T>
__device__ __forceinline__ void convert_chunk(T* shared, const char* row, DType dtype, int column, int head_dim,
                                              bool valid) {
  const int bytes = dtype_bytes(dtype);
  uint32_t words[kChunk / 2];
#pragma unroll
  for (int w = 0; w < kChunk / 2; ++w) {
    const int at = column + 2 * w;
    const float low = valid && at < head_dim ? load_element(row + at * bytes, dtype) : 0.0f;
    const float high = valid && at + 1 < head_dim ? load_element(row + (at + 1) * bytes, dtype) : 0.0f;
    words[w] = pack2<T>(low, high);
  }
  *reinterpret_cast<uint4*>(shared) = make_uint4(words[0], words[1], words[2], words[3]);
}

// Copies one row; every one of the kLanesPerRow<kHeadDim> threads that share it calls this with its number, and with
// the address of the first of its chunks in the tile. What arrives by cp.async is there after its wait, what does not
// at once; for other threads, both after the next barrier.
template <typename T, int kHeadDim>
__device__ __forceinline__ void copy_chunks(T* first, const char* row, DType dtype, bool whole_chunks, int lane_of_row,
                                            int head_dim, bool valid) {
  using Tile = SharedTile<kHeadDim>;
  constexpr int kLanes = kLanesPerRow<kHeadDim>;
  static_assert(kLanes % Tile::kPermuted == 0, "chunks that are kLanes apart are so in the tile");
  if (whole_chunks) {
#pragma unroll
    for (int chunk = 0; chunk < Tile::kChunks; chunk += kLanes) {
      ptx::cp_async_16(first + chunk * kChunk, row + (lane_of_row + chunk) * 16,
                       valid && (lane_of_row + chunk) * kChunk < head_dim);
    }
  } else {
#pragma unroll 1
    for (int chunk = 0; chunk < Tile::kChunks; chunk += kLanes) {
      convert_chunk(first + chunk * kChunk, row, dtype, (lane_of_row + chunk) * kChunk, head_dim, valid);
    }
  }
}

template <typename T, int kHeadDim>
__device__ __forceinline__ void copy_row(T* tile, int tile_row, const char* row, DType dtype, bool whole_chunks,
                                         int lane_of_row, int head_dim, bool valid) {
  T* const first = settled(tile + SharedTile<kHeadDim>::offset(tile_row, lane_of_row));
  copy_chunks<T, kHeadDim>(first, row, dtype, whole_chunks, lane_of_row, head_dim, valid);
}

// Writes one chunk of a finished row.
template <typename T>
__device__ __forceinline__ void store_chunk(T* row, const T* shared, int column, int head_dim, bool whole_chunks) {
  if (whole_chunks) {
    if (column < head_dim) *reinterpret_cast<uint4*>(row + column) = *reinterpret_cast<const uint4*>(shared);
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (column + i < head_dim) row[column + i] = shared[i];
    }
  }
}

}  // namespace prefix_kernels::cuda
