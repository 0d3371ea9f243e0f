// Partial attentions merged row by row; the formulas stand in merge_params.h.
//
// One warp takes a row. Lane i holds what there is once for part i: its lse, its share and, backward, the dot product
// <dout, out_i>. For the elements of a row lane l takes, of every 64, the two from 2 l on where rows are aligned for
// loads of two elements; of every 32 the one at l else.
#include <algorithm>

#include "merge.h"
#include "simt/warp.cuh"

namespace prefix_kernels::cuda {
namespace {

using simt::lane;

struct MergeRows {
  MergeParams p;
  bool pairs;  // two elements may be loaded and stored at once
};

struct MergeBackwardRows {
  MergeBackwardParams b;
  bool pairs;
};

// Elements of a row that one lane loads or stores at once, at an address that is a multiple of their size.
template <class Element, int kNumber>
struct alignas(kNumber * sizeof(Element)) Chunk {
  using Type = Element;
  static constexpr int kCount = kNumber;

  __device__ static Chunk load(const Element* x) { return *reinterpret_cast<const Chunk*>(x); }
  __device__ void store(Element* x) const { *reinterpret_cast<Chunk*>(x) = *this; }

  Element elements[kNumber];
};

__device__ int64_t number_offset(const RowNumbers& x, int64_t batch, int64_t head, int64_t row) {
  return batch * x.batch_stride + head * x.head_stride + row * x.row_stride;
}

// The share of this lane's part in a row, 0 for a part that the row does not see and beyond the parts, and the row's
// lse.
template <class T>
struct Share {
  T value;
  T lse;

