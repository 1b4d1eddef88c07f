# Two commands do everything on a fresh machine with Python >= 3.11: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# With an NVIDIA GPU the kernels' compiler and Transformer Engine come along.
comma := ,
EXTRAS := rl,demo,dev$(if $(shell command -v nvidia-smi),$(comma)gpu)

.PHONY: setup demo test lint clean

setup: $(VENV)/installed

# torch first and pinned: left to choose, pip would replace a CPU build by gigabytes of CUDA packages.
$(VENV)/installed: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "needs Python >= 3.11, got " + sys.version.split()[0] + "; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check $$(grep -E '^(torch|setuptools|wheel)==' constraints.txt)
	$(BIN)/pip install -q --disable-pip-version-check --no-build-isolation -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

demo: setup
	$(BIN)/python tools/demo.py

# The GPU is hidden: ranks in tests talk over gloo, and kernels run in Triton's interpreter (benchmarks/gpu_suite.sh: there).
test: setup
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info runs/demo
