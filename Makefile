# Everything works from nothing installed but Python 3.11 or later; a second run does not install again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Threads that wait sleep instead of spinning: see slimwright/cli.py.
export OMP_WAIT_POLICY ?= PASSIVE
JOBS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: install demo test lint bench clean

install: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (a minute or two the first time) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test]"
	@touch $@

demo: install
	@$(BIN)/python -m slimwright.zoo.demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow"

bench: install
	$(BIN)/python -m benchmarks.run

clean:
	rm -rf $(VENV) demo bench-results .pytest_cache .ruff_cache .mypy_cache
