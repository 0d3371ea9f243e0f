// The columns that a block owns: their place in the launch, their keys and values on the way in, their sums on the way
// out.
#pragma once

#include "columns_shared.cuh"
#include "gemm.cuh"
#include "gradient_rows.cuh"

namespace prefix_kernels::cuda::sm80 {

// The columns that block number `block` of the launch owns.
__device__ __forceinline__ ColumnsOwner columns_owner(const ColumnsParams& params, int block_n, int64_t block) {
  const AttentionParams& p = params.b.forward;
  const int heads = static_cast<int>(p.kv_heads);
  ColumnsOwner owner;
  owner.is_prefix = block < params.prefix_blocks;
  if (owner.is_prefix) {
    owner.splits = params.splits;
    owner.split = static_cast<int>(block % params.splits);
    block /= params.splits;
  } else {
    owner.splits = 1;
    owner.split = 0;
    block -= params.prefix_blocks;
  }
  const int tiles = owner.is_prefix ? params.prefix_tiles : params.sequence_tiles;
  owner.first = static_cast<int>(block % tiles) * block_n;
  owner.kv_head = static_cast<int>(block / tiles % heads);
  owner.index = static_cast<int>(block / tiles / heads);
  owner.rows = static_cast<int>(owner.is_prefix ? p.prefix_len : p.k_len);
  owner.length = owner.is_prefix ? static_cast<int>(valid_prefix_length(p, owner.index)) : owner.rows;
  return owner;
}

// A block as its functions see it. The accumulators need the registers, so the owner stays in shared memory and the
// warp's layout is computed anew wherever it is needed.
template <typename Traits_>
struct ColumnsBlock {
  using Traits = Traits_;
  using Shared = ColumnsShared<Traits>;
  using Tiles = typename Shared::Tiles;

  const ColumnsParams& params;
  const Shared& shared;
  const ColumnsOwner& owner;
  int thread;
  int lane;

  __device__ __forceinline__ const AttentionParams& attention() const { return params.b.forward; }
  __device__ __forceinline__ WarpLayout layout() const {
    return WarpLayout(thread / kWarpSize, (owner.rows - owner.first + Traits::kWarpN - 1) / Traits::kWarpN);
  }
  // Tells if dvalue of the block's segment was asked for.
  __device__ __forceinline__ bool adds_dvalue() const {
    return Traits::kWantsDValue && params.b.gradients[owner.is_prefix ? kDPrefixValue : kDValue].data != nullptr;
  }
};

// The keys and values of a warp's columns, left operands of the scores and of dP.
template <typename Traits>
using ColumnsKey = Resident<typename Traits::T, Traits::kHeadDim, Traits::kTiles, Traits::kKeyInRegisters>;
template <typename Traits>
using ColumnsValue = Resident<typename Traits::T, Traits::kHeadDim, Traits::kTiles, Traits::kValueInRegisters>;

// The sums of a warp's columns. That of a gradient that the kernel does not compute is not used.
template <typename Traits>
struct ColumnsSums {
  float dkey[Traits::kWantsDKey ? Traits::kTiles : 1][Traits::kHeadDim / 8][4];
  float dvalue[Traits::kWantsDValue ? Traits::kTiles : 1][Traits::kHeadDim / 8][4];

