// The operators' schemas, once. What Python adds (fake kernels, autograd, autocast) is in prefix_kernels/ops.py.
#include <torch/library.h>

#include "cpu/api.h"

namespace prefix_kernels {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

std::tuple<at::Tensor, at::Tensor> forward_cpu(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                               const OptionalTensor& prefix_key, const OptionalTensor& prefix_value,
                                               const OptionalTensor& attn_mask, const OptionalTensor& prefix_ids,
                                               const OptionalTensor& prefix_lens, const OptionalTensor& query_offsets,
                                               const OptionalTensor& dropout_seed, double dropout_p, bool is_causal,
                                               std::optional<double> scale, std::optional<int64_t> query_offset,
                                               int64_t window_left, int64_t window_right, bool window_includes_prefix,
                                               double softcap) {
  const OptionalTensor some_key = key, some_value = value;
  return cpu::forward({query, some_key, some_value, prefix_key, prefix_value, attn_mask, prefix_ids, prefix_lens,
                       query_offsets, dropout_seed, dropout_p, is_causal, scale, query_offset, window_left,
                       window_right, window_includes_prefix, softcap});
}

std::vector<at::Tensor> backward_cpu(const at::Tensor& dout, const OptionalTensor& dlse, const at::Tensor& query,
                                     const OptionalTensor& key, const OptionalTensor& value,
                                     const OptionalTensor& prefix_key, const OptionalTensor& prefix_value,
                                     const OptionalTensor& out, const at::Tensor& lse, const OptionalTensor& attn_mask,
                                     const OptionalTensor& prefix_ids, const OptionalTensor& prefix_lens,
                                     const OptionalTensor& query_offsets, const OptionalTensor& dropout_seed,
                                     double dropout_p, bool is_causal, std::optional<double> scale,
                                     std::optional<int64_t> query_offset, int64_t window_left, int64_t window_right,
                                     bool window_includes_prefix, double softcap, int64_t key_len,
                                     std::array<bool, kNumGradients> needs) {
  return cpu::backward(
      {query, key, value, prefix_key, prefix_value, attn_mask, prefix_ids, prefix_lens, query_offsets, dropout_seed,
       dropout_p, is_causal, scale, query_offset, window_left, window_right, window_includes_prefix, softcap},
      dout, dlse, out, lse, key_len, needs);
}

}  // namespace

#define PREFIX_KERNELS_OPTIONS                                                                                \
  "Tensor? attn_mask, Tensor? prefix_ids, Tensor? prefix_lens, Tensor? query_offsets, Tensor? dropout_seed, " \
  "float dropout_p, bool is_causal, float? scale, SymInt? query_offset, int window_left, int window_right, "  \
  "bool window_includes_prefix, float softcap"

TORCH_LIBRARY(prefix_kernels, m) {
  m.def(
      "forward(Tensor query, Tensor key, Tensor value, Tensor? prefix_key, Tensor? "
      "prefix_value, " PREFIX_KERNELS_OPTIONS ") -> (Tensor out, Tensor lse)");
  m.def(
      "backward(Tensor dout, Tensor? dlse, Tensor query, Tensor? key, Tensor? value, Tensor? prefix_key, "
      "Tensor? prefix_value, Tensor? out, Tensor lse, " PREFIX_KERNELS_OPTIONS
      ", SymInt key_len, bool[5] needs) -> Tensor[]");
  m.def("cpu_isa() -> str", &cpu::isa);
}

TORCH_LIBRARY_IMPL(prefix_kernels, CPU, m) {
  m.impl("forward", &forward_cpu);
  m.impl("backward", &backward_cpu);
}

}  // namespace prefix_kernels
