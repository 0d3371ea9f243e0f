// The only definition of the operators' schemas. prefix_kernels/ops.py adds fake kernels and autocast,
// prefix_kernels/autograd.py the derivatives.
#include <torch/library.h>

#include "validate.h"

#if defined(PREFIX_KERNELS_EMULATED) || defined(PREFIX_KERNELS_WITH_CUDA)
#include "cuda/api.h"
#endif
#if !defined(PREFIX_KERNELS_EMULATED)
#include "cpu/api.h"
#endif

// tests/helpers/emulated.py registers the same operators under a name of its own, where the CPU runs the CUDA kernels.
#if defined(PREFIX_KERNELS_EMULATED)
#define PREFIX_KERNELS_LIBRARY PREFIX_KERNELS_EMULATED
#else
#define PREFIX_KERNELS_LIBRARY prefix_kernels
#endif
// Expands the macro's argument before torch makes a name of it.
#define PREFIX_KERNELS_DEFINE(library, m) TORCH_LIBRARY(library, m)
#define PREFIX_KERNELS_IMPLEMENT(library, key, m) TORCH_LIBRARY_IMPL(library, key, m)

namespace prefix_kernels {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

template <auto kForward>
Results forward_on(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                   const OptionalTensor& prefix_key, const OptionalTensor& prefix_value,
                   const OptionalTensor& attn_mask, const OptionalTensor& prefix_ids, const OptionalTensor& prefix_lens,
                   const OptionalTensor& query_offsets, const OptionalTensor& dropout_seed, double dropout_p,
                   bool is_causal, std::optional<double> scale, std::optional<int64_t> query_offset,
                   int64_t window_left, int64_t window_right, bool window_includes_prefix, double softcap) {
  const OptionalTensor some_key = key, some_value = value;
  return kForward({query, some_key, some_value, prefix_key, prefix_value, attn_mask, prefix_ids, prefix_lens,
                   query_offsets, dropout_seed, dropout_p, is_causal, scale, query_offset, window_left, window_right,
                   window_includes_prefix, softcap});
}

// The checks of the forward pass alone, for a call that another library computes in part.
void check_on_any(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                  const OptionalTensor& prefix_key, const OptionalTensor& prefix_value, const OptionalTensor& attn_mask,
                  const OptionalTensor& prefix_ids, const OptionalTensor& prefix_lens,
                  const OptionalTensor& query_offsets, const OptionalTensor& dropout_seed, double dropout_p,
                  bool is_causal, std::optional<double> scale, std::optional<int64_t> query_offset, int64_t window_left,
                  int64_t window_right, bool window_includes_prefix, double softcap) {
  const OptionalTensor some_key = key, some_value = value;
  check_forward({query, some_key, some_value, prefix_key, prefix_value, attn_mask, prefix_ids, prefix_lens,
                 query_offsets, dropout_seed, dropout_p, is_causal, scale, query_offset, window_left, window_right,
                 window_includes_prefix, softcap});
}

template <auto kExtend>
void extend_on(const at::Tensor& query, at::Tensor out, at::Tensor lse, const at::Tensor& prefix_key,
               const at::Tensor& prefix_value, const OptionalTensor& prefix_ids, const OptionalTensor& prefix_lens,
               std::optional<double> scale) {
  const OptionalTensor none, some_key = prefix_key, some_value = prefix_value;
  kExtend({query, none, none, some_key, some_value, none, prefix_ids, prefix_lens, none, none, 0.0, false, scale,
           std::nullopt, -1, -1, false, 0.0},
          out, lse);
}

template <auto kBackward>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward_on(
    const at::Tensor& dout, const OptionalTensor& dlse, const at::Tensor& query, const OptionalTensor& key,
    const OptionalTensor& value, const OptionalTensor& prefix_key, const OptionalTensor& prefix_value,
    const OptionalTensor& out, const at::Tensor& lse, const OptionalTensor& attn_mask, const OptionalTensor& prefix_ids,
    const OptionalTensor& prefix_lens, const OptionalTensor& query_offsets, const OptionalTensor& dropout_seed,
    double dropout_p, bool is_causal, std::optional<double> scale, std::optional<int64_t> query_offset,
    int64_t window_left, int64_t window_right, bool window_includes_prefix, double softcap, int64_t key_len,
    std::array<bool, kNumGradients> needs) {
  const Gradients gradients = kBackward(
      {query, key, value, prefix_key, prefix_value, attn_mask, prefix_ids, prefix_lens, query_offsets, dropout_seed,
       dropout_p, is_causal, scale, query_offset, window_left, window_right, window_includes_prefix, softcap},
      dout, dlse, out, lse, key_len, needs);
  return std::tuple_cat(gradients);
}

// The options of the packed operators, in the order of their schema.
#define PREFIX_KERNELS_PACKED_PARAMETERS                                                                        \
  const at::Tensor &cu_seqlens_q, const at::Tensor &cu_seqlens_k, const OptionalTensor &cu_prefix_lens,         \
      const OptionalTensor &prefix_ids, const OptionalTensor &prefix_lens, const OptionalTensor &query_offsets, \
      const OptionalTensor &dropout_seed, int64_t max_seqlen_q, int64_t max_seqlen_k, double dropout_p,         \
      bool is_causal, std::optional<double> scale, int64_t window_left, int64_t window_right,                   \
      bool window_includes_prefix, double softcap
#define PREFIX_KERNELS_PACKED_VALUES                                                                              \
  cu_seqlens_q, cu_seqlens_k, cu_prefix_lens, prefix_ids, prefix_lens, query_offsets, dropout_seed, max_seqlen_q, \
      max_seqlen_k, dropout_p, is_causal, scale, window_left, window_right, window_includes_prefix, softcap

template <auto kForward>
std::tuple<at::Tensor, at::Tensor> packed_forward_on(const at::Tensor& query, const at::Tensor& key,
                                                     const at::Tensor& value, const OptionalTensor& prefix_key,
                                                     const OptionalTensor& prefix_value,
                                                     PREFIX_KERNELS_PACKED_PARAMETERS) {
  const OptionalTensor some_key = key, some_value = value;
  return kForward({query, some_key, some_value, prefix_key, prefix_value, PREFIX_KERNELS_PACKED_VALUES});
}

template <auto kBackward>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> packed_backward_on(
    const at::Tensor& dout, const OptionalTensor& dlse, const at::Tensor& query, const OptionalTensor& key,
    const OptionalTensor& value, const OptionalTensor& prefix_key, const OptionalTensor& prefix_value,
    const OptionalTensor& out, const at::Tensor& lse, PREFIX_KERNELS_PACKED_PARAMETERS, int64_t key_rows,
    std::array<bool, kNumGradients> needs) {
  return std::tuple_cat(kBackward({query, key, value, prefix_key, prefix_value, PREFIX_KERNELS_PACKED_VALUES}, dout,
                                  dlse, out, lse, key_rows, needs));
}

template <auto kMergeBackward>
std::vector<at::Tensor> merge_backward_on(const at::Tensor& dout, const OptionalTensor& dlse, at::TensorList outs,
                                          at::TensorList lses, c10::List<bool> needs) {
  return kMergeBackward(dout, dlse, outs, lses, std::vector<bool>(needs.begin(), needs.end()));
}

}  // namespace

