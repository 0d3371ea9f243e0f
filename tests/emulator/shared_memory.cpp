#include "shared_memory.h"

#include <sys/mman.h>

#include <cstring>
#include <new>

namespace emulator {
namespace {
constexpr size_t kPage = 4096;
constexpr size_t kUsable = (kMaxSharedBytes + kPage - 1) / kPage * kPage;
// What dynamic shared memory is aligned to on a GPU, though CUDA promises 16.
constexpr size_t kAlignment = 128;
}  // namespace

SharedMemory::SharedMemory() : mapped_(kUsable + 2 * kPage) {
  void* memory = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mapping_ = static_cast<char*>(memory);
  mprotect(mapping_, kPage, PROT_NONE);
  mprotect(mapping_ + kPage + kUsable, kPage, PROT_NONE);
}

SharedMemory::~SharedMemory() { munmap(mapping_, mapped_); }

void SharedMemory::reset(size_t bytes) {
  bytes_ = bytes;
  const size_t aligned = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  begin_ = mapping_ + kPage + kUsable - aligned;
  std::memset(begin_, 0xFF, aligned);
}

}  // namespace emulator
