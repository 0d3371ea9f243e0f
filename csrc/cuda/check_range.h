// The range check of the numbers and lengths of prefixes, ahead of kernels that read them unchecked.
#pragma once

#include "../attention_params.h"
#include "context.h"

namespace prefix_kernels::cuda {

// Launches a kernel that, at a value of p.prefix_ids or p.prefix_lens out of range, prints the argument, what was
// expected and what came, and traps, as torch does for an index out of range. The decode kernel checks them itself.
void check_prefixes(const AttentionParams& p, const Context& context);

}  // namespace prefix_kernels::cuda
