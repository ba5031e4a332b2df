# Every target sets up what it needs in .venv: nothing is installed outside this directory.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu setup.py pyproject.toml constraints.txt)

.PHONY: demo test lint format gpu bench clean help

help:  ## show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

# pip builds the extensions in an environment of their own, as `pip install .` does for users.
$(VENV)/installed: $(SOURCES)
	@echo "== setting up $(VENV): packages at the versions of constraints.txt, then the extensions"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,triton,transformers]'
	@touch $@

demo: $(VENV)/installed  ## set up, merge the example experts by every method, compare them
	@echo "== merging and evaluating the experts of examples/glyphs"
	$(BIN)/pymerge demo

test: $(VENV)/installed  ## set up, run all tests
	@echo "== running the tests"
	$(BIN)/python -m pytest

lint: $(VENV)/installed  ## style and types
	@echo "== ruff and mypy"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed  ## let ruff format and fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

gpu: $(VENV)/installed  ## on a machine with a CUDA GPU: the tests on the device, then its benchmarks
	@$(BIN)/python -c "import torch, sys; sys.exit(not torch.cuda.is_available())" \
	  || { echo "no CUDA device here: PyTorch sees none; run this on a machine with a GPU"; exit 1; }
	PYMERGE_TEST_DEVICE=cuda $(BIN)/python -m pytest tests/ops tests/test_methods.py
	$(BIN)/python benchmarks/bench_ops.py --device cuda
	@echo "== what was the fastest, for auto to choose from: pymerge/backends/measured.json"
	$(BIN)/python benchmarks/record_fastest.py $$(ls -t benchmarks/results/*/*-ops.json | head -n 1)

bench: $(VENV)/installed  ## time the ops against PyTorch, the results to benchmarks/results
	$(BIN)/python benchmarks/bench_ops.py

clean:  ## remove what was built and installed here
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .benchmarks .hypothesis
	find . -name '*.so' -not -path './$(VENV)/*' -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
