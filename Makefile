# make demo and make test are all the set-up there is: each makes .venv first if it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

# torch comes first and pinned, so that no package pulls another build of it
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("perturbzoo needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

install: $(VENV)/installed  ## make .venv and install the package into it

demo: $(VENV)/installed  ## simulate, train, test and predict; figures and tables in demo/
	$(BIN)/python scripts/demo.py

test: $(VENV)/installed  ## the whole test suite
	$(BIN)/python -m pytest -n 2 --nbmake tests notebooks

lint: $(VENV)/installed  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove .venv and what the demo wrote
	rm -rf $(VENV) demo

.PHONY: help install demo test lint clean
