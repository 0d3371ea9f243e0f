#include "validate.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>

namespace prefix_kernels {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

bool is_supported(at::ScalarType type) {
  return type == at::kDouble || type == at::kFloat || type == at::kBFloat16 || type == at::kHalf;
}

void check_device(const char* name, const at::Tensor& x, const at::Tensor& query) {
  TORCH_CHECK_VALUE(x.device() == query.device(), name, ": expected a tensor on ", query.device(),
                    " like query, got one on ", x.device());
}

void check_floating(const char* name, const at::Tensor& x) {
  TORCH_CHECK_TYPE(is_supported(x.scalar_type()), name, ": expected float64, float32, bfloat16 or float16, got ",
                   x.scalar_type());
}

}  // namespace

void check_scalars(double dropout_p, std::optional<double> scale, double softcap, int64_t window_left,
                   int64_t window_right) {
  TORCH_CHECK_VALUE(dropout_p >= 0 && dropout_p <= 1, "dropout_p: expected a probability from 0 to 1, got ", dropout_p);
  TORCH_CHECK_VALUE(!scale.has_value() || std::isfinite(*scale), "scale: expected a finite number, got ", *scale);
  // Within these bounds neither softcap nor its inverse leaves the range of float32.
  TORCH_CHECK_VALUE(softcap == 0 || (softcap >= 1e-30 && softcap <= 1e30),
                    "softcap: expected 0 (off) or a number from 1e-30 to 1e30, got ", softcap);
  TORCH_CHECK_VALUE(window_left >= -1 && window_right >= -1,
                    "window_size: expected two numbers of keys, or -1 for no limit, got (", window_left, ", ",
                    window_right, ")");
}

void check_operand(const char* name, const at::Tensor& x, const at::Tensor& query) {
  check_device(name, x, query);
  check_floating(name, x);
  TORCH_CHECK_VALUE(x.layout() == at::kStrided, name, ": expected a dense tensor, got layout ", x.layout());
  TORCH_CHECK_VALUE(x.size(-1) <= 1 || x.numel() == 0 || x.stride(-1) == 1, name,
                    ": expected stride 1 in the last dimension, got strides ", x.strides(), "; call .contiguous()");
}

void check_integers(const char* name, const at::Tensor& x, const at::Tensor& query) {
  check_device(name, x, query);
  TORCH_CHECK_TYPE(x.scalar_type() == at::kInt || x.scalar_type() == at::kLong, name, ": expected int32 or int64, got ",
                   x.scalar_type());
}

namespace {

void check_head_dim(const char* name, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.size(3) >= 1 && x.size(3) <= kMaxHeadDim, name, ": expected a head dim from 1 to ", kMaxHeadDim,
                    ", got ", x.size(3), " in shape ", x.sizes());
}

void check_query(const at::Tensor& query) {
  TORCH_CHECK_VALUE(query.dim() == 4, "query: expected 4 dimensions [B, Hq, Sq, D], got shape ", query.sizes());
  check_operand("query", query, query);
  check_head_dim("query", query);
  TORCH_CHECK_VALUE(query.size(1) >= 1, "query: expected at least 1 head, got shape ", query.sizes());
}

// The backward pass leaves out key or value where its gradients need neither.
void check_sequence(const AttentionArguments& args) {
  const at::Tensor& query = args.query;
  for (const auto& [name, given] :
       {std::pair<const char*, const OptionalTensor&>{"key", args.key}, {"value", args.value}}) {
    if (!given.has_value()) continue;
    const at::Tensor& x = *given;
    const bool is_key = &given == &args.key;
    TORCH_CHECK_VALUE(x.dim() == 4, name, ": expected 4 dimensions [B, Hkv, Sk, ", is_key ? "D" : "Dv", "], got shape ",
                      x.sizes());
    check_operand(name, x, query);
    TORCH_CHECK_TYPE(x.scalar_type() == query.scalar_type(), name, ": expected ", query.scalar_type(),
                     " like query, got ", x.scalar_type());
    TORCH_CHECK_VALUE(x.size(0) == query.size(0), name, ": expected batch size ", query.size(0),
                      " like query, got shape ", x.sizes());
    TORCH_CHECK_VALUE(!is_key || x.size(3) == query.size(3), name, ": expected head dim ", query.size(3),
                      " like query, got shape ", x.sizes());
    check_head_dim(name, x);
  }
  if (args.key.has_value() && args.value.has_value()) {
    const auto sizes = args.key->sizes();
    TORCH_CHECK_VALUE(args.value->sizes().slice(0, 3) == sizes.slice(0, 3), "value: expected shape [", sizes[0], ", ",
                      sizes[1], ", ", sizes[2], ", Dv] like key, got ", args.value->sizes());
  }
  if (args.key.has_value()) {
    TORCH_CHECK_VALUE(args.key->size(1) >= 1 && query.size(1) % args.key->size(1) == 0,
                      "key: expected a number of heads that divides query's ", query.size(1), ", got shape ",
                      args.key->sizes());
  }
}

