#include "results.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

namespace prefix_kernels {
namespace {

// A dense tensor with the strides of its input where it has that head dim and the kernels can write them.
at::Tensor empty_gradient(const at::Tensor& input, int64_t head_dim) {
  if (input.size(-1) != head_dim) {
    auto sizes = input.sizes().vec();
    sizes.back() = head_dim;
    return at::empty(sizes, input.options());
  }
  at::Tensor gradient = at::empty_like(input);
  const bool writable = input.numel() > 0 && (input.size(-1) == 1 || gradient.stride(-1) == 1);
  return writable ? gradient : at::empty_like(input, {}, at::MemoryFormat::Contiguous);
}

}  // namespace

at::Tensor with_unit_stride(const at::Tensor& x) { return x.size(-1) > 1 && x.stride(-1) != 1 ? x.contiguous() : x; }

Results empty_results(const at::Tensor& query, AttentionParams& p) {
  const at::ScalarType lse_type = query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  at::Tensor out = at::empty({p.batch, p.q_len, p.q_heads, p.value_dim}, query.options()).transpose(1, 2);
  at::Tensor lse = at::empty({p.batch, p.q_heads, p.q_len}, query.options().dtype(lse_type));
  p.out = make_operand(out);
  p.lse = lse.mutable_data_ptr();
  const bool mask_is_added = p.mask.data != nullptr && !p.mask.is_bool;
  at::Tensor row_mass = mask_is_added ? at::empty_like(lse) : at::empty({0}, lse.options());
  if (mask_is_added) p.row_mass = row_mass.mutable_data_ptr();
  return {out, lse, row_mass};
}

void set_extended(const at::Tensor& out, const at::Tensor& lse, AttentionParams& p) {
  p.out = make_operand(out);
  p.lse = lse.mutable_data_ptr();
  p.extends = true;
}

Gradients empty_gradients(const AttentionArguments& args, std::array<bool, kNumGradients> needs, BackwardParams& b) {
  Gradients gradients;
  for (int i = 0; i < kNumGradients; ++i) {
    if (!needs[i]) {
      gradients[i] = at::empty({0}, args.query.options());
      continue;
    }
    const bool is_value = i == kDValue || i == kDPrefixValue;
    gradients[i] = empty_gradient(like_of_gradient(args, i), is_value ? b.forward.value_dim : b.forward.head_dim);
    b.gradients[i] = make_operand(gradients[i]);
    if (b.forward.batch == 0 || b.forward.q_len == 0) gradients[i].zero_();
  }
  return gradients;
}

ArrivingGradients::ArrivingGradients(const at::Tensor& dout, const std::optional<at::Tensor>& dlse,
                                     const std::optional<at::Tensor>& out, const at::Tensor& lse, BackwardParams& b)
    : dout(with_unit_stride(dout)), lse(lse.contiguous()) {
  b.dout = make_operand(this->dout);
  if (out.has_value()) {
    this->out = with_unit_stride(*out);  // a saved-tensor hook may have returned it with other strides
    b.forward.out = make_operand(this->out);
  }
  b.forward.lse = const_cast<void*>(this->lse.const_data_ptr());
  if (dlse.has_value()) {
    this->dlse = dlse->to(lse.scalar_type()).contiguous();
    b.dlse = this->dlse.const_data_ptr();
  }
}

}  // namespace prefix_kernels
