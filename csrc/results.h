// The tensors that the operators make, alike on every device.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <array>
#include <tuple>

#include "validate.h"

namespace prefix_kernels {

// The tensor itself, or a copy whose last dimension has stride 1, as kernels read rows.
at::Tensor with_unit_stride(const at::Tensor& x);

// (out, lse, row_mass), not yet written. out is laid out [B, Sq, Hq, D], so that merging the heads afterwards is free;
// lse is float, or double for double queries; row_mass is like lse where a mask is added to the scores, else [0].
using Results = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// The results and p's view of them.
Results empty_results(const at::Tensor& query, AttentionParams& p);

// p's view of attention over other keys, to which the call adds its own.
void set_extended(const at::Tensor& out, const at::Tensor& lse, AttentionParams& p);

// dquery, dkey, dvalue, dprefix_key, dprefix_value; [0] where a gradient is not asked for.
using Gradients = std::array<at::Tensor, kNumGradients>;

// The tensor whose shape and dtype a gradient has but for the head dim: its input, or the input's twin where the
// backward pass does not read the input itself.
template <class Arguments>
const at::Tensor& like_of_gradient(const Arguments& args, int gradient) {
  const auto either = [](const std::optional<at::Tensor>& input, const std::optional<at::Tensor>& twin) {
    TORCH_CHECK_VALUE(input.has_value() || twin.has_value(),
                      "backward: a gradient was asked for an input that was not given");
    return input.has_value() ? &*input : &*twin;
  };
  switch (gradient) {
    case kDQuery:
      return args.query;
    case kDKey:
      return *either(args.key, args.value);
    case kDValue:
      return *either(args.value, args.key);
    case kDPrefixKey:
      return *either(args.prefix_key, args.prefix_value);
    default:
      return *either(args.prefix_value, args.prefix_key);
  }
}

// The gradients asked for and b's view of them: not yet written, or zero where there is no query.
Gradients empty_gradients(const AttentionArguments& args, std::array<bool, kNumGradients> needs, BackwardParams& b);

// The backward pass's inputs in the layout that the kernels read. Must live as long as b is used.
struct ArrivingGradients {
  at::Tensor dout, out, lse, dlse;

  ArrivingGradients(const at::Tensor& dout, const std::optional<at::Tensor>& dlse, const std::optional<at::Tensor>& out,
                    const at::Tensor& lse, BackwardParams& b);
};

}  // namespace prefix_kernels
