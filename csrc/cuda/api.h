// A GPU's entry points: tensors in, tensors out. Nothing here reads what stands in the device's memory.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <tuple>
#include <vector>

#include "../merge.h"
#include "../results.h"
#include "../validate.h"

namespace prefix_kernels::cuda {

Results forward(const AttentionArguments& args);

// Adds attention over the prefixes to the out and lse of attention over other keys, in place.
void extend(const AttentionArguments& args, const at::Tensor& out, const at::Tensor& lse);

// The asked-for gradients, in the order query, key, value, prefix_key, prefix_value.
Gradients backward(const AttentionArguments& args, const at::Tensor& dout, const std::optional<at::Tensor>& dlse,
                   const std::optional<at::Tensor>& out, const at::Tensor& lse, int64_t key_len,
                   std::array<bool, kNumGradients> needs);

// Attention over all keys from attention over disjoint sets of them: out and lse.
std::tuple<at::Tensor, at::Tensor> merge(at::TensorList outs, at::TensorList lses);

// The gradients of outs and then of lses, [0] where `needs` does not ask for one.
std::vector<at::Tensor> merge_backward(const at::Tensor& dout, const std::optional<at::Tensor>& dlse,
                                       at::TensorList outs, at::TensorList lses, const std::vector<bool>& needs);

}  // namespace prefix_kernels::cuda
