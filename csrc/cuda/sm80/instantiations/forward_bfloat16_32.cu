#include "../forward/launch.cuh"

namespace prefix_kernels::cuda::sm80 {

template void forward<DType::kBFloat16, 32>(const AttentionParams&, const Context&);

}  // namespace prefix_kernels::cuda::sm80
