// The parameters of the decode kernels, and their tile sizes, registers and shared memory by head dim.
#pragma once

#include "../../common/scores.cuh"

namespace prefix_kernels::cuda::sm80 {

// The weight of a part of a row's columns among the others: sum * exp(maximum).
struct Share {
  float maximum;
  float sum;

  __device__ __forceinline__ float relative_to(float most) const {
    return ptx::exp2_approx((maximum - most) * kLog2E) * sum;
  }
};

struct DecodeParams {
  AttentionParams attention;
  float scale;
  float softcap;
  float dropout_rescale;
  int rows_per_entry;    // queries * heads of a group
  int blocks_per_entry;  // blocks of kRows rows
  int prefix_parts;      // parts of each prefix
  int sequence_parts;    // parts of each sequence
  int parts;             // parts of a row: prefix_slots * prefix_parts + sequence_parts
  int prefix_blocks;     // blocks of prefixes, which come first in the grid
  float* partial_out;    // [batch * q_heads * q_len, parts, kHeadDim]
  Share* partial_share;  // [batch * q_heads * q_len, parts]
  bool aligned_query;    // results of has_aligned_chunks
  bool aligned_key;
  bool aligned_value;
  bool aligned_prefix_key;
  bool aligned_prefix_value;
};

// A row of a block: one query of one head.
struct DecodeRow {
  int batch;
  int head;
  int query;
  int segment;  // number as in Cell
  Span seen;    // columns of the segment that the row sees
};

// Wide blocks have twice the rows. They serve prefixes that more rows share than fill a narrow block, on GPUs that give
// a block the shared memory.
template <typename Element, int kHeadDim_, bool kWide_>
struct DecodeTraits {
  using T = Element;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kWide = kWide_;
  static constexpr int kWarps = (kHeadDim <= 128 ? 4 : 2) * (kWide ? 2 : 1);
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kRows = kWarps * kCell;
  static constexpr int kStages = kHeadDim <= 64 && !kWide ? 4 : 2;
  // The blocks per SM that the host code plans for.
  static constexpr int kBlocksPerSM = kHeadDim <= 64 ? (kWide ? 2 : 3) : (kWide ? 1 : 2);
  static constexpr bool kQueryInRegisters = kHeadDim <= 128;

  static constexpr int kCellBytes = SharedTile<kHeadDim>::bytes(kCell);
  static constexpr int kCellStride = kCellBytes + kSharedGap;
  static constexpr int kRingBytes = kWarps * kStages * 2 * kCellStride;
  // Queries that go into registers come by way of the rings' last stages.
  static constexpr int kQueryOffset = kRingBytes;
  static constexpr int kQueryBytes = kQueryInRegisters ? 0 : kWarps * kCellStride;
  static constexpr int kRowsOffset = kQueryOffset + kQueryBytes;
  static constexpr int kRowsBytes = kRows * sizeof(DecodeRow);
  // Memory for the entries and later for the warps' shares.
  static constexpr int kSharesOffset = kRowsOffset + kRowsBytes + kSharedGap;
  static constexpr int kSharesBytes = kRows * sizeof(Share);
  static_assert(sizeof(int) <= sizeof(Share), "the entries, at most one a row, fit where the shares go");
  static constexpr int kSharedBytes = kSharesOffset + kSharesBytes + kSharedGap;
  static_assert(kSharedGap > 0 || (kWide ? 1 : 2) * (kSharedBytes + 1024) <= 164 * 1024,
                "sm_80, with its share of each");
  static_assert(kSharedGap > 0 || kWide || kSharedBytes <= 99 * 1024, "8.6 and 8.9 give a block no more");
  // The warps' results take the place of the cells.
  static constexpr int kOutBytes = kRows * kHeadDim * sizeof(float);
  static_assert(kOutBytes <= kRingBytes, "the warps' results fit where the cells were");
};

}  // namespace prefix_kernels::cuda::sm80
