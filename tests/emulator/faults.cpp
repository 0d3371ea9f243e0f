#include "faults.h"

#include <ucontext.h>

#include <cstdint>
#include <string>

#include "block.h"
#include "source_line.h"

namespace emulator {
namespace {

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE};
constexpr size_t kSignalStackBytes = 256 * 1024;

std::string describe(int signal, const char* address) {
  if (signal == SIGFPE) return "integer division by zero";
  const SharedMemory& shared = current_block->shared_memory();
  if (shared.contains(address)) {
    return "out of bounds: byte " + std::to_string(address - shared.begin()) + " of " +
           std::to_string(shared.end() - shared.begin()) + " bytes of shared memory";
  }
  const Lane& lane = *current_lane;
  constexpr ptrdiff_t kGuard = 4096;
  if (address >= lane.stack_begin - kGuard && address < lane.stack_begin) return "the lane's stack is too small";
  if (reinterpret_cast<uintptr_t>(address) < 4096) return "null pointer";
  return "out of bounds: no memory at this address";
}

void handle(int signal, siginfo_t* info, void* context) {
  if (current_lane == nullptr) {
    // Not a kernel's: let it happen again without us.
    std::signal(signal, SIG_DFL);
    return;
  }
  const auto* registers = static_cast<const ucontext_t*>(context);
  const auto* instruction = reinterpret_cast<const char*>(registers->uc_mcontext.gregs[REG_RIP]);
  std::string where = in_this_library(instruction) ? line_of(instruction) : "a library function";
  current_block->fail(describe(signal, static_cast<const char*>(info->si_addr)) + ": " + name_of(*current_lane) +
                      " at " + where);
}

}  // namespace

FaultHandlers::FaultHandlers() {
  for (int i = 0; i < 3; ++i) {
    struct sigaction action = {};
    action.sa_sigaction = &handle;
    // The handler never returns: the signal must not stay blocked.
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(kSignals[i], &action, &before_[i]);
  }
}

FaultHandlers::~FaultHandlers() {
  for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &before_[i], nullptr);
}

SignalStack::SignalStack() : memory_(new char[kSignalStackBytes]) {
  stack_t stack = {};
  stack.ss_sp = memory_.get();
  stack.ss_size = kSignalStackBytes;
  sigaltstack(&stack, &before_);
}

SignalStack::~SignalStack() { sigaltstack(&before_, nullptr); }

}  // namespace emulator
