// Padding: columns that the mask of a batch row hides from all its queries, before the first that it shows and after
// the last. The kernels neither visit nor load them.
#pragma once

#include "../attention_params.h"
#include "context.h"

namespace prefix_kernels::cuda {

// Finds p.mask.shown on the device, where all queries of a batch row have one mask: [batch, 1, 1, columns].
void find_padding(AttentionParams& p, const Context& context);

}  // namespace prefix_kernels::cuda
