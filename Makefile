# `make help` lists the targets. Each sets up the virtual environment it needs.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# What `make gpu` runs with: it needs torch and pytest only, and installs nothing.
GPU_PYTHON ?= python3
export PYTHONUNBUFFERED = 1

.PHONY: help demo test test-all lint format docs bench gpu clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (about two minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/pip install --quiet -c constraints.txt torch==2.13.0 2> $(VENV)/pip.log || { cat $(VENV)/pip.log; exit 1; }
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/pip install --quiet -c constraints.txt -e ".[dev]" 2> $(VENV)/pip.log || { cat $(VENV)/pip.log; exit 1; }
	@touch $@

demo: $(STAMP)  ## run the whole way once: crawl, encode, train, kill, resume, sample, report
	@$(BIN)/starflow demo

test: $(STAMP)  ## run the tests (no network, no GPU)
	@$(BIN)/python -m pytest -m "not slow and not gpu and not browser"

test-all: $(STAMP)  ## run the tests, with the long kill, fault, soak and browser tests
	@$(BIN)/python -m pytest -m "not gpu"

lint: $(STAMP)  ## check style, imports and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP)  ## rewrite the sources in the project's style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: $(STAMP)  ## build the documentation site into site/, with every link checked and without network
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

bench: $(STAMP)  ## run every benchmark that needs no GPU and write benchmarks/results/
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

gpu:  ## run every GPU test and benchmark with the CUDA build of torch that $(GPU_PYTHON) has; under ten minutes
	@PYTHONPATH=. $(GPU_PYTHON) -m pytest --noconftest -m gpu tests/starflow
	@PYTHONPATH=. $(GPU_PYTHON) benchmarks/train_step.py --device cuda
	@PYTHONPATH=. $(GPU_PYTHON) benchmarks/sampling.py --device cuda

clean:  ## remove the virtual environment and everything generated
	@[ ! -x $(BIN)/starflow ] || $(BIN)/starflow down
	rm -rf $(VENV) .starflow demo-output site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
