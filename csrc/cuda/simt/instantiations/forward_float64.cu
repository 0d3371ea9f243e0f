#include "../forward.cuh"

template void prefix_kernels::cuda::simt::forward<double>(const prefix_kernels::AttentionParams&,
                                                          const prefix_kernels::cuda::Context&);
