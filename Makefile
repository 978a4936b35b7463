# Each target sets up what it needs by itself, in .venv; python3.11 with venv and pip is enough.
#   make predict [INPUTS=dir] [OUTPUTS=dir]   segment a folder of cases (the sample by default)
#   make setup                                install what training and evaluation need
#   make test                                 linters, types, import contracts, tests
#   make lint                                 all of that but the tests
#   make bench                                every benchmark, tables and CSV
#   make evaluate CASES=dir [OUT=dir]         score a folder of labelled cases
#   make image [TORCH=cpu]                    build the container image (cpu: small, no GPU)
#   make image-test [QUICK=yes]               build it and test it; quick: without the minutes
#   make export                               build it and save it as tar.gz, with its SHA-256
# Threads that wait sleep, as in predict.sh: the tests share their machine with others.
export OMP_WAIT_POLICY ?= passive
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
TORCH   ?= cuda
# What the image's labels say; the checkout may be of another user's, or no repository.
git := git -c safe.directory='*'
VERSION  ?= $(shell $(git) describe --tags --always --dirty 2>/dev/null || echo unknown)
REVISION ?= $(shell $(git) rev-parse HEAD 2>/dev/null || echo unknown)
SOURCE   ?= $(shell $(git) config --get remote.origin.url | grep '^https:')
# In full, since engines add registries of their own to shorter names. What comes before the first
# slash is a registry where it has a dot or a port, or is localhost.
first := $(firstword $(subst /, ,$(IMAGE)))
registry := $(findstring .,$(first))$(findstring :,$(first))$(filter localhost,$(first))
full_name = $(if $(findstring /,$(IMAGE)),$(if $(registry),,docker.io/),docker.io/library/)$(IMAGE)

python := $(VENV)/bin/python
pip := $(python) -m pip install --quiet --disable-pip-version-check
runtime := $(VENV)/.runtime
training := $(VENV)/.training
tests := $(VENV)/.tests

.PHONY: help setup predict test lint bench evaluate image image-test export archive

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

$(tests): $(training) tests/requirements.txt inference/cluster-requirements.txt
	@$(pip) -r requirements.txt -r training/requirements.txt -r tests/requirements.txt
	@touch $@

setup: $(training)

predict: $(runtime)
	@PYTHON="$(abspath $(python))" sh predict.sh --inputs "$(INPUTS)" --outputs "$(OUTPUTS)" --overlay "$(OUTPUTS)"

lint: $(tests)
	@$(python) -m ruff check .
	@$(python) -m ruff format --check .
	@$(python) -m mypy
	@$(VENV)/bin/lint-imports

test: lint
	@$(python) -m pytest -n auto --maxprocesses 4 --dist loadfile

bench: $(tests)
	@failed=; \
	for script in tests/benchmarks/bench_*.py; do \
	    name="$$(basename "$$script" .py)"; \
	    $(python) -m "tests.benchmarks.$$name" || failed+=" $$name"; \
	done; \
	[[ ! $$failed ]] || { echo "failed:$$failed" >&2; exit 1; }

evaluate: $(training)
	@test -n "$(CASES)" || { echo "make evaluate CASES=folder of labelled .npz cases" >&2; exit 2; }
	@$(python) -m training.evaluation.evaluate --cases "$(CASES)" --out "$(OUT)"

image:
	@docker build --build-arg TORCH="$(TORCH)" --build-arg VERSION="$(VERSION)" \
	    --build-arg REVISION="$(REVISION)" --build-arg SOURCE="$(SOURCE)" -t "$(IMAGE)" .

image-test: $(tests) image
	@IMAGE="$(IMAGE)" $(python) -m pytest tests/container $(if $(QUICK),-m "not slow")

export: image
	@$(MAKE) archive

# The image as it is.
archive:
	@docker tag "$(IMAGE)" "$(full_name)"
	@trap 'rm -f "$(ARCHIVE).part"' EXIT; \
	docker save "$(full_name)" | gzip -n > "$(ARCHIVE).part"; \
	mv "$(ARCHIVE).part" "$(ARCHIVE)"
	@cd "$$(dirname "$(ARCHIVE)")" && name="$$(basename "$(ARCHIVE)")" && \
	    sha256sum "$$name" > "$$name.sha256"
	@sha256sum "$(ARCHIVE)"
	@echo "$$(stat -c %s "$(ARCHIVE)" | awk '{ printf "%.0f MB", $$1 / 1e6 }') in $(ARCHIVE)"
