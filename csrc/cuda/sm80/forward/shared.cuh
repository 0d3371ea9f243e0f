// The shared memory of a forward block: queries, two tiles of keys, two of values, and a plan per warp.
#pragma once

#include "params.cuh"

namespace prefix_kernels::cuda::sm80 {

template <typename Traits>
struct ForwardShared {
  using T = typename Traits::T;
  using Plan = WarpPlan<Traits::kWarpRows, Traits::kCells, Traits::kGeneral>;

  static __device__ __forceinline__ T* queries() { return reinterpret_cast<T*>(shared_memory()); }

  // Tile i of the four: keys of even and of odd tiles, values of even and of odd tiles.
  static __device__ __forceinline__ T* tile(int i) {
    return reinterpret_cast<T*>(shared_memory() + Traits::kKeyOffset + i * Traits::kTileStride);
  }

  // The buffer of tile j of the keys.
  static __device__ __forceinline__ T* keys(int j) { return tile(j & 1); }

  // The buffer of tile j of the values.
  static __device__ __forceinline__ T* values(int j) { return tile(2 + (j & 1)); }

  static __device__ __forceinline__ Plan& plan(int warp) {
    return *reinterpret_cast<Plan*>(shared_memory() + Traits::kPlanOffset + warp * Traits::kPlanStride);
  }

  // Announces the pieces that a warp uses to the emulator.
  static __device__ __forceinline__ void announce(int warp) {
    shared_buffer(queries(), Traits::kQueryBytes);
#pragma unroll
    for (int i = 0; i < 4; ++i) shared_buffer(tile(i), Traits::kTileBytes);
    shared_buffer(&plan(warp), sizeof(Plan));
  }
};

}  // namespace prefix_kernels::cuda::sm80
