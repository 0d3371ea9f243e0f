#include "kernel.h"

namespace prefix_kernels::PREFIX_KERNELS_ISA {
template void merge_forward<PREFIX_KERNELS_SCALAR>(const MergeParams&, int, RunWorkers);
template void merge_backward<PREFIX_KERNELS_SCALAR>(const MergeBackwardParams&, int, RunWorkers);
}  // namespace prefix_kernels::PREFIX_KERNELS_ISA
