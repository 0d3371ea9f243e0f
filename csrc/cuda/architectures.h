// The GPUs that the compiled kernels run on.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

namespace prefix_kernels::cuda {

// Tells if code compiled for `entry`, in the notation of TORCH_CUDA_ARCH_LIST ("8.0", "9.0a", "9.0+PTX"), runs on a GPU
// of compute capability major.minor. Machine code runs on later minor versions, PTX on everything later, and code whose
// entry ends in a letter on that very GPU (a) or its family (f).
inline bool runs_on(std::string entry, int major, int minor) {
  const std::string ptx = "+PTX";
  const bool has_ptx = entry.size() > ptx.size() && entry.compare(entry.size() - ptx.size(), ptx.size(), ptx) == 0;
  if (has_ptx) entry.resize(entry.size() - ptx.size());
  const size_t dot = entry.find('.');
  if (dot == std::string::npos || dot + 1 >= entry.size()) return false;
  const int entry_major = std::stoi(entry.substr(0, dot)), entry_minor = std::stoi(entry.substr(dot + 1));
  const char last = entry.back();
  if (last == 'a') return entry_major == major && entry_minor == minor;
  if (entry_major == major && entry_minor <= minor) return true;
  return has_ptx && last != 'f' && entry_major < major;
}

// Throws std::runtime_error, with the remedy, if no architecture of `compiled` (separated by semicolons) runs on the
// GPU `name`.
inline void check_architecture(const std::string& compiled, int major, int minor, const std::string& name) {
  for (size_t begin = 0; begin < compiled.size();) {
    const size_t end = std::min(compiled.find(';', begin), compiled.size());
    if (runs_on(compiled.substr(begin, end - begin), major, minor)) return;
    begin = end + 1;
  }
  const std::string capability = std::to_string(major) + "." + std::to_string(minor);
  const std::string remedy =
      major < 8 ? "the CUDA kernels need 8.0 or later"
                : "run `TORCH_CUDA_ARCH_LIST=" + capability +
                      " pip install --force-reinstall --no-deps --no-cache-dir` on the source folder of prefix_kernels";
  throw std::runtime_error("prefix_kernels: " + name + " has compute capability " + capability +
                           ", the CUDA kernels were compiled for " + compiled + ": " + remedy + ".");
}

}  // namespace prefix_kernels::cuda
