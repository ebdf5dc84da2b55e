# Two commands a newcomer needs: `make demo` and `make test`. Both make their own environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
# torch first and alone: asked for by another package it may bring gigabytes of CUDA along.
TORCH ?= torch==2.13.0

MODEL := tests/fixtures/digit-reader
DEMO := demo
KEEP ?= 0.25
DIR ?= build/bench
LAYERS ?= 28
CHECK ?= all

.PHONY: help setup demo test lint format types unit bench-accuracy bench-score bench-prefill bench-export fixture clean

help:  ## What there is.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(STAMP)  ## Make the environment in .venv.

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH) -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[export,dev]' -c constraints.txt
	@touch $@

demo: $(STAMP)  ## Build the shipped model pruned and ask it about a picture.
	@$(BIN)/python tests/demo.py --model $(MODEL) --keep $(KEEP) --out $(DEMO)

test: lint types unit  ## Everything CI asserts.

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

unit: $(STAMP)
	$(BIN)/python -m pytest -q

format: $(STAMP)  ## Format the code.
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

bench-accuracy: $(STAMP)  ## Shipped model, held-out questions: full, recommended policy, paper's policy.
	PYTHONPATH=tests/fixtures $(BIN)/python tests/bench/bench_accuracy.py

bench-score: $(STAMP)  ## Entropy scores: primal and dual eigenvalues against the ONNX body.
	$(BIN)/python tests/bench/bench_score.py

bench-prefill: $(STAMP)  ## Measured prefill speed-up against the FLOPs model.
	$(BIN)/python tests/bench/bench_prefill.py

bench-export: $(STAMP)  ## Build a 7B-shape checkpoint: DIR=build/bench LAYERS=28 (or 4).
	$(BIN)/python tests/bench/bench_export.py $(DIR) --layers $(LAYERS) --check $(CHECK)

fixture: $(STAMP)  ## Train the shipped model again (over an hour on two cores).
	$(BIN)/python tests/fixtures/train_digit_reader.py --out $(MODEL)

clean:  ## Remove what the targets above made, but not the environment.
	rm -rf build $(DEMO) dist *.egg-info
