# Every target makes .venv and installs Tritune into it when needed. PYTHON=python3.12 make test chooses the interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest
export PYTHONDONTWRITEBYTECODE :=  # the tests start some hundred Pythons, each of which would compile our source anew

.PHONY: help demo test test-slow test-gpu check clean
help:
	@echo "make demo       a small model from scratch, then LoRA teaches it a task; base against tuned, a report (3 minutes)"
	@echo "make test       the tests (at most 10 minutes on two cores)"
	@echo "make test-slow  what takes longer and needs no GPU (at most 40 minutes): of large matrices the part of the day"
	@echo "make test-gpu   the kernels and some runs, on a GPU (at most 3 minutes)"
	@echo "make check      ruff and mypy"

$(STAMP): pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt --editable ".[test,dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/python -m tritune.launch.quickstart

test: $(STAMP)
	$(PYTEST) -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder --durations=20

# Three workers on two cores: a third of these tests wait for a clock, a scheduler or another process.
test-slow: $(STAMP)
	$(PYTEST) -m "slow and not alone" -n 3 --dist loadfile --no-loadscope-reorder --durations=20
	$(PYTEST) -m "slow and alone" $$(grep -rl --include="*.py" "mark.alone" tests)

test-gpu: $(STAMP)
	$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("tritune: make test-gpu needs a GPU")'
	$(PYTEST) -m gpu -n 6 --dist loadgroup tests/kernels tests/trainer tests/verify

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/types/tritune
	for d in trainer launch kernels conf; do ln -sfn $(CURDIR)/$$d build/types/tritune/$$d; done
	MYPYPATH=build/types $(BIN)/mypy -p tritune.trainer -p tritune.launch -p tritune.kernels

clean:
	rm -rf $(VENV) build *.egg-info
