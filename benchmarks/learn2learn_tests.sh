#!/usr/bin/env bash
# Runs example scripts of learn2learn 0.2.0 under it and under innerloop.compat.learn2learn (learn2learn_scripts.py), then
# its own tests of MAML, MetaSGD and the module helpers on the latter: its source release is downloaded, and the one
# import of each file changed. docs/learn2learn.md has the outcome.
#
#   benchmarks/learn2learn_tests.sh [PYTEST ARGUMENTS]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=$PWD/.venv/bin/python
sources=$(mktemp -d)
trap 'rm -r "$sources"' EXIT
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --no-build-isolation --no-binary :all: \
  --dest "$sources" learn2learn==0.2.0
tar -xzf "$sources"/learn2learn-0.2.0.tar.gz -C "$sources"

benchmarks/peers.sh learn2learn
"$python" benchmarks/learn2learn_scripts.py "$sources/learn2learn-0.2.0/examples"

mkdir "$sources/tests"
cp "$sources"/learn2learn-0.2.0/tests/unit/{algorithms/maml_test,algorithms/metasgd_test,utils_test}.py "$sources/tests"
sed -i 's/^import learn2learn as l2l$/import innerloop.compat.learn2learn as l2l/' "$sources"/tests/*.py
"$python" -m pytest -c /dev/null --rootdir "$sources/tests" -p no:cacheprovider -q "$@" "$sources"/tests/*_test.py
