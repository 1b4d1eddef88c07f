#!/usr/bin/env bash
# GPU tests and kernel measurements on a machine with one NVIDIA GPU, torch >= 2.11 and no network, in under 10 minutes.
# Needs nothing installed from this repository: torch, triton, pytest, rich. Writes benchmarks/results/kernels_<gpu>.json
# and .md, to be committed. Usage: benchmarks/gpu_suite.sh [python]
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${1:-python3}
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET

"$PYTHON" - <<'CHECK' || exit 2
import sys, torch
if not torch.cuda.is_available():
    sys.exit("gpu_suite.sh: torch finds no GPU here. Without one: python benchmarks/compile_kernels.py")
version = tuple(int(x) for x in torch.__version__.split("+")[0].split(".")[:2])
if version < (2, 11):
    sys.exit(f"gpu_suite.sh: torch {torch.__version__}; needs 2.11 or newer")
print(torch.cuda.get_device_name(), torch.__version__)
CHECK

WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
status=0
# The kernels' tests run the compiled kernels where there is a GPU; the others marked gpu need megatron-core as well.
timeout 200 "$PYTHON" -m pytest -p no:cacheprovider -q --junitxml "$WORK/kernels.xml" tests/kernels/test_*_kernel.py || status=1
if "$PYTHON" -c 'import megatron.core' 2>/dev/null; then
    timeout 80 "$PYTHON" -m pytest -p no:cacheprovider -q -m gpu --junitxml "$WORK/gpu.xml" tests || [ $? -eq 5 ] || status=1
fi
timeout 300 "$PYTHON" benchmarks/kernels.py --quick --tests "$WORK/kernels.xml" "$WORK/gpu.xml" || status=1
exit $status
