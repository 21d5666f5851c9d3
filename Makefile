# Needs only GNU make and Python 3.11 or newer with its venv module; all else is installed into .venv.

PYTHON ?=
VENV := .venv
BIN := $(VENV)/bin
# Written last, so that its presence means: everything in constraints.txt is installed.
STAMP := $(VENV)/.installed
# Present while pip is at work: a .venv that still has it was interrupted, and is made anew.
UNFINISHED := $(VENV)/.unfinished
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
# One thread each: with more, the threads of two workers wait for each other and nothing is gained. A file's tests stay
# together, because they share what its fixtures make; four workers at most, because each may hold a model.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo docs test test-fast lint format clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1|/' | while IFS='|' read -r name text; do \
		printf '  make %-10s %s\n' "$$name" "$$text"; done

setup: $(STAMP) ## Install everything into .venv (the other targets do it by themselves)

demo: $(STAMP) ## Sparsify the default model, evaluate it, and write demo-report/
	@$(BIN)/actsparse demo --out demo-report

docs: $(STAMP) ## Build the documentation into site/, without the network
	@# Not --quiet, under which mkdocs counts no warnings and --strict means nothing.
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo 'written to site/index.html'

test: lint ## Check style and types, and run every test
	@echo 'testing …'
	@$(PYTEST)

test-fast: $(STAMP) ## Run the quick tests: no real model, no conversion, no other process
	@$(PYTEST) -m 'not real_model and not slow'

lint: $(STAMP) ## Check style and types
	@echo 'checking style and types …'
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP) ## Put the code into the house style
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

clean: ## Remove everything that make made here
	@rm -rf $(VENV) demo-report site build dist .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@if [ -e $(UNFINISHED) ] || ! $(PIP) --version >/dev/null 2>&1; then rm -rf $(VENV); fi
	@if [ ! -d $(VENV) ]; then \
		for python in $(PYTHON) python3.11 python3.12 python3.13 python3.14 python3 python; do \
			if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
				echo "making $(VENV) with $$python …"; \
				exec "$$python" -m venv $(VENV); \
			fi; \
		done; \
		echo 'error: no Python 3.11 or newer with its venv module was found; install one, or name it: make PYTHON=/path/to/python3' >&2; \
		exit 1; \
	fi
	@rm -f $@ && touch $(UNFINISHED)
	@echo 'installing the pinned packages into $(VENV) (a few minutes, once) …'
	@$(PIP) install --quiet --quiet --progress-bar off -c constraints.txt -e '.[hub,plot,eval,docs,dev]'
	@# optimum-intel asks for torchvision, which text models do not need and which would bring another torch.
	@$(PIP) install --quiet --quiet --progress-bar off -c constraints.txt --no-deps \
		optimum optimum-intel openvino-genai openvino-tokenizers
	@rm -f $(UNFINISHED) && touch $@
	@echo 'installed'
