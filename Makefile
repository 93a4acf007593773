# Every target sets up what it needs: a virtual environment under $(VENV), pinned dependencies, the package in editable form.
#   make quickstart             the guided tour, about 4 minutes on 2 cores after the set-up
#   make test                   the test suite;  make test-all adds the exhaustive grids
#   make lint types format      what CI checks
#   make cuda                   compile csrc for sm_80 and sm_90a wherever nvcc is; no GPU needed
# Variables: PYTHON (interpreter, 3.10 to 3.13), VENV, MODEL (quickstart from real weights), WORKERS (pytest processes),
#   PIP_FLAGS (for example an --index-url that holds CPU builds of torch), MEGATRON_QWEN_CUDA=auto|on|off.
SHELL := /bin/sh
VENV ?= .venv
WORKERS ?= 2
MODEL ?=
PYTEST_FLAGS ?=
PIP_FLAGS ?= $(if $(CI),-q)

# The first interpreter that really runs and fits: a pyenv shim, for one, can be on PATH and run nothing.
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.12 python3.13 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && { echo $$p; break; }; done)
endif

BIN := $(VENV)/bin
STAMP := $(VENV)/.megatron-qwen-installed
CXX_SOURCES := $(shell find csrc -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.h')
# Read by the shell, after the environment exists.
PINS = -c requirements/$$($(BIN)/python -c 'import sys; print("py%d%d.txt" % sys.version_info[:2])')
# One thread per process: ranks and pytest workers are the parallelism here.
TEST_ENV = OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: setup quickstart test test-all lint types format cuda lock clean

setup: $(STAMP)

$(STAMP): pyproject.toml setup.py CMakeLists.txt $(wildcard requirements/*.txt) $(CXX_SOURCES)
	@test -n "$(PYTHON)" || { echo "No Python 3.10 to 3.13 found on PATH; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "Setting up $(VENV) with $$($(PYTHON) --version); torch alone is 200 MB (CPU) to 3 GB (CUDA)."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
		echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu install python3-venv" >&2; rm -rf $(VENV); exit 1; }
	$(BIN)/python -m pip install $(PIP_FLAGS) --upgrade 'pip>=25'
	@# torch first and alone: with it in place no other requirement can bring another build of it.
	$(BIN)/python -m pip install $(PIP_FLAGS) $(PINS) torch
	$(BIN)/python -m pip install $(PIP_FLAGS) $(PINS) -e '.[dev]'
	@$(BIN)/python -c 'import megatron_qwen._C' 2>/dev/null || \
		echo "Note: no C++ compiler was found, so the optional extension megatron_qwen._C was not built; all but CUDA kernels works."
	@touch $@

quickstart: $(STAMP)
	$(BIN)/megatron-qwen quickstart $(if $(MODEL),--model "$(MODEL)")

test: $(STAMP)
	$(TEST_ENV) $(BIN)/pytest -n $(WORKERS) --dist loadfile -m 'not exhaustive' $(PYTEST_FLAGS)

test-all: $(STAMP)
	$(TEST_ENV) $(BIN)/pytest -n $(WORKERS) --dist loadfile $(PYTEST_FLAGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

types: $(STAMP)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

cuda: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/cuda -G Ninja -DMEGATRON_QWEN_CUDA=on -DPython_EXECUTABLE=$(abspath $(BIN)/python)
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/cuda
	PATH="$(abspath $(BIN)):$$PATH" ctest --test-dir build/cuda --output-on-failure

lock:
	$(PYTHON) requirements/lock.py

clean:
	rm -rf $(STAMP) build dist *.egg-info quickstart_out .mypy_cache .ruff_cache .pytest_cache .hypothesis megatron_qwen/_C*.so
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
