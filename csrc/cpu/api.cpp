#include "api.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

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

// Integer tensors in the kernels' own form, kept alive for the call.
struct HostIntegers {
  at::Tensor ids, lens, offsets;

  void attach(const AttentionArguments& args, AttentionParams& p) {
    const auto to_int64 = [](const at::Tensor& x) { return x.to(at::kLong).contiguous(); };
    if (args.prefix_ids.has_value() && p.prefix_slots > 0) {
      ids = to_int64(*args.prefix_ids);
      check_range("prefix_ids", ids, -1, p.num_prefixes - 1);
      p.prefix_ids = ids.const_data_ptr<int64_t>();
    }
    if (args.prefix_lens.has_value() && p.prefix_slots > 0) {
      lens = to_int64(*args.prefix_lens);
      check_range("prefix_lens", lens, 0, p.prefix_len);
      p.prefix_lens = lens.const_data_ptr<int64_t>();
    }
    if (args.query_offsets.has_value()) {
      offsets = to_int64(*args.query_offsets).clamp(-kMaxPosition, kMaxPosition);
      p.query_offsets = offsets.const_data_ptr<int64_t>();
    }
    if (p.dropout_threshold > 0) p.dropout_seed = static_cast<uint64_t>(*args.dropout_seed->const_data_ptr<int64_t>());
  }

 private:
  static void check_range(const char* name, const at::Tensor& x, int64_t least, int64_t most) {
    const int64_t* data = x.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < x.numel(); ++i)
      TORCH_CHECK_INDEX(data[i] >= least && data[i] <= most, name, ": expected values from ", least, " to ", most,
                        ", got ", data[i], " at flat index ", i);
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
