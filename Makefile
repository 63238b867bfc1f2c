# `make` alone lists the targets. All of them set up .venv first if need be.
.DEFAULT_GOAL := help
TRIES ?= 5
.PHONY: help setup setup-dev quickstart test test-slurm faults lint format clean
PY := .venv/bin/python
# Where it is set, each of the many processes that tests start would compile torch and Megatron anew: 12 s each.
export PYTHONDONTWRITEBYTECODE :=
SOURCES := megatron_hybrid tools tests examples docs pretrain_hybrid.py

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | \
		while IFS='|' read -r target text; do printf '%-20s %s\n' "$$target" "$$text"; done

setup: ## find Python 3.12 or 3.13, make .venv, install requirements.txt and this package
	@tools/setup_env.sh

setup-dev: ## the same, with the test and lint tools
	@tools/setup_env.sh --dev

quickstart: setup ## train a small hybrid on real text, on the CPU; run again to continue
	@$(PY) tools/quickstart.py

test: setup-dev ## run all tests, in two processes
	@OMP_NUM_THREADS=1 $(PY) -m pytest tests -n 2 --dist loadfile

test-slurm: setup-dev ## train on a SLURM of two nodes on this machine, and disturb it (needs idle cores)
	@$(PY) -m pytest tests/slurm

faults: setup-dev ## disturb runs in many ways, TRIES=5 times each, and print a table
	@OMP_NUM_THREADS=1 $(PY) -m pytest tests/faults
	@$(PY) -m tests.faults.campaign --tries $(TRIES)

lint: setup-dev ## ruff (lint and format) and mypy
	@$(PY) -m ruff check $(SOURCES)
	@$(PY) -m ruff format --check $(SOURCES)
	@$(PY) -m mypy megatron_hybrid tools pretrain_hybrid.py

format: setup-dev ## format the code
	@$(PY) -m ruff check --fix $(SOURCES)
	@$(PY) -m ruff format $(SOURCES)

clean: ## remove .venv, caches and the quickstart's files (runs/quickstart)
	rm -rf .venv runs/quickstart .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find megatron_hybrid tools tests -name __pycache__ -type d -prune -exec rm -rf {} +
