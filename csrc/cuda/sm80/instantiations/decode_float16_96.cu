#include "../decode/launch.cuh"

namespace prefix_kernels::cuda::sm80 {

template void decode<DType::kFloat16, 96>(const AttentionParams&, const Context&);

}  // namespace prefix_kernels::cuda::sm80
