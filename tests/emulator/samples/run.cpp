#include <cstdio>
#include <cstring>
#include <vector>

#include "samples.h"

namespace samples {
namespace {

const Sample* find(const char* name) {
  for (size_t i = 0; i < kNumGood; ++i) {
    if (std::strcmp(kGood[i].name, name) == 0) return &kGood[i];
  }
  for (size_t i = 0; i < kNumBugs; ++i) {
    if (std::strcmp(kBugs[i].name, name) == 0) return &kBugs[i];
  }
  return nullptr;
}

}  // namespace
}  // namespace samples

// 0: the kernel ran to its end; 1: the emulator stopped it, `report` says why; 2: no such sample.
extern "C" __attribute__((visibility("default"))) int run_sample(const char* name, const void* input,
                                                                 size_t input_bytes, void* output, size_t output_bytes,
                                                                 int count, char* report, size_t report_bytes) {
  const samples::Sample* sample = samples::find(name);
  if (sample == nullptr) return 2;
  std::vector<float> workspace(64);
  emulator::register_global(input, input_bytes, "input", false, true);
  emulator::register_global(output, output_bytes, "output", true, true);
  emulator::register_global(workspace.data(), workspace.size() * sizeof(float), "workspace", true, false);
  int status = 0;
  try {
    emulator::launch(sample->kernel, sample->blocks, sample->threads, sample->shared_bytes,
                     samples::Params{input, output, workspace.data(), count});
  } catch (const emulator::Error& error) {
    std::snprintf(report, report_bytes, "%s", error.what());
    status = 1;
  }
  emulator::clear_globals();
  return status;
}

// The names of the planted bugs, one per line.
extern "C" __attribute__((visibility("default"))) const char* bug_names() {
  static char names[4096];
  names[0] = 0;
  for (size_t i = 0; i < samples::kNumBugs; ++i) {
    std::strcat(names, samples::kBugs[i].name);
    std::strcat(names, "\n");
  }
  return names;
}
