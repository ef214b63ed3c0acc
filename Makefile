# Run `make` or `make help` for what there is. Variables: PYTHON (3.10-3.12), VENV, MODEL, DATA, OUTPUT, PYTEST_ARGS.
SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV ?= .venv
OUTPUT ?= outputs/demo
MODEL ?=
DATA ?=
PYTEST_ARGS ?=
# One thread per process: the distributed tests run up to four gloo ranks, which would fight over the cores.
OMP_NUM_THREADS ?= 1
BIN := $(VENV)/bin
CHECKED := spikingbrain_train tools tests benchmarks $(wildcard train.py)

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: environment
environment: ## Create or refresh .venv (every target below does it by itself)
	@PYTHON="$(PYTHON)" scripts/setup_environment.sh "$(VENV)"

.PHONY: demo
demo: environment ## Dense model to exported hybrid on real text (MODEL=folder DATA=file OUTPUT=folder)
	@$(BIN)/python tools/demo.py --output "$(OUTPUT)" $(if $(MODEL),--model "$(MODEL)") $(if $(DATA),--data "$(DATA)")

.PHONY: test
test: environment ## Run the whole test suite
	@OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(BIN)/python -m pytest $(PYTEST_ARGS)

.PHONY: test-fast
test-fast: environment ## Run the tests that take seconds
	@OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

.PHONY: test-matrix
test-matrix: ## Run the suite on every supported Python and megatron-core that this machine can install
	@scripts/test_matrix.sh

.PHONY: lint
lint: environment ## Check style: ruff's rules and formatting
	@$(BIN)/ruff check $(CHECKED)
	@$(BIN)/ruff format --check $(CHECKED)

.PHONY: typecheck
typecheck: environment ## Check types with mypy
	@$(BIN)/mypy

.PHONY: format
format: environment ## Rewrite the code in the project's style
	@$(BIN)/ruff check --fix $(CHECKED)
	@$(BIN)/ruff format $(CHECKED)

.PHONY: clean
clean: ## Remove the environment and caches; outputs/ stays
	rm -rf "$(VENV)" .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info build
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
