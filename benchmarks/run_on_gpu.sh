#!/usr/bin/env bash
# Everything that needs a GPU, in under ten minutes, without a network:
#
#     benchmarks/run_on_gpu.sh OUTDIR [PART...] [-- ARGUMENT...]
#
#     build      for the GPU at hand alone; without it, the other parts use what an earlier run left in OUTDIR
#     report     the package's own check of every device
#     tests      tests/gpu, with every instruction of ptx.cuh against its emulated twin
#     sanitizer  compute-sanitizer's four tools on small shapes, beside the tests
#     benchmark  kernels/cuda/bench_attention.py, with the ARGUMENTs, in what is left of the time
#     flex       the same with FlexAttention, which is compiled for every shape
#     plots      a picture of each table
#
# No PART means all of them. A part has a time limit and does not need the others to succeed; tables are written row by
# row. OUTDIR receives the text of every part, the tables and the pictures. Variables: PYTHON, the interpreter, which must
# have PyTorch and setuptools, pytest for the tests and matplotlib for the plots; TIME_LIMIT, seconds for all parts
# (default 590); MAX_JOBS, compilers side by side; COMMIT, what tables call a checkout without its history.
set -uo pipefail

readonly known=(build report tests sanitizer benchmark flex plots)
readonly tools=(memcheck racecheck synccheck initcheck)

usage() {
  echo "usage: $0 OUTDIR [PART...] [-- ARGUMENT...]; parts: ${known[*]}" >&2
  exit 2
}

if [ $# -lt 1 ] || [ "$1" = -- ]; then usage; fi
outdir=$1
shift
parts=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  [[ " ${known[*]} " == *" $1 "* ]] || usage
  parts+=("$1")
  shift
done
if [ $# -gt 0 ]; then shift; fi
if [ ${#parts[@]} -eq 0 ]; then parts=("${known[@]}"); fi

repository=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$outdir"
outdir=$(cd "$outdir" && pwd)
package=$outdir/package
python=${PYTHON:-python3}
time_limit=${TIME_LIMIT:-590}

# The built package, not the folder of its source, and no index to ask for anything.
export PYTHONPATH="$package" PIP_NO_INDEX=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
cd "$outdir" || exit 1

wanted() { [[ " ${parts[*]} " == *" $1 "* ]]; }
has_module() { "$python" -c "import $1" 2>/dev/null; }
left() { echo $((time_limit - SECONDS)); }

# limited SECONDS COMMAND...: at most so long, and not beyond the end of all.
limited() {
  local limit=$(($1 < $(left) ? $1 : $(left)))
  shift
  if [ "$limit" -le 0 ]; then
    echo 'no time is left for this'
    return 124
  fi
  timeout --kill-after=5 "$limit" "$@"
  local status=$?
  if [ "$status" -ge 124 ]; then echo "stopped after at most $limit s"; fi
  return "$status"
}

failed=()
# part NAME SECONDS COMMAND...: its output goes to the terminal and to OUTDIR/NAME.txt.
part() {
  local name=$1 status
  shift
  printf '\n=== %s (%d s, at most %d more)\n' "$name" "$SECONDS" "$1"
  limited "$@" 2>&1 | tee "$outdir/$name.txt"
  status=${PIPESTATUS[0]}
  if [ "$status" -ne 0 ]; then failed+=("$name"); fi
  return "$status"
}

declare -A beside=()
# begin NAME SECONDS COMMAND...: a part beside the next ones, until `finish NAME` shows the end of its output.
begin() {
  local name=$1
  shift
  limited "$@" >"$outdir/$name.txt" 2>&1 &
  beside[$name]=$!
}
finish() {
  printf '\n=== %s (%d s)\n' "$1" "$SECONDS"
  wait "${beside[$1]}" || failed+=("$1")
  tail -n 15 "$outdir/$1.txt"
}

if ! architecture=$("$python" -c '
import torch
assert torch.cuda.is_available(), "PyTorch sees no GPU"
print("{}.{}".format(*torch.cuda.get_device_capability()))
'); then
  echo "$0: no GPU that $python's PyTorch can use" >&2
  exit 1
fi
{ nvidia-smi || true; } >"$outdir/gpu.txt" 2>&1

if wanted build; then
  # A virtual machine may show little of its memory as free until it is used, so that is not asked.
  export TORCH_CUDA_ARCH_LIST=$architecture PREFIX_KERNELS_CUDA=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}
  if ! part build 200 "$python" -m pip install --no-deps --no-build-isolation --upgrade --target "$package" "$repository"; then
    echo "$0: the build failed, nothing more can be done" >&2
    exit 1
  fi
fi

if wanted report; then part report 40 "$python" -m prefix_kernels; fi

if wanted sanitizer; then
  if sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null); then
    for tool in "${tools[@]}"; do
      # With a cache of memory a stray access may fall into memory that PyTorch holds.
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 begin "$tool" 150 "$sanitizer" --tool "$tool" --error-exitcode 9 \
        "$python" "$repository/tests/gpu/small_shapes.py"
    done
  else
    echo 'compute-sanitizer is not installed: it was not run' | tee "$outdir/sanitizer.txt"
  fi
fi

if wanted tests; then
  if has_module pytest; then
    # Their own conftest.py alone: the suite's asks for plugins that a machine without a network may lack.
    part tests 150 "$python" -m pytest -q --maxfail=20 -o addopts= -p no:cacheprovider \
      --rootdir="$repository/tests/gpu" --confcutdir="$repository/tests/gpu" "$repository/tests/gpu"
  else
    echo 'pytest is not installed: the GPU tests were not run' | tee "$outdir/tests.txt"
  fi
fi

# The timed parts have the GPU to themselves.
for tool in "${!beside[@]}"; do finish "$tool"; done

# bench NAME SECONDS ARGUMENT...: stops in time to write what it has.
bench() {
  local name=$1 seconds=$2
  shift 2
  part "$name" "$seconds" "$python" "$repository/benchmarks/kernels/cuda/bench_attention.py" \
    --time-limit $((seconds > 30 ? seconds - 15 : 15)) --output "$outdir/attention_cuda${name#benchmark}.csv" "$@"
}

plots=0 flex=0
if wanted plots; then plots=30; fi
if wanted flex; then flex=60; fi
if wanted benchmark; then bench benchmark $(($(left) - flex - plots)) "$@"; fi
if wanted flex; then bench benchmark_flex $flex --flex --where pass=forward,backward; fi

if wanted plots; then
  if has_module matplotlib; then
    for table in "$outdir"/attention_cuda*.csv; do
      name=$(basename "$table" .csv)
      if [ -s "$table" ]; then
        part "plot_$name" 15 "$python" "$repository/benchmarks/kernels/cuda/plot.py" "$table"
      fi
    done
  else
    echo 'matplotlib is not installed: no pictures were made'
  fi
fi

printf '\n=== done in %d s; results in %s\n' "$SECONDS" "$outdir"
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
