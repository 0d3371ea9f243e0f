// The variant of the forward kernel that a call launches, and its number of blocks.
#pragma once

#include "../../launch.h"
#include "kernel.cuh"
#include "launch.h"

namespace prefix_kernels::cuda::sm80 {

template <typename Traits>
void launch_rows(ForwardParams& params, const Context& context) {
  const AttentionParams& p = params.attention;
  const int64_t group = p.q_heads / p.kv_heads;
  const auto tiles = [&](int64_t rows) { return (rows + Traits::kRows - 1) / Traits::kRows; };
  // Dropout bits belong to 16 queries of one head.
  const bool packs = p.dropout_threshold == 0 && tiles(p.q_len * group) < tiles(p.q_len) * group;
  params.pack = packs ? static_cast<int>(group) : 1;
  params.row_tiles = static_cast<int>(tiles(p.q_len * params.pack));
  params.shared_mask =
      p.mask.data != nullptr && p.mask.row_stride == 0 && (params.pack == 1 || p.mask.head_stride == 0);
  const int64_t blocks = params.row_tiles * (p.q_heads / params.pack) * p.batch;
  launch(forward_kernel<Traits>, grid_of(blocks), dim3(Traits::kThreads), Traits::kSharedBytes, context.stream, params);
}

template <typename T, int kHeadDim, bool kGeneral, bool kDropout>
void launch_forward(ForwardParams& params, const Context& context) {
  // Twice the rows per warp, if the registers allow it, halve the reads from shared memory. The blocks, half as many,
  // must still keep every multiprocessor at work.
  constexpr int kRowBlocks = kHeadDim <= (kGeneral ? 64 : 128) ? 2 : 1;
  using Large = ForwardTraits<T, kHeadDim, kGeneral, kDropout, kRowBlocks>;
  const AttentionParams& p = params.attention;
  const int64_t blocks = (p.q_len + Large::kRows - 1) / Large::kRows * p.q_heads * p.batch;
  if (p.q_len > Large::kRows / 2 && blocks >= context.sm_count) {
    launch_rows<Large>(params, context);
  } else {
    launch_rows<ForwardTraits<T, kHeadDim, kGeneral, kDropout, 1>>(params, context);
  }
}

template <DType kDType, int kHeadDim>
void forward(const AttentionParams& p, const Context& context) {
  using T = std::conditional_t<kDType == DType::kFloat16, half, bfloat16>;
  ForwardParams params;
  params.attention = p;
  params.scale = static_cast<float>(p.scale);
  params.scale_log2 = static_cast<float>(p.scale) * kLog2E;
  params.softcap = static_cast<float>(p.softcap);
  params.aligned_query = has_aligned_chunks(p.query, p.head_dim);
  params.aligned_key = has_aligned_chunks(p.key, p.head_dim);
  params.aligned_value = has_aligned_chunks(p.value, p.value_dim);
  params.aligned_prefix_key = has_aligned_chunks(p.prefix_key, p.head_dim);
  params.aligned_prefix_value = has_aligned_chunks(p.prefix_value, p.value_dim);
  params.aligned_out = has_aligned_chunks(p.out, p.value_dim);

  // The plain kernel divides the lse that it extends by scale, which must not overflow.
  const double least_scale = p.extends ? 1e-30 : 0.0;
  const bool general = p.mask.data != nullptr || p.softcap > 0 || !(p.scale > least_scale);
  if (general) {
    launch_forward<T, kHeadDim, true, false>(params, context);
  } else if (p.dropout_threshold > 0) {
    launch_forward<T, kHeadDim, false, true>(params, context);
  } else {
    launch_forward<T, kHeadDim, false, false>(params, context);
  }
}

}  // namespace prefix_kernels::cuda::sm80
