// Merging partial attentions: the checks of the tensors, the results, and the kernels' view of both, for all devices.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "merge_params.h"

namespace prefix_kernels {

// The tensors of `merge(outs, lses)` as a kernel reads and writes them. Must live as long as its params are used.
struct MergeCall {
  MergeCall(at::TensorList outs, at::TensorList lses);

  bool is_empty() const { return lse.numel() == 0; }
  std::tuple<at::Tensor, at::Tensor> results() const { return {out, lse}; }

  std::vector<at::Tensor> outs, lses;
  at::Tensor out, lse;  // not yet written
  MergeParams params;
};

// The tensors of `merge_backward`. `needs`: for each of outs and then of lses, if its gradient is asked for; outs may
// be left out where none of the lses' is.
struct MergeBackwardCall {
  MergeBackwardCall(const at::Tensor& dout, const std::optional<at::Tensor>& dlse, at::TensorList outs,
                    at::TensorList lses, const std::vector<bool>& needs);

  bool is_empty() const { return lses[0].numel() == 0; }
  // The gradients in the dtypes of their inputs, [0] where not asked for; to be called after the kernel has run.
  std::vector<at::Tensor> results() const;

  std::vector<at::Tensor> outs, lses;
  at::Tensor dout, dlse;
  std::vector<at::Tensor> gradients;  // those of outs and then of lses, not yet written
  std::vector<at::ScalarType> dtypes;
  MergeBackwardParams params;
};

}  // namespace prefix_kernels
