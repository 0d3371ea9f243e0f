// The parameters of the decode kernels, and their tile sizes, registers and shared memory by head dim.
#pragma once

#include "../../common/scores.cuh"
#include "../../common/shared_layout.cuh"

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
  bool plain;            // neither mask nor softcap nor dropout
  float* partial_out;    // [batch * q_heads * q_len, parts, kHeadDim]
  Share* partial_share;  // [batch * q_heads * q_len, parts]
  bool merges;           // the last block to arrive merges the parts; otherwise merge_kernel does
  unsigned* arrivals;    // [batch, kv_heads, blocks_per_entry], zero between launches; null if every row has one part
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

  // Cells of keys and values of every warp's ring; queries that do not go into registers (those that do come by way of
  // the rings' last stages); the block's rows; the warps' shares.
  static constexpr int kCellBytes = SharedTile<kHeadDim>::bytes(kCell);
  struct CellPiece : SharedPiece<T, kCellBytes, kWarps * kStages * 2> {};
  struct QueryPiece : SharedPiece<T, kCellBytes, kQueryInRegisters ? 0 : kWarps> {};
  struct RowPiece : SharedPiece<DecodeRow, kRows * sizeof(DecodeRow)> {};
  struct SharePiece : SharedPiece<Share, kRows * sizeof(Share)> {};
  using Shared = SharedLayout<CellPiece, QueryPiece, RowPiece, SharePiece>;
  static constexpr int kSharedBytes = Shared::kBytes;
  static_assert(kSharedGap > 0 || (kWide ? 1 : 2) * (kSharedBytes + 1024) <= 164 * 1024,
                "sm_80, with its share of each");
  static_assert(kSharedGap > 0 || kWide || kSharedBytes <= 99 * 1024, "8.6 and 8.9 give a block no more");

  // Bytes of the data that takes the place of a piece: the numbers of the block's entries, at most one a row, that of
  // the shares; the warps' results, [warp, row of its tile, kHeadDim], that of the cells.
  static constexpr int kEntriesBytes = kRows * sizeof(int), kResultsBytes = kRows * kHeadDim * sizeof(float);
  static __device__ __forceinline__ int* entries() {
    return Shared{shared_memory()}.template reuse<SharePiece, int, kEntriesBytes>();
  }
  static __device__ __forceinline__ float* results() {
    return Shared{shared_memory()}.template reuse<CellPiece, float, kResultsBytes>();
  }
};

}  // namespace prefix_kernels::cuda::sm80
