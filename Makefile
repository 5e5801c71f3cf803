# Every target sets up what it needs first: .venv with the best Python found, installed once (tools/setup).
SHELL := /bin/bash
export PYTHON
# for `make train`: the run, and more settings such as ARGS="--train.steps 100"
CONFIG ?= configs/gpt_tiny.yaml
ARGS ?=
# how the suite is shared out: a file stays in one process, where its compiled steps are
PARALLEL ?= -n auto --maxprocesses 4 --dist loadfile
# the short lane on the oldest JAX
OLDEST := 0.10.2
OLDEST_TESTS ?= tests/test_config.py tests/train/test_mesh_equivalence.py tests/pipeline/test_executor.py
# for `make gpu`: the CUDA that the driver can run, cuda12 or cuda13; with cuda12 our kernels do not compile, for JAX 0.11
# writes PTX that only CUDA 13's ptxas reads
CUDA ?= cuda13
# and a machine without a registry: a folder that `make wheels` made elsewhere; WHEELS= asks the registry all the same
WHEELS ?= $(patsubst %/python,%,$(wildcard wheels/python))

.PHONY: help train test test-all test-quarter test-oldest check fuzz soak grid audit gpu wheels docs clean

help: ## this list
	@awk -F ': .*## ' '/^[a-z-]+: .*## /{printf "  make %-14s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

train: ## train a small GPT on Python's own source (ARGS="--train.steps 100", CONFIG=...)
	@tools/setup .venv
	@.venv/bin/python -m jaxtron.train $(CONFIG) $(ARGS)

test: ## the test suite (ARGS="-k mesh")
	@tools/setup .venv test
	@.venv/bin/python -m pytest -q $(PARALLEL) $(ARGS)

test-all: ## also all of the slow tests
	@tools/setup .venv test
	@.venv/bin/python -m pytest -q $(PARALLEL) -m 'not gpu' $(ARGS)

test-quarter: ## one of the four parts of the slow tests (QUARTER=0, 1, 2 or 3)
	$(if $(filter 0 1 2 3,$(QUARTER)),,$(error say which quarter of the slow tests: make test-quarter QUARTER=0, 1, 2 or 3))
	@tools/setup .venv test
	@.venv/bin/python -m pytest -q $(PARALLEL) -m 'slow and not gpu' --quarter $(QUARTER) $(ARGS)

test-oldest: ## a short part of the suite on the oldest JAX (OLDEST_TESTS="tests/train")
	@PYTHONS="3.11 3.12 3.13" tools/setup .venv-oldest test jax==$(OLDEST) jaxlib==$(OLDEST) jax-cuda12-plugin==$(OLDEST)
	@.venv-oldest/bin/python -m pytest -q $(PARALLEL) $(OLDEST_TESTS) $(ARGS)

check: ## format, lint, types, then the suite
	@tools/setup .venv dev
	@.venv/bin/ruff format --check --quiet .
	@.venv/bin/ruff check --quiet .
	@.venv/bin/pyright
	@.venv/bin/python -m pytest -q $(PARALLEL) $(ARGS)

fuzz: ## damaged inputs by the thousand, each refused in a line (ARGS="--cases 1000 --seed 3")
	@tools/setup .venv test
	@.venv/bin/python -m tests.faults fuzz $(ARGS)

soak: ## runs that are killed by the thousand and end as undisturbed ones (ARGS="--minutes 10")
	@tools/setup .venv test
	@.venv/bin/python -m tests.faults soak $(ARGS)

grid: ## generated layouts of every family, each equal to one device (ARGS="--minutes 10"; goes on with its log)
	@tools/setup .venv test
	@.venv/bin/python -m tests.faults grid $(ARGS)

audit: ## known weaknesses of the installed packages, by a list and, where there is a network, by pip-audit
	@tools/setup .venv test
	@tools/audit .venv/bin/python

gpu: ## test the kernels and benchmark on this machine's NVIDIA GPUs (CUDA=cuda12, ARGS="--minutes 30")
ifeq ($(WHEELS),)
	@tools/setup .venv $(CUDA) pytest pytest-xdist beartype
	@.venv/bin/python -m benchmarks.gpu $(ARGS)
else
	@WHEELS=$(WHEELS) tools/setup .venv-offline "" pytest pytest-xdist beartype
	@WHEELS=$(WHEELS) .venv-offline/bin/python -m benchmarks.gpu $(ARGS)
endif

wheels: ## for `make gpu` on a machine without a registry: what that one lacks (ARGS="--python 3.11 --there list.txt")
	@tools/setup .venv
	@.venv/bin/python tools/wheels $(ARGS)

docs: ## build the documentation site in build/site; a warning is an error
	@tools/docs

clean: ## remove the environments and caches (runs/ stays)
	@rm -rf .venv .venv-oldest .venv-offline .venv-docs .venv-audit build ./*.egg-info .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
