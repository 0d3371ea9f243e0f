// A kernel that reads through a bad pointer ends its launch with a report, not the process.
#pragma once

#include <csignal>
#include <memory>

namespace emulator {

// While it lives, signals raised by a kernel's instructions on any host thread become failures of its block.
class FaultHandlers {
 public:
  FaultHandlers();
  ~FaultHandlers();
  FaultHandlers(const FaultHandlers&) = delete;
  FaultHandlers& operator=(const FaultHandlers&) = delete;

 private:
  struct sigaction before_[3];
};

// While it lives, this host thread handles signals on a stack of their own: a lane's may be the one that overflowed.
class SignalStack {
 public:
  SignalStack();
  ~SignalStack();
  SignalStack(const SignalStack&) = delete;
  SignalStack& operator=(const SignalStack&) = delete;

 private:
  std::unique_ptr<char[]> memory_;
  stack_t before_;
};

}  // namespace emulator
