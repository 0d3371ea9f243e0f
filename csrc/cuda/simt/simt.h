// float32 and float64 attention of any head dim, plain and obviously right.
#pragma once

#include "../../attention_params.h"
#include "../context.h"

namespace prefix_kernels::cuda::simt {

// T is the query's type, float or double; p.batch and p.q_len are at least 1.
template <class T>
void forward(const AttentionParams& p, const Context& context);

template <class T>
void backward(const BackwardParams& b, const Context& context);

}  // namespace prefix_kernels::cuda::simt
