// The results of the parts of a row's columns, merged in fixed order: by the last of the blocks that computed them, or
// by a kernel of its own.
#pragma once

#include "part.cuh"

namespace prefix_kernels::cuda::sm80 {

// The partial results of one row. Each thread that has one computes the row's sums anew.
template <typename Traits>
class PartsOfRow {
  using T = typename Traits::T;

 public:
  __device__ __forceinline__ PartsOfRow(const DecodeParams& params, int64_t batch, int64_t head, int64_t query)
      : params_(params), batch_(batch) {
    const AttentionParams& p = params.attention;
    row_ = (batch * p.q_heads + head) * p.q_len + query;
    out_ =
        static_cast<T*>(p.out.data) + batch * p.out.batch_stride + head * p.out.head_stride + query * p.out.row_stride;
    result_.maximum = minus_infinity();
    each_part([&](int64_t part) { result_.maximum = fmaxf(result_.maximum, params.partial_share[part].maximum); });
    reference_ = result_.maximum == minus_infinity() ? 0.0f : result_.maximum;
    result_.sum = 0.0f;
    each_part([&](int64_t part) { result_.sum += params.partial_share[part].relative_to(reference_); });
    result_.factor = result_.sum > 0.0f ? params.dropout_rescale / result_.sum : 0.0f;
  }

  // Writes the row's lse and, if it is asked for, its mass.
  __device__ __forceinline__ void store_sums() const {
    const AttentionParams& p = params_.attention;
    static_cast<float*>(p.lse)[row_] = result_.lse();
    if (p.row_mass != nullptr) static_cast<float*>(p.row_mass)[row_] = result_.mass();
  }

  // Writes elements [column, column + kColumns) of the row's output, as many of them as there are.
  template <int kColumns>
  __device__ __forceinline__ void store(int column) const {
    static_assert(kColumns == 1 || kColumns == 4);
    float total[kColumns] = {};
    each_part([&](int64_t part) {
      const float weight = params_.partial_share[part].relative_to(reference_);
      const float* const from = params_.partial_out + part * Traits::kHeadDim + column;
      if constexpr (kColumns == 4) {
        const float4 four = *reinterpret_cast<const float4*>(from);
        total[0] += weight * four.x;
        total[1] += weight * four.y;
        total[2] += weight * four.z;
        total[3] += weight * four.w;
      } else {
        total[0] += weight * *from;
      }
    });
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if (column + i < params_.attention.value_dim) out_[column + i] = from_float<T>(total[i] * result_.factor);
    }
  }

 private:
  // Calls use(index of the partial result) for each of the row's parts, in their order.
  template <typename Use>
  __device__ __forceinline__ void each_part(Use use) const {
    const AttentionParams& p = params_.attention;
    int64_t first = row_ * params_.parts;
#pragma unroll 1
    for (int slot = 0; slot <= p.prefix_slots; ++slot) {
      const bool is_prefix = slot < p.prefix_slots;
      // Nothing was written for a slot without a prefix.
      const bool exists = !is_prefix || prefix_of_row(p, batch_, slot) >= 0;
      const int parts = is_prefix ? params_.prefix_parts : params_.sequence_parts;
#pragma unroll 4
      for (int i = 0; i < (exists ? parts : 0); ++i) use(first + i);
      first += parts;
    }
  }

  const DecodeParams& params_;
  int64_t batch_;
  int64_t row_;
  T* out_;
  float reference_;
  RowResult result_;
};

// The blocks that compute parts of the rows of a batch row: its own, and those of the prefixes that it has.
__device__ __forceinline__ int blocks_of_row(const DecodeParams& params, int64_t batch) {
  const AttentionParams& p = params.attention;
  int blocks = params.sequence_parts;
  for (int slot = 0; slot < p.prefix_slots; ++slot)
    blocks += prefix_of_row(p, batch, slot) >= 0 ? params.prefix_parts : 0;
  return blocks;
}

// Merges those of the block's rows whose last part this one is. Blocks that compute parts of the same rows count
// themselves in; whoever finds that it is the last merges them, in the order of the parts and not of the arrivals. The
// counter is then zero again, for the next launch. A function of its own, and the parameters __grid_constant__, because
// inlined code makes the compiler choose other registers for the main loop.
template <typename Traits>
__device__ __noinline__ void merge_last(const DecodeParams& params, const DecodeRow* rows, int entries, int row_count,
                                        int kv_head, int first_row, int thread) {
  const AttentionParams& p = params.attention;
  constexpr int kQuads = Traits::kHeadDim / 4;
  int* const is_last = Traits::entries();  // by the number of the entry in the block
  __syncthreads();                         // all results of the block are written
  if (thread < entries) {
    const int64_t batch = rows[thread * params.rows_per_entry].batch;
    const int64_t counter = (batch * p.kv_heads + kv_head) * params.blocks_per_entry + first_row / Traits::kRows;
    const unsigned blocks = blocks_of_row(params, batch);
    __threadfence();  // others see the block's results before they see that it has arrived
    is_last[thread] = blocks == 1 || atomicInc(params.arrivals + counter, blocks - 1) == blocks - 1;
    __threadfence();  // and what is read from here on is not older than the arrivals that were seen
  }
  __syncthreads();
#pragma unroll 1
  for (int i = thread; i < row_count * kQuads; i += Traits::kThreads) {
    const int column = i % kQuads * 4;
    if (!is_last[i / kQuads / params.rows_per_entry]) continue;
    const DecodeRow& row = rows[i / kQuads];
    const PartsOfRow<Traits> parts(params, row.batch, row.head, row.query);
    if (column == 0) parts.store_sums();
    if (column < p.value_dim) parts.template store<4>(column);
  }
}

// Merges the parts of all rows, one warp per row.
template <typename Traits>
__global__ void __launch_bounds__(128) merge_kernel(const DecodeParams params) {
  const AttentionParams& p = params.attention;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  if (row >= p.batch * p.q_heads * p.q_len) return;
  const PartsOfRow<Traits> parts(params, row / p.q_len / p.q_heads, row / p.q_len % p.q_heads, row % p.q_len);
  if (lane == 0) parts.store_sums();
  for (int column = lane; column < p.value_dim; column += kWarpSize) parts.template store<1>(column);
}

}  // namespace prefix_kernels::cuda::sm80
