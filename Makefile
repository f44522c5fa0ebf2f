# Every target sets up what it needs: a virtual environment in .venv, created once and updated whenever pyproject.toml or
# constraints.txt changes.

PYTHON ?= python3
CONFIG ?= configs/emoji_64.yaml
JOBS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PYTEST = $(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal
BIOME := @biomejs/biome@2.6.8
TYPESCRIPT := typescript@7.0.2
PIP_INSTALL := $(BIN)/python -m pip install --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo serve test test-long test-page test-gpu lint lint-page format train install clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.run  ## sample eight prompts from the shipped model; prints the path of the image
	@$(BIN)/python tools/sample.py --demo

serve: $(VENV)/.serve  ## serve the shipped model over HTTP; prints the address (ARGS="--model mine=runs/mine" for others)
	$(BIN)/python tools/serve.py $(ARGS)

test: $(VENV)/.dev  ## run the tests (JOBS=2 processes; ARGS="tests/vae -k parity" for a part)
	$(PYTEST) -m "not slow and not page" $(ARGS)

test-long: $(VENV)/.dev  ## run the tests that make test leaves out: trainings, several processes, kills, large images
	$(PYTEST) -m "slow and not page" $(ARGS)

test-page: $(VENV)/.dev  ## run the tests of the web page in Chromium, which is installed if it is missing and may be
	@$(BIN)/python -m tests.page.browser || apt-get install --yes chromium || $(BIN)/playwright install chromium || true
	$(BIN)/python -m pytest tests/page -m page $(ARGS)

test-gpu: $(VENV)/.dev  ## run the tests on a CUDA device, which the other targets do not use
	LDM_TEST_GPU=1 $(PYTEST) tests/test_cuda.py $(ARGS)

lint: $(VENV)/.dev lint-page  ## check style, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

lint-page:  ## check the scripts and styles of the web page with biome and tsc, or without npm's registry their syntax with node
	@if timeout 120 npx --yes $(BIOME) --version > /dev/null 2>&1; then \
		npx --yes $(BIOME) check --error-on-warnings && npx --yes --package=$(TYPESCRIPT) tsc --project jsconfig.json; \
	elif command -v node > /dev/null; then \
		for file in ldm/serving/page/*.js; do node --check --input-type=module - < $$file || exit 1; done; \
	else echo "the scripts of the web page are not checked, since there is no node"; fi

format: $(VENV)/.dev  ## fix what ruff, and biome if npx is there, can fix automatically
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	@! command -v npx > /dev/null || npx --yes $(BIOME) check --write

train: $(VENV)/.run  ## train all three stages (CONFIG=configs/emoji_64.yaml; ARGS="key=value ...")
	$(BIN)/python tools/train.py --stage all --config $(CONFIG) $(ARGS)

install: $(VENV)/.dev  ## set up .venv for development

clean:  ## remove caches and builds; .venv and runs/ stay
	rm -rf build dist demo.png .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find ldm tests tools -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or later is needed; set PYTHON=" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.run: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.serve: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) --editable '.[serve]'
	@touch $(VENV)/.run $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) --editable '.[dev]'
	$(PIP_INSTALL) --no-deps --upgrade --target $(VENV)/torch-fidelity torch-fidelity  # which has a package `tests`
	@touch $(VENV)/.run $(VENV)/.serve $@
