// A stage of the columns kernel: a query tile with its dout rows and, for each of its queries, the lse, delta and
// visible columns.
#pragma once

#include "columns_block.cuh"
#include "delta.cuh"

namespace prefix_kernels::cuda::sm80 {

// The lse and delta of one query, loaded into registers while the tile's copies are under way. Each of the first
// kBlockM threads of the block has one.
struct ArrivingQuery {
  float lse = 0.0f;
  float delta = 0.0f;
};

// Starts to copy the current visit of `tiles` into a stage.
template <typename Block>
__device__ __forceinline__ void fetch_queries(const Block& block, const typename Block::Tiles& tiles, int stage,
                                              ArrivingQuery& arriving) {
  using Traits = typename Block::Traits;
  using T = typename Traits::T;
  constexpr int kHeadDim = Traits::kHeadDim, kBlockM = Traits::kBlockM;
  const AttentionParams& p = block.attention();
  const BackwardParams& b = block.params.b;
  const AlignedChunks& aligned = block.params.aligned;
  const int head_dim = static_cast<int>(p.head_dim), value_dim = static_cast<int>(p.value_dim);
  const int q_len = static_cast<int>(p.q_len);
  const int first = tiles.first_query(), batch = tiles.batch, h = tiles.head();
  copy_rows<T, kHeadDim, kBlockM, Traits::kThreads, true>(
      block.shared.tile(stage, 0), HeadRows(p.query, batch, h, aligned.query), first, q_len, head_dim);
  copy_rows<T, kHeadDim, kBlockM, Traits::kThreads, true>(
      block.shared.tile(stage, 1), HeadRows(b.dout, batch, h, aligned.dout), first, q_len, value_dim);
  if constexpr (Traits::kFusesDelta) {
    copy_rows<T, kHeadDim, kBlockM, Traits::kThreads, true>(
        block.shared.tile(stage, 2), HeadRows(p.out, batch, h, aligned.out), first, q_len, value_dim);
  }
  ptx::cp_async_commit();
  if (block.thread < kBlockM && first + block.thread < q_len) {
    const int64_t row = (batch * p.q_heads + h) * p.q_len + first + block.thread;
    arriving.lse = static_cast<const float*>(p.lse)[row];
    if constexpr (Traits::kFusesDelta) {
      arriving.delta = b.dlse != nullptr ? -static_cast<const float*>(b.dlse)[row] : 0.0f;
    } else if constexpr (Traits::kWantsDKey) {
      arriving.delta = block.params.delta[row];
    }
  }
}

// Writes the numbers of the current visit of `tiles` into its stage, and the visit that follows it.
template <typename Block>
__device__ __forceinline__ void describe_queries(const Block& block, const typename Block::Tiles& tiles, int stage,
                                                 const ArrivingQuery& arrived) {
  using Traits = typename Block::Traits;
  constexpr int kBlockM = Traits::kBlockM;
  const AttentionParams& p = block.attention();
  const int thread = block.thread, q_len = static_cast<int>(p.q_len);
  auto& info = block.shared.info(stage);
  const int first = tiles.first_query();
  if (thread < kBlockM) {
    const int i = first + thread;
    const bool exists = i < q_len;
    info.reference[thread] = exists ? softmax_reference<Traits::kGeneral>(arrived.lse) : kInfinity;
    info.delta[thread] = exists ? arrived.delta : 0.0f;
    // Rows beyond the last query are skipped in blocks of 16. In a block with queries they continue the visible
    // columns, so that the block's first and last row give the columns that it sees.
    const Span visible = tiles.visible(p, i);
    const bool in_block = i / kCell * kCell < q_len;
    info.begin[thread] = in_block ? visible.begin : kNoColumn;
    info.end[thread] = in_block ? visible.end : 0;
  }
  if (Traits::kGeneral && thread == kBlockM) {
    info.first_query = first;
    info.queries = q_len - first;
    info.head = tiles.batch * static_cast<int>(p.q_heads) + tiles.head();
    info.segment = tiles.segment;
    info.mask = mask_row(p, tiles.batch, tiles.head(), first, tiles.segment);
    info.seed = p.dropout_threshold > 0 ? dropout_seed(p) : 0;
  }
  if (thread >= Traits::kThreads - kWarpSize) {
    typename Block::Tiles next = tiles;
    next.next(p);
    if (block.lane == 0) info.next = next;
  }
}

// One lane's part of the dot product of row `row` of two tiles, which kLanes lanes share.
template <typename T, int kHeadDim, int kLanes>
__device__ __forceinline__ float row_product(const T* x, const T* y, int row, int lane_of_row) {
  using Tile = SharedTile<kHeadDim>;
  float sum = 0.0f;
#pragma unroll 2
  for (int chunk = lane_of_row; chunk < Tile::kChunks; chunk += kLanes) {
    const int at = Tile::offset(row, chunk);
    sum += chunk_product(x + at, y + at);
  }
  return sum;
}

// Adds rowsum(dout * out) to the stage's -dlse.
template <typename Traits>
__device__ __forceinline__ void fuse_delta(const ColumnsBlock<Traits>& block, int stage) {
  constexpr int kLanes = Traits::kThreads / Traits::kBlockM;
  const int row = block.thread / kLanes, lane_of_row = block.thread % kLanes;
  float sum = row_product<typename Traits::T, Traits::kHeadDim, kLanes>(block.shared.tile(stage, 1),
                                                                        block.shared.tile(stage, 2), row, lane_of_row);
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  if (lane_of_row == 0) block.shared.info(stage).delta[row] += sum;
}

}  // namespace prefix_kernels::cuda::sm80
