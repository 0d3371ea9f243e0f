// The gradients of keys and values, of the sequence and of the prefixes.
//
//   dK' = scale ds^T Q      dV' = p^T dO
//
// Both are summed over the heads of the group and, for a prefix, over the rows that name it. A block owns kBlockN
// columns of one segment of one kv head and visits every query tile that sees them:
//
//   keys, values of the block     in registers, as left operands, or in shared memory if the sums leave no room
//   query, dout tiles             two stages of shared memory, filled by cp.async while the other is at work
//   S^T = K Q^T, dP^T = V dO^T    one warp: kTiles x 16 columns against 16 queries at a time
//   dV += P^T dO, dK += dS^T Q    left operands straight from the registers; sums in registers to the end
//
// For prefix gradients alone, delta is computed here, so that query, out and dout are read once and nothing else is. If
// the columns are too few for all warps, several warps share columns and divide the queries of a tile (WarpLayout). A
// prefix's visits are split over blocks, whose sums reduce.cuh adds.
#pragma once

#include "columns_stage.cuh"
#include "columns_step.cuh"

namespace prefix_kernels::cuda::sm80 {

// Computes the gradients of one block of columns, or its split's part of them.
template <typename Traits>
__global__ void __launch_bounds__(kBackwardThreads, 2) backward_columns(const ColumnsParams params) {
  using Shared = ColumnsShared<Traits>;
  using Tiles = typename Shared::Tiles;
  const AttentionParams& p = params.b.forward;
  const int thread = threadIdx.x;
  const Shared shared{{shared_memory()}};
  shared.declare();
  if (thread == 0) shared.owner() = columns_owner(params, Traits::kBlockN, blockIdx.x);
  __syncthreads();
  const ColumnsBlock<Traits> block{params, shared, shared.owner(), thread, thread % kWarpSize};

  ColumnsSums<Traits> sums;
  sums.begin();
  Tiles first_tiles;
  first_tiles.begin(p, block.owner);
  if (!first_tiles.done()) {
    ColumnsKey<Traits> key;
    ColumnsValue<Traits> value;
    load_columns(block, key, value);
    ArrivingQuery arriving;
    fetch_queries(block, first_tiles, 0, arriving);
    describe_queries(block, first_tiles, 0, arriving);
    bool more = true;
    for (int stage = 0; more; stage = 1 - stage) {
      ptx::cp_async_wait<0>();
      __syncthreads();
      const Tiles& next = shared.info(stage).next;
      more = !next.done();
      if (more) fetch_queries(block, next, 1 - stage, arriving);
      if constexpr (Traits::kFusesDelta) {
        fuse_delta(block, stage);
        __syncthreads();
      }
      work_on_stage(block, key, value, sums, stage);
      if (more) describe_queries(block, next, 1 - stage, arriving);
    }
  }
  store_columns(block, sums);
}

}  // namespace prefix_kernels::cuda::sm80
