# Every target builds .venv first; nothing happens when it is up to date.

PYTHON ?= python3
UV_VERSION := 0.13.9
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format bench train-demo lock clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: $(STAMP)  ## build .venv with the pinned packages

# Bytecode at once: where PYTHONDONTWRITEBYTECODE is set, as in many containers, each command would compile torch anew.
$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "steadyflow needs Python 3.11 or newer; make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraints requirements.lock \
		--editable '.[dev,bench]'
	@touch $@

demo: setup  ## sample the embedded checkpoint with three samplers, score it, save the picture
	$(BIN)/python scripts/demo.py

test: setup  ## the whole test suite (< 10 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: setup  ## ruff, formatting, types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: setup  ## apply what lint would complain about
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: setup  ## cost of a sampling step outside the network, beside diffusers
	$(BIN)/python scripts/bench/run.py

train-demo: setup  ## retrain the embedded checkpoints from scratch (<= 45 minutes on 2 cores)
	$(BIN)/python scripts/train_demo.py

lock: setup  ## resolve requirements.lock anew
	printf 'torch==2.12.1\ntorchvision==0.27.1\n' | $(BIN)/uv pip compile --quiet --universal --python-version 3.11 \
		--generate-hashes --no-emit-index-url --no-header --all-extras --upgrade --constraints /dev/stdin \
		pyproject.toml --output-file requirements.lock

clean:  ## remove .venv and the caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache dist
