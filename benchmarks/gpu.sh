#!/usr/bin/env bash
# Everything that needs a GPU, within ten minutes and without a network, into one file:
#
#     benchmarks/gpu.sh [RESULT]            default: benchmarks/results/gpu.txt
#     benchmarks/gpu.sh --dry [RESULT]      the same steps where there is no GPU: does the script run? (build/gpu-dry.txt)
#
# PYTHON is the interpreter with torch, python3 by default; in a clone that ./dev setup was run in, .venv/bin/python.
#
# Builds the package for the GPU that is there, runs the CUDA tests, the op cases and a net of all layers under
# compute-sanitizer, and the benchmarks: what matters most first. The machine has nvcc (on PATH, or named by CUDACXX), a
# CUDA build of torch (2.10 or newer) with pip beside it, and what pyproject.toml names for building and testing, or a
# folder of those wheels that INNERLOOP_WHEELS names, made beforehand with
#
#     pip download -d wheels "scikit-build-core>=0.11" "cmake>=3.26" ninja "pybind11>=3.0" pytest hypothesis \
#       safetensors typer rich
#
# The peers that the step is measured beside are those that are installed, and the packages of .cache/peers, made
# beforehand by benchmarks/peers.sh.
# A step that fails, or finds no time left, is noted, and the next one runs, but for the build, without which there is
# nothing to run; the script fails in the end.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

device=cuda quick=()
if [ "${1:-}" = --dry ]; then
  device=cpu quick=(--quick)
  shift
fi
[ "$device" = cuda ] && result=${1:-benchmarks/results/gpu.txt} || result=${1:-build/gpu-dry.txt}
python=${PYTHON:-python3}
nvcc=${CUDACXX:-nvcc}
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
deadline=$((SECONDS + 600))
failed=()

die() {
  printf 'gpu.sh: %s\n' "$*" >&2
  exit 2
}

step() { # NAME SECONDS COMMAND...
  local name=$1 seconds=$2 begin=$SECONDS status=0
  shift 2
  [ "$seconds" -le $((deadline - SECONDS)) ] || seconds=$((deadline - SECONDS))
  printf '\n== %s: %s\n' "$name" "$*"
  if [ "$seconds" -gt 0 ]; then timeout --kill-after=5 "$seconds" "$@" 2>&1 || status=$?; else status="none, no time is left,"; fi
  [[ "$status" != @(124|137) ]] || printf 'stopped after %s s\n' "$seconds"
  printf '== %s: status %s after %s s\n' "$name" "$status" "$((SECONDS - begin))"
  [ "$status" = 0 ] || failed+=("$name")
}

# What the steps need, before the first of them.
check_machine() {
  command -v "$nvcc" >/dev/null || die "no nvcc (put it on PATH, or name it by CUDACXX)"
  "$python" -c 'import torch' || die "$python has no torch (PYTHON names another interpreter)"
  [ "$device" = cuda ] || return 0
  "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    die "torch sees no CUDA device; benchmarks/gpu.sh --dry runs the steps without one"
}

# On PATH, or beside nvcc; where it is missing, its steps fail and the others run.
sanitizer() {
  command -v compute-sanitizer || printf '%s/compute-sanitizer' "$(dirname "$(readlink -f "$(command -v "$nvcc")")")"
}

build() {
  "$python" -m venv --without-pip --system-site-packages "$place/venv" || die "$python cannot make an environment"
  # What this Python has, pip too, may itself lie in an environment, which the new one does not see.
  "$python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))' \
    >"$("$place/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')/borrowed.pth"
  python=$place/venv/bin/python
  local capability=90
  [ "$device" = cpu ] || capability=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
  if [ -n "${INNERLOOP_WHEELS:-}" ]; then
    step tools 60 "$python" -m pip install --no-index --find-links "$INNERLOOP_WHEELS" scikit-build-core cmake ninja \
      pybind11 pytest hypothesis safetensors typer rich
  fi
  step build 400 "$python" -m pip install --no-index --no-deps --no-build-isolation --force-reinstall \
    -C build-dir="$place/build" -C cmake.define.INNERLOOP_CUDA=ON \
    -C cmake.define.INNERLOOP_CUDA_ARCHITECTURES="$capability" .
}

sanitize() { # TOOL OPTIONS...
  local tool=("$(sanitizer)" --tool "$@" --kernel-name kns=innerloop --error-exitcode 1)
  step "$1 of the ops" 60 "${tool[@]}" "$python" tests/op_cases.py cuda
  step "$1 of the engine" 60 "${tool[@]}" "$python" tests/test_cuda_engine.py cuda
}

run() {
  date -u
  [ "$device" = cpu ] || nvidia-smi
  "$nvcc" --version
  git log -1 --format='commit %h of %cd' 2>/dev/null
  build
  [[ " ${failed[*]} " == *" build "* ]] || run_steps
  if [ ${#failed[@]} -gt 0 ]; then
    printf '\nfailed:'
    printf ' [%s]' "${failed[@]}"
    printf '\n'
    return 1
  fi
  printf '\nall steps passed\n'
}

run_steps() {
  "$python" -m innerloop info
  export OMP_NUM_THREADS=1
  # Warnings are errors where every version is known; here they would hide what the kernels do.
  local tests=("$python" -m pytest -q --slow --tb=short -W default -m "not emulated")
  tests+=(tests/test_cuda_ops.py tests/test_cuda_engine.py)
  if [ "$device" = cuda ]; then
    INNERLOOP_REQUIRE_CUDA=1 step tests 180 "${tests[@]}"
    # Every tensor an allocation of its own, so that memory behind it is nobody's. torch's own kernels, and what it asks
    # of CUDA to see whether it fails, are not looked at.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 sanitize memcheck --report-api-errors no
  else
    step tests 180 "${tests[@]}"
    step ops 60 "$python" tests/op_cases.py cpu
    step engine 60 "$python" tests/test_cuda_engine.py cpu
  fi
  step kernels 90 "$python" benchmarks/gpu.py --device "$device" "${quick[@]}"
  step steps 250 "$python" benchmarks/gpu_steps.py --device "$device" --seconds 230 "${quick[@]}"
  if [ "$device" = cuda ]; then
    sanitize racecheck
    sanitize synccheck
  fi
}

check_machine
mkdir -p "$(dirname "$result")"
run 2>&1 | tee "$result"
