# Enginesmith. `make help` lists the targets.
#
# A target that needs the environment makes it in .venv when it is missing or older than the
# files that define it. PYTHON=python3 makes every target use that interpreter and install nothing.

MODEL ?= smollm2
ARGS ?=

ifdef PYTHON
RUN := $(PYTHON)
READY :=
else
RUN := .venv/bin/python
READY := .venv/ready
endif

.DEFAULT_GOAL := help
.PHONY: help engine plan test test-all test-gpu check format setup clean clean-cache

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

engine: $(READY) ## build, check and publish: make engine MODEL=smollm2 ARGS="compiler.max_batch_size=16"
	@$(RUN) -m pipeline.cli build $(MODEL) $(ARGS)

plan: $(READY) ## show size, fit and ceilings of a recipe, downloading nothing
	@$(RUN) -m pipeline.cli plan $(MODEL) $(ARGS)

test: $(READY) ## unit and contract tests: no network, no GPU, no services, under 5 minutes
	$(RUN) -m pytest -q -n 2 -m "not slow and not gpu" $(ARGS)

test-all: $(READY) check ## all tests: the main job on real weights, real compilers
	$(RUN) -m pytest -q -n 2 -m "not slow and not gpu" $(ARGS)
	$(RUN) -m pytest -q -m "slow and not gpu" $(ARGS)

test-gpu: $(READY) ## on a machine with a CUDA device: a missing one is a failure
	$(RUN) -m pytest -q -m gpu tests/gpu $(ARGS)

check: $(READY) ## lint, format and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(READY) ## format the code
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

setup: $(READY) ## only make the environment

.venv/ready: pyproject.toml requirements.lock requirements-nodeps.txt
	python3 -m venv --clear .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-nodeps.txt
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

clean: ## remove the environment and the records of runs; packages and the cache stay
	rm -rf .venv artifacts/.runs .mypy_cache .ruff_cache .pytest_cache build enginesmith.egg-info

clean-cache: ## remove downloaded weights and finished stages
	@$(if $(ENGINESMITH_CACHE),rm -rf "$(ENGINESMITH_CACHE)",rm -rf "$(HOME)/.cache/enginesmith")
