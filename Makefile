# Everything starts from a bare Python >= 3.11: `make demo`, `make test`. Both set up .venv themselves.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed

# Spinning OpenMP threads stall every operation when another process runs on the same cores.
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false
DATA ?= mnist-5k

.PHONY: help setup demo test test-device test-slow test-gpu lint types doctest readme docs format ci clean

help:
	@echo "make demo      set up, then run both halves on real data and write demo_output/report.html"
	@echo "make test      set up, then run the tests"
	@echo "make test-device                   the tests of GPUs on an emulated one (part of make test)"
	@echo "make lint types doctest readme    the other checks of CI"
	@echo "make docs      build the documentation in site/, and check its links"
	@echo "make test-slow test-gpu           the tests that CI leaves out"
	@echo "make format    let ruff rewrite the code"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "lightning_gap needs Python 3.11 or newer, '$(PYTHON)' is older: make PYTHON=python3.11 ..."; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || \
	  { echo "'$(PYTHON) -m venv' failed: install your system's venv package (python3-venv)"; exit 1; }
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	$(VENV)/bin/lightning-gap demo --data $(DATA)

# Two passes: all that needs no compiler runs with none on the PATH, which proves that the package works without one.
test: setup
	PATH="$(CURDIR)/$(VENV)/bin" OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadgroup -q \
	  -m "not compiler and not slow and not gpu"
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -m "compiler and not slow and not gpu"
	$(MAKE) test-device

# In processes of their own: the device is there from before torch is imported, and stays.
test-device: setup
	EMULATED_DEVICE=1 OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile -q tests/device

test-slow: setup
	$(PY) -m pytest -q -m slow

test-gpu: setup
	$(PY) -m pytest -q -m gpu

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: setup
	$(VENV)/bin/mypy

doctest: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -q --doctest-modules lightning_gap -p no:xdist

readme: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -q tests/test_readme.py

# Warnings are errors, and nothing is asked of the network.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build
	$(PY) site_build/links.py site

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

ci: test lint types doctest readme docs

clean:
	rm -rf $(VENV) site demo_output .pytest_cache .mypy_cache .ruff_cache .hypothesis
