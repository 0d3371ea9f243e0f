#include "dispatch.h"

#include <stdexcept>

#include "simt/simt.h"

namespace prefix_kernels::cuda {

void dispatch_forward(const AttentionParams& p, const Context& context) {
  switch (p.query.dtype) {
    case DType::kFloat64:
      return simt::forward<double>(p, context);
    case DType::kFloat32:
      return simt::forward<float>(p, context);
    default:
      throw std::runtime_error("prefix_attention: expected float32 or float64 on CUDA");
  }
}

void dispatch_backward(const BackwardParams& b, const Context& context) {
  switch (b.forward.query.dtype) {
    case DType::kFloat64:
      return simt::backward<double>(b, context);
    case DType::kFloat32:
      return simt::backward<float>(b, context);
    default:
      throw std::runtime_error("prefix_attention: expected float32 or float64 on CUDA");
  }
}

}  // namespace prefix_kernels::cuda
