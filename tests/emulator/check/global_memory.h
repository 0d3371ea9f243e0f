// The tensors and workspaces that the host registered: what a kernel may touch of global memory.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "shadow.h"

namespace emulator::check {

struct Allocation {
  const char* begin;
  size_t bytes;
  std::string name;
  bool writable;
  bool initialized;
  std::unique_ptr<Shadow> shadow;  // of writable memory; what nobody may write needs none

  bool holds(const void* address, size_t count) const {
    const auto* first = static_cast<const char*>(address);
    return first >= begin && first + count <= begin + bytes;
  }
};

class GlobalMemory {
 public:
  void add(const void* data, size_t bytes, const char* name, bool writable, bool initialized);
  void clear();

  // The allocation that holds all of these bytes, a writable one if there is any: views of one storage may overlap.
  // Null: none.
  Allocation* find(const void* address, size_t bytes);
  // "12 bytes behind the end of 'key'": the allocation next to the address.
  std::string near(const void* address) const;

 private:
  std::vector<Allocation> allocations_;
};

GlobalMemory& global_memory();

}  // namespace emulator::check
