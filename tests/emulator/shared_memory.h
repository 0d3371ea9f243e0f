// A block's dynamic shared memory: a mapping of its own that ends at a page that cannot be touched.
#pragma once

#include <cstddef>

namespace emulator {

// Most that a block may ask for on any GPU of compute capability 8.0 to 9.0.
inline constexpr size_t kMaxSharedBytes = 227 * 1024;

class SharedMemory {
 public:
  SharedMemory();
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  // `bytes` bytes of 0xFF, which is NaN in every floating-point type.
  void reset(size_t bytes);

  char* begin() const { return begin_; }
  char* end() const { return begin_ + bytes_; }
  // Whether all of these bytes belong to the block.
  bool holds(const void* address, size_t bytes) const {
    const auto* first = static_cast<const char*>(address);
    return first >= begin() && first + bytes <= end();
  }
  // Whether the address is in the mapping, pages that cannot be touched included.
  bool contains(const void* address) const {
    const auto* byte = static_cast<const char*>(address);
    return byte >= mapping_ && byte < mapping_ + mapped_;
  }

 private:
  char* mapping_;
  size_t mapped_;
  char* begin_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace emulator
