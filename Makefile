# Every target sets up what it needs in .venv: nothing is installed outside this directory.
MAKEFLAGS += --no-print-directory
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CSRC := $(wildcard csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)
SOURCES := $(CSRC) setup.py pyproject.toml constraints.txt

.PHONY: demo test test-slow wheel wheel-test torture lint format gpu gpu-bundle bench parity bench-small quality quality-smoke clean help

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

# pip builds the extensions in an environment of their own, as `pip install .` does for users.
$(VENV)/installed: $(SOURCES)
	@echo "== setting up $(VENV): packages at the versions of constraints.txt, then the extensions"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,triton,transformers]'
	@touch $@

demo: $(VENV)/installed  ## set up, merge the example experts by every method, compare them
	@echo "== merging and evaluating the experts of examples/glyphs"
	$(BIN)/pymerge demo

# Hundreds of tests start processes: modules are compiled once, whatever the environment says.
TESTS := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest

test: $(VENV)/installed  ## set up, run all tests but the slow ones, a file at a time on each core
	@echo "== running the tests"
	$(TESTS) -n auto --maxprocesses 8 --dist loadfile -m "not slow"

test-slow: $(VENV)/installed  ## run the slow tests: inside mergekit, sentence-transformers, FusionBench and Ray, which it installs beside; demos
	$(TESTS) -m slow

wheel: $(VENV)/installed  ## into dist/: the sdist, wheels of manylinux_2_28 for each Python here, for x86-64 and aarch64
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r wheels/requirements.txt
	$(BIN)/python -m wheels.build

wheel-test: $(VENV)/installed  ## install the wheel of this machine from dist/ where no compiler is: its ops, merges, the demo
	$(BIN)/python -m wheels.tried

torture: $(VENV)/installed  ## kill, fill disks and damage files by the hundred, then fuzz the parsers for 10 minutes
	PYMERGE_TORTURE=1 $(BIN)/python -m pytest -s $(addprefix tests/guarantees/test_,kill.py corruption.py names_property.py)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check atheris==3.0.0
	$(BIN)/python tests/guarantees/fuzz_headers.py -max_total_time=600

lint: $(VENV)/installed  ## style and types
	@echo "== ruff, mypy and clang-format"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CSRC)

format: $(VENV)/installed  ## let ruff and clang-format format and fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

gpu-bundle:  ## on a machine with network: wheels for `make gpu`, for the Python of the machine with the GPU (PYTHON=python3.12)
	$(PYTHON) -m benchmarks device bundle

gpu:  ## on a machine with a CUDA GPU, without network, in 8 minutes: tests, figures; DRY_RUN=1 prints the steps
	@$(PYTHON) -m benchmarks device $(if $(DRY_RUN),--dry-run)

bench: $(VENV)/installed  ## time ops, solvers and merges beside PyTorch, published forms and mergekit
	@echo "== timing; results go to benchmarks/runs, see benchmarks/README.md"
	$(BIN)/python -m benchmarks ops
	$(BIN)/python -m benchmarks solvers --shapes 768x768x8 3072x768x8 --methods wudi,wudi_flow,ace --seconds 5
	$(BIN)/python -m benchmarks merges

parity: $(VENV)/installed  ## merge small models by every method of mergekit, with both, and compare the results
	$(BIN)/python -m benchmarks parity

bench-small: $(VENV)/installed  ## time every op on a small shape, in under a minute
	$(BIN)/python -m pytest benchmarks/ops/test_small.py --benchmark-max-time=0.5 --benchmark-columns=min,median,rounds

quality: $(VENV)/installed  ## train four suites' experts, merge them by every method, measure, draw
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r benchmarks/quality/requirements.txt
	@echo "== base, experts and what was measured: ~/.cache/pymerge-bench/quality; results: benchmarks/runs, docs/quality.md"
	$(BIN)/python -m benchmarks quality
	for suite in glyphs8 minilm4 glyphs16 smollm4; do \
	  $(BIN)/python -m benchmarks quality plot $$suite && $(BIN)/python -m benchmarks quality show $$suite || exit 1; \
	done

quality-smoke: $(VENV)/installed  ## merge two of the example's experts and check the order of the methods
	$(BIN)/python -m benchmarks quality smoke
	$(BIN)/python -m pytest -q tests/repository/test_quality_smoke.py

clean:  ## remove what was built and installed here
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .benchmarks .hypothesis
	find . -name '*.so' -not -path './$(VENV)/*' -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
