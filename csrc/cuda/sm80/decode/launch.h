// The forward pass of few queries of float16 and bfloat16 on tensor cores, for host code that knows neither torch nor
// CUDA.
#pragma once

#include "../../../attention_params.h"
#include "../../context.h"

namespace prefix_kernels::cuda::sm80 {

// The same for few queries against many keys, which are split over blocks. What the rows of a batch share of their
// prefixes is read once for many of them.
template <DType kDType, int kHeadDim>
void decode(const AttentionParams& p, const Context& context);

inline constexpr int64_t kMaxDecodeQueries = 16;

}  // namespace prefix_kernels::cuda::sm80
