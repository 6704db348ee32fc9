# The verbs of this project. `make quickstart` and `make test` need nothing before them but Python >= 3.11.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
# The first Python that is new enough; where none is, `setup` says what it found.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done; true)
BIN := .venv/bin
STAMP := .venv/.farspan-installed
LONG := 'long and not gpu and not soak'

.PHONY: help setup check test test-long test-gpu soak launch bench docs quickstart lock clean

help:
	@echo "make quickstart   make the environment and run the main job: data, training, serving, report"
	@echo "make test         make the environment and run the tests"
	@echo "make test-long    tests that take minutes each: drivers killed, nodes lost, quickstart"
	@echo "make setup        make the environment (.venv) only"
	@echo "make check        format, lint, types, import rules, layout"
	@echo "make bench        benchmarks on this machine"
	@echo "make docs         build the documentation site into site/"
	@echo "make test-gpu     tests that need a CUDA device"
	@echo "make soak         long endurance tests"
	@echo "make launch       clusters to their end: ray up on a mocked EC2, the README's six commands"
	@echo "make lock         write requirements.lock from this environment"

setup: $(STAMP)

$(STAMP): pyproject.toml requirements.lock
	@test -n "$(PYTHON)" || { echo "farspan needs Python >= 3.11, found $$(python3 --version 2>&1); install one or say make PYTHON=..."; exit 1; }
	@echo "==> making the environment in .venv (a few minutes the first time)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[dev]'
	@touch $@
	@echo "==> environment ready"

check: setup
	@echo "==> format and lint"; $(BIN)/ruff format --check . && $(BIN)/ruff check .
	@echo "==> types"; $(BIN)/mypy
	@echo "==> import rules"; $(BIN)/lint-imports
	@echo "==> layout"; $(BIN)/python -m pytest -q tests/layout
	@echo "==> every test can be collected"; $(BIN)/python -m pytest -q --collect-only -m "" tests > .venv/collected || { tail -30 .venv/collected; exit 1; }

test: setup
	@echo "==> tests of one process"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests/layout tests/unit tests/kernels tests/infra
	@echo "==> tests of several processes; those with Ray one after another, beside the others"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests/distributed tests/cluster tests/end_to_end

test-long: setup
	@echo "==> tests that take minutes each"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m $(LONG) tests/unit tests/kernels tests/distributed \
		tests/cluster tests/end_to_end

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

soak: setup
	$(BIN)/python -m pytest -m soak --timeout 3600

launch: setup
	$(BIN)/python -m pytest -m soak --timeout 1200 tests/infra/test_ray_up.py tests/end_to_end/test_stranger.py

bench: setup
	$(BIN)/farspan bench all

docs: setup
	$(BIN)/python docs/reference.py && $(BIN)/mkdocs build --strict --quiet

quickstart: setup
	@exec $(BIN)/farspan quickstart

lock: setup
	@$(BIN)/python -m pip freeze --exclude-editable | sed -e 's/+cpu$$//' | grep -viE '^nvidia|^cuda' > requirements.lock

clean:
	rm -rf .venv site dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