// The backward pass leaves out prefix_value, or both, where its gradients need neither. `value_dim`: the head dim of
// value and out.
void check_prefix(const AttentionArguments& args, int64_t kv_heads, int64_t value_dim) {
  const at::Tensor& query = args.query;
  for (const auto& [name, given] : {std::pair<const char*, const OptionalTensor&>{"prefix_key", args.prefix_key},
                                    {"prefix_value", args.prefix_value}}) {
    if (!given.has_value()) continue;
    const at::Tensor& x = *given;
    const int64_t head_dim = &given == &args.prefix_key ? query.size(3) : value_dim;
    TORCH_CHECK_VALUE((x.dim() == 3 || x.dim() == 4) && x.size(-3) == kv_heads && x.size(-1) == head_dim, name,
                      ": expected [", kv_heads, ", P, ", head_dim, "] or [N, ", kv_heads, ", P, ", head_dim, "], got ",
                      x.sizes());
    check_operand(name, x, query);
  }
  if (!args.prefix_key.has_value()) return;
  const at::Tensor& key = *args.prefix_key;
  if (args.prefix_value.has_value()) {
    const at::Tensor& value = *args.prefix_value;
    auto expected = key.sizes().vec();
    expected.back() = value_dim;
    TORCH_CHECK_VALUE(value.sizes() == at::IntArrayRef(expected), "prefix_value: expected shape ",
                      at::IntArrayRef(expected), " like prefix_key and value, got ", value.sizes());
    TORCH_CHECK_TYPE(value.scalar_type() == key.scalar_type(), "prefix_value: expected ", key.scalar_type(),
                     " like prefix_key, got ", value.scalar_type());
  }
  if (key.dim() == 4 && !args.prefix_ids.has_value()) {
    TORCH_CHECK_VALUE(key.size(0) == query.size(0), "prefix_key: expected one prefix per batch row, [", query.size(0),
                      ", ", kv_heads, ", P, ", query.size(3), "], or prefix_ids that name them, got ", key.sizes());
  }
}

int64_t prefix_count(const at::Tensor& prefix_key) { return prefix_key.dim() == 3 ? 1 : prefix_key.size(0); }

// The backward pass has a selection without a prefix where no gradient asked for needs the prefix.
void check_prefix_selection(const AttentionArguments& args) {
  const at::Tensor& query = args.query;
  const int64_t batch = query.size(0);
  const bool no_prefix = !args.prefix_key.has_value();
  if (args.prefix_ids.has_value()) {
    const at::Tensor& ids = *args.prefix_ids;
    TORCH_CHECK_VALUE((ids.dim() == 1 || ids.dim() == 2) && ids.size(0) == batch, "prefix_ids: expected [", batch,
                      "] or [", batch, ", M], got ", ids.sizes());
    check_integers("prefix_ids", ids, query);
  }
  if (args.prefix_lens.has_value()) {
    const at::Tensor& lens = *args.prefix_lens;
    TORCH_CHECK_VALUE(lens.dim() == 1 && (no_prefix || lens.size(0) == prefix_count(*args.prefix_key)),
                      "prefix_lens: expected [", no_prefix ? lens.size(0) : prefix_count(*args.prefix_key),
                      "], a length for each prefix, got ", lens.sizes());
    check_integers("prefix_lens", lens, query);
  }
}

int64_t prefix_slots(const AttentionArguments& args) {
  if (!args.prefix_key.has_value()) return 0;
  return args.prefix_ids.has_value() && args.prefix_ids->dim() == 2 ? args.prefix_ids->size(1) : 1;
}

