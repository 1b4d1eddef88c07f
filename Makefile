# Two commands do everything on a fresh machine with Python >= 3.11: `make demo` and `make test`.
# On a machine with an NVIDIA GPU `make gpu` adds what is optional there (docs/install-gpu.md).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Where no wheel fits they are built, which needs nvcc and takes long; MAX_JOBS bounds the memory that takes. The engine's
# own wheel is of CUDA 13, as is the torch that constraints.txt pins; its version is the last that megatron-core names.
GPU_PACKAGES ?= transformer-engine[pytorch,core_cu13]==2.11.0 flash-attn causal-conv1d mamba-ssm
export MAX_JOBS ?= 4

NEWER := 'import sys; sys.exit(sys.version_info < (3, 11) and "needs Python >= 3.11, got " + sys.version.split()[0] + "; set PYTHON=python3.11")'
OURS := 'import os, prism_mcore; raise SystemExit(not os.path.samefile(prism_mcore.__path__[0], "prism_mcore"))'

.PHONY: setup gpu demo test lint clean

setup: $(VENV)/installed
	@$(BIN)/python -P -c $(OURS) 2>/dev/null || { echo "$(VENV) is stale: it does not run, or is of another folder; make clean, then again"; exit 1; }

# torch first and pinned: left to choose, pip would replace a CPU build by gigabytes of CUDA packages.
$(VENV)/installed: setup.py constraints.txt
	@$(PYTHON) -c $(NEWER)
	@[ ! -e $(VENV) ] || $(BIN)/python -c $(NEWER) || { echo "$(VENV) is stale: made by a Python that is gone or too old; make clean, then again"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q $$(grep -E '^(torch|setuptools|wheel)==' constraints.txt)
	$(PIP) install -q --no-build-isolation -c constraints.txt -e '.[rl,demo,dev]'
	@touch $@
	@! command -v nvidia-smi >/dev/null || echo "this machine has a GPU: make gpu adds Transformer Engine and others"

# One by one, because each may fail to build, and the engine does without any of them.
gpu: setup
	@failed=; for package in $(GPU_PACKAGES); do \
	  log=$(VENV)/$${package%%[*}.log; echo "$$package ..."; \
	  if $(PIP) install --no-build-isolation -c constraints.txt "$$package" >$$log 2>&1; \
	  then echo "  installed"; \
	  else echo "  not installed, the engine does without it; $$log ends with:"; tail -n 3 $$log | sed 's/^/    /'; failed="$$failed $$package"; fi; \
	done; echo "not installed:$${failed:- none}; $(BIN)/python tools/doctor.py says which backend each op will use"

demo: setup
	$(BIN)/python tools/demo.py

# The GPU is hidden: ranks in tests talk over gloo, and kernels run in Triton's interpreter (benchmarks/gpu_suite.sh: there).
# Two processes where no test starts ranks that would fight for two cores, then the rest one after another.
APART := benchmarks data kernels plan rewards study tools
test: setup
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -n 2 $(APART:%=tests/%)
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest $(APART:%=--ignore=tests/%)

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info runs/demo
