// Every check of shape, dtype, device and stride, once, for all devices.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>

#include "attention_params.h"

namespace prefix_kernels {

// The operators' arguments as torch gives them. The backward pass leaves out what its gradients do not need.
struct AttentionArguments {
  const at::Tensor& query;                         // [B, Hq, Sq, D]
  const std::optional<at::Tensor>& key;            // [B, Hkv, Sk, D]
  const std::optional<at::Tensor>& value;          // [B, Hkv, Sk, Dv]
  const std::optional<at::Tensor>& prefix_key;     // [Hkv, P, D] or [N, Hkv, P, D]
  const std::optional<at::Tensor>& prefix_value;   // [Hkv, P, Dv] or [N, Hkv, P, Dv]
  const std::optional<at::Tensor>& attn_mask;      // broadcastable to [B, Hq, Sq, Sk] or [B, Hq, Sq, M * P + Sk]
  const std::optional<at::Tensor>& prefix_ids;     // [B] or [B, M]
  const std::optional<at::Tensor>& prefix_lens;    // [N]
  const std::optional<at::Tensor>& query_offsets;  // [B]
  const std::optional<at::Tensor>& dropout_seed;   // [1]
  double dropout_p;
  bool is_causal;
  std::optional<double> scale;
  std::optional<int64_t> query_offset;
  int64_t window_left;
  int64_t window_right;
  bool window_includes_prefix;
  double softcap;
};

// Checks the device, dtype, layout and last stride of a tensor that the kernels read.
void check_operand(const char* name, const at::Tensor& x, const at::Tensor& query);

// Checks the device and dtype of a tensor of integers.
void check_integers(const char* name, const at::Tensor& x, const at::Tensor& query);

// Checks the numbers of a call.
void check_scalars(double dropout_p, std::optional<double> scale, double softcap, int64_t window_left,
                   int64_t window_right);

// Checks the arguments of the forward pass and throws what a user should read.
void check_forward(const AttentionArguments& args);

// Checks the arguments of a call that adds the prefixes to attention over other keys.
void check_extend(const AttentionArguments& args, const at::Tensor& out, const at::Tensor& lse);

// Checks the arguments of the backward pass: those of the forward pass anew, as saved-tensor hooks may have changed
// them, and that none is missing for the gradients asked for.
void check_backward(const AttentionArguments& args, const at::Tensor& dout, const std::optional<at::Tensor>& dlse,
                    const std::optional<at::Tensor>& out, const at::Tensor& lse, int64_t key_len,
                    std::array<bool, kNumGradients> needs);

// The arguments, already checked, as the kernels take them; the integer tensors and the seed are left to the device.
// `value_dim`: Dv.
AttentionParams make_params(const AttentionArguments& args, int64_t key_len, int64_t value_dim);

// Positions beyond any tensor, as «no limit» is often written, brought to where sums of them do not overflow.
inline constexpr int64_t kMaxPosition = int64_t{1} << 60;
int64_t clamp_position(int64_t position);

Operand make_operand(const at::Tensor& tensor);

DType dtype_of(const at::Tensor& tensor);

}  // namespace prefix_kernels
