// The parameters of the rows kernel, and its tile sizes and registers by head dim.
#pragma once

#include "params.cuh"
#include "scores.cuh"
#include "warp_layout.cuh"

namespace prefix_kernels::cuda::sm80 {

struct RowsParams {
  BackwardParams b;
  const float* delta;  // [batch, q_heads, q_len]
  ScoreScalars scalars;
  AlignedChunks aligned;
  bool aligned_pairs;  // has_aligned_pairs of dquery
  int query_tiles;     // blocks: (batch * q_heads + head) * query_tiles + tile
};

// The tile sizes and registers of one rows kernel. kGeneral: mask, softcap, dropout, windows over the prefix.
template <int kHeadDim, bool kGeneral>
struct RowsTile {
  static constexpr int kTiles = kHeadDim <= 64 ? 2 : 1;    // blocks of 16 queries of a warp
  static constexpr int kWarpM = kTiles * kCell;            // queries of a warp
  static constexpr int kBlockM = kBackwardWarps * kWarpM;  // queries of a block
  static constexpr int kCells = kHeadDim <= 128 ? 4 : 2;   // cells of a stage
  static constexpr int kBlockN = kCells * kCell;           // columns of a stage
  static constexpr bool kDOutInRegisters = kHeadDim <= 128;
  static_assert(kBlockM <= 2 * kBlockN, "query and dout pass through the stages on their way to the registers");
};

}  // namespace prefix_kernels::cuda::sm80
