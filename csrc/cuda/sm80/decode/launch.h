// The forward pass of few queries of float16 and bfloat16 on tensor cores, for host code that knows neither torch nor
// CUDA.
#pragma once

#include "../../../attention_params.h"
#include "../../context.h"

namespace prefix_kernels::cuda::sm80 {

// Attention of few queries (at most kMaxDecodeQueries) over many keys, which are split over blocks. A prefix that rows
// of the batch share is read once for many of them. kHeadDim: 32, 64, 96, 128, 192 or 256, at least p.head_dim and
// p.value_dim.
template <DType kDType, int kHeadDim>
void decode(const AttentionParams& p, const Context& context);

inline constexpr int64_t kMaxDecodeQueries = 16;

}  // namespace prefix_kernels::cuda::sm80
