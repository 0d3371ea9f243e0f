// The largest call on a GPU: the kernels count rows and columns in 32 bits, and only offsets in memory in 64.
#pragma once

#include <c10/util/Exception.h>

#include "../attention_params.h"

namespace prefix_kernels::cuda {

// Throws ValueError where a number of rows or columns, with what it is rounded up to, does not fit.
inline void check_limits(const AttentionParams& p) {
  constexpr int64_t kMost = int64_t{1} << 30;
  const auto at_most = [&](const char* name, const char* what, int64_t count) {
    TORCH_CHECK_VALUE(count <= kMost, name, ": expected at most ", kMost, " ", what, " on a GPU, got ", count);
  };
  at_most("query", "rows and heads", p.batch * p.q_heads);
  at_most("query", "queries of the heads that share a key head", p.q_len * (p.q_heads / p.kv_heads));
  at_most("key", "keys", p.k_len);
  at_most("prefix_key", "prefixes and heads", p.num_prefixes * p.kv_heads);
  at_most("prefix_key", "columns", p.prefix_slots * p.prefix_len);
  at_most("prefix_ids", "elements", p.batch * p.prefix_slots);
}

}  // namespace prefix_kernels::cuda
