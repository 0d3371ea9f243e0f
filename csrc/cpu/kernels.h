// The table of functions that the build of one ISA offers, the same for every ISA.
#pragma once

#include "../attention_params.h"
#include "../merge_params.h"

namespace prefix_kernels {

// Runs body(argument, worker) for worker in [0, workers), on as many threads.
using RunWorkers = void (*)(int workers, void (*body)(void* argument, int worker), void* argument);

struct CpuKernels {
  void (*forward_float)(const AttentionParams&, int threads, RunWorkers);
  void (*forward_double)(const AttentionParams&, int threads, RunWorkers);
  void (*backward_float)(const BackwardParams&, int threads, RunWorkers);
  void (*backward_double)(const BackwardParams&, int threads, RunWorkers);
  void (*merge_forward_float)(const MergeParams&, int threads, RunWorkers);
  void (*merge_forward_double)(const MergeParams&, int threads, RunWorkers);
  void (*merge_backward_float)(const MergeBackwardParams&, int threads, RunWorkers);
  void (*merge_backward_double)(const MergeBackwardParams&, int threads, RunWorkers);
};

#define PREFIX_KERNELS_DECLARE_ISA(isa)                             \
  namespace isa {                                                   \
  template <class T>                                                \
  void attention_forward(const AttentionParams&, int, RunWorkers);  \
  template <class T>                                                \
  void attention_backward(const BackwardParams&, int, RunWorkers);  \
  template <class T>                                                \
  void merge_forward(const MergeParams&, int, RunWorkers);          \
  template <class T>                                                \
  void merge_backward(const MergeBackwardParams&, int, RunWorkers); \
  }

PREFIX_KERNELS_DECLARE_ISA(portable)
PREFIX_KERNELS_DECLARE_ISA(avx2)
PREFIX_KERNELS_DECLARE_ISA(avx512)

}  // namespace prefix_kernels
