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
  bool contains(const void* address) const {
    return static_cast<const char*>(address) >= mapping_ && static_cast<const char*>(address) < mapping_ + mapped_;
  }

 private:
  char* mapping_;
  size_t mapped_;
  char* begin_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace emulator
