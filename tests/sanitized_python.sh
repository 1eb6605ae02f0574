#!/usr/bin/env bash
# Python with the package built a second time, under AddressSanitizer and UndefinedBehaviorSanitizer:
#
#   tests/sanitized_python.sh ARGS...
#
# The build goes into an environment of its own, which borrows torch and the test tools from the one on PATH.
# Leaks are not looked for: Python and torch leave many.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

place=$PWD/.cache/sanitize
[ -x "$place/venv/bin/python" ] || python -m venv --without-pip "$place/venv"
site=$("$place/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
python -c 'import sysconfig; print(sysconfig.get_path("platlib"))' >"$site/borrowed.pth"
python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --no-index \
  --target "$site" --upgrade -C build-dir="$place/build" \
  -C cmake.define.CMAKE_CXX_FLAGS_RELEASE=-O1 -C cmake.define.INNERLOOP_SANITIZE=ON -C cmake.define.INNERLOOP_CUDA=OFF .

LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libubsan.so)"
export LD_PRELOAD ASAN_OPTIONS=detect_leaks=0:${ASAN_OPTIONS:-} UBSAN_OPTIONS=print_stacktrace=1
exec "$place/venv/bin/python" "$@"
