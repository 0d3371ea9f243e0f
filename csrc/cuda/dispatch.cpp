#include "dispatch.h"

#include <algorithm>
#include <type_traits>

#include "check_range.h"
#include "padding.h"
#include "simt/simt.h"
#include "sm80/backward/launch.h"
#include "sm80/decode/launch.h"
#include "sm80/forward/launch.h"

namespace prefix_kernels::cuda {
namespace {

// Calls call(the smallest compiled head dim that holds `head_dim`).
template <class Call>
void with_head_dim(int64_t head_dim, Call call) {
  if (head_dim <= 32) return call(std::integral_constant<int, 32>());
  if (head_dim <= 64) return call(std::integral_constant<int, 64>());
  if (head_dim <= 96) return call(std::integral_constant<int, 96>());
  if (head_dim <= 128) return call(std::integral_constant<int, 128>());
  if (head_dim <= 192) return call(std::integral_constant<int, 192>());
  call(std::integral_constant<int, 256>());
}

// Tells if the decode kernel, which splits the keys over blocks, serves a call of few queries. It does if the rows of a
// key head, (query, head of the group) pairs, are few; if their tiles are fewer than the multiprocessors; or if most of
// the columns are prefixes that rows of the batch share. It cannot start from results over other keys.
bool uses_decode_kernel(const AttentionParams& p, const Context& context) {
  if (p.extends || p.q_len > sm80::kMaxDecodeQueries) return false;
  constexpr int64_t kFewRows = 16;
  constexpr int64_t kTileRows = 64;  // rows of the forward kernels' smallest tile
  const int64_t rows = p.q_len * (p.q_heads / p.kv_heads);
  const int64_t tiles = p.batch * p.kv_heads * ((rows + kTileRows - 1) / kTileRows);
  const bool shares = p.prefix_len >= p.k_len && p.num_prefixes < p.batch * p.prefix_slots;
  return rows <= kFewRows || tiles < context.sm_count || shares;
}

template <DType kDType>
void forward_sm80(AttentionParams p, const Context& context) {
  const bool few_queries = uses_decode_kernel(p, context);
  if (!few_queries) check_prefixes(p, context);
  find_padding(p, context);
  with_head_dim(std::max(p.head_dim, p.value_dim), [&](auto head_dim) {
    if (few_queries)
      sm80::decode<kDType, head_dim>(p, context);
    else
      sm80::forward<kDType, head_dim>(p, context);
  });
}

template <typename T>
void forward_simt(const AttentionParams& p, const Context& context) {
  check_prefixes(p, context);
  simt::forward<T>(p, context);
}

template <DType kDType>
void backward_sm80(BackwardParams b, const Context& context) {
  if (b.needs(kDQuery) || b.needs(kDKey) || b.needs(kDValue) || b.forward.mask.prefix_columns > 0)
    find_padding(b.forward, context);
  else
    b.forward.mask = {};  // the mask covers no column that is visited
  with_head_dim(std::max(b.forward.head_dim, b.forward.value_dim),
                [&](auto head_dim) { sm80::backward<kDType, head_dim>(b, context); });
}

}  // namespace

void dispatch_forward(const AttentionParams& p, const Context& context) {
  switch (p.query.dtype) {
    case DType::kFloat64:
      return forward_simt<double>(p, context);
    case DType::kFloat32:
      return forward_simt<float>(p, context);
    case DType::kBFloat16:
      return forward_sm80<DType::kBFloat16>(p, context);
    case DType::kFloat16:
      return forward_sm80<DType::kFloat16>(p, context);
  }
}

void dispatch_backward(const BackwardParams& b, const Context& context) {
  check_prefixes(b.forward, context);
  switch (b.forward.query.dtype) {
    case DType::kFloat64:
      return simt::backward<double>(b, context);
    case DType::kFloat32:
      return simt::backward<float>(b, context);
    case DType::kBFloat16:
      return backward_sm80<DType::kBFloat16>(b, context);
    case DType::kFloat16:
      return backward_sm80<DType::kFloat16>(b, context);
  }
}

}  // namespace prefix_kernels::cuda
