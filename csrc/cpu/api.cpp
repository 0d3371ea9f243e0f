#include "api.h"

#include <ATen/Parallel.h>
#include <ATen/ops/sub.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdlib>

#include "../results.h"
#include "kernels.h"

namespace prefix_kernels::cpu {
namespace {

struct Isa {
  const char* name;
  bool supported;
  CpuKernels kernels;
};

#define PREFIX_KERNELS_TABLE(isa)                                                                  \
  CpuKernels {                                                                                     \
    isa::attention_forward<float>, isa::attention_forward<double>, isa::attention_backward<float>, \
        isa::attention_backward<double>, isa::merge_forward<float>, isa::merge_forward<double>,    \
        isa::merge_backward<float>, isa::merge_backward<double>                                    \
  }

const Isa& chosen_isa() {
  static const Isa chosen = [] {
    // Best first.
    const Isa compiled[] = {
#if defined(PREFIX_KERNELS_WITH_X86)
        {"avx512",
         __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"),
         PREFIX_KERNELS_TABLE(avx512)},
        {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), PREFIX_KERNELS_TABLE(avx2)},
#endif
        {"portable", true, PREFIX_KERNELS_TABLE(portable)},
    };
    const char* wanted = std::getenv("PREFIX_KERNELS_CPU_ISA");
    std::string names;
    for (const Isa& isa : compiled) {
      if (!isa.supported) continue;
      if (wanted == nullptr || *wanted == '\0' || std::string(wanted) == isa.name) return isa;
      names += std::string(names.empty() ? "" : ", ") + isa.name;
    }
    TORCH_CHECK_VALUE(false, "PREFIX_KERNELS_CPU_ISA: expected one of ", names, " on this processor, got ", wanted);
  }();
  return chosen;
}

void run_workers(int workers, void (*body)(void* argument, int worker), void* argument) {
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(argument, static_cast<int>(i));
  });
}

// Integers in the kernels' own form.
at::Tensor integers(const at::Tensor& x) { return x.to(at::kLong).contiguous(); }

void check_range(const char* name, const at::Tensor& x, int64_t least, int64_t most) {
  const int64_t* data = x.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < x.numel(); ++i)
    TORCH_CHECK_INDEX(data[i] >= least && data[i] <= most, name, ": expected values from ", least, " to ", most,
                      ", got ", data[i], " at flat index ", i);
}

// Integer tensors in the kernels' own form, kept alive for the call.
struct HostIntegers {
  at::Tensor ids, lens, offsets;

  void attach(const AttentionArguments& args, AttentionParams& p) {
    if (args.prefix_ids.has_value() && p.prefix_slots > 0) {
      ids = integers(*args.prefix_ids);
      check_range("prefix_ids", ids, -1, p.num_prefixes - 1);
      p.prefix_ids = ids.const_data_ptr<int64_t>();
    }
    if (args.prefix_lens.has_value() && p.prefix_slots > 0) {
      lens = integers(*args.prefix_lens);
      check_range("prefix_lens", lens, 0, p.prefix_len);
      p.prefix_lens = lens.const_data_ptr<int64_t>();
    }
    if (args.query_offsets.has_value()) {
      offsets = integers(*args.query_offsets).clamp(-kMaxPosition, kMaxPosition);
      p.query_offsets = offsets.const_data_ptr<int64_t>();
    }
    if (p.dropout_threshold > 0) p.dropout_seed = static_cast<uint64_t>(*args.dropout_seed->const_data_ptr<int64_t>());
  }
};

// The lengths of packed sequences, read on the host and kept alive for the call.
struct PackedIntegers {
  at::Tensor query_starts, key_starts, prefix_starts, ids, lens, offsets;

