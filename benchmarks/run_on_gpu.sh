#!/usr/bin/env bash
# Everything that needs a GPU, in under ten minutes, without a network:
#
#     benchmarks/run_on_gpu.sh OUTDIR
#
# Builds for the GPU at hand, checks the package on it, runs the GPU tests, looks at small shapes with compute-sanitizer,
# and measures. Each part has a time limit of its own and does not need the others to succeed. OUTDIR receives the text of
# every part, the tables and the pictures. PYTHON names the interpreter, which must have PyTorch and setuptools; pytest
# and matplotlib where the tests and the pictures are wanted.
set -uo pipefail

if [ $# -ne 1 ]; then
  echo "usage: $0 OUTDIR" >&2
  exit 2
fi
repository=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
outdir=$(cd "$1" && pwd)
python=${PYTHON:-python3}
package=$outdir/package

# The built package, not the folder of its source, and no index to ask for anything.
export PYTHONSAFEPATH=1 PYTHONPATH="$package:$repository/benchmarks" PIP_NO_INDEX=1 PIP_DISABLE_PIP_VERSION_CHECK=1
cd "$repository" || exit 1

failed=()
# part NAME SECONDS COMMAND...: its output goes to the terminal and to OUTDIR/NAME.txt.
part() {
  local name=$1 limit=$2 status
  shift 2
  printf '\n=== %s (%d s, at most %d more)\n' "$name" "$SECONDS" "$limit"
  timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$outdir/$name.txt"
  status=${PIPESTATUS[0]}
  if [ "$status" -ne 0 ]; then
    [ "$status" -ge 124 ] && echo "stopped after $limit s" | tee -a "$outdir/$name.txt"
    failed+=("$name")
  fi
  return "$status"
}
has_module() { "$python" -c "import $1" 2>/dev/null; }

if ! architecture=$("$python" -c '
import torch
assert torch.cuda.is_available(), "PyTorch sees no GPU"
print("{}.{}".format(*torch.cuda.get_device_capability()))
'); then
  echo "$0: no GPU that $python's PyTorch can use" >&2
  exit 1
fi

export TORCH_CUDA_ARCH_LIST=$architecture PREFIX_KERNELS_CUDA=1
if ! part build 170 "$python" -m pip install --no-deps --no-build-isolation --upgrade --target "$package" .; then
  echo "$0: the build failed, nothing more can be done" >&2
  exit 1
fi

{ nvidia-smi || true; } >"$outdir/gpu.txt" 2>&1
part report 30 "$python" -m prefix_kernels

if has_module pytest; then
  # Their own conftest.py alone: the suite's asks for plugins that a machine without a network may lack.
  part tests 100 "$python" -m pytest -q --maxfail=20 -o addopts= -p no:cacheprovider --rootdir="$repository/tests/gpu" \
    --confcutdir="$repository/tests/gpu" "$repository/tests/gpu"
else
  echo 'pytest is not installed: the GPU tests were not run' | tee "$outdir/tests.txt"
fi

if sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null); then
  for tool in memcheck racecheck synccheck initcheck; do
    # With a cache of memory a stray access may fall into memory that PyTorch holds.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 part "$tool" 20 "$sanitizer" --tool "$tool" --error-exitcode 9 \
      "$python" "$repository/tests/gpu/small_shapes.py"
  done
else
  echo 'compute-sanitizer is not installed: it was not run' | tee "$outdir/sanitizer.txt"
fi

part benchmark 125 "$python" benchmarks/bench_attention.py --device cuda --time-limit 105 \
  --output "$outdir/attention_cuda.csv"
part benchmark_flex 50 "$python" benchmarks/bench_attention.py --device cuda --flex --time-limit 40 \
  --output "$outdir/attention_cuda_flex.csv"

if has_module matplotlib; then
  for table in "$outdir"/attention_cuda*.csv; do
    name=$(basename "$table" .csv)
    [ "$(wc -l <"$table")" -gt 1 ] && part "plot_$name" 15 "$python" benchmarks/cuda_plot.py "$table"
  done
else
  echo 'matplotlib is not installed: no pictures were made'
fi

printf '\n=== done in %d s; results in %s\n' "$SECONDS" "$outdir"
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
