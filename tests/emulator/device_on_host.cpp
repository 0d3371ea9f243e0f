// The emulated GPU as the host code of csrc/cuda sees it: what a Device tells, with tensors in the host's memory.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "../../csrc/cuda/architectures.h"
#include "../../csrc/cuda/device.h"
#include "emulator_launch.h"

namespace {

int architecture = 80;
int sm_count = 4;
int max_grid_yz = 65535;
std::vector<unsigned> counters(1024);

// What one block may have, and room for the gaps that the emulator leaves between arrays.
int shared_bytes() {
  constexpr int kGaps = 4;
  const int kib = architecture == 80 || architecture == 87 ? 163 : architecture / 10 == 8 ? 99 : 227;
  return (kib + kGaps) * 1024;
}

}  // namespace

// Sets the GPU that the emulator is: its compute capability without the dot, its number of multiprocessors, the most
// blocks that the host code puts along y and along z of a grid, and its number of counters.
extern "C" __attribute__((visibility("default"))) void prefix_kernels_emulated_device(int new_architecture,
                                                                                      int new_sm_count,
                                                                                      int new_max_grid_yz,
                                                                                      int new_counters) {
  architecture = new_architecture;
  sm_count = new_sm_count;
  max_grid_yz = new_max_grid_yz;
  counters.resize(static_cast<size_t>(new_counters), 0u);
}

namespace prefix_kernels::cuda {
namespace {

// From a tensor's first element to behind its last; what lies between its rows is left to the poison of the tests.
size_t extent_in_bytes(const at::Tensor& tensor) {
  if (tensor.numel() == 0) return 0;
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  return static_cast<size_t>(last + 1) * tensor.element_size();
}

}  // namespace

struct Device::Guard {};

Device::Device(const at::Tensor& tensor) : like_(tensor) {
  check_architecture("8.0;9.0+PTX", architecture / 10, architecture % 10, "the emulated GPU");
  context_ = {architecture, sm_count, shared_bytes(), nullptr, &Device::allocate, this, max_grid_yz};
  context_.counters_in = &Device::counters;
  emulator::clear_globals();
}

// A kernel that was stopped leaves counters as they are; on a GPU nothing is launched after it.
Device::~Device() {
  emulator::clear_globals();
  if (std::uncaught_exceptions() > 0) std::fill(::counters.begin(), ::counters.end(), 0u);
}

void* Device::allocate(void* owner, size_t bytes) {
  auto& self = *static_cast<Device*>(owner);
  self.workspaces_.push_back(at::empty({static_cast<int64_t>(bytes)}, self.like_.options().dtype(at::kByte)));
  // A byte that no kernel has written must not pass for a number.
  self.workspaces_.back().fill_(0xFF);
  emulator::register_global(self.workspaces_.back().const_data_ptr(), bytes, "workspace", true, false);
  return self.workspaces_.back().mutable_data_ptr();
}

unsigned* Device::counters(void*, size_t count) {
  if (count > ::counters.size()) return nullptr;
  for (size_t i = 0; i < ::counters.size(); ++i) {
    const unsigned left = std::exchange(::counters[i], 0u);
    if (left != 0)
      throw emulator::Error("counter " + std::to_string(i) + ": expected 0 before a launch, got " +
                            std::to_string(left));
  }
  emulator::register_global(::counters.data(), count * sizeof(unsigned), "counters", true, true);
  return ::counters.data();
}

void Device::allow_reading(const at::Tensor& tensor, const char* name) const {
  emulator::register_global(tensor.const_data_ptr(), extent_in_bytes(tensor), name, false, true);
}

void Device::allow_writing(const at::Tensor& tensor, const char* name) const {
  emulator::register_global(tensor.const_data_ptr(), extent_in_bytes(tensor), name, true, false);
}

void Device::allow_updating(const at::Tensor& tensor, const char* name) const {
  emulator::register_global(tensor.const_data_ptr(), extent_in_bytes(tensor), name, true, true);
}

}  // namespace prefix_kernels::cuda
