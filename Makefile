# `make demo` and `make test` work in a fresh clone. PYTHON=python3.12 chooses another interpreter.

PYTHON ?= python3
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -ec
.DELETE_ON_ERROR:
.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help demo test check install format lint types pytest quick sanitize fuzz clean reliability

BIN := .venv/bin
STAMP := .venv/.installed

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

# DEMO="--steps 40" takes a minute or two: the same steps with a model that is trained less.
demo: $(STAMP)  ## train a small ternary model, pack it and generate with it: about four minutes
	@$(BIN)/python -m bitnet.cli.demo $(DEMO)

test: $(STAMP) lint types pytest  ## check format, lint and types, and run every test

check: $(STAMP) lint types quick  ## check format, lint and types, and run the quick tests: two minutes

install: $(STAMP)  ## create the virtual environment .venv with the project in it (editable)

format: $(STAMP)  ## format the sources
	@$(BIN)/ruff check --quiet --fix-only
	@$(BIN)/ruff format --quiet

lint: $(STAMP)  ## check format and lint without changing anything
	@echo "checking format and lint"
	@$(BIN)/ruff format --check --quiet --output-format concise || { echo "run make format to fix this"; exit 1; }
	@$(BIN)/ruff check --quiet --output-format concise

# In the checkout kernels/, train/ and benchmarks/ are next to bitnet/; installed, they are inside it. Links in build/types
# give mypy the installed layout, and sed turns the paths in its messages back into those of the checkout.
types: $(STAMP)  ## check types
	@echo "checking types"
	@rm -rf build/types && mkdir -p build/types/bitnet/benchmarks
	@cd build/types/bitnet && ln -s ../../../bitnet/* ../../../kernels ../../../train .
	@cd build/types/bitnet/benchmarks && ln -s ../../../../benchmarks/*/ . && rm -f results specs __pycache__
	@cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache \
	  --no-error-summary -p bitnet | sed -E 's,^bitnet/(kernels|train|benchmarks)/,\1/,'

# On all cores that this process may use (tests/conftest.py counts them); JOBS=0 runs everything in one process. Idle
# workers take tests from busy ones (worksteal), since test files differ much in duration.
JOBS ?= auto
pytest: $(STAMP)
	@echo "running the tests"
	@$(BIN)/pytest --quiet -n $(JOBS) --dist worksteal

quick: $(STAMP)
	@echo "running the quick tests"
	@$(BIN)/pytest --quiet -n $(JOBS) --dist worksteal -m 'not slow'

# Needs cmake and a C++20 compiler, but no Python. Takes two minutes on two slow cores, including the builds.
sanitize:  ## run the C++ tests under the address, undefined behaviour and thread sanitizers
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

# The target is a million inputs; FUZZ=20000 for a quick run.
FUZZ ?= 1000000
fuzz: $(STAMP)  ## feed mutated files to every reader of files
	@$(BIN)/python benchmarks/fuzz.py --inputs $(FUZZ)

# Takes up to ten minutes; KILLS=20 for a quick run.
KILLS ?= 200
reliability: $(STAMP)  ## count what a training run survives: kill -9, full disk, read-only folder, two writers
	@$(BIN)/python benchmarks/reliability.py --kills $(KILLS)

# Repeated when a dependency or a pin changes; sources may change, since the install is editable.
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
