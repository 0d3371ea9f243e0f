// Padding: the columns before the first and after the last that a batch row's mask shows to any of its queries. The
// kernels neither visit nor load them.
#pragma once

#include "../attention_params.h"
#include "context.h"

namespace prefix_kernels::cuda {

// Fills p.mask.shown on the device if all queries of a batch row share one mask row: [batch, 1, 1, columns].
void find_padding(AttentionParams& p, const Context& context);

}  // namespace prefix_kernels::cuda
