// The parameters of the columns kernel, and its tile sizes and registers by head dim.
#pragma once

#include "params.cuh"
#include "scores.cuh"
#include "warp_layout.cuh"

namespace prefix_kernels::cuda::sm80 {

struct ColumnsParams {
  BackwardParams b;
  const float* delta;  // [batch, q_heads, q_len]
  ScoreScalars scalars;
  AlignedChunks aligned;
  bool aligned_pairs[kNumGradients];

  // Blocks of prefixes come first: ((prefix * kv_heads + kv_head) * prefix_tiles + tile) * splits + split.
  int64_t prefix_blocks;
  int prefix_tiles;
  int splits;
  float* partial_dkey;  // [num_prefixes, kv_heads, splits, prefix_len, kHeadDim]; null: one split writes the gradient
  float* partial_dvalue;
  // Then those of sequences: (batch * kv_heads + kv_head) * sequence_tiles + tile.
  int sequence_tiles;
};

// The traits of one columns kernel. kWantsDKey, kWantsDValue: the sums that it computes; kGeneral: mask, softcap,
// dropout, windows over the prefix; kFusesDelta: delta is computed from out, which is streamed with dout, and not read.
template <typename T_, int kHeadDim_, bool kWantsDKey_, bool kWantsDValue_, bool kGeneral_, bool kFusesDelta_ = false>
struct ColumnsTraits {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kWantsDKey = kWantsDKey_, kWantsDValue = kWantsDValue_, kGeneral = kGeneral_;
  static constexpr bool kFusesDelta = kFusesDelta_;

  static constexpr int kThreads = kBackwardThreads;
  static constexpr int kTiles = kHeadDim <= 64 ? 2 : 1;    // blocks of 16 columns of a warp
  static constexpr int kWarpN = kTiles * kCell;            // columns of a warp
  static constexpr int kBlockN = kBackwardWarps * kWarpN;  // columns of a block
  // The queries of a stage.
  static constexpr int kBlockM = kHeadDim == 256 && kGeneral                          ? 16
                                 : kHeadDim > 128 || (kHeadDim == 128 && kFusesDelta) ? 32
                                                                                      : 64;
  // The tiles that a stage streams: query, dout and, for delta, out.
  static constexpr int kStreams = 2 + kFusesDelta;
  // The sums leave registers for the block's keys, or values; kGeneral kernels need some for their options.
  static constexpr bool kKeyInRegisters =
      kHeadDim == 256 ? kWantsDKey && !kGeneral : !kGeneral || (kHeadDim != 64 && kHeadDim != 128);
  static constexpr bool kValueInRegisters = kHeadDim == 32 || kHeadDim == 96;
  static_assert(kBlockN <= 2 * kBlockM || !(kKeyInRegisters || kValueInRegisters),
                "keys and values pass through the stages on their way to the registers");
};

// Tells if the registers hold dK and dV together.
template <int kHeadDim>
inline constexpr bool kBothSums = kHeadDim <= 128;

}  // namespace prefix_kernels::cuda::sm80