  __device__ __forceinline__ void begin() {
    if constexpr (Traits::kWantsDKey) clear(dkey);
    if constexpr (Traits::kWantsDValue) clear(dvalue);
  }
};

// Starts to copy the block's rows of one operand, the keys (0) or the values (1).
template <typename Block>
__device__ __forceinline__ void copy_columns(const Block& block, const Operand& x, bool aligned, int which, int dim) {
  using Traits = typename Block::Traits;
  const ColumnsOwner& owner = block.owner;
  const HeadRows source(x, owner.index, owner.kv_head, aligned);
#pragma unroll
  for (int part = 0; part < Traits::kBlockN / Traits::kBlockM; ++part) {
    copy_rows<typename Traits::T, Traits::kHeadDim, Traits::kBlockM, Traits::kThreads, false>(
        block.shared.columns(which, part), source, owner.first + part * Traits::kBlockM, owner.length, dim);
  }
}

// Loads the warp's keys and values, by way of the stages if they go into registers.
template <typename Traits>
__device__ __forceinline__ void load_columns(const ColumnsBlock<Traits>& block, ColumnsKey<Traits>& key,
                                             ColumnsValue<Traits>& value) {
  const AttentionParams& p = block.attention();
  const AlignedChunks& aligned = block.params.aligned;
  const bool is_prefix = block.owner.is_prefix;
  const int warp_row = block.layout().resident * Traits::kWarpN;  // the warp's first row among the block's columns
  copy_columns(block, is_prefix ? p.prefix_key : p.key, is_prefix ? aligned.prefix_key : aligned.key, 0,
               static_cast<int>(p.head_dim));
  if constexpr (Traits::kWantsDKey) {
    copy_columns(block, is_prefix ? p.prefix_value : p.value, is_prefix ? aligned.prefix_value : aligned.value, 1,
                 static_cast<int>(p.value_dim));
  }
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  key.take(block.shared.column(0, warp_row), block.lane);
  if constexpr (Traits::kWantsDKey) value.take(block.shared.column(1, warp_row), block.lane);
  __syncthreads();  // nobody reads the stages any more
}

// Adds the sums of warps that share columns and stores those of one gradient, times `factor`: to the gradient, or to
// the split's own place if the splits' sums are still to be added. `dim`: the gradient's head dim.
template <typename Traits, int kTiles>
__device__ __forceinline__ void store_gradient(const ColumnsBlock<Traits>& block, const WarpLayout& warps,
                                               float (&sums)[kTiles][Traits::kHeadDim / 8][4], Gradient gradient,
                                               int dim, float* partial, float factor) {
  using T = typename Traits::T;
  constexpr int kHeadDim = Traits::kHeadDim;
  const AttentionParams& p = block.attention();
  const ColumnsOwner& owner = block.owner;
  const int warp_column = owner.first + warps.resident * Traits::kWarpN;
  if (warps.parts > 1) {
    add_parts<kHeadDim, kTiles>(sums, warps, block.shared.parts(), block.lane);
  }
  if (warps.part > 0) return;
  if (owner.is_prefix && partial != nullptr) {
    const int64_t slot = (static_cast<int64_t>(owner.index) * p.kv_heads + owner.kv_head) * owner.splits + owner.split;
    store_sums<float, kHeadDim>(partial + slot * p.prefix_len * kHeadDim, kHeadDim, true, warp_column, owner.rows,
                                kHeadDim, factor, sums, block.lane);
  } else {
    const Operand& x = block.params.b.gradients[gradient];
    T* head = static_cast<T*>(x.data) + owner.index * x.batch_stride + owner.kv_head * x.head_stride;
    store_sums<T, kHeadDim>(head, x.row_stride, block.params.aligned_pairs[gradient], warp_column, owner.rows, dim,
                            factor, sums, block.lane);
  }
}

// Stores all sums of the warp. dvalue is skipped for segments whose gradient was not asked for.
template <typename Traits>
__device__ __forceinline__ void store_columns(const ColumnsBlock<Traits>& block, ColumnsSums<Traits>& sums) {
  const AttentionParams& p = block.attention();
  const ColumnsParams& params = block.params;
  const bool is_prefix = block.owner.is_prefix;
  const WarpLayout warps = block.layout();
  if constexpr (Traits::kWantsDValue) {
    // The sum holds the kept P without dropout's factor, which is applied here.
    if (block.adds_dvalue())
      store_gradient<Traits>(block, warps, sums.dvalue, is_prefix ? kDPrefixValue : kDValue,
                             static_cast<int>(p.value_dim), params.partial_dvalue, params.scalars.rescale);
  }
  if constexpr (Traits::kWantsDKey)
    store_gradient<Traits>(block, warps, sums.dkey, is_prefix ? kDPrefixKey : kDKey, static_cast<int>(p.head_dim),
                           params.partial_dkey, params.scalars.scale);
}

}  // namespace prefix_kernels::cuda::sm80
