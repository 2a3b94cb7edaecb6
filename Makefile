# `make demo` and `make test` need Python 3.10 or newer, git and make; they make .venv and install into it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PROCESSES ?= 2
# Of 20,000 files few are ever imported: those Python compiles itself.
PIP := $(BIN)/python -m pip install -q --no-compile
# Where the environment forbids to keep compiled modules, each process would compile anew all that it imports.
export PYTHONDONTWRITEBYTECODE :=
# How many examples hypothesis draws: "quick" or "fixed", five times as many.
PROFILE ?= fixed
# As many processes as cores: in each, one thread, which sleeps where it waits. A file is of one process, which makes
# once what its tests share. (Groups of tests, --dist loadgroup, are nothing to pytest 9.2 with pytest-xdist 3.8.)
# In the order of their names, files that train by several processes do not run side by side, and hinder each other.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n $(PROCESSES) --dist loadfile --no-loadscope-reorder
INTERPRETED := TRITON_INTERPRET=1 $(PYTEST) --dist load -k triton tests/ops tests/models/test_official.py

.PHONY: help demo test test-all test-triton exhaustive lint typecheck docs serve conformance compat wheel clean
.DEFAULT_GOAL := help

help:
	@echo "make demo         classify real images, draw what the model sees, train on digits (under 3 minutes)"
	@echo "make test         the quick tier: what covers the library (under 5 minutes)"
	@echo "make test-all     every test but those minutes long; test-triton: the GPU kernels in Triton's interpreter"
	@echo "make exhaustive   every test and kernel there is, the CPU kernel under all sanitizers (hours)"
	@echo "make lint typecheck docs conformance compat wheel   what CI runs besides"
	@echo "make serve        the site, rebuilt as you write"
	@echo "make clean        remove $(VENV) and what tools leave behind"

# The pip that comes with Python 3.11 takes twice as long to choose versions as today's.
$(VENV)/installed: pyproject.toml CMakeLists.txt $(wildcard csrc/*)
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is " + sys.version) if sys.version_info < (3, 10) else 0'
	@echo "Installing PyTorch and all else into $(VENV): a few minutes, 6 GB on Linux"
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) -e '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py

test: $(VENV)/installed
	$(PYTEST) --hypothesis-profile=quick -m "not full and not slow and not gpu and not compat"

test-all: $(VENV)/installed
	$(PYTEST) --hypothesis-profile=$(PROFILE) --durations=40 -m "not slow and not gpu and not compat"

# Interpreted, a kernel takes seconds a call: the quick tier's cases here, all of them in `make exhaustive`.
test-triton: $(VENV)/installed
	$(INTERPRETED) -m "not full and not slow and not gpu and not compat"

exhaustive: $(VENV)/installed
	$(PYTEST) -m "not gpu and not compat"
	$(INTERPRETED) -m "not gpu and not compat"
	$(BIN)/python tools/sanitize.py address,undefined
	$(BIN)/python tools/sanitize.py thread
	$(BIN)/python tools/compile_triton.py
	$(BIN)/python tools/timm_conformance.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(VENV)/installed
	$(BIN)/mypy

docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

serve: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

conformance: $(VENV)/installed
	$(BIN)/python tools/timm_conformance.py

# The packages of the extra alone: -e would build the kernel again.
$(VENV)/compat: $(VENV)/installed
	$(PIP) 'vmamba[compat]'
	touch $@

compat: $(VENV)/compat
	$(PYTEST) -m compat tests/compat

wheel: $(VENV)/installed
	bash tools/check_wheel.sh

clean:
	rm -rf $(VENV) .venv-lowest .cache .pytest_cache .ruff_cache .mypy_cache .hypothesis site
