#include "../backward/launch.cuh"

namespace prefix_kernels::cuda::sm80 {

template void backward<DType::kBFloat16, 32>(const BackwardParams&, const Context&);

}  // namespace prefix_kernels::cuda::sm80
