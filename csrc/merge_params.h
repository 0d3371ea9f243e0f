// The contract of merging partial attentions, between the host code that knows torch and the kernels that do not.
//
// Part i is attention of the same queries over keys of its own: out_i, and lse_i, the logarithm of its sum of
// exponentiated scores. With the shares w_i = exp(lse_i) / sum_j exp(lse_j), which sum to 1:
//
//     out = sum_i w_i out_i                lse = log sum_i exp(lse_i)
//     dout_i = w_i dout                    dlse_i = w_i (<dout, out_i> - sum_j w_j <dout, out_j> + dlse)
//
// An infinite lse_i, of either sign, marks a row that sees none of the part's keys: its share is 0, and so are its
// gradients, whatever out_i holds. A row that sees nothing of any part has out = 0 and lse = -inf.
#pragma once

#include "attention_params.h"

namespace prefix_kernels {

inline constexpr int kMaxMergedParts = 32;  // parts of one call; a lane of a GPU's warp holds the share of each

// One number per row: [batch, heads, rows] with any strides, in the type that the kernel computes in.
struct RowNumbers {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
  int64_t row_stride = 0;
};

struct MergeParams {
  // The dimensions before the last, in the order in which the result lies in memory.
  int64_t batch = 0;
  int64_t heads = 0;
  int64_t rows = 0;
  int64_t value_dim = 0;
  int32_t parts = 0;
  bool computes_in_double = false;  // false: in float

  Operand outs[kMaxMergedParts];     // [batch, heads, rows, value_dim], all of one dtype
  RowNumbers lses[kMaxMergedParts];  // [batch, heads, rows]
  Operand out;                       // like outs
  RowNumbers lse;                    // like lses
};

struct MergeBackwardParams {
  MergeParams forward;  // without out and lse; without outs where no dlse is asked for
  Operand dout;         // like outs
  RowNumbers dlse;      // like lses; data is null for zero

  // The gradients; null where not asked for.
  void* douts[kMaxMergedParts] = {};
  void* dlses[kMaxMergedParts] = {};
  Operand douts_layout;      // strides and dtype of all douts, without data
  RowNumbers dlses_layout;   // strides of all dlses, without data
  bool needs_dlses = false;  // some dlses are asked for
};

// A CUDA kernel's parameters may take 4 KB.
static_assert(sizeof(MergeBackwardParams) <= 4000);

}  // namespace prefix_kernels
