// The step from S and dP to P and dS: one cell of 16 queries x 16 keys at a time, in place and in registers.
//
//   p = exp(s - lse)    ds = p (dp - delta)    with softcap c, s = c tanh(x / c):  ds (1 - tanh^2(x / c))
//   with dropout:  dv takes p where kept;  dp where kept is scaled by 1 / (1 - r), elsewhere 0
//
// A cell lies in one segment (a prefix slot or the sequence), begins at a multiple of 16 of it, and is the unit of
// masking and of Philox. The columns kernel holds it as keys x queries, the rows kernel as queries x keys; with
// g = lane / 4 and t = lane % 4 a lane holds the resident rows g and g + 8 and the streamed rows 2t, 2t + 1, 2t + 8,
// 2t + 9. kKeysResident tells the two apart.
#pragma once

#include "../../common/scores.cuh"

namespace prefix_kernels::cuda::sm80 {

inline constexpr float kInfinity = __builtin_huge_valf();

// The lse in p = exp(s - lse), to base 2 unless a mask may be added: with the least float as a mask, s and lse are so
// low that their difference is finite and their multiples are not. A query that sees no key has p = 0.
template <bool kGeneral>
__device__ __forceinline__ float softmax_reference(float lse) {
  return lse == -kInfinity ? kInfinity : kGeneral ? lse : lse * kLog2E;
}

// The lse and delta of the queries that a lane holds: two queries if they are resident, four if they are streamed.
template <bool kKeysResident>
struct LaneQueries {
  static constexpr int kCount = kKeysResident ? 4 : 2;
  float reference[kCount];  // softmax_reference(lse)
  float delta[kCount];      // rowsum(dout * out) - dlse
};

// Address in attn_mask of a query and the first column of a segment; null if the segment is unmasked.
__device__ __forceinline__ const char* mask_row(const AttentionParams& p, int64_t batch, int64_t head, int64_t query,
                                                int segment) {
  const MaskOperand& mask = p.mask;
  if (mask.data == nullptr || (segment > 0 && mask.prefix_columns == 0)) return nullptr;
  const int64_t column = segment > 0 ? (segment - 1) * p.prefix_len : mask.prefix_columns;
  return static_cast<const char*>(mask.data) +
         (batch * mask.batch_stride + head * mask.head_stride + query * mask.row_stride + column * mask.column_stride) *
             mask_bytes(mask);
}

// The place of a cell among queries and keys.
struct ScoreCell {
  int first_key;    // the cell's first key, counted in its segment
  int first_query;  // the cell's first query, counted in the batch row
  int head;         // batch * q_heads + head
  int segment;      // number in philox.h: 0 the sequence, 1 + m the prefix in slot m
  int queries;      // queries from the first on that exist; more than 16 may
  uint64_t seed;
  const char* mask;  // attn_mask at (first_query, first_key); null: none

  __device__ __forceinline__ void move_mask(const MaskOperand& m, int64_t queries, int64_t keys) {
    if (mask != nullptr) mask += (queries * m.row_stride + keys * m.column_stride) * mask_bytes(m);
  }
};

// The scalars of the scores, computed once on the host.
struct ScoreScalars {
  float scale;
  float scale_log2;      // scale log2(e)
  float scale_over_cap;  // scale / softcap
  float softcap;         // 0: off
  float rescale;         // factor on elements that dropout keeps
  uint32_t threshold;

  static ScoreScalars of(const AttentionParams& p) {
    constexpr double kExactLog2E = 1.4426950408889634;
    ScoreScalars s;
    s.scale = static_cast<float>(p.scale);
    s.scale_log2 = static_cast<float>(p.scale * kExactLog2E);
    s.scale_over_cap = p.softcap > 0 ? static_cast<float>(p.scale / p.softcap) : 0.0f;
    s.softcap = static_cast<float>(p.softcap);
    s.rescale = static_cast<float>(dropout_rescale(p.dropout_threshold));
    s.threshold = p.dropout_threshold;
    return s;
  }
};

// The offsets within the cell of a lane's streamed rows 0..3 and resident rows 0..1.
__device__ __forceinline__ int streamed_row(int u) { return u / 2 * 8 + threadIdx.x % 4 * 2 + u % 2; }
__device__ __forceinline__ int resident_row(int v) { return threadIdx.x % kWarpSize / 4 + v * 8; }

// The elements that dropout keeps: bit 4n + e is that of scores[n][e].
template <bool kKeysResident>
__device__ __forceinline__ uint32_t kept(const ScoreCell& cell, const ScoreScalars& scalars) {
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
  const uint32_t row_group = static_cast<uint32_t>(cell.first_query / 2);
  const uint32_t column_group = static_cast<uint32_t>(cell.first_key / 4);
  uint32_t bits = 0;
  if constexpr (!kKeysResident) {
    const PhiloxWords words = philox(cell.seed, row_group + g, column_group + t, cell.head, cell.segment);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t word = words.word[i % 4 / 2 * 2 + i / 4];
      bits |= static_cast<uint32_t>((i % 2 ? word >> 16 : word & 0xFFFF) >= scalars.threshold) << i;
    }
  } else {
    // A lane needs one half of each word of two calls, its neighbour of the next key the other half: each makes one
    // call and they exchange.
    const int odd = g % 2;
    const PhiloxWords words = philox(cell.seed, row_group + 2 * t + odd, column_group + g / 2, cell.head, cell.segment);
    uint32_t mine[2], theirs[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t low = (words.word[2 * i] & 0xFFFF) | (words.word[2 * i + 1] << 16);
      const uint32_t high = (words.word[2 * i] >> 16) | (words.word[2 * i + 1] & 0xFFFF0000u);
      mine[i] = odd ? high : low;
      theirs[i] = __shfl_xor_sync(~0u, odd ? low : high, 4);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int n = i / 4, e = i % 4;
      const uint32_t pair = (e % 2 == odd) ? mine[n] : theirs[n];
      bits |= static_cast<uint32_t>((e / 2 ? pair >> 16 : pair & 0xFFFF) >= scalars.threshold) << i;
    }
  }
  return bits;
}

