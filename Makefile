# Two commands for a newcomer: `make quickstart` and `make test`. Both make a virtual environment in .venv first.
#
#   PYTHON=python3.12       the interpreter (3.11 or newer)
#   PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
#                           passed on to pip, here for a CPU build of torch
#   ARGS="--minutes 4"      passed on to `minnow quickstart`

PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) --constraint constraints.txt

.PHONY: help quickstart test test-slow test-gpu llama-cpp test-export test-vllm lint format clean

help:
	@sed -n 's/^\([a-z-]*\):.*## /  make \1: /p' $(MAKEFILE_LIST)

quickstart: $(VENV)/base.stamp  ## install the base, then raw text to a chatting model
	$(BIN)/minnow quickstart $(ARGS)

test: $(VENV)/all.stamp  ## install everything, then the fast tests
	$(BIN)/python -m pytest -n 2

test-slow: $(VENV)/all.stamp  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

test-gpu: $(VENV)/all.stamp  ## what only a CUDA device can show, and the table of benchmarks/gpu.py (8 minutes)
	$(BIN)/python -m pytest -m gpu tests/gpu
	$(BIN)/python benchmarks/gpu.py

llama-cpp: $(VENV)/all.stamp  ## fetch and build llama.cpp once (minutes; MINNOW_LLAMA_CPP names another folder for it)
	$(BIN)/python benchmarks/llama_cpp_model.py

test-export: llama-cpp  ## exported models in llama.cpp and onnxruntime, ollama's template in Go where there is one
	$(BIN)/python -m pytest -m slow tests/export

test-vllm: $(VENV)/all.stamp  ## models in vLLM's CPU build, in an environment of its own (2 GB, minutes)
	$(BIN)/python benchmarks/vllm_model.py install .venv-vllm
	MINNOW_VLLM=$(CURDIR)/.venv-vllm/bin/python $(BIN)/python -m pytest -m slow tests/export/test_vllm.py tests/rl/test_remote_engine.py

lint: $(VENV)/all.stamp  ## style, types and layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/all.stamp  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and all caches
	rm -rf $(VENV) .venv-vllm .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache build
	find . -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "minnow needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
		     "Name a newer one: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# The stamps record what was installed: a second call installs nothing until these files change.
$(VENV)/base.stamp: pyproject.toml constraints.txt | $(BIN)/python compiler
	@echo 'installing minnow into $(VENV); the first time takes some minutes'
	@$(PIP) --editable .
	@touch $@

$(VENV)/all.stamp: pyproject.toml constraints.txt | $(BIN)/python compiler
	@echo 'installing minnow and its tools into $(VENV); the first time takes some minutes'
	@$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/base.stamp

.PHONY: compiler
compiler:
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
		echo "note: no C++ compiler found; everything works, without torch.compile's speed."
