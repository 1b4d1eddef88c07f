#!/usr/bin/env bash
# GPU tests and kernel measurements on a machine with one NVIDIA GPU, torch >= 2.11 and no network.
# Needs nothing installed from this repository: torch, triton, pytest, rich; with pytest-xdist the tests take a fraction.
#
#     benchmarks/gpu_suite.sh tests [folder]      the kernels' tests: gpu_tests.txt, gpu_tests.xml
#     benchmarks/gpu_suite.sh measure [folder]    every op of three models beside its peers: kernels_<gpu>.json and .md,
#                                                 and what the kernels compile to here: compiled.json and .md
#     benchmarks/gpu_suite.sh features [folder]   each feature of the training step on and off (needs megatron-core):
#                                                 features_<gpu>.json
#
# Each part ends within 9 minutes, the first call's compiling included, and writes as it goes: what ends it early leaves
# what it had. The folder is benchmarks/results unless given, the interpreter python3 unless PYTHON names another.
set -uo pipefail
[ $# -ge 1 ] && [ $# -le 2 ] && [[ $1 =~ ^(tests|measure|features)$ ]] || { sed -n 2,12p "$0"; exit 2; }
mkdir -p "${2:-$(dirname "$0")/results}" && RESULTS=$(cd "${2:-$(dirname "$0")/results}" && pwd) || exit 2
PYTHON=${PYTHON:-python3}
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET

GPU=$("$PYTHON" - <<'CHECK'
import sys, torch
if not torch.cuda.is_available():
    sys.exit("gpu_suite.sh: torch finds no GPU here. Without one: python benchmarks/compile_kernels.py")
version = tuple(int(x) for x in torch.__version__.split("+")[0].split(".")[:2])
if version < (2, 11):
    sys.exit(f"gpu_suite.sh: torch {torch.__version__}; needs 2.11 or newer")
print(torch.cuda.get_device_name().lower().replace(" ", "_"))
CHECK
) || exit 2

run_tests() {
    # A process for each file: one that breaks the GPU's context takes no other's tests along. SIGINT: pytest still reports.
    local parallel=()
    "$PYTHON" -c 'import xdist' 2>/dev/null && parallel=(-n 10 --dist loadfile)
    local pytest=("$PYTHON" -m pytest -p no:cacheprovider -vv -rfE --tb=short "${parallel[@]}")
    timeout -s INT -k 30 420 "${pytest[@]}" --junitxml "$RESULTS/gpu_tests.xml" \
        tests/kernels/*/test_triton.py tests/kernels/norm/test_gated.py tests/kernels/scan/test_step.py \
        tests/kernels/fp8_linear/test_fp8_linear.py tests/kernels/adamw/test_remainder.py
    local status=$?
    # The other tests marked gpu need megatron-core as well.
    if "$PYTHON" -c 'import megatron.core' 2>/dev/null; then
        timeout -s INT -k 30 60 "${pytest[@]}" -m gpu --junitxml "$RESULTS/gpu_tests_marked.xml" tests
        local marked=$?
        [ $marked -eq 0 ] || [ $marked -eq 5 ] || status=$marked
    fi
    return $status
}

measure() {
    local models=(llama-3.1-8b nemotron-h-8b granite-4.0-h-micro)
    # Triton keeps what it compiles: in parallel first, so that measuring does not wait for one kernel after the other.
    timeout 150 "$PYTHON" benchmarks/compile_kernels.py --models "${models[@]}" --tp 1 --traffic none --peers \
        --processes "$(nproc)" --out "$RESULTS/compiled" >/dev/null
    timeout 360 "$PYTHON" benchmarks/measure_kernels.py --quick --models "${models[@]}" --out "$RESULTS/kernels_$GPU" \
        --tests "$RESULTS"/gpu_tests*.xml
}

features() {
    "$PYTHON" benchmarks/features.py --nproc "$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')" \
        --minutes 8 --out "$RESULTS/features_$GPU.json"
}

case $1 in
    tests) run_tests 2>&1 | tee "$RESULTS/gpu_tests.txt" ;;
    *) "$1" ;;
esac