  void attach(const PackedArguments& args, AttentionParams& p, int64_t key_rows) {
    query_starts = starts("cu_seqlens_q", args.cu_seqlens_q, args.query.size(0), p.q_len);
    check_longest("max_seqlen_q", args.max_seqlen_q, p.q_len);
    key_starts = starts("cu_seqlens_k", args.cu_seqlens_k, key_rows, p.k_len);
    check_longest("max_seqlen_k", args.max_seqlen_k, p.k_len);
    p.query_starts = query_starts.const_data_ptr<int64_t>();
    p.key_starts = key_starts.const_data_ptr<int64_t>();
    if (p.prefix_slots > 0) {
      if (args.cu_prefix_lens.has_value()) {
        const at::Tensor& bank = args.prefix_key.has_value() ? *args.prefix_key : *args.prefix_value;
        prefix_starts = starts("cu_prefix_lens", *args.cu_prefix_lens, bank.size(0), p.prefix_len);
        p.prefix_starts = prefix_starts.const_data_ptr<int64_t>();
        lens = prefix_starts.diff();
        p.prefix_lens = lens.const_data_ptr<int64_t>();
      }
      if (args.prefix_lens.has_value()) {
        lens = integers(*args.prefix_lens);
        check_range("prefix_lens", lens, 0, p.prefix_len);
        p.prefix_lens = lens.const_data_ptr<int64_t>();
      }
      if (args.prefix_ids.has_value()) {
        ids = integers(*args.prefix_ids);
        check_range("prefix_ids", ids, -1, p.num_prefixes - 1);
        p.prefix_ids = ids.const_data_ptr<int64_t>();
      }
    }
    offsets = args.query_offsets.has_value() ? integers(*args.query_offsets).clamp(-kMaxPosition, kMaxPosition)
                                             : at::sub(key_starts.diff(), query_starts.diff());
    p.query_offsets = offsets.const_data_ptr<int64_t>();
    if (p.dropout_threshold > 0) p.dropout_seed = static_cast<uint64_t>(*args.dropout_seed->const_data_ptr<int64_t>());
  }

 private:
  // The first rows of sequences that fill all `rows`; finds the length of the longest.
  static at::Tensor starts(const char* name, const at::Tensor& given, int64_t rows, int64_t& longest) {
    const at::Tensor x = integers(given);
    const int64_t* data = x.const_data_ptr<int64_t>();
    const int64_t count = x.numel();
    TORCH_CHECK_INDEX(data[0] == 0 && data[count - 1] == rows, name, ": expected numbers from 0 to ", rows,
                      ", the number of rows, got ", data[0], " to ", data[count - 1]);
    longest = 0;
    for (int64_t i = 0; i + 1 < count; ++i) {
      TORCH_CHECK_INDEX(data[i + 1] >= data[i], name, ": expected numbers that do not fall, got ", data[i], " and ",
                        data[i + 1], " at ", i);
      longest = std::max(longest, data[i + 1] - data[i]);
    }
    return x;
  }

  static void check_longest(const char* name, int64_t given, int64_t longest) {
    TORCH_CHECK_VALUE(given < 0 || given >= longest, name, ": expected at least ", longest,
                      ", the length of the longest sequence, got ", given);
  }
};

bool is_double(const at::Tensor& query) { return query.scalar_type() == at::kDouble; }

}  // namespace

std::string isa() { return chosen_isa().name; }

Results forward(const AttentionArguments& args) {
  check_forward(args);
  const at::Tensor& query = args.query;
  AttentionParams p = make_params(args, args.key->size(2), args.value->size(3));
  HostIntegers integers;
  integers.attach(args, p);

  const Results results = empty_results(query, p);
  const CpuKernels& kernels = chosen_isa().kernels;
  (is_double(query) ? kernels.forward_double : kernels.forward_float)(p, at::get_num_threads(), run_workers);
  return results;
}

void extend(const AttentionArguments& args, const at::Tensor& out, const at::Tensor& lse) {
  check_extend(args, out, lse);
  AttentionParams p = make_params(args, 0, out.size(3));
  HostIntegers integers;
  integers.attach(args, p);
  set_extended(out, lse, p);
  const CpuKernels& kernels = chosen_isa().kernels;
  (is_double(args.query) ? kernels.forward_double : kernels.forward_float)(p, at::get_num_threads(), run_workers);
}

