// Rows of global memory into a shared tile, whatever their dtype and alignment, and finished rows back.
//
// A chunk is the 8 elements that a thread writes into the tile at once. Rows whose chunks all begin at multiples of 16
// bytes are read 16 bytes at a time: rows of the tile's own type by cp.async, others by loads that are converted and
// stored (conversion.cuh). Rows without that alignment are loaded element by element. Chunks beyond the head dim, and
// rows that do not exist, become zero.
#pragma once

#include "conversion.cuh"
#include "shared_tile.cuh"

namespace prefix_kernels::cuda {

// Threads that share a row when a tile is copied: they move 64 or 128 adjacent bytes.
template <int kHeadDim>
inline constexpr int kLanesPerRow = kHeadDim % 64 == 0 ? 8 : 4;

// Tells if an operand's rows may be read 16 bytes at a time: every chunk of 8 elements is aligned.
inline bool has_aligned_chunks(const Operand& x, int64_t head_dim) {
  const int64_t strides = x.batch_stride | x.head_stride | x.row_stride;
  return strides % (16 / dtype_bytes(x.dtype)) == 0 && head_dim % kChunk == 0 &&
         reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

// The rows of one head of an operand.
struct HeadRows {
  const char* data;
  int64_t row_stride;  // distance of rows in elements
  DType dtype;
  bool aligned_chunks;  // result of has_aligned_chunks

  __device__ __forceinline__ HeadRows(const Operand& x, int64_t batch, int64_t head, bool aligned)
      : data(static_cast<const char*>(x.data) + (batch * x.batch_stride + head * x.head_stride) * dtype_bytes(x.dtype)),
        row_stride(x.row_stride),
        dtype(x.dtype),
        aligned_chunks(aligned) {}

  __device__ __forceinline__ const char* row(int64_t i) const { return data + i * row_stride * dtype_bytes(dtype); }
};

// Tells if rows go into a tile of T by cp.async.
template <typename T>
__device__ __forceinline__ bool goes_async(DType dtype, bool aligned_chunks) {
  return aligned_chunks && dtype == kDTypeOf<T>;
}

// Copies one row; every one of the kLanesPerRow<kHeadDim> threads that share it calls this with its number, and with
// the address of the first of its chunks in the tile. Chunks copied by cp.async are there after its wait, all others at
// once. Other threads see both after the next barrier.
template <typename T, int kHeadDim>
__device__ __forceinline__ void copy_chunks(T* first, const char* row, DType dtype, bool aligned_chunks,
                                            int lane_of_row, int head_dim, bool valid) {
  using Tile = SharedTile<kHeadDim>;
  constexpr int kLanes = kLanesPerRow<kHeadDim>;
  static_assert(kLanes % Tile::kPermuted == 0, "chunks that are kLanes apart are so in the tile");
  if (goes_async<T>(dtype, aligned_chunks)) {
#pragma unroll
    for (int chunk = 0; chunk < Tile::kChunks; chunk += kLanes) {
      ptx::cp_async_16(first + chunk * kChunk, row + (lane_of_row + chunk) * 16,
                       valid && (lane_of_row + chunk) * kChunk < head_dim);
    }
  } else if (aligned_chunks) {
    with_source<T>(dtype, [&](auto source) {
      constexpr DType kSource = decltype(source)::value;
#pragma unroll 1
      for (int chunk = 0; chunk < Tile::kChunks; chunk += kLanes) {
        const int column = (lane_of_row + chunk) * kChunk;
        *reinterpret_cast<uint4*>(first + chunk * kChunk) =
            converted_chunk<T, kSource>(row + column * dtype_bytes(kSource), valid && column < head_dim);
      }
    });
  } else {
#pragma unroll 1
    for (int chunk = 0; chunk < Tile::kChunks; chunk += kLanes) {
      gather_chunk(first + chunk * kChunk, row, dtype, (lane_of_row + chunk) * kChunk, head_dim, valid);
    }
  }
}

// Converts rows [first, first + kRows) of another dtype, aligned, into the rows of a tile; rows from `count` on become
// zero. kThreads threads share the work.
template <typename T, int kHeadDim, int kRows, int kThreads>
__device__ __forceinline__ void convert_rows(T* tile, const HeadRows& rows, int first, int count, int thread,
                                             int head_dim) {
  using Tile = SharedTile<kHeadDim>;
  constexpr int kLanes = kLanesPerRow<kHeadDim>, kPassRows = kThreads / kLanes, kOfLane = Tile::kChunks / kLanes;
  static_assert(kRows % kPassRows == 0);
  constexpr int kOfThread = kRows / kPassRows * kOfLane;
  with_source<T>(rows.dtype, [&](auto source) {
    constexpr DType kSource = decltype(source)::value;
    // Chunks that a thread has under way: more would take registers that the kernels need for their sums.
    constexpr int kAtOnce = kSource == DType::kFloat64 || kOfThread % 2 != 0 ? 1 : 2;
#pragma unroll 1
    for (int begin = 0; begin < kOfThread; begin += kAtOnce) {
      const auto row = [&](int i) { return thread / kLanes + (begin + i) / kOfLane * kPassRows; };
      const auto chunk = [&](int i) { return thread % kLanes + (begin + i) % kOfLane * kLanes; };
      uint4 chunks[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        chunks[i] = converted_chunk<T, kSource>(rows.row(first + row(i)) + chunk(i) * kChunk * dtype_bytes(kSource),
                                                first + row(i) < count && chunk(i) * kChunk < head_dim);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) *reinterpret_cast<uint4*>(tile + Tile::offset(row(i), chunk(i))) = chunks[i];
    }
  });
}

template <typename T, int kHeadDim>
__device__ __forceinline__ void copy_row(T* tile, int tile_row, const char* row, DType dtype, bool aligned_chunks,
                                         int lane_of_row, int head_dim, bool valid) {
  T* const first = pin_to_register(tile + SharedTile<kHeadDim>::offset(tile_row, lane_of_row));
  copy_chunks<T, kHeadDim>(first, row, dtype, aligned_chunks, lane_of_row, head_dim, valid);
}

// Writes one chunk of a finished row.
template <typename T>
__device__ __forceinline__ void store_chunk(T* row, const T* shared, int column, int head_dim, bool aligned_chunks) {
  if (aligned_chunks) {
    if (column < head_dim) *reinterpret_cast<uint4*>(row + column) = *reinterpret_cast<const uint4*>(shared);
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (column + i < head_dim) row[column + i] = shared[i];
    }
  }
}

}  // namespace prefix_kernels::cuda
