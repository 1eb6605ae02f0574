#!/usr/bin/env bash
# The emulated CUDA kernels under ThreadSanitizer, AddressSanitizer and UndefinedBehaviorSanitizer, then the op tests under
# the latter two: ./dev sanitize. With PYTEST ARGS the second alone, on these tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[ $# -gt 0 ] || python -m pytest -q --sanitizers -m sanitizers
[ $# -gt 0 ] || set -- tests/test_ops.py tests/test_closed_heads.py tests/test_coordinate_lstm.py \
  tests/test_kernels.py tests/test_primitives.py
# The sanitizers write to the process, which they end: pytest must not hold that back.
exec tests/sanitized_python.sh -m pytest -q --capture=sys "$@"
