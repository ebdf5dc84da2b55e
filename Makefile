# Two commands a newcomer needs: `make demo` and `make test`. Both make their own environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
# First and alone, so that it can be another build: where yours brings gigabytes of CUDA along, PyTorch's own index of
# CPU wheels has one without: make setup TORCH='torch==2.13.0 --index-url ...'
TORCH ?= torch==2.13.0

MODEL := tests/fixtures/digit-reader
DEMO := demo
KEEP ?= 0.25
DIR ?= build/bench
LAYERS ?= 28
CHECK ?= all
WEIGHTS ?= none
CPP := $(wildcard plugins/entropy_prune/*.h plugins/entropy_prune/*.c* plugins/entropy_prune/tests/*.h \
  plugins/entropy_prune/tests/*.c*)
# Tiny models are slower on many threads than on one.
export OMP_NUM_THREADS ?= 1

.PHONY: help setup demo test lint format types unit plugin plugin-jetson test-plugin test-bridges test-ray docs test-docs test-pythons attack engines \
  sweep why \
  bench-accuracy bench-score bench-plan bench-prefill bench-vision bench-decode bench-export bench-weights bench-families bench-engines bench-serve \
  bench-executors \
  fixture fixture-finder clean

help:  ## What there is.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(STAMP)  ## Make the environment in .venv.

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH) -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[cpu,export,dev]' -c constraints.txt
	@touch $@

demo: $(STAMP)  ## Build the shipped model pruned and ask it about a picture.
	@$(BIN)/python tests/demo.py --model $(MODEL) --keep $(KEEP) --out $(DEMO)

test: lint types unit  ## Everything CI asserts.

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)

types: $(STAMP)
	$(BIN)/mypy

# One process a core, whole files to a process: what a file's tests share is made once.
unit: $(STAMP)
	$(BIN)/python -m pytest -q -n auto --dist loadfile

# The plugin: TensorRT's headers and the Jetson's CUDA runtime come from hash-pinned packages, nvcc from CUDA or
# NVIDIA's packages. Without the cross compiler (g++-aarch64-linux-gnu) the Jetson build is left out.
HASHED := install --quiet --disable-pip-version-check --no-deps --require-hashes -r
AARCH64 := build/plugin/aarch64

plugin: $(STAMP)  ## Build the TensorRT plugin (x86-64, and Jetson where the cross compiler is).
	$(BIN)/python -m pip $(HASHED) plugins/requirements.txt
	$(BIN)/ep-export plugin build --preset ci --out build/plugin/ci
	@if command -v aarch64-linux-gnu-g++ >/dev/null; then $(MAKE) --no-print-directory plugin-jetson; \
	else echo "no aarch64-linux-gnu-g++: the Jetson build is left out"; fi

plugin-jetson: $(STAMP)
	$(BIN)/python -m pip $(HASHED) plugins/requirements-aarch64.txt --target $(AARCH64) --upgrade \
	  --platform manylinux2014_aarch64 --only-binary=:all:
	CUDART_STATIC=$(CURDIR)/$(AARCH64)/nvidia/cu13/lib/libcudart_static.a \
	  $(BIN)/ep-export plugin build --preset jetson --out build/plugin/jetson

test-plugin: plugin  ## Test the plugin without a GPU.
	$(BIN)/python -m pip $(HASHED) plugins/requirements-test.txt
	$(BIN)/python -m pytest -q tests/plugins

# TensorRT-RTX compiles without a GPU; its packages take a quarter of a gigabyte, so they are asked for apart.
RTX := $(VENV)/.rtx
$(RTX): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[rtx]' -c constraints.txt
	@touch $@

engines: $(RTX)  ## Compile the shipped model for two GPUs, without one.
	$(BIN)/python tests/bench/bench_engines.py small

# What cannot be a dependency of a test environment: lmms-eval wants torchvision and the judges of every task,
# tritonclient an older ml_dtypes. The parts that are needed of them are installed aside.
ASIDE := build/bridges
test-bridges: $(STAMP)  ## Test with lmms-eval itself, and with Triton's own schema.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(ASIDE) \
	  -r tests/bridges.txt
	PYTHONPATH=$(ASIDE) $(BIN)/python -m pytest -q tests/harness tests/package/test_triton.py

DOCS := $(VENV)/.docs
$(DOCS): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs,serve]' -c constraints.txt
	@touch $@

docs: $(DOCS)  ## Build the documentation into build/docs; a warning is an error.
	$(BIN)/sphinx-build -W --keep-going -q -b html docs build/docs
	@echo build/docs/index.html

# Ray and accelerate are extras of people who have many machines or GPUs; their tests skip without them.
RAY := $(VENV)/.ray
$(RAY): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[ray,accelerate]' -c constraints.txt
	@touch $@

test-docs: $(RAY)  ## Follow README and docs word by word, from a wheel, in environments of their own.
	$(BIN)/python tests/docs/follow_docs.py

$(DEMO)/bundle/manifest.json:
	@$(MAKE) --no-print-directory demo

test-pythons: $(STAMP) $(DEMO)/bundle/manifest.json  ## What a Jetson does, under every other Python that can be had.
	$(BIN)/python tests/docs/other_pythons.py $(DEMO)/bundle $(DEMO)/unseen/test-0-0000.png "List the digits."

test-ray: $(RAY)  ## Measure on a Ray cluster of two nodes here, one of which is killed; spread a model.
	$(BIN)/python -m pytest -q tests/measure/test_on_ray.py tests/reference/test_spread_model.py

ATTACK_CASES ?= 10
INTERRUPTIONS ?= 20
attack: $(STAMP)  ## The attack suite at length: ten times the cases, every verb ended at 60 moments (hours).
	ATTACK_CASES=$(ATTACK_CASES) INTERRUPTIONS=$(INTERRUPTIONS) $(BIN)/python -m pytest -q -n auto --dist loadfile \
	  tests/attack tests/interruption

format: $(STAMP)  ## Format the code.
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench-accuracy: $(STAMP)  ## Shipped model, held-out questions: full, recommended policy, paper's policy.
	PYTHONPATH=tests/fixtures $(BIN)/python tests/bench/bench_accuracy.py

SWEEP := build/sweep
QUESTIONS ?= 510
KINDS ?= reading
sweep: $(STAMP)  ## Compare ways of pruning a trained model on held-out questions (20 minutes): MODEL=... KINDS=looking-up.
	$(BIN)/python tests/fixtures/digit_scenes.py $(SWEEP)/calibration --count 48 --kinds $(KINDS)
	$(BIN)/python tests/fixtures/digit_scenes.py $(SWEEP)/held-out --answers --split test --seed 2 \
	  --count $(QUESTIONS) --kinds $(KINDS)
	$(BIN)/ep-export sweep --model $(MODEL) --images $(SWEEP)/held-out --prompts $(SWEEP)/held-out/prompts.json \
	  --keep 0.5 --keep 0.25 --keep 0.125 --calibration-images $(SWEEP)/calibration \
	  --calibration-prompts $(SWEEP)/calibration/prompts.json --jobs 2 --out $(SWEEP)/report --overwrite

why: $(STAMP)  ## Which tokens each score keeps on the shipped model, and what that costs.
	PYTHONPATH=tests/fixtures $(BIN)/python tests/bench/why_direction.py

bench-score: $(STAMP)  ## Entropy scores: primal and dual eigenvalues against the ONNX body.
	env -u OMP_NUM_THREADS $(BIN)/python tests/bench/bench_score.py

bench-plan: $(STAMP)  ## Tables for people: what fits which Jetson, time to first token (estimates).
	$(BIN)/python tests/bench/bench_plan.py

bench-prefill: $(STAMP)  ## Measured prefill speed-up against the FLOPs model.
	env -u OMP_NUM_THREADS $(BIN)/python tests/bench/bench_prefill.py

bench-vision: $(STAMP)  ## The vision encoder in every dialect, and where its time goes.
	env -u OMP_NUM_THREADS $(BIN)/python tests/bench/bench_vision.py

SERVING := build/transformers-serving
bench-serve: $(STAMP)  ## Many requests at once, here and over HTTP: tokens a second, time to first token, hostile clients.
	env -u OMP_NUM_THREADS $(BIN)/python tests/bench/bench_serve.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(SERVING) \
	  fastapi==0.165.0 opentelemetry-api==1.45.2 torchvision==0.28.0
	env -u OMP_NUM_THREADS $(BIN)/python tests/bench/bench_serve_http.py --aside $(SERVING)

GENAI := build/genai
bench-decode: $(STAMP)  ## Decode and prefill against onnxruntime-genai's graphs, installed aside.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(GENAI) \
	  onnxruntime-genai==0.18.0
	env -u OMP_NUM_THREADS $(BIN)/python tests/bench/bench_decode.py $(GENAI)

bench-export: $(STAMP)  ## Build a 7B-shape checkpoint: DIR=build/bench LAYERS=28 (or 4) WEIGHTS=none (or int4).
	env -u OMP_NUM_THREADS $(BIN)/python tests/bench/bench_export.py $(DIR) --layers $(LAYERS) --check $(CHECK) \
	  --weights $(WEIGHTS)

bench-executors: $(RAY)  ## What measuring costs a question besides itself: here, in processes, on Ray.
	$(BIN)/python tests/bench/bench_executors.py

bench-weights: $(STAMP)  ## Shipped model in 32, 8 and 4 bits: exact answers, KL, size, memory, speed.
	PYTHONPATH=tests/fixtures $(BIN)/python tests/bench/bench_weights.py

bench-families: $(STAMP)  ## Export 4 layers of every family's full size, weights as holes in files.
	env -u OMP_NUM_THREADS $(BIN)/python tests/bench/bench_export.py $(DIR) --model families --layers 4 \
	  --check memory --sparse

bench-engines: $(RTX)  ## Compile 2 full-size layers of two 7B models, without a GPU (2 GB of disk, 6 GB of memory).
	$(BIN)/python tests/bench/bench_engines.py full --dir $(DIR) --weights $(WEIGHTS)

fixture: $(STAMP)  ## Train the shipped model again (over an hour on two cores).
	$(BIN)/python tests/fixtures/train_digit_reader.py --out $(MODEL)

FINDER := tests/fixtures/digit-finder
fixture-finder: $(STAMP)  ## Train the second model from the first (an hour and a half on one core).
	$(BIN)/python tests/fixtures/train_digit_reader.py --recipe looking-up --from $(MODEL) --rate 1e-3 --threads 1 \
	  --out $(FINDER)

clean:  ## Remove what the targets above made, but not the environment.
	rm -rf build $(DEMO) dist *.egg-info
