// A block's four warps over the resident rows and the streamed ones, and the sum of those that share resident rows.
#pragma once

#include "../../common/shared_tile.cuh"

namespace prefix_kernels::cuda::sm80 {

inline constexpr int kBackwardWarps = 4;
inline constexpr int kBackwardThreads = kBackwardWarps * kWarpSize;

// The division of resident rows and stream among the warps. If the resident rows are fewer than the warps can own,
// several warps take the same rows and different parts of the stream, and their sums are added at the end.
struct WarpLayout {
  int resident;  // number of the resident part that this warp owns
  int parts;     // parts of the stream: 1, 2 or 4
  int part;      // number of this warp's part of the stream

  // `needed`: resident parts, at most kBackwardWarps.
  __device__ __forceinline__ WarpLayout(int warp, int needed) {
    const int owners = needed <= 1 ? 1 : needed <= 2 ? 2 : kBackwardWarps;
    resident = warp % owners;
    parts = kBackwardWarps / owners;
    part = warp / owners;
  }
};

// Shared memory that add_parts needs, in bytes.
template <int kHeadDim, int kTiles>
inline constexpr int kPartsBytes = kBackwardWarps / 2 * kTiles * kCell * kHeadDim * 4;

// Adds the sums of the warps that share resident rows, in a fixed order, into those of part 0. Every thread calls it.
template <int kHeadDim, int kTiles>
__device__ __forceinline__ void add_parts(float (&sums)[kTiles][kHeadDim / 8][4], const WarpLayout& warps,
                                          float* shared, int lane) {
  constexpr int kPerLane = kTiles * kHeadDim / 2;
  const int owners = kBackwardWarps / warps.parts;
  for (int half = warps.parts / 2; half > 0; half /= 2) {
    __syncthreads();
    const bool gives = warps.part >= half && warps.part < 2 * half, takes = warps.part < half;
    float* slot = shared + ((warps.part % half) * owners + warps.resident) * kPerLane * kWarpSize + lane;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (gives) slot[i * kWarpSize] = sums[i / (kHeadDim / 2)][i / 4 % (kHeadDim / 8)][i % 4];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (takes) sums[i / (kHeadDim / 2)][i / 4 % (kHeadDim / 8)][i % 4] += slot[i * kWarpSize];
    }
  }
}

}  // namespace prefix_kernels::cuda::sm80