// prefix_columns: those that a mask of prefix and sequence has; -1: any number.
void check_mask(const AttentionArguments& args, const at::Tensor& mask, int64_t key_len, int64_t prefix_columns) {
  check_device("attn_mask", mask, args.query);
  TORCH_CHECK_VALUE(mask.layout() == at::kStrided, "attn_mask: expected a dense tensor, got layout ", mask.layout());
  TORCH_CHECK_TYPE(mask.scalar_type() == at::kBool || is_supported(mask.scalar_type()),
                   "attn_mask: expected bool or a floating dtype, got ", mask.scalar_type());
  bool fits = mask.dim() <= 4;
  for (int64_t i = 0; fits && i < mask.dim(); ++i) {
    const int64_t size = mask.size(mask.dim() - 1 - i);
    if (size == 1) continue;
    fits = i > 0                ? size == args.query.size(3 - i)
           : prefix_columns < 0 ? size >= key_len
                                : size == key_len || size == key_len + prefix_columns;
  }
  const auto leading = args.query.sizes().slice(0, 3);
  TORCH_CHECK_VALUE(fits, "attn_mask: expected a shape broadcastable to ", leading, " + [", key_len,
                    "] (the sequence) or + [", key_len + std::max<int64_t>(prefix_columns, 0),
                    "] (prefix and sequence), got ", mask.sizes());
}

int64_t prefix_columns_of(const AttentionArguments& args) {
  return args.prefix_key.has_value() ? prefix_slots(args) * args.prefix_key->size(-2) : 0;
}

void check_dropout_seed(const AttentionArguments& args) {
  if (args.dropout_p == 0) return;
  TORCH_CHECK_VALUE(args.dropout_seed.has_value(),
                    "dropout_seed: expected an int64 tensor [1] with dropout_p=", args.dropout_p, ", got None");
  const at::Tensor& seed = *args.dropout_seed;
  check_device("dropout_seed", seed, args.query);
  TORCH_CHECK_TYPE(seed.scalar_type() == at::kLong, "dropout_seed: expected int64, got ", seed.scalar_type());
  TORCH_CHECK_VALUE(seed.numel() == 1, "dropout_seed: expected one number, got shape ", seed.sizes());
}

void check_query_offset(const AttentionArguments& args) {
  if (!args.query_offsets.has_value()) return;
  const at::Tensor& offsets = *args.query_offsets;
  TORCH_CHECK_VALUE(offsets.dim() == 1 && offsets.size(0) == args.query.size(0), "query_offset: expected an int or [",
                    args.query.size(0), "], got shape ", offsets.sizes());
  check_integers("query_offset", offsets, args.query);
}

int64_t kv_heads_of(const AttentionArguments& args) {
  if (args.key.has_value()) return args.key->size(1);
  if (args.value.has_value()) return args.value->size(1);
  return args.prefix_key.has_value() ? args.prefix_key->size(-3) : args.query.size(1);
}

void check_lse(const at::Tensor& query, const at::Tensor& lse) {
  const auto sizes = query.sizes().slice(0, 3);
  const auto type = query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK_VALUE(lse.sizes() == sizes && lse.scalar_type() == type, "lse: expected shape ", sizes, " and dtype ",
                    type, ", got ", lse.sizes(), " and ", lse.scalar_type());
  check_device("lse", lse, query);
}

// The head dim of dout is that of value and out, of which the backward pass may have neither.
void check_dout(const AttentionArguments& args, const at::Tensor& dout) {
  const at::Tensor& query = args.query;
  TORCH_CHECK_VALUE(dout.dim() == 4, "dout: expected 4 dimensions [B, Hq, Sq, Dv], got shape ", dout.sizes());
  auto expected = query.sizes().vec();
  expected.back() = args.value.has_value()          ? args.value->size(3)
                    : args.prefix_value.has_value() ? args.prefix_value->size(-1)
                                                    : dout.size(3);
  TORCH_CHECK_VALUE(dout.sizes() == at::IntArrayRef(expected), "dout: expected shape ", at::IntArrayRef(expected),
                    ", got ", dout.sizes());
  check_head_dim("dout", dout);
  TORCH_CHECK_TYPE(dout.scalar_type() == query.scalar_type(), "dout: expected ", query.scalar_type(), ", got ",
                   dout.scalar_type());
  check_device("dout", dout, query);
}

