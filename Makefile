# `make demo` and `make test` each take a fresh clone to the result. PYTHON=python3.12 picks another interpreter.

PYTHON ?= python3
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -ec
.DELETE_ON_ERROR:
.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help demo test check install format lint types pytest quick sanitize fuzz clean reliability

BIN := .venv/bin
STAMP := .venv/.installed

help:  ## this list
	@awk -F ':|## ' '/^[a-z]+:.*## / { printf "  make %-11s %s\n", $$1, $$NF }' Makefile

# DEMO="--steps 40" for a look in a minute or two: the same, of a model that has learnt less.
demo: $(STAMP)  ## train a small ternary model, pack it, generate with it
	@$(BIN)/python -m bitnet.cli.demo $(DEMO)

test: $(STAMP) lint types pytest  ## formatting, lint, types and every test

check: $(STAMP) lint types quick  ## formatting, lint, types and the quick tests of every part: two minutes

install: $(STAMP)  ## virtual environment .venv with the project in it (editable)

format: $(STAMP)  ## rewrite the sources in the project's format
	@$(BIN)/ruff check --quiet --fix-only
	@$(BIN)/ruff format --quiet

lint: $(STAMP)  ## check format and lint, change nothing
	@echo "checking format and lint"
	@$(BIN)/ruff format --check --quiet --output-format concise || { echo "make format mends this"; exit 1; }
	@$(BIN)/ruff check --quiet --output-format concise

# In the checkout kernels/ and train/ lie beside bitnet/; installed they lie inside it. Links in build/types give mypy the
# installed shape, and sed turns the paths in its messages back into those of the checkout.
types: $(STAMP)  ## check types
	@echo "checking types"
	@rm -rf build/types && mkdir -p build/types/bitnet/benchmarks
	@cd build/types/bitnet && ln -s ../../../bitnet/* ../../../kernels ../../../train .
	@cd build/types/bitnet/benchmarks && ln -s ../../../../benchmarks/*/ . && rm -f results specs __pycache__
	@cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache \
	  --no-error-summary -p bitnet | sed -E 's,^bitnet/(kernels|train|benchmarks)/,\1/,'

# On all cores this process may use (tests/conftest.py counts them); JOBS=0 runs them in one process. Idle workers take
# over tests of busy ones (worksteal): files differ too much in length to be handed out whole.
JOBS ?= auto
pytest: $(STAMP)
	@echo "running the tests"
	@$(BIN)/pytest --quiet -n $(JOBS) --dist worksteal

quick: $(STAMP)
	@echo "running the quick tests"
	@$(BIN)/pytest --quiet -n $(JOBS) --dist worksteal -m 'not slow'

# Needs cmake and a C++20 compiler, no Python. Rounds for two minutes on two slow cores, the builds included.
sanitize:  ## C++ tests under the address, undefined behaviour and thread sanitizers
	@mkdir -p build
	@for kinds in address,undefined thread; do \
	  echo "building the C++ tests for the sanitizers: $$kinds"; \
	  build=build/sanitize-$${kinds%%,*}; \
	  cmake -S . -B $$build -DBITNET_TESTS=ON -DBITNET_SANITIZE=$$kinds >$$build.log 2>&1 \
	    && cmake --build $$build --parallel 2 >>$$build.log 2>&1 || { cat $$build.log; exit 1; }; \
	  case $$kinds in thread) products=8 forward=1;; *) products=60 forward=4;; esac; \
	  $$build/products $$products; \
	  $$build/forward $$forward; \
	done

# The bar is a million inputs; FUZZ=20000 for a quick look.
FUZZ ?= 1000000
fuzz: $(STAMP)  ## mutated files against every reader of files
	@$(BIN)/python benchmarks/fuzz.py --inputs $(FUZZ)

# At most ten minutes; KILLS=20 for a quick look.
KILLS ?= 200
reliability: $(STAMP)  ## kill -9, full disk, read-only folder, two writers: what a run survives, counted
	@$(BIN)/python benchmarks/reliability.py --kills $(KILLS)

# Made again when a dependency or a pin changes; a change of source needs nothing, the install is editable.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null \
	  || { echo "error: no '$(PYTHON)' found; bitnet needs Python 3.11 or newer (make PYTHON=/path/to/python ...)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: bitnet needs Python 3.11 or newer, got $$($(PYTHON) --version 2>&1); try: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "error: $(PYTHON) lacks the venv module; on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "installing into .venv (first time: a minute or two, longer if pip has to fetch a CUDA build of torch)"
	@$(PYTHON) -m venv .venv
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[test]'
	@touch $@

clean:  ## remove .venv, caches and build output
	@rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find bitnet kernels train tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
