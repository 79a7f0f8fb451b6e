# Everything starts from a bare Python >= 3.11: `make demo`, `make test`. Both set up .venv themselves.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed

# Spinning OpenMP threads stall every operation when another process runs on the same cores.
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false
DATA ?= mnist-5k

# Imports of every module, and tests of each part that meets other packages.
CORE := tests/test_versions.py tests/test_package.py tests/test_cli.py tests/commands/test_map_cli.py \
  tests/trainer/test_loggers.py tests/dashboards/test_runs.py tests/diffusion/test_diffusion_fit.py \
  tests/diffusion/test_diffusion_reference.py \
  tests/ghost/test_ghost_functional.py tests/ghost/test_ghost_callback.py tests/monge/test_estimator.py \
  tests/monge/scores/test_metrics.py tests/monge/test_monge_map.py tests/monge/test_checkpoint.py \
  tests/monge/samples/files/test_samples_files.py \
  tests/monge/test_transport_files.py tests/regime/test_regime_schedules.py
QUICK := not compiler and not slow and not gpu and not distributed
# Mathematics and its checks, on any system: no trainer, no second process, no compiler.
PORTABLE := tests/test_versions.py tests/test_package.py tests/test_checks.py tests/ghost/test_ghost_functional.py \
  tests/diffusion/test_diffusion_fit.py tests/diffusion/test_diffusion_reference.py \
  tests/monge/scores/test_metrics.py tests/monge/ot/test_closed_forms.py tests/monge/ot/costs/test_costs.py
# Versions for test-lowest. Of some there are wheels for Python 3.11 alone: LOWEST=.venv-lowest/lowest.txt takes the
# lowest that have wheels for the Python at hand, and tools as they come.
LOWEST ?= constraints-lowest.txt
COMPILED := torch numpy scipy pyyaml pandas pyarrow h5py matplotlib pillow pot scikit-learn wandb

.PHONY: help setup demo test test-device test-triton test-slow test-gpu test-lowest test-latest test-portable test-variants \
  lowest lint types doctest readme docs dist format ci clean

help:
	@echo "make demo      set up, then run both halves on real data and write demo_output/report.html"
	@echo "make test      set up, then run the tests"
	@echo "make test-device                   the tests of GPUs on an emulated one (part of make test)"
	@echo "make test-triton                   the tests of Triton's kernels, in its interpreter and its compiler"
	@echo "make lint types doctest readme    the other checks of CI"
	@echo "make docs      build the documentation in site/, and check its links"
	@echo "make test-slow test-gpu           the tests that CI leaves out"
	@echo "make test-lowest test-latest      a core of tests at the lowest and at the latest versions"
	@echo "make test-portable                 the part of the tests that runs on any system, by the Python at hand"
	@echo "make test-variants                tests of numbers, as other processors compute them"
	@echo "make dist      build the sdist and the wheel in dist/, and check them"
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

# All that needs no compiler runs with none on the PATH, which proves that the package works without one; then what needs
# one, and what needs a device. Formulas of KeOps, which locks no cache, are compiled by tests of one file, so by one worker.
# Every log says where the time went, and which pass failed.
test: setup
	PATH="$(CURDIR)/$(VENV)/bin" OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile -q --durations=20 \
	  -m "not compiler and not slow and not gpu" || { echo "make test: failed in the pass without a compiler"; exit 1; }
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile -q --durations=20 -m "compiler and not slow and not gpu" \
	  || { echo "make test: failed in the pass of what needs a compiler"; exit 1; }
	$(MAKE) test-device

# In processes of their own: the device is there from before torch is imported, and stays.
test-device: setup
	EMULATED_DEVICE=1 OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile -q --durations=20 tests/device \
	  || { echo "make test: failed in the pass on the emulated device"; exit 1; }

