# make demo: quantize, evaluate and talk to a real model.  make test: the tests.  make compare: other quantizers and ours
# on one model, each in an environment of its own under .venv-peers (15 GB in all); PEERS="--quick" to see what runs.
# All set everything up themselves.

PYTHON ?=
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
READY_TO_TEST := $(VENV)/.ready-to-test
SETUP := benchmarks/setup.sh

.PHONY: setup demo test compare lint format clean

setup: $(READY)

$(READY): pyproject.toml $(SETUP)
	@PYTHON="$(PYTHON)" bash $(SETUP) $(VENV) demo

$(READY_TO_TEST): $(READY)
	@bash $(SETUP) $(VENV) test

demo: $(READY)
	PATH="$(abspath $(BIN)):$$PATH" bash benchmarks/demo.sh

# A file at a time on each of two workers; more threads than cores would wait for each other.
test: $(READY_TO_TEST)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

compare: $(READY)
	$(BIN)/python benchmarks/bench_peers.py $(PEERS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-peers demo build dist .pytest_cache .ruff_cache .mypy_cache
