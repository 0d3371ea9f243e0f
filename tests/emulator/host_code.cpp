// The host code of the CUDA operators, compiled for the emulated GPU: one file, because torch's headers take longer to
// read than all of it.
#include "../../csrc/cuda/api.cpp"
#include "../../csrc/cuda/dispatch.cpp"
#include "../../csrc/merge.cpp"
#include "../../csrc/ops.cpp"
#include "../../csrc/results.cpp"
#include "../../csrc/validate.cpp"
#include "device_on_host.cpp"
