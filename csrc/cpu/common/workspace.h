// The memory that kernels allocate.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace prefix_kernels::PREFIX_KERNELS_ISA {

// Scratch memory of one thread, kept between calls: faulting fresh pages in would cost more than a short attention.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { std::free(data_); }

  // Makes room for at least `bytes`; pointers that take() returned before become invalid.
  void reserve(size_t bytes) {
    used_ = 0;
    if (bytes <= capacity_) return;
    std::free(data_);
    data_ = nullptr;
    capacity_ = 0;
    data_ = static_cast<char*>(std::aligned_alloc(kAlignment, round_up(bytes)));
    if (data_ == nullptr) throw std::bad_alloc();
    capacity_ = round_up(bytes);
  }

  // Frees the memory of an unusually large call.
  void trim() {
    if (capacity_ <= kKeptBytes) return;
    std::free(data_);
    data_ = nullptr;
    capacity_ = 0;
  }

  template <class U>
  U* take(size_t count) {
    U* p = reinterpret_cast<U*>(data_ + used_);
    used_ += round_up(count * sizeof(U));
    return p;
  }

  template <class U>
  static constexpr size_t bytes_for(size_t count) {
    return round_up(count * sizeof(U));
  }

 private:
  static constexpr size_t kAlignment = 64;
  static constexpr size_t kKeptBytes = size_t{16} << 20;
  static constexpr size_t round_up(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

  char* data_ = nullptr;
  size_t used_ = 0;
  size_t capacity_ = 0;
};

// An array that lives as long as the call.
template <class U>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  void allocate(int64_t count) {
    std::free(data_);
    data_ = nullptr;
    if (count == 0) return;
    data_ = static_cast<U*>(std::aligned_alloc(64, Workspace::bytes_for<U>(count)));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  U* data() const { return data_; }
  U& operator[](int64_t i) const { return data_[i]; }

 private:
  U* data_ = nullptr;
};

template <class U>
void fill_zero(U* p, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = 0;
}

// The number of threads that have a task.
inline int workers(int threads, int64_t tasks) { return tasks < threads ? static_cast<int>(tasks) : threads; }

}  // namespace prefix_kernels::PREFIX_KERNELS_ISA
