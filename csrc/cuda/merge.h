// Merging partial attentions on a GPU, one warp per row, in a fixed order without atomics.
#pragma once

#include "../merge_params.h"
#include "context.h"

namespace prefix_kernels::cuda {

// There is at least one row.
void merge_rows(const MergeParams& p, const Context& context);

void merge_backward_rows(const MergeBackwardParams& b, const Context& context);

}  // namespace prefix_kernels::cuda
