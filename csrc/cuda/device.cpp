#include "device.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <map>
#include <mutex>
#include <utility>

#include "architectures.h"

namespace prefix_kernels::cuda {
namespace {

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

// The part of Context that a GPU never changes. The driver is asked once for each GPU: small calls take no longer than
// its answers.
struct Capabilities {
  int architecture, sm_count, shared_bytes;
};

Capabilities capabilities_of(const c10::Device& device) {
  static std::mutex mutex;
  static std::map<int, Capabilities> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device.index());
  if (found != known.end()) return found->second;
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, device.index());
  const int minor = attribute(cudaDevAttrComputeCapabilityMinor, device.index());
  check_architecture(PREFIX_KERNELS_CUDA_ARCHITECTURES, major, minor, device.str());
  const Capabilities capabilities{10 * major + minor, attribute(cudaDevAttrMultiProcessorCount, device.index()),
                                  attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device.index())};
  known.emplace(device.index(), capabilities);
  return capabilities;
}

// 64 KiB of counters.
constexpr size_t kNumCounters = 16384;

at::Tensor zeroed_counters(const at::Tensor& like) {
  return at::zeros({static_cast<int64_t>(kNumCounters)}, like.options().dtype(at::kInt));
}

}  // namespace

struct Device::Guard {
  explicit Guard(c10::Device device) : guard(device) {}
  c10::cuda::CUDAGuard guard;
};

Device::Device(const at::Tensor& tensor) : guard_(std::make_unique<Guard>(tensor.device())), like_(tensor) {
  const Capabilities gpu = capabilities_of(tensor.device());
  context_ = {gpu.architecture,  gpu.sm_count,
              gpu.shared_bytes,  c10::cuda::getCurrentCUDAStream(tensor.get_device()).stream(),
              &Device::allocate, this};
  context_.counters_in = &Device::counters;
}

Device::~Device() = default;

void* Device::allocate(void* owner, size_t bytes) {
  auto& self = *static_cast<Device*>(owner);
  // The caching allocator hands memory out again in the order of the stream, and at multiples of 512 bytes.
  self.workspaces_.push_back(at::empty({static_cast<int64_t>(bytes)}, self.like_.options().dtype(at::kByte)));
  return self.workspaces_.back().mutable_data_ptr();
}

// Every stream has counters of its own, zeroed when it first asks: its kernels follow one another, and each leaves them
// zero. A captured graph may run on any stream, beside others, and gets counters that it zeroes itself each time, by a
// memset node in front of the kernel.
unsigned* Device::counters(void* owner, size_t count) {
  if (count > kNumCounters) return nullptr;
  auto& self = *static_cast<Device*>(owner);
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  C10_CUDA_CHECK(cudaStreamIsCapturing(self.context_.stream, &capturing));
  if (capturing != cudaStreamCaptureStatusNone) {
    self.workspaces_.push_back(zeroed_counters(self.like_));
    return static_cast<unsigned*>(self.workspaces_.back().mutable_data_ptr());
  }
  static std::mutex mutex;
  // Never freed: at the end of the process CUDA may be gone before them.
  static auto& of_stream = *new std::map<std::pair<int, Stream>, at::Tensor>;
  const std::lock_guard<std::mutex> lock(mutex);
  at::Tensor& known = of_stream[{self.like_.get_device(), self.context_.stream}];
  if (!known.defined()) known = zeroed_counters(self.like_);
  return static_cast<unsigned*>(known.mutable_data_ptr());
}

void Device::allow_reading(const at::Tensor&, const char*) const {}
void Device::allow_writing(const at::Tensor&, const char*) const {}
void Device::allow_updating(const at::Tensor&, const char*) const {}

}  // namespace prefix_kernels::cuda
