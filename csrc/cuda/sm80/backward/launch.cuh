// The kernels that a backward pass launches, and their numbers of blocks.
//
//   asked for                        launched
//   any but dvalue, dprefix_value    delta.cuh, unless only gradients of prefixes of one tile are asked for
//   in one pass: all                 one_pass.cuh
//   in two: dkey, dvalue,            columns.cuh: once for prefixes and sequences together if both want the same sums;
//           dprefix_*                dK and dV apart if the registers do not hold both
//           dquery                   rows.cuh
//   dprefix_* of several blocks      reduce.cuh
//
// One pass forms S and dP once, two form them twice. A call takes
//
//                    one pass                                     two
//   gradients        dquery, dkey and dvalue, with any dprefix_*  every other set
//   head dim         64, 96, 128, that of values included         32, 192, 256
//   options          causal, windows over the sequence, several   mask, dropout, softcap, windows over the prefix
//                    prefixes
//   GPU              shared memory for OnePassShared: 8.0, 8.7,   8.6 and 8.9 with head dims 96 and 128
//                    9.0 and later; 8.6 and 8.9 with head dim 64
//
// One pass takes batch * q_heads * q_len * head_dim * 4 bytes more memory, for sums of dquery in float32, q_len and
// head_dim rounded up to the tile's.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../../launch.h"
#include "columns.cuh"
#include "delta.cuh"
#include "launch.h"
#include "one_pass.cuh"
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
    if constexpr (kHasOnePass<kHeadDim>) {
      if (takes_one_pass()) allocate_turns();
    }
    if ((b_.needs(kDQuery) || b_.needs(kDKey) || b_.needs(kDPrefixKey)) && !fuses_delta()) launch_delta();
    if constexpr (kHasOnePass<kHeadDim>) {
      if (takes_one_pass()) return run_one_pass();
    }
    if (is_general(p_)) {
      run_columns<true>();
      if (b_.needs(kDQuery)) launch_rows<true>();
    } else {
      run_columns<false>();
      if (b_.needs(kDQuery)) launch_rows<false>();
    }
  }

 private:
  // The table above.
  bool takes_one_pass() const {
    if constexpr (kHasOnePass<kHeadDim>) {
      return b_.needs(kDQuery) && b_.needs(kDKey) && b_.needs(kDValue) && !is_general(p_) &&
             OnePassShared<OnePassTraits<T, kHeadDim>>::kBytes <= context_.shared_bytes;
    } else {
      return false;
    }
  }

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
    params.turns = turns_;
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
    if (prefix.any()) plan_prefixes<ColumnsTraits<T, kHeadDim, true, kBothSums<kHeadDim>, kGeneral>>(2);
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
    reduce_partial_sums();
  }

  // Decides how many blocks share a prefix's columns, and allocates memory for their partial sums.
  template <typename Traits>
  void plan_prefixes(int64_t blocks_per_multiprocessor) {
    const int64_t owners = p_.num_prefixes * p_.kv_heads * ceil_div(p_.prefix_len, Traits::kBlockN);
    // The visits of an owner, if the rows name all prefixes equally often.
    const int64_t rows = std::max<int64_t>(1, p_.batch * p_.prefix_slots / p_.num_prefixes);
    const int64_t visits = rows * p_.q_heads / p_.kv_heads * ceil_div(p_.q_len, Traits::kBlockM);
    // The blocks fill the GPU once, and each has enough visits to be worth its partial sums.
    constexpr int64_t kLeastVisits = 4;
    splits_ =
        std::clamp<int64_t>(context_.sm_count * blocks_per_multiprocessor / owners, 1, ceil_div(visits, kLeastVisits));
    // The kernel writes gradients of the query's dtype alone.
    const int64_t bytes = p_.num_prefixes * p_.kv_heads * splits_ * p_.prefix_len * kHeadDim * sizeof(float);
    const auto waits = [&](Gradient g) { return b_.needs(g) && (splits_ > 1 || b_.gradients[g].dtype != kDTypeOf<T>); };
    if (waits(kDPrefixKey)) partial_dkey_ = static_cast<float*>(context_.allocate(bytes));
    if (waits(kDPrefixValue)) partial_dvalue_ = static_cast<float*>(context_.allocate(bytes));
  }

  // The parameters of a kernel of columns.
  template <typename Traits>
  ColumnsParams columns_params(bool of_prefixes) const {
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
    return params;
  }

  template <typename Traits>
  void launch_columns(bool of_prefixes, bool of_sequences) {
    if (!of_prefixes && !of_sequences) return;
    const ColumnsParams params = columns_params<Traits>(of_prefixes);
    const int64_t sequence_blocks = of_sequences ? p_.batch * p_.kv_heads * params.sequence_tiles : 0;
    launch(backward_columns<Traits>, grid_of(params.prefix_blocks + sequence_blocks), dim3(kBackwardThreads),
           ColumnsShared<Traits>::kBytes, context_.stream, params);
  }

  void reduce_partial_sums() {
    if (partial_dkey_ != nullptr) launch_reduce(partial_dkey_, kDPrefixKey);
    if (partial_dvalue_ != nullptr) launch_reduce(partial_dvalue_, kDPrefixValue);
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

  // ---- one pass ----

  // Allocates the sums of dquery, which launch_delta clears.
  void allocate_turns() {
    using Traits = OnePassTraits<T, kHeadDim>;
    const int64_t tiles = ceil_div(p_.q_len, Traits::kBlockM), all = p_.batch * p_.q_heads * tiles;
    turns_.sums = static_cast<float*>(context_.allocate(all * Traits::kBlockM * kHeadDim * sizeof(float)));
    turns_.counts = static_cast<int*>(context_.allocate((all + 1) * sizeof(int)));
    turns_.tickets = turns_.counts + all;
    turns_.tiles = static_cast<int>(tiles);
    turns_.tile_rows = Traits::kBlockM;
  }

  void run_one_pass() {
    using Traits = OnePassTraits<T, kHeadDim>;
    const bool has_prefixes = p_.num_prefixes > 0 && p_.prefix_len > 0;
    if (has_prefixes) plan_prefixes<Traits>(1);
    OnePassParams params;
    params.columns = columns_params<Traits>(has_prefixes);
    params.sequence_blocks = p_.batch * p_.kv_heads * params.columns.sequence_tiles;
    params.turns = turns_;
    const int64_t blocks = params.columns.prefix_blocks + params.sequence_blocks;
    if (blocks > 0)
      launch(backward_one_pass<Traits>, grid_of(blocks), dim3(Traits::kThreads), OnePassShared<Traits>::kBytes,
             context_.stream, params);
    launch_finish();
    reduce_partial_sums();
  }

  void launch_finish() {
    using Traits = OnePassTraits<T, kHeadDim>;
    FinishParams params;
    params.sums = turns_.sums;
    params.dquery = b_.gradients[kDQuery];
    params.q_heads = p_.q_heads;
    params.q_len = static_cast<int>(p_.q_len);
    params.tiles = turns_.tiles;
    params.head_dim = static_cast<int>(p_.head_dim);
    params.scale = static_cast<float>(p_.scale);
    params.aligned_pairs = has_aligned_pairs(params.dquery, p_.head_dim);
    launch(finish_dquery<Traits>, grid_of(p_.batch * p_.q_heads * turns_.tiles), dim3(Traits::kThreads), 0,
           context_.stream, params);
  }

  const BackwardParams& b_;
  const AttentionParams& p_;
  const Context& context_;
  float* delta_ = nullptr;
  Turns turns_{};
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
