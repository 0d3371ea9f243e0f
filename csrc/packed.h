// Packed sequences: rows of all sequences one behind the other, and the lengths that divide them.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>

#include "attention_params.h"
#include "results.h"

namespace prefix_kernels {

// The arguments of the packed operators as torch gives them. The backward pass leaves out what its gradients do not
// need.
struct PackedArguments {
  const at::Tensor& query;                          // [Tq, Hq, D]
  const std::optional<at::Tensor>& key;             // [Tk, Hkv, D]
  const std::optional<at::Tensor>& value;           // [Tk, Hkv, Dv]
  const std::optional<at::Tensor>& prefix_key;      // [Hkv, P, D], [Np, Hkv, P, D] or [Tp, Hkv, D]
  const std::optional<at::Tensor>& prefix_value;    // likewise, of Dv
  const at::Tensor& cu_seqlens_q;                   // [N + 1]
  const at::Tensor& cu_seqlens_k;                   // [N + 1]
  const std::optional<at::Tensor>& cu_prefix_lens;  // [Np + 1]
  const std::optional<at::Tensor>& prefix_ids;      // [N] or [N, M]
  const std::optional<at::Tensor>& prefix_lens;     // [Np]
  const std::optional<at::Tensor>& query_offsets;   // [N]
  const std::optional<at::Tensor>& dropout_seed;    // [1]
  int64_t max_seqlen_q;                             // -1: not given
  int64_t max_seqlen_k;
  double dropout_p;
  bool is_causal;
  std::optional<double> scale;
  int64_t window_left;
  int64_t window_right;
  bool window_includes_prefix;
  double softcap;
};

// Checks the arguments and throws what a user should read. `value_dim`: Dv.
void check_packed(const PackedArguments& args, int64_t value_dim);

// Checks the arguments of the backward pass, as check_backward does. `key_rows`: Tk.
void check_packed_backward(const PackedArguments& args, const at::Tensor& dout, const std::optional<at::Tensor>& dlse,
                           const std::optional<at::Tensor>& out, const at::Tensor& lse, int64_t key_rows,
                           std::array<bool, kNumGradients> needs);

// Gives the arriving gradients and out, which are [Tq, Hq, Dv], the strides of rows and heads.
void use_packed_strides(BackwardParams& b);

// The arguments, already checked, as the kernels take them; the integer tensors, the greatest lengths of what is packed
// and the seed are left to the device.
AttentionParams make_packed_params(const PackedArguments& args, int64_t value_dim);

// The packed results (out [Tq, Hq, Dv], lse [Hq, Tq]), not yet written, and p's view of them.
std::tuple<at::Tensor, at::Tensor> empty_packed_results(const at::Tensor& query, AttentionParams& p);

// The gradients asked for and b's view of them: not yet written, or zero where there is no query.
Gradients empty_packed_gradients(const PackedArguments& args, std::array<bool, kNumGradients> needs, BackwardParams& b);

}  // namespace prefix_kernels
