// A C interface to the CPU kernels of one source tree, for compare_builds.py.
//
// It is compiled once per tree, against that tree's own attention_params.h, so that trees whose parameters are laid out
// differently can be called on the same buffers. A change that renames a field changes this file with it: each tree is
// compiled with its own copy, or with that of the running script if it has none.

#include <time.h>

#include <cstdint>

#include "attention_params.h"

namespace prefix_kernels {

using RunWorkers = void (*)(int workers, void (*body)(void* argument, int worker), void* argument);

namespace PREFIX_KERNELS_ISA {
template <class T>
void attention_forward(const AttentionParams&, int threads, RunWorkers);
template <class T>
void attention_backward(const BackwardParams&, int threads, RunWorkers);
}  // namespace PREFIX_KERNELS_ISA

namespace {

// builds.py has both structs a second time. Strides are in elements; the last one is 1.
struct Tensor {
  void* data;  // null: not given, or not asked for
  int64_t batch_stride;
  int64_t head_stride;
  int64_t row_stride;
};

struct Call {
  int64_t batch, q_heads, kv_heads, q_len, k_len, head_dim, prefix_len;
  int64_t dtype;  // 0: float32, 1: bfloat16, 2: float16
  int64_t is_causal;
  int64_t dropout_threshold;  // of 65536
  int64_t dropout_seed;
  double scale;
  const void* key_mask;  // bool [batch, k_len], true where attended; null: no mask
  Tensor query, key, value, prefix_key, prefix_value, out, dout;
  Tensor gradients[5];  // of query, key, value, prefix_key, prefix_value
  float* lse;           // [batch, q_heads, q_len]
};

void run_workers(int workers, void (*body)(void* argument, int worker), void* argument) {
#pragma omp parallel for num_threads(workers) schedule(static, 1)
  for (int worker = 0; worker < workers; ++worker) body(argument, worker);
}

// The calling thread's CPU time, which leaves out the time of other processes, if it works alone; else the wall clock.
int64_t nanoseconds(int threads) {
  timespec now;
  clock_gettime(threads == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &now);
  return now.tv_sec * int64_t{1000000000} + now.tv_nsec;
}

// Trees without a head dim of values of their own have no such field.
template <class Params>
void set_value_dim(Params& p) {
  if constexpr (requires { p.value_dim; }) p.value_dim = p.head_dim;
}

BackwardParams make_params(const Call& call) {
  constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  const auto operand = [&](const Tensor& x) {
    Operand made;
    made.data = x.data;
    made.batch_stride = x.batch_stride;
    made.head_stride = x.head_stride;
    made.row_stride = x.row_stride;
    made.dtype = kDTypes[call.dtype];
    return made;
  };
  BackwardParams b;
  AttentionParams& p = b.forward;
  p.batch = call.batch;
  p.q_heads = call.q_heads;
  p.kv_heads = call.kv_heads;
  p.q_len = call.q_len;
  p.k_len = call.k_len;
  p.head_dim = call.head_dim;
  set_value_dim(p);
  p.prefix_len = call.prefix_len;
  p.num_prefixes = 1;
  p.prefix_slots = 1;
  p.query = operand(call.query);
  p.key = operand(call.key);
  p.value = operand(call.value);
  p.prefix_key = operand(call.prefix_key);
  p.prefix_value = operand(call.prefix_value);
  p.out = operand(call.out);
  p.lse = call.lse;
  if (call.key_mask != nullptr) {
    p.mask.data = call.key_mask;
    p.mask.batch_stride = call.k_len;
    p.mask.column_stride = 1;
    p.mask.is_bool = true;
  }
  p.query_offset = call.k_len - call.q_len;
  p.scale = call.scale;
  p.is_causal = call.is_causal != 0;
  p.dropout_threshold = static_cast<uint32_t>(call.dropout_threshold);
  p.dropout_seed = static_cast<uint64_t>(call.dropout_seed);
  b.dout = operand(call.dout);
  for (int i = 0; i < kNumGradients; ++i) b.gradients[i] = operand(call.gradients[i]);
  return b;
}

}  // namespace
}  // namespace prefix_kernels

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Size of Call, by which builds.py sees that both sides mean the same struct.
EXPORTED int64_t call_size() { return sizeof(prefix_kernels::Call); }

// Calls the forward kernel, the backward kernel, or one after the other, `repeats` times; returns nanoseconds.
EXPORTED int64_t run(const prefix_kernels::Call* call, int forward, int backward, int threads, int64_t repeats) {
  namespace isa = prefix_kernels::PREFIX_KERNELS_ISA;
  const prefix_kernels::BackwardParams params = prefix_kernels::make_params(*call);
  const int64_t begin = prefix_kernels::nanoseconds(threads);
  for (int64_t i = 0; i < repeats; ++i) {
    if (forward) isa::attention_forward<float>(params.forward, threads, prefix_kernels::run_workers);
    if (backward) isa::attention_backward<float>(params, threads, prefix_kernels::run_workers);
  }
  return prefix_kernels::nanoseconds(threads) - begin;
}