  __device__ Share(const MergeParams& p, int64_t batch, int64_t head, int64_t row) {
    T score = -INFINITY;
    if (lane() < p.parts) {
      const RowNumbers& lses = p.lses[lane()];
      score = static_cast<const T*>(lses.data)[number_offset(lses, batch, head, row)];
      if (score == INFINITY) score = -INFINITY;
    }
    T largest = simt::warp_max(score);
    if (largest == -INFINITY) largest = 0;
    const T weight = std::exp(score - largest);
    const T total = simt::warp_sum(weight);
    value = total == 0 ? T(0) : weight / total;
    lse = total == 0 ? T(-INFINITY) : largest + std::log(total);
  }
};

// Calls visit(d) for the first of every chunk of a row that this lane takes.
template <class Elements, class Visit>
__device__ __forceinline__ void for_each_chunk(int64_t value_dim, Visit visit) {
  constexpr int kStep = kWarpSize * Elements::kCount;
#pragma unroll 1
  for (int64_t d = lane() * Elements::kCount; d < value_dim; d += kStep) visit(d);
}

// Calls visit with a chunk of the operand's dtype, of two elements or of one.
template <class Visit>
__device__ __forceinline__ void with_chunks(const Operand& x, bool pairs, Visit visit) {
  simt::with_type(x.data, x.dtype, [&](const auto* data) {
    using Element = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
    if (pairs)
      visit(Chunk<Element, 2>{});
    else
      visit(Chunk<Element, 1>{});
  });
}

// Writes out = sum_i share_i out_i over the parts that the row sees.
template <class T, class Elements>
__device__ void store_out(const MergeParams& p, T share, int64_t batch, int64_t head, int64_t row) {
  using Element = typename Elements::Type;
  Element* out = static_cast<Element*>(p.out.data) + simt::row_offset(p.out, batch, head, row);
  // All lanes come to the exchange of shares, also those whose elements lie behind the row's end.
#pragma unroll 1
  for (int64_t first = 0; first < p.value_dim; first += kWarpSize * Elements::kCount) {
    const int64_t d = first + lane() * Elements::kCount;
    T sums[Elements::kCount] = {};
    for (int i = 0; i < p.parts; ++i) {
      const T weight = __shfl_sync(~0u, share, i);
      if (weight == 0 || d >= p.value_dim) continue;
      const Element* part = static_cast<const Element*>(p.outs[i].data);
      const Elements x = Elements::load(part + simt::row_offset(p.outs[i], batch, head, row) + d);
#pragma unroll
      for (int e = 0; e < Elements::kCount; ++e) sums[e] += weight * static_cast<T>(simt::widen(x.elements[e]));
    }
    if (d >= p.value_dim) continue;
    Elements result;
#pragma unroll
    for (int e = 0; e < Elements::kCount; ++e) result.elements[e] = simt::narrow<Element>(sums[e]);
    result.store(out + d);
  }
}

template <class T>
__global__ void __launch_bounds__(simt::kWarps* kWarpSize, simt::kMinBlocks) merge_kernel(const MergeRows arguments) {
  const MergeParams& p = arguments.p;
  simt::for_each_row({p.batch, p.heads, p.rows}, [&](int64_t batch, int64_t head, int64_t row) {
    const Share<T> share(p, batch, head, row);
    if (lane() == 0) static_cast<T*>(p.lse.data)[number_offset(p.lse, batch, head, row)] = share.lse;
    with_chunks(p.out, arguments.pairs,
                [&](auto chunk) { store_out<T, decltype(chunk)>(p, share.value, batch, head, row); });
  });
}

// The dot product <dout, out_i> of this lane's part in a row, 0 for a part that the row does not see.
template <class T, class Elements>
__device__ T dot_of_part(const MergeBackwardParams& b, T share, int64_t batch, int64_t head, int64_t row) {
  using Element = typename Elements::Type;
  const MergeParams& p = b.forward;
  const Element* dout = static_cast<const Element*>(b.dout.data) + simt::row_offset(b.dout, batch, head, row);
  T own_dot = 0;
#pragma unroll 1
  for (int i = 0; i < p.parts; ++i) {
    if (__shfl_sync(~0u, share, i) == 0) continue;
    const Element* out = static_cast<const Element*>(p.outs[i].data) + simt::row_offset(p.outs[i], batch, head, row);
    T dot = 0;
    for_each_chunk<Elements>(p.value_dim, [&](int64_t d) {
      const Elements arriving = Elements::load(dout + d), x = Elements::load(out + d);
#pragma unroll
      for (int e = 0; e < Elements::kCount; ++e)
        dot += static_cast<T>(simt::widen(arriving.elements[e])) * static_cast<T>(simt::widen(x.elements[e]));
    });
    dot = simt::warp_sum(dot);
    if (lane() == i) own_dot = dot;
  }
  return own_dot;
}

// Writes dout_i = share_i dout, or zeros for a part that the row does not see.
template <class T, class Elements>
__device__ void store_douts(const MergeBackwardParams& b, T share, int64_t batch, int64_t head, int64_t row) {
  using Element = typename Elements::Type;
  const MergeParams& p = b.forward;
  const Element* dout = static_cast<const Element*>(b.dout.data) + simt::row_offset(b.dout, batch, head, row);
  const int64_t offset = simt::row_offset(b.douts_layout, batch, head, row);
#pragma unroll 1
  for (int i = 0; i < p.parts; ++i) {
    const T weight = __shfl_sync(~0u, share, i);
    if (b.douts[i] == nullptr) continue;
    Element* dout_of_part = static_cast<Element*>(b.douts[i]) + offset;
    for_each_chunk<Elements>(p.value_dim, [&](int64_t d) {
      Elements x = Elements::load(dout + d);
#pragma unroll
      for (int e = 0; e < Elements::kCount; ++e)
        x.elements[e] = simt::narrow<Element>(weight == 0 ? T(0) : weight * static_cast<T>(simt::widen(x.elements[e])));
      x.store(dout_of_part + d);
    });
  }
}

template <class T>
__global__ void __launch_bounds__(simt::kWarps* kWarpSize, simt::kMinBlocks)
    merge_backward_kernel(const MergeBackwardRows arguments) {
  const MergeBackwardParams& b = arguments.b;
  const MergeParams& p = b.forward;
  simt::for_each_row({p.batch, p.heads, p.rows}, [&](int64_t batch, int64_t head, int64_t row) {
    const Share<T> share(p, batch, head, row);
    T dot = 0;
    with_chunks(b.dout, arguments.pairs, [&](auto chunk) {
      using Elements = decltype(chunk);
      store_douts<T, Elements>(b, share.value, batch, head, row);
      if (b.needs_dlses) dot = dot_of_part<T, Elements>(b, share.value, batch, head, row);
    });
    if (!b.needs_dlses) return;
    const T mean = simt::warp_sum(share.value * dot);
    if (lane() >= p.parts || b.dlses[lane()] == nullptr) return;
    T dlse = 0;
    if (share.value != 0) {
      const T arriving =
          b.dlse.data != nullptr ? static_cast<const T*>(b.dlse.data)[number_offset(b.dlse, batch, head, row)] : T(0);
      dlse = share.value * (dot - mean + arriving);
    }
    static_cast<T*>(b.dlses[lane()])[number_offset(b.dlses_layout, batch, head, row)] = dlse;
  });
}

bool has_aligned_pairs(const Operand& x) {
  const int64_t bytes = x.dtype == DType::kFloat64 ? 8 : x.dtype == DType::kFloat32 ? 4 : 2;
  return (x.batch_stride | x.head_stride | x.row_stride) % 2 == 0 &&
         reinterpret_cast<uintptr_t>(x.data) % (2 * bytes) == 0;
}

bool have_aligned_pairs(const Operand (&parts)[kMaxMergedParts]) {
  return std::all_of(parts, parts + kMaxMergedParts, [](const Operand& x) { return has_aligned_pairs(x); });
}

simt::RowGrid grid(const MergeParams& p) { return {p.batch, p.heads, p.rows}; }

}  // namespace

void merge_rows(const MergeParams& p, const Context& context) {
  const bool pairs = p.value_dim % 2 == 0 && have_aligned_pairs(p.outs) && has_aligned_pairs(p.out);
  simt::launch_rows(p.computes_in_double ? merge_kernel<double> : merge_kernel<float>, grid(p), 0, context,
                    MergeRows{p, pairs});
}

void merge_backward_rows(const MergeBackwardParams& b, const Context& context) {
  const MergeParams& p = b.forward;
  const bool pairs = p.value_dim % 2 == 0 && have_aligned_pairs(p.outs) && has_aligned_pairs(b.dout) &&
                     has_aligned_pairs(b.douts_layout);
  simt::launch_rows(p.computes_in_double ? merge_backward_kernel<double> : merge_backward_kernel<float>, grid(p), 0,
                    context, MergeBackwardRows{b, pairs});
}

}  // namespace prefix_kernels::cuda
