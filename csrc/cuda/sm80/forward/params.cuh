// The parameters of the forward kernel, and its tile sizes, registers and shared memory by head dim.
#pragma once

#include "warp_plan.cuh"

namespace prefix_kernels::cuda::sm80 {

struct ForwardParams {
  AttentionParams attention;
  float scale;       // takes products of query and key to natural units
  float scale_log2;  // takes them to base 2
  float softcap;
  int pack;            // heads whose rows alternate in a block
  int row_tiles;       // blocks per (batch row, packed heads)
  bool shared_mask;    // all rows of a block have the same mask row
  bool aligned_query;  // has_aligned_chunks
  bool aligned_key;
  bool aligned_value;
  bool aligned_prefix_key;
  bool aligned_prefix_value;
  bool aligned_out;
};

template <typename Element, int kHeadDim_, bool kGeneral_, bool kDropout_, int kRowBlocks_>
struct ForwardTraits {
  using T = Element;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kGeneral = kGeneral_;  // mask, softcap or a scale that is not positive; dropout or not
  static constexpr bool kDropout = kDropout_;  // dropout and none of these
  static constexpr bool kMayDrop = kGeneral || kDropout;
  static constexpr int kRowBlocks = kRowBlocks_;  // 16-row blocks of a warp
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kWarpRows = kCell * kRowBlocks;
  static constexpr int kRows = kWarps * kWarpRows;
  // The most blocks per SM that registers and shared memory allow without spills.
  static constexpr int kBlocksPerSM = kRowBlocks == 2  ? (kHeadDim == 32 && !kMayDrop ? 3 : 2)
                                      : kHeadDim == 32 ? 4
                                      : kHeadDim <= 96 ? 3
                                                       : 2;
  // Dropout at head dim 96 and 128 has tiles of half the columns: 32 rows a warp leave no registers for more scores.
  static constexpr int kCells = kHeadDim <= (kDropout && kRowBlocks == 2 ? 64 : 128) ? 4 : 2;
  static constexpr int kColumns = kCells * kCell;
  static constexpr bool kQueryInRegisters = kHeadDim <= 64;

  // Accumulators of a thread.
  using Scores = float[kRowBlocks][2 * kCells][4];
  using Out = float[kRowBlocks][2 * kHeadDim / kCell][4];

  static constexpr int kQueryBytes = SharedTile<kHeadDim>::bytes(kRows);
  static constexpr int kTileBytes = SharedTile<kHeadDim>::bytes(kColumns);
  static constexpr int kPlanBytes = sizeof(WarpPlan<kWarpRows, kCells, kGeneral>);
  static constexpr int kKeyOffset = kQueryBytes + kSharedGap;
  static constexpr int kTileStride = kTileBytes + kSharedGap;
  static constexpr int kValueOffset = kKeyOffset + 2 * kTileStride;
  static constexpr int kPlanOffset = kValueOffset + 2 * kTileStride;
  static constexpr int kPlanStride = kPlanBytes + kSharedGap;
  static constexpr int kSharedBytes = kPlanOffset + kWarps * kPlanStride;
  static_assert(kQueryBytes + 4 * kTileBytes + kWarps * kPlanBytes <= 99 * 1024,
                "shared memory of a block on compute capability 8.6");
};

}  // namespace prefix_kernels::cuda::sm80
