// The kernels that a backward pass launches, and their numbers of blocks.
//
//   asked for                        launched
//   any but dvalue, dprefix_value    delta.cuh, unless only gradients of prefixes of one tile are asked for
//   dkey, dvalue, dprefix_*          columns.cuh: once for prefixes and sequences together if both want the same sums;
//                                    dK and dV apart if the registers do not hold both
//   dprefix_* of several blocks      reduce.cuh
//   dquery                           rows.cuh
#pragma once

#include <algorithm>
#include <type_traits>

#include "../../launch.h"
#include "columns.cuh"
#include "delta.cuh"
#include "launch.h"
#include "reduce.cuh"
#include "rows.cuh"

namespace prefix_kernels::cuda::sm80 {

// Tells if a call needs the general kernels: the plain ones have no mask, softcap, dropout or windows over the prefix.
inline bool is_general(const AttentionParams& p) {
  return p.mask.data != nullptr || p.softcap > 0 || p.dropout_threshold > 0 ||
         (p.window_includes_prefix && p.window_left >= 0);
}

template <typename T, int kHeadDim>
class Backward {
 public:
  Backward(const BackwardParams& b, const Context& context) : b_(b), p_(b.forward), context_(context) {}

  void run() {
    if ((b_.needs(kDQuery) || b_.needs(kDKey) || b_.needs(kDPrefixKey)) && !fuses_delta()) launch_delta();
    if (is_general(p_)) {
      run_columns<true>();
      if (b_.needs(kDQuery)) launch_rows<true>();
    } else {
      run_columns<false>();
      if (b_.needs(kDQuery)) launch_rows<false>();
    }
  }

 private:
  // Tells if the columns kernel computes delta: if one block owns all columns of a prefix, no other reads the same rows
  // of out.
  bool fuses_delta() const {
    const bool alone = !b_.needs(kDQuery) && !b_.needs(kDKey) && !b_.needs(kDValue);
    return kBothSums<kHeadDim> && alone && b_.needs(kDPrefixKey) &&
           p_.prefix_len <= ColumnsTraits<T, kHeadDim, true, true, false, true>::kBlockN;
  }

  // The head dim of a gradient.
  int64_t head_dim_of(int gradient) const {
    return gradient == kDValue || gradient == kDPrefixValue ? p_.value_dim : p_.head_dim;
  }

  static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

  void launch_delta() {
    delta_ = static_cast<float*>(context_.allocate(p_.batch * p_.q_heads * p_.q_len * sizeof(float)));
    DeltaParams params;
    params.out = p_.out;
    params.dout = b_.dout;
    params.dlse = static_cast<const float*>(b_.dlse);
    params.delta = delta_;
    params.rows = p_.batch * p_.q_heads * p_.q_len;
    params.q_heads = p_.q_heads;
    params.q_len = p_.q_len;
    params.value_dim = static_cast<int>(p_.value_dim);
    params.aligned_chunks = has_aligned_chunks(p_.out, p_.value_dim) && has_aligned_chunks(b_.dout, p_.value_dim);
    launch(row_delta<T, kHeadDim>, grid_of(ceil_div(params.rows, kDeltaRows<kHeadDim>)), dim3(kDeltaThreads), 0,
           context_.stream, params);
  }

  // ---- columns ----

  // The sums that one launch forms of a prefix or of a sequence.
  struct Sums {
    bool dkey = false, dvalue = false;
    bool any() const { return dkey || dvalue; }
  };

  template <bool kGeneral>
  void run_columns() {
    const Sums prefix{b_.needs(kDPrefixKey), b_.needs(kDPrefixValue)}, sequence{b_.needs(kDKey), b_.needs(kDValue)};
    plan_prefixes<kGeneral>(prefix);
    if constexpr (kBothSums<kHeadDim>) {
      if (fuses_delta()) {
        launch_columns<ColumnsTraits<T, kHeadDim, true, true, kGeneral, true>>(true, false);
      } else {
        // The first kernel sums dK and, if asked for, dV; the second dV alone.
        launch_columns<ColumnsTraits<T, kHeadDim, true, true, kGeneral>>(prefix.dkey, sequence.dkey);
        launch_columns<ColumnsTraits<T, kHeadDim, false, true, kGeneral>>(prefix.any() && !prefix.dkey,
                                                                          sequence.any() && !sequence.dkey);
      }
    } else {
      launch_columns<ColumnsTraits<T, kHeadDim, true, false, kGeneral>>(prefix.dkey, sequence.dkey);
      launch_columns<ColumnsTraits<T, kHeadDim, false, true, kGeneral>>(prefix.dvalue, sequence.dvalue);
    }
    if (partial_dkey_ != nullptr) launch_reduce(partial_dkey_, kDPrefixKey);
    if (partial_dvalue_ != nullptr) launch_reduce(partial_dvalue_, kDPrefixValue);
  }

