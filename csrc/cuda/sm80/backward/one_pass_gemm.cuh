// The matrix products of the one-pass kernel, as one warp sees them. Both operands lie in shared memory.
#pragma once

#include "../../common/shared_tile.cuh"

namespace prefix_kernels::cuda::sm80 {

// The right operand of S = Q K^T and dP = dO V^T: kTiles x 16 rows of a shared tile, in registers or read each time.
template <typename T, int kHeadDim, int kTiles, bool kInRegisters>
class KeptColumns {
 public:
  // `rows`: the warp's first row; the tile stays in place unless kInRegisters.
  __device__ __forceinline__ void take(const T* rows, int lane) {
    if constexpr (kInRegisters) {
      const Reader reader(rows, lane);
#pragma unroll
      for (int k = 0; k < kHeadDim / kCell; ++k) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) reader.load(held_[k][tile], tile, k);
      }
    }
  }

  // s[row][tile] = rows columns^T, of kRows x 16 rows. `columns`: as in take.
  template <int kRows>
  __device__ __forceinline__ void score(float (&s)[kRows][kTiles][2][4], const T* rows, const T* columns,
                                        int lane) const {
    const BlockReader<T, kHeadDim, Quarters::kDown> row_reader(rows, lane);
    const Reader reader(columns, lane);
#pragma unroll
    for (int i = 0; i < kRows * kTiles * 8; ++i) s[i / (8 * kTiles)][i / 8 % kTiles][i / 4 % 2][i % 4] = 0.0f;
#pragma unroll
    for (int k = 0; k < kHeadDim / kCell; ++k) {
      uint32_t a[kRows][4], b[kTiles][4];
#pragma unroll
      for (int row = 0; row < kRows; ++row) row_reader.load(a[row], row, k);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if constexpr (kInRegisters) {
#pragma unroll
          for (int i = 0; i < 4; ++i) b[tile][i] = held_[k][tile][i];
        } else {
          reader.load(b[tile], tile, k);
        }
#pragma unroll
        for (int row = 0; row < kRows; ++row) mma_block<T>(s[row][tile][0], s[row][tile][1], a[row], b[tile]);
      }
    }
  }

 private:
  using Reader = BlockReader<T, kHeadDim, Quarters::kAcross>;

  uint32_t held_[kInRegisters ? kHeadDim / kCell : 1][kInRegisters ? kTiles : 1][4];
};

// sums += weights^T rows: kTiles x 16 columns of the weights, from block column `first_tile` on, against kColumns
// columns of the rows, from block column `first_column` on. kDepth: rows of both.
template <typename T, int kWidth, int kHeadDim, int kDepth, int kTiles, int kColumns>
__device__ __forceinline__ void add_transposed(float (&sums)[kTiles][kColumns / 8][4], const T* weights, int first_tile,
                                               const T* rows, int first_column, int lane) {
  const BlockReader<T, kWidth, Quarters::kAcross> weight_reader(weights, lane, first_tile);
  const BlockReader<T, kHeadDim, Quarters::kDown> reader(rows, lane, first_column);
#pragma unroll
  for (int k = 0; k < kDepth / kCell; ++k) {
    uint32_t a[kTiles][4];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) weight_reader.load_transposed(a[tile], k, tile);
#pragma unroll
    for (int n = 0; n < kColumns / kCell; ++n) {
      uint32_t b[4];
      reader.load_transposed(b, k, n);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) mma_block<T>(sums[tile][2 * n], sums[tile][2 * n + 1], a[tile], b);
    }
  }
}

// sums = weights rows: kTiles x 16 rows of the weights, all kWidth columns of them, against kColumns columns of the
// rows, from block column `first_column` on.
template <typename T, int kWidth, int kHeadDim, int kTiles, int kColumns>
__device__ __forceinline__ void multiply(float (&sums)[kTiles][kColumns / 8][4], const T* weights, const T* rows,
                                         int first_column, int lane) {
  const BlockReader<T, kWidth, Quarters::kDown> weight_reader(weights, lane);
  const BlockReader<T, kHeadDim, Quarters::kDown> reader(rows, lane, first_column);
#pragma unroll
  for (int i = 0; i < kTiles * kColumns / 2; ++i) sums[i / (kColumns / 2)][i / 4 % (kColumns / 8)][i % 4] = 0.0f;
#pragma unroll
  for (int k = 0; k < kWidth / kCell; ++k) {
    uint32_t a[kTiles][4];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) weight_reader.load(a[tile], tile, k);
#pragma unroll
    for (int n = 0; n < kColumns / kCell; ++n) {
      uint32_t b[4];
      reader.load_transposed(b, k, n);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) mma_block<T>(sums[tile][2 * n], sums[tile][2 * n + 1], a[tile], b);
    }
  }
}

}  // namespace prefix_kernels::cuda::sm80
