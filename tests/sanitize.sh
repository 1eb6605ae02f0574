#!/usr/bin/env bash
# The emulated CUDA kernels under ThreadSanitizer, AddressSanitizer and UndefinedBehaviorSanitizer, then the op tests under
# the latter two: ./dev sanitize. With PYTEST ARGS the second alone, on these tests.
# The package is built a second time, into an environment of its own that borrows torch and the test tools from .venv.
# Leaks are not looked for: Python and torch leave many.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[ $# -gt 0 ] || python -m pytest -q --sanitizers -m sanitizers

place=$PWD/.cache/sanitize
[ -x "$place/venv/bin/python" ] || python -m venv --without-pip "$place/venv"
site=$("$place/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
python -c 'import sysconfig; print(sysconfig.get_path("platlib"))' >"$site/borrowed.pth"
python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --no-index \
  --target "$site" --upgrade -C build-dir="$place/build" \
  -C cmake.define.CMAKE_CXX_FLAGS_RELEASE=-O1 -C cmake.define.INNERLOOP_SANITIZE=ON -C cmake.define.INNERLOOP_CUDA=OFF .

LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libubsan.so)"
export LD_PRELOAD ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
[ $# -gt 0 ] || set -- tests/test_ops.py tests/test_closed_heads.py
# The sanitizers write to the process, which they end: pytest must not hold that back.
exec "$place/venv/bin/python" -m pytest -q --capture=sys "$@"
