# Every target sets up .venv by itself: from constraints.txt, when it is missing or older than
# pyproject.toml or constraints.txt. PIP_FLAGS passes options to pip (an index of CPU builds, say).
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP_FLAGS ?=
WORKERS ?= 2

BIN := .venv/bin
INSTALLED := .venv/.installed
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt

.PHONY: setup demo test test-long test-browser fuzz test-triton36 lint bench clean
.DELETE_ON_ERROR:

setup: $(INSTALLED)

# torch goes first and alone, so that the constraint, not another package's wish, decides its build;
# setuptools next, so that the project itself builds without fetching a second one into isolation.
# The link shows mypy the root under the package's name (see [tool.mypy]).
$(INSTALLED): pyproject.toml constraints.txt
	@echo "setting up .venv with $(PYTHON) (a few minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "memcompile needs Python >= 3.11; name one with: make PYTHON=/path/to/python3")'
	@$(PYTHON) -m venv .venv
	@$(PIP) torch
	@$(PIP) setuptools wheel
	@$(PIP) --no-build-isolation -e '.[hf,dev]'
	@mkdir -p .venv/src && ln -sfn ../.. .venv/src/memcompile
	@touch $@

demo: $(INSTALLED)
	@$(BIN)/python examples/demo.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p memcompile

# One thread a worker: two workers that both start a thread per core only wait for each other.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

# What the gate leaves out, among it hundreds of specs compiled for a GPU, TensorRT-RTX engines of
# every preset, and the tested networks on generated kernels but for two, whose heads are 6 wide.
# NVIDIA's wheels come from PyPI, under NVIDIA's licence; torch-tensorrt stays out of .venv, where
# torch.compile would find its backend.
TENSORRT := .venv-tensorrt
test-long: lint
	@$(PIP) --no-deps tensorrt_rtx_cu13_libs==1.7.1.116 tensorrt_rtx_cu13_bindings==1.7.1.116
	@test -d $(TENSORRT) || $(PIP) --no-deps --target $(TENSORRT) torch-tensorrt-rtx==2.13.0
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal --timeout 3600 \
		--long -m long --ignore tests/fuzz
	OMP_NUM_THREADS=1 MEMCOMPILE_KERNELS=required $(BIN)/python -m pytest -q -n $(WORKERS) \
		--dist worksteal --long -k "not nanogpt and not llama.c" \
		tests/compiler/test_networks.py tests/compiler/test_more_networks.py

# report.html in headless Chromium, with Debian's packages; the pictures go to docs/pictures.
BROWSER := chromium chromium-driver
test-browser: $(INSTALLED)
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { \
		echo "installing $(BROWSER)"; \
		{ apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq -y \
			--no-install-recommends install $(BROWSER); } >/dev/null || { \
		echo "make test-browser needs chromium and chromedriver, which apt-get could not" \
			"install; as root: apt-get install $(BROWSER)" >&2; exit 1; }; }
	@$(PIP) selenium
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --browser -m browser --pictures docs/pictures \
		tests/compiler/test_report_browser.py

# Command lines and model files by the thousand, MEMCOMPILE_FUZZ_CASES of them (10000) from
# MEMCOMPILE_FUZZ_SEED (0), for MEMCOMPILE_FUZZ_SECONDS (3000) at most.
fuzz: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -s --long tests/fuzz

# The oldest triton that templates must compile under, in an environment of its own.
test-triton36: $(INSTALLED)
	@$(PYTHON) -m venv .venv-triton36
	@.venv-triton36/bin/python -m pip install -qq $(PIP_FLAGS) -c constraints.txt torch
	@.venv-triton36/bin/python -m pip install -qq $(PIP_FLAGS) --no-deps triton==3.6.0
	@.venv-triton36/bin/python -m pip install -qq $(PIP_FLAGS) 'numpy<2.4' \
		pytest pytest-timeout hypothesis jinja2 networkx
	@mkdir -p .venv-triton36/src && ln -sfn ../.. .venv-triton36/src/memcompile
	PYTHONPATH=.venv-triton36/src .venv-triton36/bin/python -m pytest -q tests/codegen/triton

bench: $(INSTALLED)
	@$(BIN)/python -m memcompile.benchmarks

clean:
	rm -rf .venv .venv-triton36 .venv-tensorrt build dist out memcompile.egg-info
