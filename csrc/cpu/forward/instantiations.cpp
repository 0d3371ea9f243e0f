#include "driver.h"

namespace prefix_kernels::PREFIX_KERNELS_ISA {
template void attention_forward<PREFIX_KERNELS_SCALAR>(const AttentionParams&, int, RunWorkers);
}
