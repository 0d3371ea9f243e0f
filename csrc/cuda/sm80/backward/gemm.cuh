// The matrix products of the backward pass, as one warp sees them.
//
// A warp owns kTiles x 16 rows of the resident side (keys in the columns kernel, queries in the rows kernel) and meets
// the streamed side 16 rows at a time. Two products serve both kernels:
//   score       s     = resident stream^T      (S^T = K Q^T, dP^T = V dO^T;    S = Q K^T, dP = dO V^T)
//   accumulate  sums += s stream               (dK += dS^T Q, dV += P^T dO;    dQ += dS K)
// The accumulator of `score` holds, lane for lane, what `accumulate` wants as its left operand, so that P and dS never
// leave the registers, and `accumulate` reads the streamed rows through the transposing ldmatrix.
#pragma once

#include "../../common/shared_tile.cuh"

namespace prefix_kernels::cuda::sm80 {

// The left operand of `score`: kTiles x 16 rows of a shared tile, kept in registers or read each time.
template <typename T, int kHeadDim, int kTiles, bool kInRegisters>
class Resident {
 public:
  // `rows`: the warp's first row; the tile stays in place unless kInRegisters.
  __device__ __forceinline__ void take(const T* rows, int lane) {
    rows_ = rows;
    lane_ = lane;
    if constexpr (kInRegisters) {
      const Reader reader(rows, lane);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int k = 0; k < kHeadDim / kCell; ++k) reader.load(held_[tile][k], tile, k);
      }
    }
  }

  __device__ __forceinline__ void operand(uint32_t (&a)[4], int tile, int k) const {
    if constexpr (kInRegisters) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = held_[tile][k][i];
    } else {
      Reader(rows_, lane_).load(a, tile, k);
    }
  }

 private:
  using Reader = BlockReader<T, kHeadDim, Quarters::kDown>;

  uint32_t held_[kInRegisters ? kTiles : 1][kInRegisters ? kHeadDim / kCell : 1][4];
  const T* rows_;
  int lane_;
};

template <int kTiles, int kBlocks>
__device__ __forceinline__ void clear(float (&sums)[kTiles][kBlocks][4]) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < kBlocks * 4; ++i) sums[tile][i / 4][i % 4] = 0.0f;
  }
}

// The warp's blocks of 16 rows that take part; kAll says at compile time that all do.
template <int kTiles, bool kAll>
struct ActiveTiles {
  bool tile[kTiles];
  __device__ __forceinline__ bool operator[](int i) const { return kAll || tile[i]; }
};

// Scores of the 16 streamed rows that begin at `stream`: s[tile][n] are those of rows [8n, 8n + 8).
template <typename T, int kHeadDim, int kTiles, bool kInRegisters, bool kAll>
__device__ __forceinline__ void score(float (&s)[kTiles][2][4],
                                      const Resident<T, kHeadDim, kTiles, kInRegisters>& resident, const T* stream,
                                      int lane, const ActiveTiles<kTiles, kAll>& active) {
  const BlockReader<T, kHeadDim, Quarters::kAcross> reader(stream, lane);
  clear(s);
#pragma unroll
  for (int k = 0; k < kHeadDim / kCell; ++k) {
    uint32_t b[4];
    reader.load(b, 0, k);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      if (active[tile]) {
        uint32_t a[4];
        resident.operand(a, tile, k);
        mma_block<T>(s[tile][0], s[tile][1], a, b);
      }
    }
  }
}

// sums[tile][n] are columns [8n, 8n + 8) of the warp's rows.
template <typename T, int kHeadDim, int kTiles, bool kAll>
__device__ __forceinline__ void accumulate(float (&sums)[kTiles][kHeadDim / 8][4], const float (&s)[kTiles][2][4],
                                           const T* stream, int lane, const ActiveTiles<kTiles, kAll>& active) {
  const BlockReader<T, kHeadDim, Quarters::kDown> reader(stream, lane);
  uint32_t a[kTiles][4];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) pack_operand<T>(a[tile], s[tile][0], s[tile][1]);
#pragma unroll
  for (int k = 0; k < kHeadDim / kCell; ++k) {
    uint32_t b[4];
    reader.load_transposed(b, 0, k);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      if (active[tile]) mma_block<T>(sums[tile][2 * k], sums[tile][2 * k + 1], a[tile], b);
    }
  }
}

}  // namespace prefix_kernels::cuda::sm80
