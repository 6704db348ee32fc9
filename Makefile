# The verbs of this project. `make quickstart` and `make test` need nothing before them but Python >= 3.11.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(shell command -v $(p) 2>/dev/null)))
BIN := .venv/bin
STAMP := .venv/.farspan-installed

.PHONY: help setup check test test-gpu soak bench docs quickstart lock clean

help:
	@echo "make quickstart   make the environment and run the main job: data, training, serving, report"
	@echo "make test         make the environment and run the tests"
	@echo "make setup        make the environment (.venv) only"
	@echo "make check        format, lint, types, import rules, layout"
	@echo "make bench        benchmarks on this machine"
	@echo "make docs         build the documentation site into site/"
	@echo "make test-gpu     tests that need a CUDA device"
	@echo "make soak         long endurance tests"
	@echo "make lock         write requirements.lock from this environment"

setup: $(STAMP)

$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "farspan needs Python >= 3.11, found " + sys.version.split()[0])'
	@echo "==> making the environment in .venv (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[dev]'
	@touch $@
	@echo "==> environment ready"

check: setup
	@echo "==> format and lint"; $(BIN)/ruff format --check . && $(BIN)/ruff check .
	@echo "==> types"; $(BIN)/mypy
	@echo "==> import rules"; $(BIN)/lint-imports
	@echo "==> layout"; $(BIN)/python -m pytest -q tests/layout

test: setup
	@echo "==> tests"; $(BIN)/python -m pytest

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

soak: setup
	$(BIN)/python -m pytest -m soak --timeout 3600

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