MaskOperand make_mask(const at::Tensor& mask, const AttentionParams& p) {
  MaskOperand m;
  m.data = mask.const_data_ptr();
  m.is_bool = mask.scalar_type() == at::kBool;
  if (!m.is_bool) m.dtype = dtype_of(mask);
  const auto stride = [&](int64_t from_last) -> int64_t {
    return mask.dim() > from_last && mask.size(mask.dim() - 1 - from_last) != 1
               ? mask.stride(mask.dim() - 1 - from_last)
               : 0;
  };
  m.column_stride = stride(0);
  m.row_stride = stride(1);
  m.head_stride = stride(2);
  m.batch_stride = stride(3);
  const int64_t columns = mask.dim() > 0 ? mask.size(-1) : 1;
  m.prefix_columns = columns != 1 ? columns - p.k_len : 0;
  return m;
}

}  // namespace

int64_t clamp_position(int64_t position) { return std::clamp(position, -kMaxPosition, kMaxPosition); }

DType dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return DType::kFloat64;
    case at::kFloat:
      return DType::kFloat32;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      TORCH_CHECK_TYPE(false, "expected float64, float32, bfloat16 or float16, got ", tensor.scalar_type());
  }
}

Operand make_operand(const at::Tensor& tensor) {
  Operand x;
  x.data = const_cast<void*>(tensor.const_data_ptr());
  x.batch_stride = tensor.dim() == 4 ? tensor.stride(0) : 0;
  x.head_stride = tensor.stride(-3);
  x.row_stride = tensor.stride(-2);
  x.dtype = dtype_of(tensor);
  return x;
}

AttentionParams make_params(const AttentionArguments& args, int64_t key_len, int64_t value_dim) {
  AttentionParams p;
  p.batch = args.query.size(0);
  p.q_heads = args.query.size(1);
  p.q_len = args.query.size(2);
  p.head_dim = args.query.size(3);
  p.value_dim = value_dim;
  p.kv_heads = kv_heads_of(args);
  p.k_len = key_len;
  p.query = make_operand(args.query);
  if (args.key.has_value()) p.key = make_operand(*args.key);
  if (args.value.has_value()) p.value = make_operand(*args.value);
  if (args.prefix_key.has_value()) {
    p.prefix_key = make_operand(*args.prefix_key);
    p.num_prefixes = prefix_count(*args.prefix_key);
    p.prefix_len = args.prefix_key->size(-2);
    p.prefix_slots = prefix_slots(args);
  }
  if (args.prefix_value.has_value()) p.prefix_value = make_operand(*args.prefix_value);
  if (args.attn_mask.has_value()) p.mask = make_mask(*args.attn_mask, p);
  p.query_offset = clamp_position(args.query_offset.value_or(key_len - p.q_len));
  p.scale = args.scale.value_or(1.0 / std::sqrt(static_cast<double>(p.head_dim)));
  p.softcap = args.softcap;
  p.window_left = clamp_position(args.window_left);
  p.window_right = clamp_position(args.window_right);
  p.is_causal = args.is_causal;
  p.window_includes_prefix = args.window_includes_prefix;
  p.dropout_threshold = static_cast<uint32_t>(std::floor(args.dropout_p * 65536 + 0.5));
  return p;
}

void check_forward(const AttentionArguments& args) {
  check_query(args.query);
  check_sequence(args);
  TORCH_CHECK_VALUE(args.prefix_key.has_value() == args.prefix_value.has_value(),
                    args.prefix_key.has_value() ? "prefix_value: expected a tensor like prefix_key, got None"
                                                : "prefix_key: expected a tensor like prefix_value, got None");
  for (const auto& [name, selection] : {std::pair<const char*, const OptionalTensor&>{"prefix_ids", args.prefix_ids},
                                        {"prefix_lens", args.prefix_lens}}) {
    TORCH_CHECK_VALUE(args.prefix_key.has_value() || !selection.has_value(), name,
                      ": expected None without prefix_key, got shape ", selection->sizes());
  }
  check_prefix(args, args.key->size(1), args.value->size(3));
  check_prefix_selection(args);
  check_scalars(args.dropout_p, args.scale, args.softcap, args.window_left, args.window_right);
  check_query_offset(args);
  check_dropout_seed(args);
  if (args.attn_mask.has_value()) check_mask(args, *args.attn_mask, args.key->size(2), prefix_columns_of(args));
}

