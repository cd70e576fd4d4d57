# make demo and make test do all the set-up themselves: an environment in .venv, pinned by constraints.txt, reused after.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint pytest bench clean
.DELETE_ON_ERROR:

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,features]'
	touch $@

demo: $(STAMP)
	$(BIN)/raydiff demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

test: $(STAMP)
	$(MAKE) --no-print-directory --jobs=2 lint pytest

# Two processes: one has all that starts Ray and mostly waits, the other one all the rest (tests/conftest.py).
pytest: $(STAMP)
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadgroup

bench: $(STAMP)
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
