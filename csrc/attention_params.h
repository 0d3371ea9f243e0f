// The one contract between the host code that knows torch and the kernels that do not: plain data, raw pointers and
// strides in elements. Every device reads the same struct.
#pragma once

#include <cstdint>

namespace prefix_kernels {

inline constexpr int64_t kMaxHeadDim = 256;

enum class DType : int32_t { kFloat64, kFloat32, kBFloat16, kFloat16 };

// The asked-for gradients, in the order of the operator's list.
enum Gradient : int32_t { kDQuery, kDKey, kDValue, kDPrefixKey, kDPrefixValue, kNumGradients };

// One [batch, heads, rows, head_dim] operand, or [..., value_dim], whose last stride is 1. A prefix bank is
// [num_prefixes, heads, rows, head_dim].
struct Operand {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
  int64_t row_stride = 0;
  DType dtype = DType::kFloat32;
};

// The smallest ranges of columns that contain everything a batch row's mask shows; [0, 0) is empty.
struct ShownColumns {
  int32_t prefix_begin;  // range of the prefix columns
  int32_t prefix_end;
  int32_t begin;  // range of the sequence's columns
  int32_t end;
};

struct MaskOperand {
  const void* data = nullptr;  // [batch, q_heads, q_len, columns]; stride 0 where broadcast; null: no mask
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
  int64_t row_stride = 0;
  int64_t column_stride = 0;
  bool is_bool = false;        // true: nonzero elements attend; false: elements are added to the scores
  int64_t prefix_columns = 0;  // the mask's first columns: prefix_slots * prefix_len, or 0: the prefix is unmasked
  DType dtype = DType::kFloat32;
  const ShownColumns* shown = nullptr;  // device memory, [batch], or [1] if batch_stride is 0; null: mask not scanned
};

struct AttentionParams {
  int64_t batch = 0;
  int64_t q_heads = 0;
  int64_t kv_heads = 0;
  int64_t q_len = 0;
  int64_t k_len = 0;
  int64_t head_dim = 0;      // of query and key
  int64_t value_dim = 0;     // head dim of value and out
  int64_t prefix_len = 0;    // P, the prefix length: rows of each prefix in the bank
  int64_t num_prefixes = 0;  // prefixes in the bank
  int64_t prefix_slots = 0;  // most prefixes that one batch row sees, one after another

  Operand query;         // [batch, q_heads, q_len, head_dim]
  Operand key;           // [batch, kv_heads, k_len, head_dim]
  Operand value;         // [batch, kv_heads, k_len, value_dim]
  Operand prefix_key;    // [num_prefixes, kv_heads, prefix_len, head_dim]
  Operand prefix_value;  // [num_prefixes, kv_heads, prefix_len, value_dim]
  Operand out;           // [batch, q_heads, q_len, value_dim]
  void* lse = nullptr;   // [batch, q_heads, q_len] contiguous; float, or double for double queries
  // Sum over the row of exp(score - lse), laid out like lse; null: not asked for. It is 1 but for a mask that moves all
  // scores so far that lse rounds the logarithm of the sum away.
  void* row_mass = nullptr;
  // out and lse hold attention over other keys, from which the softmax goes on; an infinite lse marks a row that saw
  // none. Without dropout and row_mass only.
  bool extends = false;
  MaskOperand mask;

  // Packed sequences: operands are [rows of all sequences, heads, dim], so that batch_stride is 0; batch is the number
  // of sequences, q_len and k_len their greatest lengths, and lse is [q_heads, packed_queries]. Null: each has all of
  // q_len and k_len.
  const int64_t* query_starts = nullptr;   // [batch + 1]
  const int64_t* key_starts = nullptr;     // [batch + 1]
  const int64_t* prefix_starts = nullptr;  // [num_prefixes + 1]: a packed bank, whose valid rows are prefix_lens
  int64_t packed_queries = 0;
  int64_t packed_keys = 0;

  const int64_t* prefix_ids = nullptr;     // [batch, prefix_slots] contiguous; -1 is none; null: see prefix_of_row
  const int64_t* prefix_lens = nullptr;    // [num_prefixes], valid rows of each; null: all prefix_len
  const int64_t* query_offsets = nullptr;  // [batch]; null: query_offset for all
  int64_t query_offset = 0;                // position of the first query among the sequence keys

  double scale = 1.0;
  double softcap = 0.0;      // 0: off
  int64_t window_left = -1;  // -1: unlimited
  int64_t window_right = -1;
  bool is_causal = false;
  bool window_includes_prefix = false;

  uint32_t dropout_threshold = 0;  // an element is dropped when its 16 random bits are below this; 0: no dropout
  uint64_t dropout_seed = 0;
  const int64_t* dropout_seed_ptr = nullptr;  // the seed in device memory; null: dropout_seed
};

struct BackwardParams {
  AttentionParams forward;
  Operand dout;                      // [batch, q_heads, q_len, value_dim]
  const void* dlse = nullptr;        // like lse; null: zero
  Operand gradients[kNumGradients];  // laid out like the inputs; data is null where not asked for

  bool needs(Gradient g) const { return gradients[g].data != nullptr; }
};

}  // namespace prefix_kernels
