# `make` lists the targets. Everything is installed into .venv; nothing outside this folder changes.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := demo

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
export PIP_ROOT_USER_ACTION := ignore

.PHONY: help setup demo test lint bench kernels gpu clean

help:  ## list the targets
	@awk -F ':.*## +' '/^[a-z]+:.*## /{printf "  make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## install everything into .venv (once; again when what it is made from changes)

# The tests also drive the bindings of two versions of TensorRT whose libraries only NVIDIA's own index has.
$(STAMP): pyproject.toml constraints.txt tests/trtsim/setup.py tests/trtsim/stubs.c
	@command -v $(PYTHON) >/dev/null || \
	  { echo "make: $(PYTHON) not found: install Python 3.10 or later, or say which: make setup PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "make: $$($(PYTHON) -V) is too old: Python 3.10 or later is needed, for example: make setup PYTHON=python3.11" >&2; exit 1; }
	@[ -x $(BIN)/python ] && $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || \
	  { echo "make: $(PYTHON) cannot make a virtual environment: install its venv module (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	@echo "Installing into $(VENV) (PyTorch is the bulk of it; some minutes the first time) ..." >&2
	@$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/python tests/trtsim/setup.py
	@touch $@

$(DEMO)/digits.pt: | $(STAMP)
	@$(BIN)/python examples/digits/train.py --output $(DEMO)

demo: $(STAMP) $(DEMO)/digits.pt  ## the main job on a trained model: export, verify, build-trt, bench; leaves demo/digits.evit
	$(BIN)/evit-deploy export $(DEMO)/digits.pt --output $(DEMO)/digits.evit --force
	$(BIN)/evit-deploy verify $(DEMO)/digits.evit --input $(DEMO)/heldout
	$(BIN)/evit-deploy build-trt $(DEMO)/digits.evit || \
	  { code=$$?; [ $$code -eq 4 ] || exit $$code; }  # 4: TensorRT for RTX has no package for this machine
	$(BIN)/evit-deploy bench $(DEMO)/digits.evit --batch 1,8,64 --duration 180 --json $(DEMO)/bench.json || \
	  { code=$$?; [ $$code -eq 5 ] || exit $$code; }  # 5: this machine is too busy to tell, which is no failure here
	@echo; echo "The bundle is $(DEMO)/digits.evit: try $(BIN)/evit-deploy inspect $(DEMO)/digits.evit"

test: $(STAMP)  ## run every test, as many at once as there are cores
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: $(STAMP)  ## ruff (lint and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)  ## measure what benchmarks/ promises and write benchmarks/results/
	$(BIN)/python -m benchmarks

kernels: $(STAMP)  ## compile every kernel for every GPU architecture, without a GPU, and write what ptxas says of it
	$(BIN)/python -m benchmarks kernels
	$(BIN)/python -m benchmarks readme

# The GPU's machine may have its own PyTorch and no network: any Python will do whose torch has CUDA.
gpu:  ## where there is an NVIDIA GPU: its tests, then its benchmarks, in ten minutes (PYTHON=... with a CUDA torch)
	@python=$$(command -v $(PYTHON) || true); \
	  has_cuda() { [ -x "$$1" ] && "$$1" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; }; \
	  has_cuda "$$python" || { [ -x $(BIN)/python ] && python=$(BIN)/python; } || true; \
	  [ -n "$$python" ] || { echo "make: $(PYTHON) not found: make gpu PYTHON=/path/to/python3" >&2; exit 1; }; \
	  PYTHONPATH=.:kernels "$$python" -m benchmarks.gpu

clean:  ## remove the virtual environment, the demo and every cache
	rm -rf $(VENV) $(DEMO) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
