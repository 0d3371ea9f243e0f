#include "merge.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <limits>
#include <numeric>
#include <utility>

#include "results.h"
#include "validate.h"

namespace prefix_kernels {
namespace {

constexpr int kRowDims = 3;  // dimensions that count rows: batch, heads and rows of MergeParams

// Outermost dimensions folded into one where there are more than `most` in all.
at::Tensor fold_outer(const at::Tensor& x, int64_t most) { return x.dim() > most ? x.flatten(0, x.dim() - most) : x; }

at::Tensor to_rows(const at::Tensor& x) { return fold_outer(with_unit_stride(x), kRowDims + 1); }

at::Tensor to_numbers(const at::Tensor& x, at::ScalarType type) { return fold_outer(x.to(type), kRowDims); }

// A tensor of x's shape with its order in memory, where the kernels can write it.
at::Tensor empty_rows(const at::Tensor& x) {
  at::Tensor rows = at::empty_like(x);
  const bool writable = x.dim() <= kRowDims + 1 && x.numel() > 0 && (x.size(-1) == 1 || rows.stride(-1) == 1);
  return writable ? rows : at::empty_like(x, {}, at::MemoryFormat::Contiguous);
}

// The row dimensions of the tensors of one call, in the order in which the rows of `like` lie in memory, so that
// neighbours in the loops of a kernel are neighbours there.
class RowOrder {
 public:
  // like: [..., Dv] with at most kRowDims dimensions before the last.
  explicit RowOrder(const at::Tensor& like) {
    std::iota(order_.begin(), order_.end(), 0);
    const Numbers strides = padded(like.strides(), like.dim() - 1, 0), sizes = padded(like.sizes(), like.dim() - 1, 1);
    // The stride of a dimension of size 1 means nothing: it goes outside, where it costs no kernel anything.
    const auto key = [&](int i) { return sizes[i] == 1 ? std::numeric_limits<int64_t>::max() : strides[i]; };
    std::stable_sort(order_.begin(), order_.end(), [&](int a, int b) { return key(a) > key(b); });
    for (int i = 0; i < kRowDims; ++i) sizes_[i] = sizes[order_[i]];
  }

  Operand operand(const at::Tensor& x) const {
    const Numbers strides = ordered_strides(x, x.dim() - 1);
    return {const_cast<void*>(x.const_data_ptr()), strides[0], strides[1], strides[2], dtype_of(x)};
  }

  RowNumbers numbers(const at::Tensor& x) const {
    const Numbers strides = ordered_strides(x, x.dim());
    return {const_cast<void*>(x.const_data_ptr()), strides[0], strides[1], strides[2]};
  }

  void set_sizes(MergeParams& p) const {
    p.batch = sizes_[0];
    p.heads = sizes_[1];
    p.rows = sizes_[2];
  }

 private:
  using Numbers = std::array<int64_t, kRowDims>;

  // The first `count` values, behind as many of `fill` as are missing.
  static Numbers padded(at::IntArrayRef values, int64_t count, int64_t fill) {
    Numbers numbers;
    numbers.fill(fill);
    std::copy_n(values.begin(), count, numbers.end() - count);
    return numbers;
  }

  Numbers ordered_strides(const at::Tensor& x, int64_t count) const {
    const Numbers strides = padded(x.strides(), count, 0);
    Numbers ordered;
    for (int i = 0; i < kRowDims; ++i) ordered[i] = strides[order_[i]];
    return ordered;
  }

