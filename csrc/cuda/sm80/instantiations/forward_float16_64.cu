#include "../forward/launch.cuh"

namespace prefix_kernels::cuda::sm80 {

template void forward<DType::kFloat16, 64>(const AttentionParams&, const Context&);

}  // namespace prefix_kernels::cuda::sm80
