# `make` lists the targets. Everything is installed into .venv; nothing outside this folder changes.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-for-tests
LOG := .setup.log
DEMO := demo
PACK := kernels/evit_kernels/published.zip
PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal

# Bytecode is written: the tests start hundreds of processes, and each would compile the whole tool anew.
unexport PYTHONDONTWRITEBYTECODE
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
export PIP_ROOT_USER_ACTION := ignore

.PHONY: help setup demo test test-exhaustive mutants lint bench kernels pack release gpu clean

help:  ## list the targets
	@awk -F ':.*## +' '/^[a-z-]+:.*## /{printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(TEST_STAMP)  ## install everything into .venv (once; again when what it is made from changes)

# What a step prints goes to a log; what went wrong is one line. Whatever a step left undone, the next make does.
$(STAMP): pyproject.toml constraints.txt
	@code=0; "$(PYTHON)" -c 'import sys; sys.exit(3 if sys.version_info < (3, 10) else 0)' >$(LOG) 2>&1 || code=$$?; \
	  example="for example: make $(or $(firstword $(MAKECMDGOALS)),setup) PYTHON=/usr/bin/python3.11"; \
	  case $$code in \
	    0) ;; \
	    3) echo "make: $$("$(PYTHON)" -V 2>&1) is too old: Python 3.10 or later is needed, $$example" >&2; exit 1 ;; \
	    126|127) echo "make: $(PYTHON) not found: install Python 3.10 or later, or say where it is, $$example" >&2; exit 1 ;; \
	    *) echo "make: $(PYTHON) is no Python that runs (its words are in $(LOG)): name another one, $$example" >&2; exit 1 ;; \
	  esac
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV) >$(LOG) 2>&1 || \
	  { echo "make: $(PYTHON) cannot make a virtual environment: install its venv module (Debian, Ubuntu:" \
	         "apt-get install python3-venv), or name another Python with PYTHON=" >&2; exit 1; }
	@echo "Installing into $(VENV) (PyTorch is the bulk of it; some minutes the first time) ..." >&2
	@$(BIN)/python -m pip install -q --constraint constraints.txt --editable '.[dev]' >$(LOG) 2>&1 || \
	  { echo "make: pip stopped, $$(grep -m1 '^ERROR' $(LOG) || tail -n1 $(LOG)): see to it (network, disk) and run make" \
	         "again, it goes on from there; all of pip's words are in $(LOG)" >&2; exit 1; }
	@touch $@

# The tests also drive the bindings of two versions of TensorRT whose libraries only NVIDIA's own index has.
$(TEST_STAMP): $(STAMP) tests/trtsim/setup.py tests/trtsim/stubs.c
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

test: $(TEST_STAMP)  ## run the fast tier of the tests, as many at once as there are cores: minutes
	$(PYTEST) -m "not exhaustive"

test-exhaustive: $(TEST_STAMP)  ## run all other tests: what they add is more sizes, types and whole programs; half an hour
	$(PYTEST) -m exhaustive

mutants: $(TEST_STAMP)  ## plant every known fault in a copy of the sources, and print which test of the fast tier catches it
	$(BIN)/python -m tests.mutants

lint: $(STAMP)  ## ruff (lint and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)  ## measure what benchmarks/ promises and write benchmarks/results/
	$(BIN)/python -m benchmarks

kernels: $(STAMP)  ## compile every kernel for every GPU architecture, without a GPU, and write what ptxas says of it
	$(BIN)/python -m benchmarks kernels
	$(BIN)/python -m benchmarks readme

# 86, 87 and 89 take the PTX of 80.
pack: $(STAMP)  ## compile every kernel of the published models into the pack that a release carries; a quarter of an hour
	$(BIN)/evit-deploy kernels pack --arch 80,90,100,120 --output $(PACK)

release: test test-exhaustive mutants pack  ## all tests, then the wheel that is published into dist/, the kernel pack inside
	$(BIN)/python -m pip wheel -q --no-deps --wheel-dir dist .

# The GPU's machine may have its own PyTorch and no network: any Python will do whose torch has CUDA.
gpu:  ## where there is an NVIDIA GPU: its tests, then its benchmarks, in ten minutes (PYTHON=... with a CUDA torch)
	@python=$$(command -v $(PYTHON) || true); \
	  has_cuda() { [ -x "$$1" ] && "$$1" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; }; \
	  has_cuda "$$python" || { [ -x $(BIN)/python ] && python=$(BIN)/python; } || true; \
	  [ -n "$$python" ] || { echo "make: $(PYTHON) not found: make gpu PYTHON=/path/to/python3" >&2; exit 1; }; \
	  PYTHONPATH=.:kernels "$$python" -m benchmarks.gpu

clean:  ## remove the virtual environment, the demo and every cache
	rm -rf $(VENV) $(LOG) $(DEMO) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