  // Decides how many blocks share a prefix's columns, and allocates memory for their partial sums.
  template <bool kGeneral>
  void plan_prefixes(const Sums& prefix) {
    using Traits = ColumnsTraits<T, kHeadDim, true, kBothSums<kHeadDim>, kGeneral>;
    splits_ = 1;
    if (!prefix.any()) return;
    const int64_t owners = p_.num_prefixes * p_.kv_heads * ceil_div(p_.prefix_len, Traits::kBlockN);
    // The visits of an owner, if the rows name all prefixes equally often.
    const int64_t rows = std::max<int64_t>(1, p_.batch * p_.prefix_slots / p_.num_prefixes);
    const int64_t visits = rows * p_.q_heads / p_.kv_heads * ceil_div(p_.q_len, Traits::kBlockM);
    // The blocks fill the GPU once, and each has enough visits to be worth its partial sums.
    constexpr int64_t kBlocksPerMultiprocessor = 2, kLeastVisits = 4;
    splits_ =
        std::clamp<int64_t>(context_.sm_count * kBlocksPerMultiprocessor / owners, 1, ceil_div(visits, kLeastVisits));
    // The kernel writes gradients of the query's dtype alone.
    const int64_t bytes = p_.num_prefixes * p_.kv_heads * splits_ * p_.prefix_len * kHeadDim * sizeof(float);
    const auto waits = [&](Gradient g) { return b_.needs(g) && (splits_ > 1 || b_.gradients[g].dtype != kDTypeOf<T>); };
    if (waits(kDPrefixKey)) partial_dkey_ = static_cast<float*>(context_.allocate(bytes));
    if (waits(kDPrefixValue)) partial_dvalue_ = static_cast<float*>(context_.allocate(bytes));
  }

  template <typename Traits>
  void launch_columns(bool of_prefixes, bool of_sequences) {
    if (!of_prefixes && !of_sequences) return;
    ColumnsParams params;
    params.b = b_;
    params.delta = delta_;
    params.scalars = ScoreScalars::of(p_);
    params.aligned = AlignedChunks::of(b_);
    for (int i = 0; i < kNumGradients; ++i)
      params.aligned_pairs[i] = has_aligned_pairs(b_.gradients[i], head_dim_of(i));
    params.prefix_tiles = static_cast<int>(ceil_div(p_.prefix_len, Traits::kBlockN));
    params.splits = static_cast<int>(splits_);
    params.prefix_blocks = of_prefixes ? p_.num_prefixes * p_.kv_heads * params.prefix_tiles * splits_ : 0;
    params.partial_dkey = partial_dkey_;
    params.partial_dvalue = partial_dvalue_;
    params.sequence_tiles = static_cast<int>(ceil_div(p_.k_len, Traits::kBlockN));
    const int64_t sequence_blocks = of_sequences ? p_.batch * p_.kv_heads * params.sequence_tiles : 0;
    launch(backward_columns<Traits>, grid_of(params.prefix_blocks + sequence_blocks), dim3(kBackwardThreads),
           ColumnsShared<Traits>::kBytes, context_.stream, params);
  }

  void launch_reduce(const float* partial, Gradient gradient) {
    ReduceParams params;
    params.partial = partial;
    params.gradient = b_.gradients[gradient];
    params.pairs = p_.num_prefixes * p_.kv_heads * p_.prefix_len * kHeadDim / 2;
    params.kv_heads = static_cast<int>(p_.kv_heads);
    params.splits = static_cast<int>(splits_);
    params.prefix_len = static_cast<int>(p_.prefix_len);
    params.head_dim = static_cast<int>(head_dim_of(gradient));
    params.aligned_pairs = has_aligned_pairs(params.gradient, params.head_dim);
    launch(reduce_partial<kHeadDim>, grid_of(ceil_div(params.pairs, kReduceThreads)), dim3(kReduceThreads), 0,
           context_.stream, params);
  }

  // ---- rows ----

  template <bool kGeneral>
  void launch_rows() {
    using Shared = RowsShared<T, kHeadDim, kGeneral>;
    RowsParams params;
    params.b = b_;
    params.delta = delta_;
    params.scalars = ScoreScalars::of(p_);
    params.aligned = AlignedChunks::of(b_);
    params.aligned_pairs = has_aligned_pairs(b_.gradients[kDQuery], p_.head_dim);
    params.query_tiles = static_cast<int>(ceil_div(p_.q_len, Shared::Tile::kBlockM));
    launch(backward_rows<T, kHeadDim, kGeneral>, grid_of(p_.batch * p_.q_heads * params.query_tiles),
           dim3(kBackwardThreads), Shared::kBytes, context_.stream, params);
  }

  const BackwardParams& b_;
  const AttentionParams& p_;
  const Context& context_;
  float* delta_ = nullptr;
  int64_t splits_ = 1;
  float* partial_dkey_ = nullptr;
  float* partial_dvalue_ = nullptr;
};

template <DType kDType, int kHeadDim>
void backward(const BackwardParams& b, const Context& context) {
  using T = std::conditional_t<kDType == DType::kFloat16, half, bfloat16>;
  Backward<T, kHeadDim>(b, context).run();
}

}  // namespace prefix_kernels::cuda::sm80
