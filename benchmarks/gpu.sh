#!/usr/bin/env bash
# Everything that needs a GPU, in about ten minutes and without a network, into one file:
#
#     benchmarks/gpu.sh [RESULT]          default: benchmarks/results/gpu.txt
#
# Builds the package for the GPU that is there, runs the CUDA tests with nothing skipped, the op cases under
# compute-sanitizer, and the benchmarks. The machine has nvcc (on PATH, or named by CUDACXX), a CUDA build of torch, and
# what pyproject.toml names for building and testing, or a folder of those wheels that INNERLOOP_WHEELS names, made
# beforehand with
#
#     pip download -d wheels "scikit-build-core>=0.11" "cmake>=3.26" ninja "pybind11>=3.0" pytest hypothesis \
#       safetensors typer rich
#
# A step that fails or takes too long is noted, and the next one runs; the script fails in the end.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

result=${1:-benchmarks/results/gpu.txt}
python=${PYTHON:-python3}
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
failed=()

step() { # NAME SECONDS COMMAND...
  local name=$1 seconds=$2 begin=$SECONDS status=0
  shift 2
  printf '\n== %s: %s\n' "$name" "$*"
  timeout "$seconds" "$@" 2>&1 || status=$?
  printf '== %s: status %s after %s s\n' "$name" "$status" "$((SECONDS - begin))"
  [ "$status" = 0 ] || failed+=("$name")
}

build() {
  "$python" -m venv --system-site-packages "$place/venv" || return
  python=$place/venv/bin/python
  local capability
  capability=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || return
  if [ -n "${INNERLOOP_WHEELS:-}" ]; then
    step tools 60 "$python" -m pip install --no-index --find-links "$INNERLOOP_WHEELS" scikit-build-core cmake ninja \
      pybind11 pytest hypothesis safetensors typer rich
  fi
  step build 240 "$python" -m pip install --no-index --no-deps --no-build-isolation -C build-dir="$place/build" \
    -C cmake.define.INNERLOOP_CUDA=ON -C cmake.define.INNERLOOP_CUDA_ARCHITECTURES="$capability" .
}

run() {
  date -u
  nvidia-smi
  "${CUDACXX:-nvcc}" --version
  git log -1 --format='commit %h of %cd' 2>/dev/null
  build || failed+=(build)
  "$python" -m innerloop info
  export OMP_NUM_THREADS=1
  INNERLOOP_REQUIRE_CUDA=1 step tests 180 "$python" -m pytest -q -k "not emulated" tests/test_cuda_ops.py tests/test_cuda_engine.py
  for tool in memcheck racecheck synccheck; do
    step "$tool" 120 compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" tests/op_cases.py cuda
  done
  step benchmarks 120 "$python" benchmarks/gpu.py
  if [ ${#failed[@]} -gt 0 ]; then
    printf '\nfailed: %s\n' "${failed[*]}"
    return 1
  fi
  printf '\nall steps passed\n'
}

run 2>&1 | tee "$result"
