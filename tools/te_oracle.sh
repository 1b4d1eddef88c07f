#!/usr/bin/env bash
# An environment with the real Transformer Engine on a machine without a GPU, to compare our FP8 with it bit by bit:
#   tools/te_oracle.sh FOLDER         # 6 GB and some 15 minutes; a step that is done is not done again
#   FOLDER/bin/python -P -m pytest tests/model/test_transformer_engine_real.py
# Its torch extension has no wheel: 33 files are compiled here with g++ alone, without optimisation and without nvcc. The
# CUDA headers come from wheels, or from CUDA_HOME where that is set. PYTHON, MAX_JOBS and TE_VERSION choose others.
set -euo pipefail
[ $# -eq 1 ] || { sed -n '2,6p' "$0"; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
venv=$(cd "$1" && pwd)
torch=${TORCH_VERSION:-2.14.1} te=${TE_VERSION:-2.20.2} # that torch is of CUDA 13, and so is the engine's wheel below
export MAX_JOBS=${MAX_JOBS:-1} CUDA_HOME=${CUDA_HOME:-}

fail() { echo "te_oracle: $*" >&2; exit 1; }
command -v g++ >/dev/null || fail "needs a C++ compiler: no g++ is found"
[ -z "$CUDA_HOME" ] || [ -f "$CUDA_HOME/include/cuda_runtime.h" ] ||
  fail "CUDA_HOME=$CUDA_HOME has no include/cuda_runtime.h; name a CUDA 13 toolkit's folder, or unset it for wheels"

step() { # step NAME COMMAND...: once; its output in FOLDER/NAME.log
  local name=$1 log=$venv/$1.log
  shift
  [ ! -e "$venv/.$name" ] || return 0
  echo "$name ..."
  "$@" >"$log" 2>&1 || { tail -n 15 "$log" >&2; fail "$name failed; all of it is in $log"; }
  touch "$venv/.$name"
}
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

# The project's requirements but torch's and what comes with it: this environment has a newer torch than constraints.txt.
others() { grep -v -E '^(torch|triton|setuptools|filelock|fsspec|networkx|sympy)==' "$root/constraints.txt"; }
project() { pip install --no-build-isolation -c <(others) -e "$root[rl]" pytest pytest-xdist; }

headers() { # what torch does not bring of CUDA's, of the version of the rest
  local runtime
  runtime=$(pip show nvidia-cuda-runtime | sed -n 's/^Version: \([0-9]*\.[0-9]*\).*/\1/p')
  pip install --no-deps "nvidia-cuda-crt==$runtime.*" "nvidia-cuda-cccl==$runtime.*"
}

extension() {
  local site source=$venv/source
  site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  CPLUS_INCLUDE_PATH=$(find "$site/nvidia" -maxdepth 2 -type d -name include | paste -sd:)
  export CPLUS_INCLUDE_PATH NVTE_FRAMEWORK=pytorch
  export NVTE_PYTORCH_FORCE_BUILD=TRUE # otherwise it asks GitHub for a wheel first
  [ -n "$CUDA_HOME" ] || export NVTE_BUILD_USE_NVIDIA_WHEELS=1
  rm -rf "$source" && mkdir "$source" || return
  pip download --no-deps --no-build-isolation --no-binary :all: -d "$source" "transformer-engine-torch==$te" || return
  tar -xzf "$source"/*.tar.gz -C "$source" --strip-components 1 || return
  # A test needs no speed, and with -O3 the compiler takes hours and gigabytes.
  grep -rl --include='*.py' -e '-O3' "$source" | xargs -r sed -i 's/-O3/-O0/' || return
  pip install --no-deps --no-build-isolation "$source"
}

step venv "${PYTHON:-python3}" -m venv "$venv"
step torch pip install "torch==$torch" setuptools wheel pybind11 packaging
step engine pip install --no-deps "transformer-engine==$te" "transformer-engine-cu13==$te"
step needs pip install einops onnxscript onnx pydantic nvdlfw-inspect
step project project
[ -n "$CUDA_HOME" ] || step headers headers
step extension extension
"$venv/bin/python" -c "
from importlib.metadata import version
print('ready:', ', '.join(f'{name} {version(name)}' for name in ('torch', 'transformer-engine-torch', 'megatron-core')))"
