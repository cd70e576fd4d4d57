# make demo and make test do all the set-up themselves: an environment in .venv, pinned by constraints.txt, reused after.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint pytest pytest-ray pytest-rest bench clean
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

# Side by side: the tests that start Ray mostly wait for it, the others compute; what trains on Ray follows the latter.
# Their dots mix; each ends with a summary.
TRAINS := $(addprefix tests/distributed/test_,bad_shards.py sweep.py train.py)

test: $(STAMP)
	$(MAKE) --no-print-directory --jobs=3 --keep-going lint pytest-ray pytest-rest

pytest-ray: $(STAMP)
	$(BIN)/python -m pytest -m "distributed and not slow" $(addprefix --ignore=,$(TRAINS))

pytest-rest: $(STAMP)
	status=0; \
	$(BIN)/python -m pytest -m "not distributed and not slow" || status=$$?; \
	$(BIN)/python -m pytest -m "distributed and not slow" $(TRAINS) || status=$$?; \
	exit $$status

pytest: $(STAMP)
	$(BIN)/python -m pytest

bench: $(STAMP)
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
