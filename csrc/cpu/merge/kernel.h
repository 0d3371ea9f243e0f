// Partial attentions merged row by row; the formulas stand in merge_params.h.
#pragma once

#include <algorithm>
#include <cmath>

#include "../../merge_params.h"
#include "../common/simd.h"
#include "../kernels.h"

namespace prefix_kernels::PREFIX_KERNELS_ISA {

// Place of a row among [batch, heads, rows].
struct RowPlace {
  int64_t batch;
  int64_t head;
  int64_t row;

  int64_t in(const Operand& x) const { return batch * x.batch_stride + head * x.head_stride + row * x.row_stride; }
  int64_t in(const RowNumbers& x) const { return batch * x.batch_stride + head * x.head_stride + row * x.row_stride; }
};

// The first element of a row.
template <class Element>
Element* row_of(const Operand& x, const RowPlace& place) {
  return static_cast<Element*>(x.data) + place.in(x);
}

template <class T>
T& number_of(const RowNumbers& x, const RowPlace& place) {
  return static_cast<T*>(x.data)[place.in(x)];
}

// The parts that a row sees, in their order, and their shares.
template <class T>
struct Shares {
  int count = 0;
  int part[kMaxMergedParts];
  T share[kMaxMergedParts];
  T lse = -std::numeric_limits<T>::infinity();

