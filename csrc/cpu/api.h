// The CPU's entry points: tensors in, tensors out.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "../merge.h"
#include "../packed.h"
#include "../results.h"
#include "../validate.h"

namespace prefix_kernels::cpu {

// The ISA of the kernels in use: PREFIX_KERNELS_CPU_ISA where set, else the best that this processor runs.
std::string isa();

Results forward(const AttentionArguments& args);

// Adds the prefixes to `out` and `lse`, which hold attention of the same queries over other keys.
void extend(const AttentionArguments& args, const at::Tensor& out, const at::Tensor& lse);

// The asked-for gradients, in the order query, key, value, prefix_key, prefix_value.
Gradients backward(const AttentionArguments& args, const at::Tensor& dout, const std::optional<at::Tensor>& dlse,
                   const std::optional<at::Tensor>& out, const at::Tensor& lse, int64_t key_len,
                   std::array<bool, kNumGradients> needs);

// The same for packed sequences: out and lse, and the asked-for gradients.
std::tuple<at::Tensor, at::Tensor> packed_forward(const PackedArguments& args);
Gradients packed_backward(const PackedArguments& args, const at::Tensor& dout, const std::optional<at::Tensor>& dlse,
                          const std::optional<at::Tensor>& out, const at::Tensor& lse, int64_t key_rows,
                          std::array<bool, kNumGradients> needs);

// Attention over all keys from attention over disjoint sets of them: out and lse.
std::tuple<at::Tensor, at::Tensor> merge(at::TensorList outs, at::TensorList lses);

// The gradients of outs and then of lses, [0] where `needs` does not ask for one.
std::vector<at::Tensor> merge_backward(const at::Tensor& dout, const std::optional<at::Tensor>& dlse,
                                       at::TensorList outs, at::TensorList lses, const std::vector<bool>& needs);

}  // namespace prefix_kernels::cpu