  std::array<int, kRowDims> order_;
  Numbers sizes_;
};

void check_like(const std::string& name, const at::Tensor& x, const at::Tensor& like, const char* like_name) {
  TORCH_CHECK_VALUE(x.sizes() == like.sizes() && x.device() == like.device(), name, ": expected ", like.sizes(), " on ",
                    like.device(), " like ", like_name, ", got ", x.sizes(), " on ", x.device());
  TORCH_CHECK_TYPE(x.scalar_type() == like.scalar_type(), name, ": expected ", like.scalar_type(), " like ", like_name,
                   ", got ", x.scalar_type());
}

void check_numbers(const std::string& name, const at::Tensor& x, const at::Tensor& like, const char* like_name) {
  const auto expected = like.sizes().slice(0, like.dim() - 1);
  TORCH_CHECK_VALUE(x.sizes() == expected && x.device() == like.device(), name, ": expected ", expected, " on ",
                    like.device(), ", the shape of ", like_name, " without its last dimension, got ", x.sizes(), " on ",
                    x.device());
  dtype_of(x);
}

std::string element(const char* name, size_t i) { return std::string(name) + "[" + std::to_string(i) + "]"; }

// like: the first of outs, or dout.
void check_parts(at::TensorList outs, at::TensorList lses, const at::Tensor& like, const char* like_name) {
  TORCH_CHECK_VALUE(!lses.empty() && lses.size() <= kMaxMergedParts, "lses: expected 1 to ", kMaxMergedParts,
                    " tensors, got ", lses.size());
  TORCH_CHECK_VALUE(like.dim() >= 1, like_name, ": expected [..., Dv], got ", like.sizes());
  dtype_of(like);
  for (size_t i = 0; i < outs.size(); ++i) check_like(element("outs", i), outs[i], like, like_name);
  for (size_t i = 0; i < lses.size(); ++i) check_numbers(element("lses", i), lses[i], like, like_name);
}

// The type that a call computes in: float, or double where some tensor is.
at::ScalarType compute_type(const at::Tensor& rows, at::TensorList lses) {
  const auto is_double = [](const at::Tensor& x) { return x.scalar_type() == at::kDouble; };
  return is_double(rows) || std::any_of(lses.begin(), lses.end(), is_double) ? at::kDouble : at::kFloat;
}

void set_parts(MergeParams& p, const RowOrder& order, at::TensorList outs, at::TensorList lses) {
  p.parts = static_cast<int32_t>(lses.size());
  p.computes_in_double = lses[0].scalar_type() == at::kDouble;
  order.set_sizes(p);
  for (size_t i = 0; i < outs.size(); ++i) p.outs[i] = order.operand(outs[i]);
  for (size_t i = 0; i < lses.size(); ++i) p.lses[i] = order.numbers(lses[i]);
}

}  // namespace

MergeCall::MergeCall(at::TensorList given_outs, at::TensorList given_lses) {
  TORCH_CHECK_VALUE(given_outs.size() == given_lses.size(), "lses: expected as many as outs, got ", given_lses.size(),
                    " for ", given_outs.size(), " outs");
  TORCH_CHECK_VALUE(!given_outs.empty(), "outs: expected at least one tensor, got none");
  const at::Tensor& first = given_outs[0];
  check_parts(given_outs, given_lses, first, "outs[0]");
  const at::ScalarType type = compute_type(first, given_lses);
  out = empty_rows(first);
  lse = at::empty(first.sizes().slice(0, first.dim() - 1), first.options().dtype(type));
  if (is_empty()) return;
  for (const at::Tensor& x : given_outs) outs.push_back(to_rows(x));
  for (const at::Tensor& x : given_lses) lses.push_back(to_numbers(x, type));
  const at::Tensor out_rows = to_rows(out);
  const RowOrder order(out_rows);
  set_parts(params, order, outs, lses);
  params.value_dim = first.size(-1);
  params.out = order.operand(out_rows);
  params.lse = order.numbers(to_numbers(lse, type));
}

MergeBackwardCall::MergeBackwardCall(const at::Tensor& given_dout, const std::optional<at::Tensor>& given_dlse,
                                     at::TensorList given_outs, at::TensorList given_lses,
                                     const std::vector<bool>& needs) {
  check_parts(given_outs, given_lses, given_dout, "dout");
  const size_t parts = given_lses.size();
  TORCH_CHECK_VALUE(needs.size() == 2 * parts, "needs: expected ", 2 * parts, " values for ", parts, " lses, got ",
                    needs.size());
  params.needs_dlses = std::any_of(needs.begin() + parts, needs.end(), [](bool need) { return need; });
  TORCH_CHECK_VALUE(given_outs.size() == parts || (given_outs.empty() && !params.needs_dlses), "outs: expected ", parts,
                    " tensors for the gradients asked for, got ", given_outs.size());
  if (given_dlse.has_value()) check_numbers("dlse", *given_dlse, given_dout, "dout");
  const at::ScalarType type = compute_type(given_dout, given_lses);

  dout = to_rows(given_dout);
  for (const at::Tensor& x : given_outs) outs.push_back(to_rows(x));
  for (const at::Tensor& x : given_lses) {
    lses.push_back(to_numbers(x, type));
    dtypes.push_back(x.scalar_type());
  }
  const RowOrder order(dout);
  set_parts(params.forward, order, outs, lses);
  params.forward.value_dim = given_dout.size(-1);
  params.dout = order.operand(dout);
  if (given_dlse.has_value()) {
    dlse = to_numbers(*given_dlse, type);
    params.dlse = order.numbers(dlse);
  }
  for (size_t i = 0; i < needs.size(); ++i) {
    const bool is_dout = i < parts;
    if (!needs[i]) {
      gradients.push_back(at::empty({0}, given_dout.options()));
    } else if (is_dout) {
      gradients.push_back(empty_rows(given_dout));
      params.douts_layout = order.operand(to_rows(gradients.back()));
      std::swap(params.douts[i], params.douts_layout.data);
    } else {
      gradients.push_back(at::empty(given_lses[0].sizes(), given_dout.options().dtype(type)));
      params.dlses_layout = order.numbers(to_numbers(gradients.back(), type));
      std::swap(params.dlses[i - parts], params.dlses_layout.data);
    }
  }
}

std::vector<at::Tensor> MergeBackwardCall::results() const {
  std::vector<at::Tensor> results = gradients;
  for (size_t i = 0; i < dtypes.size(); ++i) {
    at::Tensor& dlse_of_part = results[dtypes.size() + i];
    if (params.dlses[i] != nullptr) dlse_of_part = dlse_of_part.to(dtypes[i]);
  }
  return results;
}

}  // namespace prefix_kernels
