// The only switch over dtype, head dim and kernel variant.
#pragma once

#include "../attention_params.h"
#include "context.h"

namespace prefix_kernels::cuda {

// p.batch and p.q_len are at least 1. Throw std::runtime_error where a launch fails.
void dispatch_forward(const AttentionParams& p, const Context& context);
void dispatch_backward(const BackwardParams& b, const Context& context);

}  // namespace prefix_kernels::cuda
