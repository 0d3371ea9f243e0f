#include "packed.h"

#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <cmath>

#include "validate.h"

namespace prefix_kernels {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// Strides of [rows, heads, dim].
Operand packed_operand(const at::Tensor& x) {
  Operand operand = make_operand(x);
  std::swap(operand.head_stride, operand.row_stride);
  return operand;
}

void check_rows(const char* name, const at::Tensor& x, const at::Tensor& query, int64_t heads, int64_t head_dim) {
  TORCH_CHECK_VALUE(x.dim() == 3 && (heads < 0 || x.size(1) == heads) && (head_dim < 0 || x.size(2) == head_dim), name,
                    ": expected [rows, ", heads < 0 ? std::string("heads") : std::to_string(heads), ", ",
                    head_dim < 0 ? std::string("head dim") : std::to_string(head_dim), "], got ", x.sizes());
  check_operand(name, x, query);
  TORCH_CHECK_VALUE(x.size(2) >= 1 && x.size(2) <= kMaxHeadDim, name, ": expected a head dim from 1 to ", kMaxHeadDim,
                    ", got ", x.size(2), " in shape ", x.sizes());
}

void check_vector(const char* name, const at::Tensor& x, const at::Tensor& query, int64_t size) {
  TORCH_CHECK_VALUE(x.dim() == 1 && x.size(0) == size, name, ": expected [", size, "], got ", x.sizes());
  check_integers(name, x, query);
}

bool is_packed_bank(const PackedArguments& args) { return args.cu_prefix_lens.has_value(); }

const at::Tensor* given_prefix(const PackedArguments& args) {
  if (args.prefix_key.has_value()) return &*args.prefix_key;
  return args.prefix_value.has_value() ? &*args.prefix_value : nullptr;
}

int64_t count_of_prefixes(const PackedArguments& args) {
  const at::Tensor* prefix = given_prefix(args);
  if (prefix == nullptr) return 0;
  if (is_packed_bank(args)) return args.cu_prefix_lens->size(0) - 1;
  return prefix->dim() == 3 ? 1 : prefix->size(0);
}

int64_t kv_heads_of(const PackedArguments& args) {
  if (args.key.has_value()) return args.key->size(1);
  if (args.value.has_value()) return args.value->size(1);
  const at::Tensor* prefix = given_prefix(args);
  return prefix == nullptr ? args.query.size(1) : prefix->size(is_packed_bank(args) ? 1 : -3);
}

void check_bank(const PackedArguments& args, int64_t sequences, int64_t kv_heads, int64_t value_dim) {
  const at::Tensor& query = args.query;
  for (const auto& [name, given] : {std::pair<const char*, const OptionalTensor&>{"prefix_key", args.prefix_key},
                                    {"prefix_value", args.prefix_value}}) {
    if (!given.has_value()) continue;
    const int64_t head_dim = &given == &args.prefix_key ? query.size(2) : value_dim;
    const at::Tensor& x = *given;
    if (is_packed_bank(args)) {
      check_rows(name, x, query, kv_heads, head_dim);
      continue;
    }
    TORCH_CHECK_VALUE((x.dim() == 3 || x.dim() == 4) && x.size(-3) == kv_heads && x.size(-1) == head_dim, name,
                      ": expected [", kv_heads, ", P, ", head_dim, "], [Np, ", kv_heads, ", P, ", head_dim,
                      "], or with cu_prefix_lens [rows, ", kv_heads, ", ", head_dim, "], got ", x.sizes());
    check_operand(name, x, query);
  }
  if (args.prefix_key.has_value() && args.prefix_value.has_value()) {
    const at::Tensor &key = *args.prefix_key, &value = *args.prefix_value;
    auto expected = key.sizes().vec();
    expected.back() = value_dim;
    TORCH_CHECK_VALUE(value.sizes() == at::IntArrayRef(expected), "prefix_value: expected shape ",
                      at::IntArrayRef(expected), " like prefix_key and value, got ", value.sizes());
    TORCH_CHECK_TYPE(value.scalar_type() == key.scalar_type(), "prefix_value: expected ", key.scalar_type(),
                     " like prefix_key, got ", value.scalar_type());
  }
  const at::Tensor* prefix = given_prefix(args);
  if (prefix == nullptr) return;
  const int64_t prefixes = count_of_prefixes(args);
  TORCH_CHECK_VALUE(args.prefix_ids.has_value() || prefixes == 1 || prefixes == sequences,
                    is_packed_bank(args) ? "cu_prefix_lens" : "prefix_key", ": expected one prefix for each of ",
                    sequences, " sequences, or prefix_ids that name them, got ", prefixes, " prefixes");
}

}  // namespace

