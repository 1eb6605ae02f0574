#!/usr/bin/env bash
# Installs the libraries that the benchmarks compare with, each into a folder of its own beside the project's torch.
#
#   benchmarks/peers.sh            all of them
#   benchmarks/peers.sh NAME...    some: learn2learn higher torchopt torchmeta parallel-metalearn easyfsl qpth jax
#
# `pip install --no-deps --target .cache/peers/NAME` keeps the project's environment as it is; a benchmark puts the
# folder on sys.path of the process that runs this peer. So every peer runs on the same torch and numpy.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

peers=$PWD/.cache/peers
python=$PWD/.venv/bin/python
[ -x "$python" ] || { echo "peers.sh: no .venv here; run ./dev setup first" >&2; exit 1; }

install() { # FOLDER PACKAGE...
  local folder=$1
  shift
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --upgrade \
    --target "$peers/$folder" "$@"
}

# The sdist's C files were generated for Python 3.9 and do not compile on 3.11 and later: Cython writes them anew.
# Its umbrella module imports gym and torchvision, which nothing here needs: rivals/importing.py goes round it.
# tqdm and requests are what learn2learn.data imports.
install_learn2learn() {
  local sources
  sources=$(mktemp -d)
  install learn2learn tqdm==4.67.1 requests==2.32.5 urllib3==2.5.0 idna==3.10 certifi==2025.8.3 \
    charset-normalizer==3.4.3
  install cython cython==3.1.4
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps --no-build-isolation --no-binary :all: \
    --dest "$sources" learn2learn==0.2.0
  tar -xzf "$sources"/learn2learn-0.2.0.tar.gz -C "$sources"
  (
    cd "$sources/learn2learn-0.2.0"
    export PYTHONPATH=$peers/cython
    "$python" -m cython -3 learn2learn/data/*.pyx
    install learn2learn "$PWD"
  )
  rm -r "$sources"
}

install_higher() { install higher higher==0.2.1; }

# optree holds its trees; graphviz is imported by torchopt.visual and never called here.
install_torchopt() { install torchopt torchopt==0.7.3 optree==0.17.0 graphviz==0.21; }

# Asks for torch < 1.10 and torchvision < 0.11 (--no-deps), but its modules run on today's torch. Its umbrella module
# imports every data set: rivals/importing.py goes round it.
install_torchmeta() { install torchmeta torchmeta==1.8.0; }

install_parallel-metalearn() { install parallel-metalearn parallel-metalearn==0.5.6; }

# Its umbrella modules import pandas and torchvision: rivals/importing.py goes round them.
install_easyfsl() { install easyfsl easyfsl==1.5.0; }

# An sdist. Its other solver imports cvxpy only when it is called.
install_qpth() { install qpth qpth==0.0.18; }

install_jax() { install jax jax==0.10.2 jaxlib==0.10.2 ml_dtypes==0.5.3 opt_einsum==3.4.0; }

[ $# -gt 0 ] || set -- learn2learn higher torchopt torchmeta parallel-metalearn easyfsl qpth jax
for peer; do
  if [ -f "$peers/$peer/.installed" ]; then continue; fi
  echo "Installing $peer" >&2
  "install_$peer"
  touch "$peers/$peer/.installed"
done
