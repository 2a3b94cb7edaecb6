# `make demo` and `make test` need Python 3.10 or newer, git and make; they make .venv and install into it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help demo test lint typecheck conformance clean
.DEFAULT_GOAL := help

help:
	@echo "make demo         train a small model on real digits, judge it, draw what it sees (about 3 minutes)"
	@echo "make test         run the tests"
	@echo "make lint typecheck conformance   what CI runs besides"
	@echo "make clean        remove $(VENV) and what tools leave behind"

$(VENV)/installed: pyproject.toml CMakeLists.txt $(wildcard csrc/*)
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is " + sys.version) if sys.version_info < (3, 10) else 0'
	@echo "Installing PyTorch and all else into $(VENV): a few minutes, 6 GB on Linux"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py

test: $(VENV)/installed
	$(BIN)/python -m pytest -q -n 2 -m "not slow and not gpu"

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(VENV)/installed
	$(BIN)/mypy

conformance: $(VENV)/installed
	$(BIN)/python tools/timm_conformance.py

clean:
	rm -rf $(VENV) .venv-lowest .cache .pytest_cache .ruff_cache .mypy_cache .hypothesis
