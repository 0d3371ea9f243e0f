// The instructions that are more than a computation of one lane. Their CUDA names are in cuda_on_host.h and
// ptx_on_host.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "lane.h"

namespace emulator {

void sync_threads(Where where);
void sync_warp(uint32_t mask, Where where);

// Every lane brings a value and gets the one of lane `source`, which must bring one too.
uint64_t exchange(const char* name, uint32_t mask, uint64_t value, int source, Where where);
uint32_t ballot(const char* name, uint32_t mask, bool predicate, Where where);

void load_matrices(uint32_t* registers, int count, bool transpose, const void* shared_row, Where where);
void multiply_16x8x16(float* d, const uint32_t* a, const uint32_t* b, bool bfloat16, Where where);

// Returns the old value. Blocks may run on several host threads.
float atomic_add(float* address, float value, Where where);
double atomic_add(double* address, double value, Where where);
int atomic_add(int* address, int value, Where where);
unsigned atomic_add(unsigned* address, unsigned value, Where where);
unsigned atomic_increment(unsigned* address, unsigned limit, Where where);
void fence();
int load_relaxed(const int* address, Where where);
// Blocks that run at the same time may write the value; fails if none has within seconds.
void wait_for_value(const int* address, int value, Where where);

void copy_async(void* shared, const void* global, bool valid, Where where);
void commit_copies();
void wait_for_copies(int pending);

char* shared_memory();
// Declares a sub-buffer of shared memory. Once a block has declared one, only declared bytes may be touched.
void shared_buffer(const void* begin, size_t bytes);
[[noreturn]] void trap(Where where);

template <typename T>
T exchange_value(const char* name, uint32_t mask, T value, int source, Where where) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(name, mask, bits, source, where);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulator
