// The backward pass of float16 and bfloat16 on tensor cores, for host code that knows neither torch nor CUDA.
#pragma once

#include "../../../attention_params.h"
#include "../../context.h"

namespace prefix_kernels::cuda::sm80 {

// kHeadDim: 32, 64, 96, 128, 192 or 256, at least p.head_dim and p.value_dim. At least one batch row and one query.
// Writes every element of the gradients whose data is not null.
template <DType kDType, int kHeadDim>
void backward(const BackwardParams& b, const Context& context);

}  // namespace prefix_kernels::cuda::sm80
