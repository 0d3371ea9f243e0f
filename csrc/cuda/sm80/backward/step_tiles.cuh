// The blocks of 16 resident rows of a warp that take part in a step, a meeting with 16 streamed rows.
#pragma once

#include "gemm.cuh"

namespace prefix_kernels::cuda::sm80 {

template <int kTiles>
struct StepTiles {
  ActiveTiles<kTiles, false> active;  // tiles of which some element is visible
  bool full[kTiles];                  // tiles of which every element is visible
  bool any = false;                   // some tile is active
  bool all = true;                    // every tile is active

  __device__ __forceinline__ void set(int tile, bool is_active, bool is_full) {
    active.tile[tile] = is_active;
    full[tile] = is_full;
    any = any || is_active;
    all = all && is_active;
  }
};

// Calls step(active tiles) unless none is. Steps of which all tiles are active have a version of their own, without
// branches on them, unless kOneVersion.
template <bool kOneVersion, int kTiles, typename Step>
__device__ __forceinline__ void take_step(const StepTiles<kTiles>& tiles, const Step& step) {
  if (!tiles.any) return;
  if constexpr (kTiles > 1 && kOneVersion) {
    step(tiles.active);
  } else if (tiles.all) {
    step(ActiveTiles<kTiles, true>{});
  } else if constexpr (kTiles > 1) {
    step(tiles.active);
  }
}

}  // namespace prefix_kernels::cuda::sm80
