# On Windows, run these under WSL.
SHELL := /bin/bash
VENV  := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: setup repro test test-fast lint bench compare report ui serve demo help
.DEFAULT_GOAL := help

help:  ## these targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: $(VENV)/.runtime  ## the virtual environment with the pinned packages

repro: $(VENV)/.runtime  ## download, train, sample and evaluate, as far as something changed
	dvc repro

# One thread per process: two processes with two threads each would take turns on two cores, and take longer.
test: $(VENV)/.dev  ## all tests
	OMP_NUM_THREADS=1 python -m pytest --numprocesses auto --dist loadfile

test-fast: $(VENV)/.dev  ## the tests that start no stage, server or browser
	OMP_NUM_THREADS=1 python -m pytest --numprocesses auto --dist worksteal -m "not slow"

lint: $(VENV)/.dev  ## style, mistakes and types
	ruff check .
	ruff format --check .
	mypy

bench: $(VENV)/.dev  ## this project beside its peers, in a quarter of an hour (after the default run)
	dvc repro --quiet
	python bench/run.py

compare: $(VENV)/.runtime  ## the experiments side by side, the best first
	@python src/compare.py

report: $(VENV)/.runtime  ## output/report.html: the experiments on one page
	@python src/report.py

ui: $(VENV)/.runtime  ## the MLflow UI; prints the address of the leaderboard
	@python src/ui.py

demo: $(VENV)/.runtime  ## garments in seconds, from the trained model that comes along: output/demo.png and .gif
	@python src/demo.py

serve: $(VENV)/.runtime  ## garments by HTTP, at http://127.0.0.1:8000, from the best model
	@python src/serve.py

$(VENV)/.runtime: requirements.txt
	@python3 install.py
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime requirements-dev.txt bench/requirements.txt
	@python3 install.py --dev
	@touch $@