Gradients backward(const AttentionArguments& args, const at::Tensor& dout, const std::optional<at::Tensor>& dlse,
                   const std::optional<at::Tensor>& out, const at::Tensor& lse, int64_t key_len,
                   std::array<bool, kNumGradients> needs) {
  check_backward(args, dout, dlse, out, lse, key_len, needs);
  const at::Tensor& query = args.query;
  BackwardParams b;
  b.forward = make_params(args, key_len, dout.size(3));
  AttentionParams& p = b.forward;
  HostIntegers integers;
  integers.attach(args, p);

  const ArrivingGradients arriving(dout, dlse, out, lse, b);
  const Gradients gradients = empty_gradients(args, needs, b);
  if (p.batch == 0 || p.q_len == 0) return gradients;
  const CpuKernels& kernels = chosen_isa().kernels;
  (is_double(query) ? kernels.backward_double : kernels.backward_float)(b, at::get_num_threads(), run_workers);
  return gradients;
}

std::tuple<at::Tensor, at::Tensor> packed_forward(const PackedArguments& args) {
  const int64_t value_dim = args.value->size(-1);
  check_packed(args, value_dim);
  AttentionParams p = make_packed_params(args, value_dim);
  PackedIntegers lengths;
  lengths.attach(args, p, args.key->size(0));
  const auto results = empty_packed_results(args.query, p);
  const CpuKernels& kernels = chosen_isa().kernels;
  (is_double(args.query) ? kernels.forward_double : kernels.forward_float)(p, at::get_num_threads(), run_workers);
  return results;
}

Gradients packed_backward(const PackedArguments& args, const at::Tensor& dout, const std::optional<at::Tensor>& dlse,
                          const std::optional<at::Tensor>& out, const at::Tensor& lse, int64_t key_rows,
                          std::array<bool, kNumGradients> needs) {
  check_packed_backward(args, dout, dlse, out, lse, key_rows, needs);
  BackwardParams b;
  b.forward = make_packed_params(args, dout.size(2));
  AttentionParams& p = b.forward;
  PackedIntegers lengths;
  lengths.attach(args, p, key_rows);
  const ArrivingGradients arriving(dout, dlse, out, lse, b);
  use_packed_strides(b);
  const Gradients gradients = empty_packed_gradients(args, needs, b);
  if (p.batch == 0 || p.q_len == 0) return gradients;
  const CpuKernels& kernels = chosen_isa().kernels;
  (is_double(args.query) ? kernels.backward_double : kernels.backward_float)(b, at::get_num_threads(), run_workers);
  return gradients;
}

std::tuple<at::Tensor, at::Tensor> merge(at::TensorList outs, at::TensorList lses) {
  const MergeCall call(outs, lses);
  if (call.is_empty()) return call.results();
  const CpuKernels& kernels = chosen_isa().kernels;
  const MergeParams& p = call.params;
  (p.computes_in_double ? kernels.merge_forward_double : kernels.merge_forward_float)(p, at::get_num_threads(),
                                                                                      run_workers);
  return call.results();
}

std::vector<at::Tensor> merge_backward(const at::Tensor& dout, const std::optional<at::Tensor>& dlse,
                                       at::TensorList outs, at::TensorList lses, const std::vector<bool>& needs) {
  const MergeBackwardCall call(dout, dlse, outs, lses, needs);
  if (call.is_empty()) return call.results();
  const CpuKernels& kernels = chosen_isa().kernels;
  const MergeBackwardParams& b = call.params;
  (b.forward.computes_in_double ? kernels.merge_backward_double : kernels.merge_backward_float)(
      b, at::get_num_threads(), run_workers);
  return call.results();
}

}  // namespace prefix_kernels::cpu