#define PREFIX_KERNELS_OPTIONS                                                                                \
  "Tensor? attn_mask, Tensor? prefix_ids, Tensor? prefix_lens, Tensor? query_offsets, Tensor? dropout_seed, " \
  "float dropout_p, bool is_causal, float? scale, SymInt? query_offset, int window_left, int window_right, "  \
  "bool window_includes_prefix, float softcap"

#define PREFIX_KERNELS_PACKED_OPTIONS                                                                               \
  "Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? cu_prefix_lens, Tensor? prefix_ids, Tensor? prefix_lens, "     \
  "Tensor? query_offsets, Tensor? dropout_seed, SymInt max_seqlen_q, SymInt max_seqlen_k, "                         \
  "float dropout_p, bool is_causal, float? scale, int window_left, int window_right, bool window_includes_prefix, " \
  "float softcap"

PREFIX_KERNELS_DEFINE(PREFIX_KERNELS_LIBRARY, m) {
  m.def(
      "forward(Tensor query, Tensor key, Tensor value, Tensor? prefix_key, Tensor? "
      "prefix_value, " PREFIX_KERNELS_OPTIONS ") -> (Tensor out, Tensor lse, Tensor row_mass)");
  m.def(
      "backward(Tensor dout, Tensor? dlse, Tensor query, Tensor? key, Tensor? value, Tensor? prefix_key, "
      "Tensor? prefix_value, Tensor? out, Tensor lse, " PREFIX_KERNELS_OPTIONS
      ", SymInt key_len, bool[5] needs) -> (Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dprefix_key, "
      "Tensor dprefix_value)");
  m.def(
      "extend_(Tensor query, Tensor(a!) out, Tensor(b!) lse, Tensor prefix_key, Tensor prefix_value, Tensor? "
      "prefix_ids, Tensor? prefix_lens, float? scale) -> ()");
  m.def(
      "check(Tensor query, Tensor key, Tensor value, Tensor? prefix_key, Tensor? prefix_value, " PREFIX_KERNELS_OPTIONS
      ") -> ()",
      &check_on_any);
  m.def("merge(Tensor[] outs, Tensor[] lses) -> (Tensor out, Tensor lse)");
  m.def("merge_backward(Tensor dout, Tensor? dlse, Tensor[] outs, Tensor[] lses, bool[] needs) -> Tensor[]");
#if !defined(PREFIX_KERNELS_EMULATED)
  m.def("cpu_isa() -> str", &cpu::isa);
  m.def(
      "packed_forward(Tensor query, Tensor key, Tensor value, Tensor? prefix_key, Tensor? "
      "prefix_value, " PREFIX_KERNELS_PACKED_OPTIONS ") -> (Tensor out, Tensor lse)");
  m.def(
      "packed_backward(Tensor dout, Tensor? dlse, Tensor query, Tensor? key, Tensor? value, Tensor? prefix_key, "
      "Tensor? prefix_value, Tensor? out, Tensor lse, " PREFIX_KERNELS_PACKED_OPTIONS
      ", SymInt key_rows, bool[5] needs) -> (Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dprefix_key, "
      "Tensor dprefix_value)");
#endif
}

