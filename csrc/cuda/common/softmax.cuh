// The online softmax of a warp's rows, in base 2.
//
// Scores arrive tile by tile. Each row keeps its maximum so far and its sum of exp(score - maximum). When the maximum
// grows, the sum and the output so far are scaled down. A thread sums its own columns; the four threads that share a
// row add up at the end.
#pragma once

#include "scores.cuh"

namespace prefix_kernels::cuda {

inline constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// The maximum of a row, over the four threads that hold it.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

// The sum of a row, over the four threads that hold it.
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// A finished row; its output is multiplied by `factor`. Parts of a row are merged by maximum and sum and not by lse: if
// a mask pushes all scores to the least float, lse rounds the logarithm of the sum away.
struct RowResult {
  float factor;
  float maximum;  // largest score, in natural units
  float sum;      // sum of exp(score - maximum)

  __device__ __forceinline__ float lse() const { return sum > 0.0f ? maximum + logf(sum) : minus_infinity(); }

  // AttentionParams::row_mass
  __device__ __forceinline__ float mass() const { return sum > 0.0f ? sum * expf(maximum - lse()) : 1.0f; }
};

// kRowBlocks: 16-row blocks of the warp. kScaled: scores are final, in natural units. Otherwise they are products of
// query and key whose positive scale is still to be applied, which saves one instruction per score.
template <int kRowBlocks, bool kScaled>
class OnlineSoftmax {
 public:
  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
      for (int half_row = 0; half_row < 2; ++half_row) {
        maximum_[m][half_row] = minus_infinity();
        sum_[m][half_row] = 0.0f;
      }
    }
  }

  // Starts row half_row * 8 + lane / 4 of block m from an output normalised over other columns, whose lse is `maximum`
  // in the units of the scores.
  __device__ __forceinline__ void resume(int m, int half_row, float maximum, int lane) {
    maximum_[m][half_row] = maximum;
    sum_[m][half_row] = lane % 4 == 0 ? 1.0f : 0.0f;
  }

  // Turns scores into probabilities relative to the maximum so far, and rescales `out` to that maximum. `factor` takes
  // scores to base 2.
  template <int kColumns, int kOut>
  __device__ __forceinline__ void update(float (&scores)[kRowBlocks][kColumns][4], float (&out)[kRowBlocks][kOut][4],
                                         float factor) {
    float now[kRowBlocks][2];
    bool grew = false;
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
      for (int half_row = 0; half_row < 2; ++half_row) {
        float most = maximum_[m][half_row];
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          most = fmaxf(most, fmaxf(scores[m][n][2 * half_row], scores[m][n][2 * half_row + 1]));
        }
        now[m][half_row] = row_max(most);
        grew = grew || now[m][half_row] > maximum_[m][half_row];
      }
    }
    // Rare after the first tiles.
    if (__any_sync(kAllLanes, grew)) {
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
        for (int half_row = 0; half_row < 2; ++half_row) {
          const float shrink = ptx::exp2_approx((maximum_[m][half_row] - finite(now[m][half_row])) * factor);
          maximum_[m][half_row] = now[m][half_row];
          sum_[m][half_row] *= shrink;
#pragma unroll
          for (int n = 0; n < kOut; ++n) {
            out[m][n][2 * half_row] *= shrink;
            out[m][n][2 * half_row + 1] *= shrink;
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
      for (int half_row = 0; half_row < 2; ++half_row) {
        const float reference = finite(maximum_[m][half_row]);
        const float offset = reference * factor;
        float total = 0.0f;
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
#pragma unroll
          for (int e = 2 * half_row; e < 2 * half_row + 2; ++e) {
            float& score = scores[m][n][e];
            // Final scores may be as low as a mask can make them: their difference is finite, their multiple is not.
            score = ptx::exp2_approx(kScaled ? (score - reference) * factor : score * factor - offset);
            total += score;
          }
        }
        sum_[m][half_row] += total;
      }
    }
  }

  // The result of row half_row * 8 + lane / 4 of block m; `scale` takes scores to natural units.
  __device__ __forceinline__ RowResult finish(int m, int half_row, float scale) const {
    const float sum = row_sum(sum_[m][half_row]);
    if (sum == 0.0f) return {0.0f, minus_infinity(), 0.0f};
    return {__fdividef(1.0f, sum), maximum_[m][half_row] * scale, sum};
  }

 private:
  // A row that has seen nothing yet has maximum -inf; exp2(-inf - 0) is still 0.
  __device__ __forceinline__ static float finite(float maximum) { return maximum == minus_infinity() ? 0.0f : maximum; }

  float maximum_[kRowBlocks][2];
  float sum_[kRowBlocks][2];
};

}  // namespace prefix_kernels::cuda
