// Attention of [prefixes ; sequence], forward, after FlashAttention-2 (Dao, 2023).
//
//   S = scale Q K'^T      P = softmax(S)      out = P V'      lse = log sum exp S
//
// A block of four warps owns kRows rows: queries of one head, or of several heads that share keys, the head running
// fastest. A warp owns 16 kRowBlocks rows alone and never exchanges scores with another. Keys and values stream through
// shared memory in tiles of kCells cells, two buffers each:
//
//   copy   | K0 | V0 | K1        | V1        | K2        | V2 ...
//   compute           S = Q K0^T   out += P V0  S = Q K1^T
//
// Scores stay in registers: a thread's accumulators of S, packed to 16 bits, are its operand of P V'.
#pragma once

#include "dropout.cuh"
#include "epilogue.cuh"
#include "load.cuh"
#include "resume.cuh"
#include "scores.cuh"
#include "values.cuh"

namespace prefix_kernels::cuda::sm80 {

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSM) forward_kernel(const ForwardParams params) {
  using Shared = ForwardShared<Traits>;
  constexpr int kCells = Traits::kCells;
  const AttentionParams& p = params.attention;
  const int thread = threadIdx.x % Traits::kThreads, lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int head_dim = static_cast<int>(p.head_dim), value_dim = static_cast<int>(p.value_dim);
  const int warp_row = warp * Traits::kWarpRows;

  Shared::announce(warp);
  typename Shared::Plan& plan = Shared::plan(warp);
  plan.make(p, rows_of_block(p, params.pack, params.row_tiles, Traits::kRows, blockIdx.x), warp_row, lane);
  const BlockRows& rows = plan.rows;
  const VisitedCells& cells = plan.cells;
  const int tiles = (cells.count + kCells - 1) / kCells;

  load_queries<Traits>(params, rows, thread);
  QueryOperand<Traits> query;
  const WarpDropout dropout(p, rows, warp_row, lane);
  OnlineSoftmax<Traits::kRowBlocks, Traits::kGeneral> softmax;
  typename Traits::Out out;
  set_all(out, 0.0f);
  if (!Traits::kDropout && p.extends) resume_rows<Traits>(params, rows, warp, lane, softmax, out);

  // Turn -1 only copies, so that every copy has one place in the code.
#pragma unroll 1
  for (int j = -1; j < tiles; ++j) {
    ptx::cp_async_wait<1>();
    __syncthreads();  // all have key tile j, and none reads tile j - 1 any more
    if (j + 1 < tiles) load_keys<Traits>(params, rows, cells, j + 1, head_dim, thread);
    ptx::cp_async_commit();
    const typename QueryOperand<Traits>::Reader query_reader(Shared::queries() + warp_row * Traits::kHeadDim, lane);
    if (Traits::kQueryInRegisters && j == 0) query.keep(query_reader);

    typename Traits::Scores scores;
    unsigned seen = 0;  // one bit per cell of the tile that some row sees
    const KeyReader<Traits> key(Shared::keys(j), lane);
    const CellRun run = Traits::kMayDrop ? CellRun(cells, j * kCells, kCells) : CellRun();
    if (j >= 0) seen = tile_scores(scores, params, plan, j, run.exists, query, query_reader, key, warp_row, lane);
    if (seen != 0) softmax.update(scores, out, Traits::kGeneral ? kLog2E : params.scale_log2);

    ptx::cp_async_wait<1>();
    __syncthreads();  // all have value tile j
    if (j + 1 < tiles) load_values<Traits>(params, rows, cells, j + 1, value_dim, thread);
    ptx::cp_async_commit();
    if (Traits::kMayDrop && seen != 0 && (Traits::kDropout || p.dropout_threshold > 0)) {
      drop_out_tile<Traits>(scores, dropout, run, plan.tile, seen, lane);
    }
    add_values<Traits>(out, scores, seen, Shared::values(j), lane);
  }

  ptx::cp_async_wait<0>();
  __syncthreads();  // without any tile, other threads' copies of queries may still be under way
  write_results<Traits>(params, plan, softmax, out, warp_row, lane);
}

}  // namespace prefix_kernels::cuda::sm80
