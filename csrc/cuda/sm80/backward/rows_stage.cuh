// A stage of the rows kernel: a few visited cells of keys and values.
#pragma once

#include "rows_block.cuh"

namespace prefix_kernels::cuda::sm80 {

// Starts to copy the visited cells from `first_cell` on, keys and values, into a stage.
template <typename Block>
__device__ __forceinline__ void fetch_cells(const Block& block, int first_cell, int stage) {
  const AttentionParams& p = block.attention();
  const RowsOwner& owner = block.owner;
  const AlignedChunks& aligned = block.params.aligned;
  const auto load = [&](const Operand& sequence, bool aligned_sequence, const Operand& prefix, bool aligned_prefix,
                        int which, int64_t columns) {
    const int kv_head = owner.head / static_cast<int>(p.q_heads / p.kv_heads);
    TileLoader<typename Block::T, Block::kHeadDim, kBackwardThreads>(sequence, aligned_sequence, prefix, aligned_prefix,
                                                                     owner.batch, kv_head, block.thread)
        .template load<Block::Tile::kCells>(block.shared.tile(stage, which), p, owner.cells, first_cell,
                                            static_cast<int>(columns));
  };
  load(p.key, aligned.key, p.prefix_key, aligned.prefix_key, 0, p.head_dim);
  load(p.value, aligned.value, p.prefix_value, aligned.prefix_value, 1, p.value_dim);
  ptx::cp_async_commit();
}

}  // namespace prefix_kernels::cuda::sm80