# On a CPU: kernels run in Triton's interpreter, and are compiled for a GPU that is not there.
test-triton:
	@test -x .venv-triton/bin/python || $(PYTHON) -m venv .venv-triton
	.venv-triton/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,flash]'
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 .venv-triton/bin/python -m pytest -q --durations=10 -m triton \
	  tests/monge/ot/test_triton_passes.py
	EMULATED_DEVICE=1 TRITON_INTERPRET=1 OMP_NUM_THREADS=1 .venv-triton/bin/python -m pytest -q --durations=10 \
	  tests/device/test_device_fused.py

test-slow: setup
	$(PY) -m pytest -q -m slow

test-gpu: setup
	$(PY) -m pytest -q -m gpu

.venv-lowest/.installed: pyproject.toml $(LOWEST)
	@test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check -c $(LOWEST) -e '.[dev]'
	@touch $@

.venv-lowest/lowest.txt: pyproject.toml
	@test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv-lowest/bin/uv pip compile --quiet --python .venv-lowest/bin/python --resolution lowest-direct \
	  $(COMPILED:%=--only-binary %) --extra all --no-annotate --no-header -o $@ pyproject.toml

test-lowest: .venv-lowest/.installed
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n 2 --dist loadfile -q -m "$(QUICK)" $(CORE)

# torch as in constraints.txt, of which there is a wheel without CUDA; all else as new as it comes.
test-latest:
	@test -x .venv-latest/bin/python || $(PYTHON) -m venv .venv-latest
	.venv-latest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager \
	  "$$(grep '^torch==' constraints.txt)" -e '.[dev]'
	.venv-latest/bin/python -m pip list --disable-pip-version-check
	OMP_NUM_THREADS=1 .venv-latest/bin/python -m pytest -n 2 --dist loadfile -q -m "$(QUICK)" $(CORE)

test-portable:
	$(PYTHON) -m pytest -q -m "$(QUICK)" $(PORTABLE)

# constraints-lowest.txt anew, after a change of a floor.
lowest: setup
	$(PY) -m pip install --quiet --disable-pip-version-check uv
	{ echo "# The lowest versions that pyproject.toml allows, by \`make lowest\`."; $(VENV)/bin/uv pip compile --quiet \
	  --python-version 3.11 --resolution lowest-direct --all-extras --no-annotate --no-header pyproject.toml \
	  | grep -vE '^(nvidia|cuda|triton)'; } > constraints-lowest.txt

# Other kernels of torch, MKL and OpenBLAS: no test may depend on the last bits.
test-variants: setup
	for variant in \
	  "ATEN_CPU_CAPABILITY=default OPENBLAS_CORETYPE=Prescott MKL_CBWR=COMPATIBLE" \
	  "ATEN_CPU_CAPABILITY=avx2 OPENBLAS_CORETYPE=Haswell MKL_CBWR=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2" \
	  "OPENBLAS_CORETYPE=SkylakeX MKL_CBWR=AVX512" \
	  "OPENBLAS_CORETYPE=Zen OMP_NUM_THREADS=2"; do \
	  echo "$$variant"; env OMP_NUM_THREADS=1 $$variant $(PY) -m pytest -q -m "$(QUICK)" tests/monge || exit 1; done

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: setup
	$(VENV)/bin/mypy

doctest: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -q --doctest-modules lightning_gap -p no:xdist

readme: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -q tests/test_readme.py

# Pictures whose code has changed are made anew; warnings are errors, and nothing is asked of the network.
docs: setup
	OMP_NUM_THREADS=1 $(PY) docs/hooks/pictures.py
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build
	$(PY) docs/hooks/links.py site

dist:
	@test -x .venv-dist/bin/python || $(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python -m pip install --quiet --disable-pip-version-check --upgrade build twine
	rm -rf dist
	.venv-dist/bin/python -m build
	.venv-dist/bin/twine check --strict dist/*

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

ci: test test-lowest lint types doctest readme docs

clean:
	rm -rf $(VENV) .venv-lowest .venv-latest .venv-triton .venv-dist dist site demo_output .pytest_cache .mypy_cache .ruff_cache .hypothesis