#if defined(PREFIX_KERNELS_EMULATED)
PREFIX_KERNELS_IMPLEMENT(PREFIX_KERNELS_LIBRARY, CPU, m) {
  m.impl("forward", &forward_on<&cuda::forward>);
  m.impl("extend_", &extend_on<&cuda::extend>);
  m.impl("backward", &backward_on<&cuda::backward>);
  m.impl("merge", &cuda::merge);
  m.impl("merge_backward", &merge_backward_on<&cuda::merge_backward>);
}
#else
PREFIX_KERNELS_IMPLEMENT(PREFIX_KERNELS_LIBRARY, CPU, m) {
  m.impl("forward", &forward_on<&cpu::forward>);
  m.impl("extend_", &extend_on<&cpu::extend>);
  m.impl("backward", &backward_on<&cpu::backward>);
  m.impl("packed_forward", &packed_forward_on<&cpu::packed_forward>);
  m.impl("packed_backward", &packed_backward_on<&cpu::packed_backward>);
  m.impl("merge", &cpu::merge);
  m.impl("merge_backward", &merge_backward_on<&cpu::merge_backward>);
}
#endif

#if defined(PREFIX_KERNELS_WITH_CUDA)
PREFIX_KERNELS_IMPLEMENT(PREFIX_KERNELS_LIBRARY, CUDA, m) {
  m.impl("forward", &forward_on<&cuda::forward>);
  m.impl("extend_", &extend_on<&cuda::extend>);
  m.impl("backward", &backward_on<&cuda::backward>);
  m.impl("merge", &cuda::merge);
  m.impl("merge_backward", &merge_backward_on<&cuda::merge_backward>);
}
#endif

}  // namespace prefix_kernels