void check_packed(const PackedArguments& args, int64_t value_dim) {
  const at::Tensor& query = args.query;
  check_rows("query", query, query, -1, -1);
  TORCH_CHECK_VALUE(query.size(1) >= 1, "query: expected at least 1 head, got shape ", query.sizes());
  const int64_t kv_heads = kv_heads_of(args);
  TORCH_CHECK_VALUE(kv_heads >= 1 && query.size(1) % kv_heads == 0,
                    "key: expected a number of heads that divides query's ", query.size(1), ", got ", kv_heads);
  if (args.key.has_value()) check_rows("key", *args.key, query, kv_heads, query.size(2));
  if (args.value.has_value()) check_rows("value", *args.value, query, kv_heads, value_dim);
  if (args.key.has_value() && args.value.has_value())
    TORCH_CHECK_VALUE(args.key->size(0) == args.value->size(0), "value: expected ", args.key->size(0),
                      " rows like key, got ", args.value->size(0));
  for (const auto& [name, given] :
       {std::pair<const char*, const OptionalTensor&>{"key", args.key}, {"value", args.value}})
    TORCH_CHECK_TYPE(!given.has_value() || given->scalar_type() == query.scalar_type(), name, ": expected ",
                     query.scalar_type(), " like query, got ", given->scalar_type());
  TORCH_CHECK_VALUE(args.cu_seqlens_q.dim() == 1 && args.cu_seqlens_q.size(0) >= 1,
                    "cu_seqlens_q: expected [N + 1], got ", args.cu_seqlens_q.sizes());
  const int64_t sequences = args.cu_seqlens_q.size(0) - 1;
  check_integers("cu_seqlens_q", args.cu_seqlens_q, query);
  check_vector("cu_seqlens_k", args.cu_seqlens_k, query, sequences + 1);
  if (is_packed_bank(args)) {
    const at::Tensor& starts = *args.cu_prefix_lens;
    TORCH_CHECK_VALUE(starts.dim() == 1 && starts.size(0) >= 1, "cu_prefix_lens: expected [Np + 1], got ",
                      starts.sizes());
    check_integers("cu_prefix_lens", starts, query);
    TORCH_CHECK_VALUE(!args.prefix_lens.has_value(), "prefix_lens: expected None with cu_prefix_lens, got shape ",
                      args.prefix_lens->sizes());
  }
  check_bank(args, sequences, kv_heads, value_dim);
  if (args.prefix_ids.has_value()) {
    const at::Tensor& ids = *args.prefix_ids;
    TORCH_CHECK_VALUE((ids.dim() == 1 || ids.dim() == 2) && ids.size(0) == sequences, "prefix_ids: expected [",
                      sequences, "] or [", sequences, ", M], got ", ids.sizes());
    check_integers("prefix_ids", ids, query);
  }
  if (args.prefix_lens.has_value() && given_prefix(args) != nullptr)
    check_vector("prefix_lens", *args.prefix_lens, query, count_of_prefixes(args));
  if (args.query_offsets.has_value()) check_vector("query_offset", *args.query_offsets, query, sequences);
  check_scalars(args.dropout_p, args.scale, args.softcap, args.window_left, args.window_right);
  if (args.dropout_p > 0) {
    TORCH_CHECK_VALUE(args.dropout_seed.has_value() && args.dropout_seed->numel() == 1,
                      "dropout_seed: expected an int64 tensor [1] with dropout_p=", args.dropout_p);
    TORCH_CHECK_TYPE(args.dropout_seed->scalar_type() == at::kLong, "dropout_seed: expected int64, got ",
                     args.dropout_seed->scalar_type());
  }
}

void check_packed_backward(const PackedArguments& args, const at::Tensor& dout, const OptionalTensor& dlse,
                           const OptionalTensor& out, const at::Tensor& lse, int64_t key_rows,
                           std::array<bool, kNumGradients> needs) {
  const at::Tensor& query = args.query;
  TORCH_CHECK_VALUE(dout.dim() == 3 && dout.sizes().slice(0, 2) == query.sizes().slice(0, 2),
                    "dout: expected [Tq, Hq, Dv] like query ", query.sizes(), ", got ", dout.sizes());
  TORCH_CHECK_TYPE(dout.scalar_type() == query.scalar_type(), "dout: expected ", query.scalar_type(), ", got ",
                   dout.scalar_type());
  check_packed(args, dout.size(2));
  const bool prefix_ds = args.prefix_key.has_value() && (needs[kDQuery] || needs[kDPrefixKey]);
  const bool sequence_ds = needs[kDQuery] || needs[kDKey];
  const auto check_given = [](bool needed, const char* name, bool given) {
    TORCH_CHECK_VALUE(!needed || given, name, ": expected a tensor for the gradients asked for, got None");
  };
  check_given(sequence_ds || needs[kDValue], "key", args.key.has_value());
  check_given(sequence_ds, "value", args.value.has_value());
  check_given(needs[kDPrefixKey] || needs[kDPrefixValue], "prefix_key", args.prefix_key.has_value());
  check_given(prefix_ds, "prefix_value", args.prefix_value.has_value());
  check_given(sequence_ds || prefix_ds, "out", out.has_value());
  if (out.has_value())
    TORCH_CHECK_VALUE(out->sizes() == dout.sizes() && out->scalar_type() == query.scalar_type(),
                      "out: expected shape and dtype of dout, ", dout.sizes(), ", got ", out->sizes());
  const std::array<int64_t, 2> rows{query.size(1), query.size(0)};
  const auto lse_type = query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK_VALUE(lse.sizes() == at::IntArrayRef(rows) && lse.scalar_type() == lse_type, "lse: expected [", rows[0],
                    ", ", rows[1], "] of ", lse_type, ", got ", lse.sizes(), " of ", lse.scalar_type());
  if (dlse.has_value())
    TORCH_CHECK_VALUE(dlse->sizes() == lse.sizes(), "dlse: expected ", lse.sizes(), ", got ", dlse->sizes());
  TORCH_CHECK_VALUE((!args.key.has_value() || args.key->size(0) == key_rows) &&
                        (!args.value.has_value() || args.value->size(0) == key_rows),
                    "key_rows: expected the rows of key and value, got ", key_rows);
}

