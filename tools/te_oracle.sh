#!/usr/bin/env bash
# An environment with the real Transformer Engine on a machine without a GPU, to compare our FP8 with it bit by bit:
#   tools/te_oracle.sh FOLDER         # 6 GB and some 15 minutes; a step that is done is not done again
#   FOLDER/bin/python -m pytest tests/model/test_transformer_engine_real.py
# Its torch extension has no wheel: it is compiled here with g++ alone, without optimisation (33 files of C++, no nvcc).
# CUDA_HOME must name a CUDA toolkit's folder, for its headers; those of cuDNN and NCCL are in the wheels that torch needs.
set -euo pipefail
[ $# -eq 1 ] || { sed -n '2,6p' "$0"; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"; venv=$(cd "$1" && pwd)
torch=${TE_ORACLE_TORCH:-2.14.1} te=${TE_ORACLE_VERSION:-2.20.2}
export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda} MAX_JOBS=${MAX_JOBS:-1}
[ -f "$CUDA_HOME/include/cuda_runtime.h" ] || { echo "CUDA_HOME=$CUDA_HOME has no include/cuda_runtime.h; name a CUDA 13 toolkit's folder"; exit 1; }

step() {  # step NAME COMMAND...: once
  [ ! -e "$venv/.$1" ] || return 0
  echo "$1 ..."; shift_name=$1; shift
  "$@" > "$venv/$shift_name.log" 2>&1 || { echo "failed; $venv/$shift_name.log ends with:"; tail -n 15 "$venv/$shift_name.log"; exit 1; }
  touch "$venv/.$shift_name"
}
pip=("$venv/bin/python" -m pip --disable-pip-version-check)

step venv "${PYTHON:-python3}" -m venv "$venv"
step torch "${pip[@]}" install "torch==$torch" setuptools wheel pybind11 packaging
step engine "${pip[@]}" install --no-deps "transformer-engine==$te" "transformer-engine-cu13==$te"
step needs "${pip[@]}" install einops onnxscript onnx pydantic nvdlfw-inspect
step project "${pip[@]}" install --no-build-isolation -c <(grep -v -E '^(torch|triton|setuptools|filelock|fsspec|networkx|sympy)==' "$root/constraints.txt") -e "$root[rl]" pytest pytest-xdist

compile() {
  site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  CPLUS_INCLUDE_PATH=$(find "$site/nvidia" -type d -name include | paste -sd:)
  export CPLUS_INCLUDE_PATH NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_FRAMEWORK=pytorch
  rm -rf "$venv/source" && mkdir "$venv/source"
  "${pip[@]}" download --no-deps --no-build-isolation --no-binary :all: -d "$venv/source" "transformer-engine-torch==$te"
  tar -xzf "$venv/source"/*.tar.gz -C "$venv/source" --strip-components 1
  grep -rl -- '-O3' "$venv/source" --include='*.py' | xargs -r sed -i 's/-O3/-O0/'  # a test needs no speed
  "${pip[@]}" install --no-deps --no-build-isolation "$venv/source"
}
step extension compile
"$venv/bin/python" -c 'import torch, transformer_engine.pytorch as te, transformer_engine_torch; print("torch", torch.__version__, "with Transformer Engine", te.__file__)'
