# Each target sets up what it needs by itself, in .venv; python3.11 with venv and pip is enough.
#   make predict [INPUTS=dir] [OUTPUTS=dir]   segment a folder of cases (the sample by default)
#   make test                                 linters, types, import contracts, tests
#   make lint                                 all of that but the tests
#   make bench                                every benchmark, tables and CSV
#   make evaluate CASES=dir [OUT=dir]         score a folder of labelled cases
#   make image | export                       build the container image | save it as tar.gz
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON  ?= $(shell command -v python3.11 || echo python3)
VENV    ?= .venv
INPUTS  ?= tests/data
OUTPUTS ?= outputs
OUT     ?= runs/evaluation
IMAGE   ?= sammed3d:latest
ARCHIVE ?= sammed3d.tar.gz

python := $(VENV)/bin/python
pip := $(python) -m pip install --quiet --disable-pip-version-check
runtime := $(VENV)/.runtime
training := $(VENV)/.training
tests := $(VENV)/.tests

.PHONY: help predict test lint bench evaluate image export

help:
	@sed -n 's/^#   //p' Makefile

# A stamp a set of requirements: newer than the file it was installed from, or installed again.
$(runtime): requirements.txt
	@echo "setting up $(VENV) (once; a minute or two)"
	@$(PYTHON) -m venv $(VENV)
	@$(pip) -r requirements.txt
	@touch $@

$(training): $(runtime) training/requirements.txt
	@$(pip) -r requirements.txt -r training/requirements.txt
	@touch $@

$(tests): $(training) tests/requirements.txt
	@$(pip) -r requirements.txt -r training/requirements.txt -r tests/requirements.txt
	@touch $@

predict: $(runtime)
	@PYTHON="$(abspath $(python))" sh predict.sh --inputs "$(INPUTS)" --outputs "$(OUTPUTS)" --overlay "$(OUTPUTS)"

lint: $(tests)
	@$(python) -m ruff check .
	@$(python) -m ruff format --check .
	@$(python) -m mypy
	@$(VENV)/bin/lint-imports

test: lint
	@$(python) -m pytest

bench: $(tests)
	@for script in tests/benchmarks/bench_*.py; do \
	    $(python) -m "tests.benchmarks.$$(basename "$$script" .py)"; \
	done

evaluate: $(training)
	@test -n "$(CASES)" || { echo "make evaluate CASES=folder of labelled .npz cases" >&2; exit 2; }
	@$(python) -m training.evaluation.evaluate --cases "$(CASES)" --out "$(OUT)"

image:
	@docker build -t "$(IMAGE)" .

export: image
	@docker save "$(IMAGE)" | gzip > "$(ARCHIVE).part"
	@mv "$(ARCHIVE).part" "$(ARCHIVE)"
	@sha256sum "$(ARCHIVE)"