void check_extend(const AttentionArguments& args, const at::Tensor& out, const at::Tensor& lse) {
  const at::Tensor& query = args.query;
  check_query(query);
  TORCH_CHECK_VALUE(args.prefix_key->dim() >= 3, "prefix_key: expected [Hkv, P, D] or [N, Hkv, P, D], got ",
                    args.prefix_key->sizes());
  const int64_t kv_heads = args.prefix_key->size(-3);
  TORCH_CHECK_VALUE(kv_heads >= 1 && query.size(1) % kv_heads == 0,
                    "prefix_key: expected a number of heads that divides query's ", query.size(1), ", got ", kv_heads);
  TORCH_CHECK_VALUE(out.dim() == 4 && out.sizes().slice(0, 3) == query.sizes().slice(0, 3),
                    "out: expected [B, Hq, Sq, Dv] like query ", query.sizes(), ", got ", out.sizes());
  check_head_dim("out", out);
  TORCH_CHECK_TYPE(out.scalar_type() == query.scalar_type(), "out: expected ", query.scalar_type(), ", got ",
                   out.scalar_type());
  check_device("out", out, query);
  TORCH_CHECK_VALUE(out.size(3) == 1 || out.stride(3) == 1, "out: expected stride 1 in the last dimension, got ",
                    out.strides());
  check_lse(query, lse);
  TORCH_CHECK_VALUE(lse.is_contiguous(), "lse: expected a contiguous tensor, got strides ", lse.strides());
  check_prefix(args, kv_heads, out.size(3));
  check_prefix_selection(args);
  check_scalars(args.dropout_p, args.scale, args.softcap, args.window_left, args.window_right);
}

void check_backward(const AttentionArguments& args, const at::Tensor& dout, const OptionalTensor& dlse,
                    const OptionalTensor& out, const at::Tensor& lse, int64_t key_len,
                    std::array<bool, kNumGradients> needs) {
  check_query(args.query);
  const at::Tensor& query = args.query;
  check_sequence(args);
  const int64_t kv_heads = kv_heads_of(args);
  TORCH_CHECK_VALUE(kv_heads >= 1 && query.size(1) % kv_heads == 0, args.value.has_value() ? "value" : "prefix_key",
                    ": expected a number of heads that divides query's ", query.size(1), ", got ", kv_heads);
  check_dout(args, dout);
  check_prefix(args, kv_heads, dout.size(3));

  const bool sequence_ds = needs[kDQuery] || needs[kDKey];
  const bool prefix_ds = args.prefix_key.has_value() && (needs[kDQuery] || needs[kDPrefixKey]);
  const auto check_given = [](bool needed, const char* name, bool given) {
    TORCH_CHECK_VALUE(!needed || given, name, ": expected a tensor for the gradients asked for, got None");
  };
  check_given(sequence_ds || needs[kDValue], "key", args.key.has_value());
  check_given(sequence_ds, "value", args.value.has_value());
  check_given(needs[kDPrefixKey] || needs[kDPrefixValue] || args.prefix_value.has_value(), "prefix_key",
              args.prefix_key.has_value());
  check_given(prefix_ds, "prefix_value", args.prefix_value.has_value());
  check_given(sequence_ds || prefix_ds, "out", out.has_value());

  if (out.has_value()) {
    TORCH_CHECK_VALUE(out->sizes() == dout.sizes(), "out: expected shape ", dout.sizes(), " like dout, got ",
                      out->sizes());
    TORCH_CHECK_TYPE(out->scalar_type() == query.scalar_type(), "out: expected ", query.scalar_type(), ", got ",
                     out->scalar_type());
    check_device("out", *out, query);
  }
  check_lse(query, lse);
  const auto lse_sizes = query.sizes().slice(0, 3);
  if (dlse.has_value()) {
    TORCH_CHECK_VALUE(dlse->sizes() == lse_sizes, "dlse: expected shape ", lse_sizes, ", got ", dlse->sizes());
    check_device("dlse", *dlse, query);
  }
  TORCH_CHECK_VALUE(key_len >= 0 && (!args.key.has_value() || args.key->size(2) == key_len) &&
                        (!args.value.has_value() || args.value->size(2) == key_len),
                    "key_len: expected the length of key and value, got ", key_len);
  check_prefix_selection(args);
  check_scalars(args.dropout_p, args.scale, args.softcap, args.window_left, args.window_right);
  check_query_offset(args);
  check_dropout_seed(args);
  if (args.attn_mask.has_value()) {
    check_mask(args, *args.attn_mask, key_len, args.prefix_key.has_value() ? prefix_columns_of(args) : -1);
  }
}

}  // namespace prefix_kernels
