#!/usr/bin/env bash
# Makes an environment for each of the libraries that the benchmarks compare with, every version pinned.
#
#   benchmarks/peers.sh            all of them
#   benchmarks/peers.sh NAME...    some: learn2learn higher torchopt torchmeta parallel-metalearn easyfsl qpth jax
#
# .cache/peers/NAME is a venv that holds the library and what it imports; everything else, torch, numpy and innerloop
# among it, it finds in the project's .venv, which stays as it is. So every peer runs on the same torch and numpy. A
# benchmark runs a peer by the venv's Python. One that is there as this script would make it is left alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

peers=$PWD/.cache/peers
project=$PWD/.venv/bin/python
[ -x "$project" ] || { echo "peers.sh: no .venv here; run ./dev setup first" >&2; exit 1; }

make_environment() { # NAME
  rm -rf "${peers:?}/$1"
  "$project" -m venv --without-pip "$peers/$1"
  # addsitedir, and not the folder's name alone: the project's own .pth files, such as innerloop's, are read too.
  local site_packages='import sysconfig; folder = sysconfig.get_path("platlib");'
  "$project" -c "$site_packages print(f'import site; site.addsitedir({folder!r})')" \
    >"$("$peers/$1/bin/python" -c "$site_packages print(folder)")/project.pth"
}

# Builds with the project's setuptools. What the project has too is installed nevertheless, in the version asked for.
install() { # NAME PACKAGE...
  local name=$1
  shift
  "$project" -m pip --python "$peers/$name/bin/python" install --quiet --disable-pip-version-check --no-deps \
    --no-build-isolation --ignore-installed "$@"
}

# The sdist's C files were generated for Python 3.9 and do not compile on 3.11 and later: Cython writes them anew.
# Its umbrella module imports gym and torchvision, which nothing here needs: rivals/importing.py goes round it.
# tqdm and requests are what learn2learn.data imports.
install_learn2learn() {
  local sources
  sources=$(mktemp -d)
  install learn2learn tqdm==4.67.1 requests==2.32.5 urllib3==2.5.0 idna==3.10 certifi==2025.8.3 \
    charset-normalizer==3.4.3
  "$project" -m pip install --quiet --disable-pip-version-check --no-deps --target "$sources/cython" cython==3.1.4
  "$project" -m pip download --quiet --disable-pip-version-check --no-deps --no-build-isolation --no-binary :all: \
    --dest "$sources" learn2learn==0.2.0
  tar -xzf "$sources"/learn2learn-0.2.0.tar.gz -C "$sources"
  (
    cd "$sources/learn2learn-0.2.0"
    PYTHONPATH=$sources/cython "$project" -m cython -3 learn2learn/data/*.pyx
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
  declare -F "install_$peer" >/dev/null || { echo "peers.sh: no peer is called $peer" >&2; exit 2; }
  # What an environment was made by, written when it is whole.
  recipe=$("$project" -VV; declare -f make_environment install "install_$peer")
  made=$peers/$peer/.made
  if [ -f "$made" ] && [ "$(cat "$made")" = "$recipe" ]; then continue; fi
  echo "Installing $peer" >&2
  make_environment "$peer"
  "install_$peer"
  echo "$recipe" >"$made"
done