// The number that attn_mask adds to the score of (query, key) of the cell.
__device__ __forceinline__ float mask_bias(const MaskOperand& mask, const ScoreCell& cell, int query, int key) {
  const int64_t at = query * mask.row_stride + key * mask.column_stride;
  return element_bias(mask, cell.mask + at * mask_bytes(mask));
}

// tanh(x) to a few ulp of 1, which is what a softcap of scores in 16-bit products can show.
__device__ __forceinline__ float tanh_by_exp2(float x) {
  return 1.0f - 2.0f / (1.0f + ptx::exp2_approx(2.0f * kLog2E * x));
}

// The elements of a cell that are hidden: bit i is that of s[i / 4][i % 4] and equals hides(query, key), offsets in the
// cell.
template <bool kKeysResident, typename Hides>
__device__ __forceinline__ uint32_t hidden_elements(const Hides& hides) {
  uint32_t hidden = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int streamed = streamed_row(i / 4 * 2 + i % 2), resident = resident_row(i % 4 / 2);
    const bool hides_it = kKeysResident ? hides(streamed, resident) : hides(resident, streamed);
    hidden |= static_cast<uint32_t>(hides_it) << i;
  }
  return hidden;
}

// Turns s into p as dV takes it, and dp into ds. kWantsDs: false leaves dp alone. `hidden`: result of hidden_elements.
template <bool kGeneral, bool kKeysResident, bool kWantsDs>
__device__ __forceinline__ void finish_cell(float (&s)[2][4], float (&dp)[2][4],
                                            const LaneQueries<kKeysResident>& queries, const ScoreCell& cell,
                                            const ScoreScalars& scalars, const MaskOperand& mask, uint32_t hidden) {
  const bool has_dropout = kGeneral && scalars.threshold > 0;
  const bool has_softcap = kGeneral && scalars.softcap > 0;
  const bool has_mask = kGeneral && cell.mask != nullptr;
  const uint32_t keep = has_dropout ? kept<kKeysResident>(cell, scalars) : ~0u;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int n = i / 4, e = i % 4;
    const int u = n * 2 + e % 2, v = e / 2;
    const int q = kKeysResident ? u : v;
    float slope = 1.0f;
    float exponent;
    if constexpr (kGeneral) {
      float score;
      if (has_softcap) {
        const float t = tanh_by_exp2(s[n][e] * scalars.scale_over_cap);
        slope = 1.0f - t * t;
        score = t * scalars.softcap;
      } else {
        score = s[n][e] * scalars.scale;
      }
      if (has_mask) {
        const int query = kKeysResident ? streamed_row(u) : resident_row(v);
        const int key = kKeysResident ? resident_row(v) : streamed_row(u);
        if ((hidden >> i & 1) == 0 && query < cell.queries) score += mask_bias(mask, cell, query, key);
      }
      exponent = (score - queries.reference[q]) * kLog2E;
    } else {
      exponent = s[n][e] * scalars.scale_log2 - queries.reference[q];
    }
    const float p = ptx::exp2_approx(exponent);
    const bool is_kept = !has_dropout || (keep >> i & 1) != 0;
    s[n][e] = is_kept ? p : 0.0f;
    if constexpr (kWantsDs) {
      const float arriving = has_dropout ? (is_kept ? dp[n][e] * scalars.rescale : 0.0f) : dp[n][e];
      dp[n][e] = p * (arriving - queries.delta[q]);
      if (has_softcap) dp[n][e] *= slope;
    }
  }
  if (hidden != 0) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (hidden >> i & 1) {
        s[i / 4][i % 4] = 0.0f;
        if constexpr (kWantsDs) dp[i / 4][i % 4] = 0.0f;
      }
    }
  }
}

}  // namespace prefix_kernels::cuda::sm80
