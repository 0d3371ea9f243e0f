// The Python module: what was compiled into it. The operators register themselves with torch (ops.cpp).
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>

namespace py = pybind11;

namespace {

#define PREFIX_KERNELS_STRING(x) #x
#define PREFIX_KERNELS_EXPAND_STRING(x) PREFIX_KERNELS_STRING(x)

constexpr const char* kCompiler =
#if defined(__clang__)
    "clang " PREFIX_KERNELS_EXPAND_STRING(__clang_major__) "." PREFIX_KERNELS_EXPAND_STRING(
        __clang_minor__) "." PREFIX_KERNELS_EXPAND_STRING(__clang_patchlevel__);
#elif defined(__GNUC__)
    "gcc " PREFIX_KERNELS_EXPAND_STRING(__GNUC__) "." PREFIX_KERNELS_EXPAND_STRING(
        __GNUC_MINOR__) "." PREFIX_KERNELS_EXPAND_STRING(__GNUC_PATCHLEVEL__);
#else
    "unknown";
#endif

constexpr const char* kAbi =
#if defined(__GXX_ABI_VERSION)
    "cxxabi " PREFIX_KERNELS_EXPAND_STRING(__GXX_ABI_VERSION) ", _GLIBCXX_USE_CXX11_ABI="
#if defined(_GLIBCXX_USE_CXX11_ABI)
    PREFIX_KERNELS_EXPAND_STRING(_GLIBCXX_USE_CXX11_ABI);
#else
    "undefined";
#endif
#else
    "unknown";
#endif

constexpr bool kOpenMP =
#if defined(_OPENMP)
    true;
#else
    false;
#endif

// The entries of a list that the build passes as one string, separated by semicolons.
py::list split(const std::string& entries) {
  py::list result;
  for (size_t begin = 0; begin < entries.size();) {
    const size_t end = std::min(entries.find(';', begin), entries.size());
    result.append(entries.substr(begin, end - begin));
    begin = end + 1;
  }
  return result;
}

py::dict build_info() {
  py::dict info;
  info["torch"] = PREFIX_KERNELS_TORCH_VERSION;
  info["compiler"] = kCompiler;
  info["cxx_standard"] = static_cast<long>(__cplusplus);
  info["openmp"] = kOpenMP;
  info["abi"] = kAbi;
  info["cpu_isas"] = split(PREFIX_KERNELS_CPU_ISAS);
  info["cuda_architectures"] = split(PREFIX_KERNELS_CUDA_ARCHITECTURES);
#if defined(PREFIX_KERNELS_CUDA_TOOLKIT)
  info["cuda_toolkit"] = PREFIX_KERNELS_CUDA_TOOLKIT;
#else
  info["cuda_toolkit"] = py::none();
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info,
        "What this module was compiled with: torch, compiler, cxx_standard, openmp, abi, cpu_isas,\n"
        "cuda_architectures, cuda_toolkit (None without one).");
}
