// Loops of nothing but multiply-adds, or loads, or copies, with which ceilings.py measures what a processor can do.
//
// Compiled with the flags of one instruction set and LANES, the floats of its vectors. Every function runs on `threads`
// threads and returns its amount of work: floating-point operations, or bytes read and written.

#include <cstddef>
#include <cstring>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef Vector Unaligned __attribute__((aligned(4)));

// Two units with a latency of four cycles need eight independent chains; AVX2 has 16 registers.
constexpr int kChains = 12;
// Each thread reads so many places at once: one stream alone does not keep enough loads of DRAM in flight.
constexpr int kStreams = 4;
constexpr std::ptrdiff_t kLine = 16;  // floats

// Keeps a result from being optimised away.
template <typename T>
void use(const T& value) {
  asm volatile("" : : "m"(value) : "memory");
}

template <typename Step>
void run_chains(int threads, long steps, Step step) {
#pragma omp parallel num_threads(threads)
  {
    Vector chain[kChains];
    for (int i = 0; i < kChains; ++i) chain[i] = Vector{} + static_cast<float>(i);
    for (long n = 0; n < steps; ++n) {
#pragma GCC unroll 12
      for (int i = 0; i < kChains; ++i) chain[i] = step(chain[i]);
    }
    use(chain);
  }
}

}  // namespace

extern "C" {

double multiply_add(int threads, long steps) {
  const Vector factor = Vector{} + 0.5f, addend = Vector{} + 1.0f;  // tends to 2: neither overflow nor denormals
  run_chains(threads, steps, [=](Vector chain) { return chain * factor + addend; });
  return 2.0 * LANES * kChains * steps * threads;
}

#ifdef __AVX512BF16__
double bfloat16_dot(int threads, long steps) {
  const __m512bh ones = _mm512_cvtne2ps_pbh(_mm512_set1_ps(1.0f), _mm512_set1_ps(1.0f));
  run_chains(threads, steps, [=](Vector chain) {
    return reinterpret_cast<Vector>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(chain), ones, ones));
  });
  return 4.0 * LANES * kChains * steps * threads;
}
#endif

// `count` is a multiple of threads * kStreams * kLine; lines are prefetched `ahead` floats before they are loaded.
double read_memory(int threads, const float* source, std::ptrdiff_t count, std::ptrdiff_t ahead) {
  const std::ptrdiff_t stream = count / (threads * kStreams);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; ++thread) {
    const float* begin = source + thread * kStreams * stream;
    Vector sum[kStreams] = {};
    for (std::ptrdiff_t i = 0; i < stream; i += kLine) {
#pragma GCC unroll 4
      for (int s = 0; s < kStreams; ++s) {
        const float* line = begin + s * stream + i;
        __builtin_prefetch(line + ahead);
#pragma GCC unroll 4
        for (std::ptrdiff_t j = 0; j < kLine; j += LANES) sum[s] += *reinterpret_cast<const Unaligned*>(line + j);
      }
    }
    use(sum);
  }
  return 4.0 * count;
}

double copy_memory(int threads, float* target, const float* source, std::ptrdiff_t count) {
  const std::ptrdiff_t part = count / threads;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int thread = 0; thread < threads; ++thread)
    std::memcpy(target + thread * part, source + thread * part, sizeof(float) * part);
  return 8.0 * count;
}

}  // extern "C"
