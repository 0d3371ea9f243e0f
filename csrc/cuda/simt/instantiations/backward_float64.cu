#include "../backward.cuh"

template void prefix_kernels::cuda::simt::backward<double>(const prefix_kernels::BackwardParams&,
                                                           const prefix_kernels::cuda::Context&);
