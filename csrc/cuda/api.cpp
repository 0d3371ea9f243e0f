#include "api.h"

#include "../results.h"
#include "device.h"
#include "dispatch.h"
#include "merge.h"
#include "size_limits.h"

namespace prefix_kernels::cuda {
namespace {

// Integer tensors in the kernels' own form, kept alive for the call.
struct DeviceIntegers {
  at::Tensor ids, lens, offsets, seed;

  void attach(const AttentionArguments& args, AttentionParams& p, const Device& device) {
    const auto to_int64 = [](const at::Tensor& x) { return x.to(at::kLong).contiguous(); };
    const auto data = [&](const at::Tensor& x, const char* name) {
      device.allow_reading(x, name);
      return x.const_data_ptr<int64_t>();
    };
    if (args.prefix_ids.has_value() && p.prefix_slots > 0) {
      ids = to_int64(*args.prefix_ids);
      p.prefix_ids = data(ids, "prefix_ids");
    }
    if (args.prefix_lens.has_value() && p.prefix_slots > 0) {
      lens = to_int64(*args.prefix_lens);
      p.prefix_lens = data(lens, "prefix_lens");
    }
    if (args.query_offsets.has_value()) {
      offsets = to_int64(*args.query_offsets).clamp(-kMaxPosition, kMaxPosition);
      p.query_offsets = data(offsets, "query_offset");
    }
    if (p.dropout_threshold > 0) {
      seed = *args.dropout_seed;
      p.dropout_seed_ptr = data(seed, "dropout_seed");
    }
  }
};

void allow_reading(const Device& device, const std::optional<at::Tensor>& x, const char* name) {
  if (x.has_value() && x->defined()) device.allow_reading(*x, name);
}

void allow_reading_inputs(const AttentionArguments& args, const Device& device) {
  allow_reading(device, args.query, "query");
  allow_reading(device, args.key, "key");
  allow_reading(device, args.value, "value");
  allow_reading(device, args.prefix_key, "prefix_key");
  allow_reading(device, args.prefix_value, "prefix_value");
  allow_reading(device, args.attn_mask, "attn_mask");
}

}  // namespace

Results forward(const AttentionArguments& args) {
  check_forward(args);
  AttentionParams p = make_params(args, args.key->size(2), args.value->size(3));
  check_limits(p);
  Device device(args.query);
  const Results results = empty_results(args.query, p);
  if (p.batch == 0 || p.q_len == 0) return results;
  DeviceIntegers integers;
  integers.attach(args, p, device);
  allow_reading_inputs(args, device);
  device.allow_writing(std::get<0>(results), "out");
  device.allow_writing(std::get<1>(results), "lse");
  device.allow_writing(std::get<2>(results), "row_mass");
  dispatch_forward(p, device.context());
  return results;
}

void extend(const AttentionArguments& args, const at::Tensor& out, const at::Tensor& lse) {
  check_extend(args, out, lse);
  AttentionParams p = make_params(args, 0, out.size(3));
  check_limits(p);
  Device device(args.query);
  set_extended(out, lse, p);
  if (p.batch == 0 || p.q_len == 0) return;
  DeviceIntegers integers;
  integers.attach(args, p, device);
  allow_reading_inputs(args, device);
  device.allow_updating(out, "out");
  device.allow_updating(lse, "lse");
  dispatch_forward(p, device.context());
}

Gradients backward(const AttentionArguments& args, const at::Tensor& dout, const std::optional<at::Tensor>& dlse,
                   const std::optional<at::Tensor>& out, const at::Tensor& lse, int64_t key_len,
                   std::array<bool, kNumGradients> needs) {
  check_backward(args, dout, dlse, out, lse, key_len, needs);
  BackwardParams b;
  b.forward = make_params(args, key_len, dout.size(3));
  check_limits(b.forward);
  Device device(args.query);
  const ArrivingGradients arriving(dout, dlse, out, lse, b);
  const Gradients gradients = empty_gradients(args, needs, b);
  if (b.forward.batch == 0 || b.forward.q_len == 0) return gradients;
  DeviceIntegers integers;
  integers.attach(args, b.forward, device);
  allow_reading_inputs(args, device);
  allow_reading(device, arriving.dout, "dout");
  allow_reading(device, arriving.lse, "lse");
  allow_reading(device, arriving.dlse, "dlse");
  allow_reading(device, arriving.out, "out");
  const char* names[kNumGradients] = {"dquery", "dkey", "dvalue", "dprefix_key", "dprefix_value"};
  for (size_t i = 0; i < kNumGradients; ++i)
    if (needs[i]) device.allow_writing(gradients[i], names[i]);
  dispatch_backward(b, device.context());
  return gradients;
}

std::tuple<at::Tensor, at::Tensor> merge(at::TensorList outs, at::TensorList lses) {
  const MergeCall call(outs, lses);
  if (call.is_empty()) return call.results();
  const Device device(call.out);
  for (const at::Tensor& x : call.outs) device.allow_reading(x, "outs");
  for (const at::Tensor& x : call.lses) device.allow_reading(x, "lses");
  device.allow_writing(call.out, "out");
  device.allow_writing(call.lse, "lse");
  merge_rows(call.params, device.context());
  return call.results();
}

std::vector<at::Tensor> merge_backward(const at::Tensor& dout, const std::optional<at::Tensor>& dlse,
                                       at::TensorList outs, at::TensorList lses, const std::vector<bool>& needs) {
  const MergeBackwardCall call(dout, dlse, outs, lses, needs);
  if (call.is_empty()) return call.results();
  const Device device(call.dout);
  for (const at::Tensor& x : call.outs) device.allow_reading(x, "outs");
  for (const at::Tensor& x : call.lses) device.allow_reading(x, "lses");
  device.allow_reading(call.dout, "dout");
  if (call.dlse.defined()) device.allow_reading(call.dlse, "dlse");
  for (const at::Tensor& x : call.gradients) device.allow_writing(x, "gradients");
  merge_backward_rows(call.params, device.context());
  return call.results();
}

}  // namespace prefix_kernels::cuda
