# Enginesmith. `make help` lists the targets.
#
# A target that needs the environment makes it in .venv when it is missing or older than the
# files that define it. PYTHON=python3 makes every target use that interpreter and install nothing.

MODEL ?= smollm2
ARGS ?=
BASE ?=
IMAGE ?= enginesmith-build:1.2.1
CLIENT_IMAGE ?= enginesmith-client

ifdef PYTHON
RUN := $(PYTHON)
READY :=
RUN_PINNED := $(PYTHON)
READY_PINNED :=
else
RUN := .venv/bin/python
READY := .venv/ready
# The packages of the build image, as far as a CPU can have them.
RUN_PINNED := .venv-image/bin/python
READY_PINNED := .venv-image/ready
endif

.DEFAULT_GOAL := help
.PHONY: help engine plan rehearse test test-all test-image-pins test-hostile test-soak test-gpu bench-registry check format record-stages setup image image-client clean clean-cache

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

engine: $(READY) ## build, check and publish: make engine MODEL=smollm2 ARGS="compiler.max_batch_size=16"
	@$(RUN) -m pipeline.cli build $(MODEL) $(ARGS)

plan: $(READY) ## show size, fit and ceilings of a recipe, downloading nothing
	@$(RUN) -m pipeline.cli plan $(MODEL) $(ARGS)

rehearse: $(READY) ## the whole line of a recipe on a tiny random model, in every format
	@$(RUN) -m pipeline.cli rehearse $(MODEL) $(ARGS)

QUICK = not slow and not gpu and not services and not product
# Tiny models gain nothing from more threads, and beside each other they wait for them.
test: $(READY) ## unit and contract tests: no network, no GPU, no services, under 4 minutes
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist worksteal -m "$(QUICK)" $(ARGS)

# Three workers: half of these tests wait for deadlines and for a Docker engine.
test-all: check test test-image-pins ## all tests: the main job on real weights, real compilers
	$(RUN) -m pytest -q -n 3 --dist loadscope -m "(slow or services) and not gpu and not product" \
	    --ignore tests/image/test_rehearsal_formats.py $(ARGS)

test-image-pins: $(READY_PINNED) ## quantize, convert and rehearse under the build image's packages
	OMP_NUM_THREADS=1 $(RUN_PINNED) -m pytest -q -n 2 -m "$(QUICK)" \
	    tests/model/test_hf.py tests/quant tests/formats/decoder tests/rehearse $(ARGS)
	OMP_NUM_THREADS=1 $(RUN_PINNED) -m pytest -q -n 2 tests/image/test_rehearsal_formats.py $(ARGS)

test-hostile: $(READY) ## of `make test` the seeded attacks on stores, servers, machines and caches
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist worksteal \
	    -m "$(QUICK)" tests/hostile $(ARGS)

test-soak: $(READY) ## every configuration; publish and pull killed at 50 moments; thousands of hostile cases
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 -m "product and not gpu" tests $(ARGS)
	ENGINESMITH_SOAK_POINTS=50 $(RUN) -m pytest -q -k kill \
	    tests/registry/stores tests/registry/client $(ARGS)
	ENGINESMITH_HOSTILE_CASES=100 OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist worksteal \
	    -m "not gpu" tests/hostile $(ARGS)

bench-registry: $(READY) ## registries against boto3, oras, cp and sha256sum, 1 GB, side by side
	$(RUN) -m tests.benchmarks.registry $(ARGS)

test-gpu: $(READY) ## on a machine with a CUDA device: a missing one is a failure
	$(RUN) -m pytest -q -m gpu tests/gpu $(ARGS)

check: $(READY) ## lint, format and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

record-stages: $(READY) ## after an edit of a stage: record versions and code (pipeline/core/stages.yaml)
	$(RUN) -m tests.record_stages

format: $(READY) ## format the code
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

setup: $(READY) ## only make the environment

image: ## build the build image: make image BASE=<TensorRT-LLM image> IMAGE=<name>
	docker build --file Dockerfile.build --tag $(IMAGE) $(if $(BASE),--build-arg BASE=$(BASE)) \
	    --build-arg REVISION=$(shell git rev-parse HEAD 2>/dev/null || echo unknown) $(ARGS) .

image-client: ## build the pull image: make image-client CLIENT_IMAGE=<name> BASE=<Python image>
	docker build --file Dockerfile.client --tag $(CLIENT_IMAGE) $(if $(BASE),--build-arg BASE=$(BASE)) \
	    --build-arg REVISION=$(shell git rev-parse HEAD 2>/dev/null || echo unknown) $(ARGS) .

.venv/ready: pyproject.toml requirements.lock requirements-nodeps.txt
	python3 -m venv --clear .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-nodeps.txt
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

.venv-image/ready: pyproject.toml requirements-image.lock
	python3 -m venv --clear .venv-image
	.venv-image/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-image.lock
	.venv-image/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

clean: ## remove the environment and the records of runs; packages and the cache stay
	rm -rf .venv .venv-image artifacts/.runs .mypy_cache .ruff_cache .pytest_cache build enginesmith.egg-info

clean-cache: ## remove downloaded weights and finished stages
	@$(if $(ENGINESMITH_CACHE),rm -rf "$(ENGINESMITH_CACHE)",rm -rf "$(HOME)/.cache/enginesmith")