void use_packed_strides(BackwardParams& b) {
  std::swap(b.dout.head_stride, b.dout.row_stride);
  std::swap(b.forward.out.head_stride, b.forward.out.row_stride);
}

AttentionParams make_packed_params(const PackedArguments& args, int64_t value_dim) {
  AttentionParams p;
  p.batch = args.cu_seqlens_q.size(0) - 1;
  p.q_heads = args.query.size(1);
  p.kv_heads = kv_heads_of(args);
  p.head_dim = args.query.size(2);
  p.value_dim = value_dim;
  p.packed_queries = args.query.size(0);
  p.query = packed_operand(args.query);
  if (args.key.has_value()) p.key = packed_operand(*args.key);
  if (args.value.has_value()) p.value = packed_operand(*args.value);
  if (args.key.has_value() || args.value.has_value())
    p.packed_keys = (args.key.has_value() ? *args.key : *args.value).size(0);
  if (const at::Tensor* prefix = given_prefix(args)) {
    p.num_prefixes = count_of_prefixes(args);
    if (!is_packed_bank(args)) p.prefix_len = prefix->size(-2);
    p.prefix_slots = args.prefix_ids.has_value() && args.prefix_ids->dim() == 2 ? args.prefix_ids->size(1) : 1;
    const auto bank = [&](const at::Tensor& x) { return is_packed_bank(args) ? packed_operand(x) : make_operand(x); };
    if (args.prefix_key.has_value()) p.prefix_key = bank(*args.prefix_key);
    if (args.prefix_value.has_value()) p.prefix_value = bank(*args.prefix_value);
  }
  p.scale = args.scale.value_or(1.0 / std::sqrt(static_cast<double>(p.head_dim)));
  p.softcap = args.softcap;
  p.window_left = clamp_position(args.window_left);
  p.window_right = clamp_position(args.window_right);
  p.is_causal = args.is_causal;
  p.window_includes_prefix = args.window_includes_prefix;
  p.dropout_threshold = static_cast<uint32_t>(std::floor(args.dropout_p * 65536 + 0.5));
  return p;
}

std::tuple<at::Tensor, at::Tensor> empty_packed_results(const at::Tensor& query, AttentionParams& p) {
  const at::ScalarType lse_type = query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  at::Tensor out = at::empty({query.size(0), p.q_heads, p.value_dim}, query.options());
  at::Tensor lse = at::empty({p.q_heads, query.size(0)}, query.options().dtype(lse_type));
  p.out = packed_operand(out);
  p.lse = lse.mutable_data_ptr();
  return {out, lse};
}

Gradients empty_packed_gradients(const PackedArguments& args, std::array<bool, kNumGradients> needs,
                                 BackwardParams& b) {
  Gradients gradients;
  for (int i = 0; i < kNumGradients; ++i) {
    if (!needs[i]) {
      gradients[i] = at::empty({0}, args.query.options());
      continue;
    }
    const at::Tensor& like = like_of_gradient(args, i);
    auto sizes = like.sizes().vec();
    sizes.back() = i == kDValue || i == kDPrefixValue ? b.forward.value_dim : b.forward.head_dim;
    gradients[i] = at::empty(sizes, like.options());
    const bool dense_bank = i >= kDPrefixKey && !is_packed_bank(args);
    b.gradients[i] = dense_bank ? make_operand(gradients[i]) : packed_operand(gradients[i]);
    if (b.forward.batch == 0 || b.forward.q_len == 0) gradients[i].zero_();
  }
  return gradients;
}

}  // namespace prefix_kernels
