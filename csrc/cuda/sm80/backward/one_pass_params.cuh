// The parameters of the one-pass kernel, its tile sizes, and the calls that it serves.
#pragma once

#include "columns_params.cuh"
#include "turns.cuh"

namespace prefix_kernels::cuda::sm80 {

// The head dims that have a one-pass kernel.
template <int kHeadDim>
inline constexpr bool kHasOnePass = kHeadDim == 64 || kHeadDim == 96 || kHeadDim == 128;

struct OnePassParams {
  ColumnsParams columns;
  int64_t sequence_blocks;
  Turns turns;
};

// The traits of one one-pass kernel; those of the columns kernel that its functions use too have the same names. The
// block's eight warps divide every product in their own way.
template <typename T_, int kHeadDim_>
struct OnePassTraits {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kWantsDKey = true, kWantsDValue = true, kGeneral = false, kFusesDelta = false;
  static constexpr int kStreams = 2;

  static constexpr int kWarps = 8;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kBlockN = 128;  // columns of a block
  static constexpr int kBlockM = 64;   // queries of a stage

  // S and dP, kBlockM x kBlockN: blocks of 16 rows and of 16 columns of a warp.
  static constexpr int kScoreRowWarps = 2;
  static constexpr int kScoreRows = kBlockM / kScoreRowWarps / kCell;
  static constexpr int kScoreColumns = kBlockN / (kWarps / kScoreRowWarps) / kCell;
  // dK and dV, kBlockN x kHeadDim: blocks of 16 rows, and columns, of a warp.
  static constexpr int kSumRowWarps = 4;
  static constexpr int kSumRows = kBlockN / kSumRowWarps / kCell;
  static constexpr int kSumColumns = kHeadDim / (kWarps / kSumRowWarps);
  // dQ, kBlockM x kHeadDim: blocks of 16 rows, and columns, of a warp.
  static constexpr int kQueryRowWarps = kHeadDim == 128 ? 2 : 4;
  static constexpr int kQueryRows = kBlockM / kQueryRowWarps / kCell;
  static constexpr int kQueryColumns = kHeadDim / (kWarps / kQueryRowWarps);

  // The warp's keys and values, as the scores and dP take them, stay in registers.
  static constexpr bool kColumnsInRegisters = kHeadDim <= 64;
};

}  // namespace prefix_kernels::cuda::sm80
