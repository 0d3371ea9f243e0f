#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <new>

namespace emulator {

__thread Lane* current_lane = nullptr;

// The callee-saved registers go on the stack that is left and come from the stack that is entered; the caller's are
// dead across a call. A fresh fiber finds start(lane) in the registers that Stacks::reset() laid out for it.
asm(R"(
.text
.p2align 4
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch, @function
emulator_switch:
    .cfi_startproc
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .cfi_endproc
.size emulator_switch, .-emulator_switch

.p2align 4
.globl emulator_fiber_begin
.hidden emulator_fiber_begin
.type emulator_fiber_begin, @function
emulator_fiber_begin:
    .cfi_startproc
    .cfi_undefined rip
    movq %r12, %rdi
    call *%rbx
    ud2
    .cfi_endproc
.size emulator_fiber_begin, .-emulator_fiber_begin
)");
extern "C" void emulator_fiber_begin() __attribute__((visibility("hidden")));

namespace {
constexpr size_t kPage = 4096;
// As deep as kernels go; filling whole stacks would cost more than running the kernel.
#if defined(PREFIX_KERNELS_CHECKED)
constexpr size_t kFilledBytes = 24 * 1024;
#else
constexpr size_t kFilledBytes = 4 * 1024;
#endif
}  // namespace

Stacks::Stacks() {
  void* memory = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  base_ = static_cast<char*>(memory);
  for (int thread = 0; thread < kMaxThreads; ++thread) mprotect(slot(thread), kPage, PROT_NONE);
}

Stacks::~Stacks() { munmap(base_, kMaxThreads * kStackBytes); }

char* Stacks::slot(int thread) const { return base_ + static_cast<size_t>(thread) * kStackBytes; }

// The lane's own record lies at the top of its stack: one mapping holds all that the thread may touch of the host's.
Lane& Stacks::operator[](int thread) {
  char* top = slot(thread) + kStackBytes - (sizeof(Lane) + 63) / 64 * 64;
  return *reinterpret_cast<Lane*>(top);
}

Lane& Stacks::reset(int thread, void (*start)(Lane*)) {
  Lane& lane = (*this)[thread];
  lane.stack_begin = slot(thread) + kPage;
  lane.stack_end = slot(thread) + kStackBytes;

  char* top = reinterpret_cast<char*>(&lane);
  std::memset(top - kFilledBytes, 0xFF, kFilledBytes);
  // What emulator_switch pops, from the lowest address: r15, r14, r13, r12, rbx, rbp, return address. The frame above
  // it keeps the stack aligned as a call expects.
  auto* frame = reinterpret_cast<uint64_t*>(top) - 9;
  frame[3] = reinterpret_cast<uint64_t>(&lane);
  frame[4] = reinterpret_cast<uint64_t>(start);
  frame[5] = 0;
  frame[6] = reinterpret_cast<uint64_t>(&emulator_fiber_begin);
  lane.stack_pointer = frame;
  return lane;
}

}  // namespace emulator
