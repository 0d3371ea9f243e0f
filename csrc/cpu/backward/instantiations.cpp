#include "driver.h"

namespace prefix_kernels::PREFIX_KERNELS_ISA {
template void attention_backward<PREFIX_KERNELS_SCALAR>(const BackwardParams&, int, RunWorkers);
}
