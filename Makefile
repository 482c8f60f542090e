# make demo    train a small Mamba-2 on Python's documentation and let it write, in four minutes on two cores
# make test    the whole suite
# make lint    style and types
#
# Each sets up .venv first, once. It takes Python 3.10 or newer: make PYTHON=python3.12 demo

PYTHON ?= python3
# Left to itself, pip on Linux takes the newest PyTorch with gigabytes of CUDA. PyTorch's own CPU build:
#   make TORCH='torch --index-url https://download.pytorch.org/whl/cpu' demo
TORCH ?= torch==2.13.0
WORKERS ?= 2

BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test lint

demo: $(READY)
	@$(BIN)/python examples/demo.py

# One thread a worker: threads of two workers that wait for each other on two cores lose most of their time.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Ophis needs Python 3.10 or newer, not " + sys.version)'
	@echo "Installing into .venv, which takes some minutes, once"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq $(TORCH)
	$(BIN)/python -m pip install -qq --editable '.[dev]'
	@touch $@