  Shares(const MergeParams& p, const RowPlace& place) {
    T scores[kMaxMergedParts], largest = lse;
    for (int i = 0; i < p.parts; ++i) {
      const T score = number_of<T>(p.lses[i], place);
      if (std::abs(score) == std::numeric_limits<T>::infinity()) continue;
      part[count] = i;
      scores[count++] = score;
      largest = score > largest ? score : largest;
    }
    if (count == 0) return;
    T total = 0;
    for (int i = 0; i < count; ++i) {
      share[i] = std::exp(scores[i] - largest);
      total += share[i];
    }
    lse = largest + std::log(total);
    const int candidates = count;
    count = 0;
    for (int i = 0; i < candidates; ++i) {
      const T of_total = share[i] / total;
      if (of_total == 0) continue;
      part[count] = part[i];
      share[count++] = of_total;
    }
  }
};

// Calls visit(place) for the rows of one of `workers` equal parts of all rows.
template <class Visit>
void for_rows_of_worker(const MergeParams& p, int worker, int workers, Visit visit) {
  const int64_t total = p.batch * p.heads * p.rows;
  const int64_t begin = total * worker / workers, end = total * (worker + 1) / workers;
  RowPlace place{begin / p.rows / p.heads, begin / p.rows % p.heads, begin % p.rows};
  for (int64_t i = begin; i < end; ++i) {
    visit(place);
    if (++place.row < p.rows) continue;
    place.row = 0;
    if (++place.head < p.heads) continue;
    place.head = 0;
    ++place.batch;
  }
}

// Calls visit(worker, workers) on as many threads as the call has work for.
template <class Visit>
void on_workers(const MergeParams& p, int threads, RunWorkers run, Visit visit) {
  constexpr int64_t kElementsPerWorker = 16384;  // below, starting a thread costs more than it saves
  const int64_t elements = p.batch * p.heads * p.rows * (p.value_dim + 16) * p.parts;
  const int workers =
      static_cast<int>(std::clamp<int64_t>(elements / kElementsPerWorker, 1, std::max<int64_t>(threads, 1)));
  struct Work {
    Visit& visit;
    int workers;
  } work{visit, workers};
  run(
      workers,
      [](void* argument, int worker) {
        const Work& work = *static_cast<Work*>(argument);
        work.visit(worker, work.workers);
      },
      &work);
}

// out[d] = sum_i share_i out_i[d] over the parts that the row sees.
template <class T, class Element>
void merge_row(const MergeParams& p, const RowPlace& place) {
  const Shares<T> seen(p, place);
  number_of<T>(p.lse, place) = seen.lse;
  const Element* rows[kMaxMergedParts];
  for (int i = 0; i < seen.count; ++i) rows[i] = row_of<Element>(p.outs[seen.part[i]], place);
  Element* out = row_of<Element>(p.out, place);
  int64_t d = 0;
  for (; d + kLanes<T> <= p.value_dim; d += kLanes<T>) {
    Vec<T> sum{};
    for (int i = 0; i < seen.count; ++i) sum += seen.share[i] * load_as<T>(rows[i] + d);
    store_as<T>(out + d, sum);
  }
  for (; d < p.value_dim; ++d) {
    T sum = 0;
    for (int i = 0; i < seen.count; ++i) sum += seen.share[i] * static_cast<T>(to_float(rows[i][d]));
    out[d] = from_float<Element>(sum);
  }
}

template <class T, class Element>
T dot(const Element* a, const Element* b, int64_t count) {
  Vec<T> sums{};
  int64_t d = 0;
  for (; d + kLanes<T> <= count; d += kLanes<T>) sums += load_as<T>(a + d) * load_as<T>(b + d);
  T sum = horizontal_sum<T>(sums);
  for (; d < count; ++d) sum += static_cast<T>(to_float(a[d])) * static_cast<T>(to_float(b[d]));
  return sum;
}

// to[d] = share from[d]
template <class T, class Element>
void store_scaled(Element* to, const Element* from, T share, int64_t count) {
  int64_t d = 0;
  for (; d + kLanes<T> <= count; d += kLanes<T>) store_as<T>(to + d, share * load_as<T>(from + d));
  for (; d < count; ++d) to[d] = from_float<Element>(share * static_cast<T>(to_float(from[d])));
}

template <class T, class Element>
void merge_backward_row(const MergeBackwardParams& b, const RowPlace& place) {
  const MergeParams& p = b.forward;
  const Shares<T> seen(p, place);
  const Element* dout = row_of<Element>(b.dout, place);
  const int64_t dout_row = place.in(b.douts_layout), dlse_place = place.in(b.dlses_layout);
  for (int i = 0; i < p.parts; ++i) {
    if (b.douts[i] != nullptr) std::fill_n(static_cast<Element*>(b.douts[i]) + dout_row, p.value_dim, Element{});
    if (b.dlses[i] != nullptr) static_cast<T*>(b.dlses[i])[dlse_place] = 0;
  }
  for (int i = 0; i < seen.count; ++i) {
    Element* dout_of_part = static_cast<Element*>(b.douts[seen.part[i]]);
    if (dout_of_part != nullptr) store_scaled(dout_of_part + dout_row, dout, seen.share[i], p.value_dim);
  }
  if (!b.needs_dlses) return;
  T dots[kMaxMergedParts], mean = 0;
  for (int i = 0; i < seen.count; ++i) {
    dots[i] = dot<T>(dout, row_of<const Element>(p.outs[seen.part[i]], place), p.value_dim);
    mean += seen.share[i] * dots[i];
  }
  const T dlse = b.dlse.data != nullptr ? number_of<T>(b.dlse, place) : T(0);
  for (int i = 0; i < seen.count; ++i) {
    T* dlse_of_part = static_cast<T*>(b.dlses[seen.part[i]]);
    if (dlse_of_part != nullptr) dlse_of_part[dlse_place] = seen.share[i] * (dots[i] - mean + dlse);
  }
}

template <class T>
void merge_forward(const MergeParams& p, int threads, RunWorkers run) {
  on_workers(p, threads, run, [&](int worker, int workers) {
    dispatch_dtype(p.out.dtype, [&](auto* element) {
      using Element = std::remove_pointer_t<decltype(element)>;
      for_rows_of_worker(p, worker, workers, [&](const RowPlace& place) { merge_row<T, Element>(p, place); });
    });
  });
}

template <class T>
void merge_backward(const MergeBackwardParams& b, int threads, RunWorkers run) {
  on_workers(b.forward, threads, run, [&](int worker, int workers) {
    dispatch_dtype(b.dout.dtype, [&](auto* element) {
      using Element = std::remove_pointer_t<decltype(element)>;
      for_rows_of_worker(b.forward, worker, workers,
                         [&](const RowPlace& place) { merge_backward_row<T, Element>(b, place); });
    });
  });
}

}  // namespace prefix_kernels::PREFIX_KERNELS_ISA
