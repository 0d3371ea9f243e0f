// The device that a tensor lies on: made current, checked, asked what a launch must know. device.cpp is a GPU's,
// tests/emulator/device_on_host.cpp the emulator's.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <vector>

#include "context.h"

namespace prefix_kernels::cuda {

class Device {
 public:
  // Makes the tensor's device current until this object's end.
  // Throws std::runtime_error where no kernel was compiled for its architecture.
  explicit Device(const at::Tensor& tensor);
  ~Device();

  // The device and its current stream; valid as long as this object is.
  const Context& context() const { return context_; }

  // Registers a tensor's memory with the emulator's checks, for kernels to read, to write, or to read and write over;
  // on a GPU they do nothing.
  void allow_reading(const at::Tensor& tensor, const char* name) const;
  void allow_writing(const at::Tensor& tensor, const char* name) const;
  void allow_updating(const at::Tensor& tensor, const char* name) const;

 private:
  struct Guard;

  static void* allocate(void* owner, size_t bytes);
  static unsigned* counters(void* owner, size_t count);

  std::unique_ptr<Guard> guard_;
  at::Tensor like_;  // tensor on whose device workspaces are allocated
  std::vector<at::Tensor> workspaces_;
  Context context_;
};

}  // namespace prefix_kernels::cuda
