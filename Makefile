# A fresh machine needs Python 3.11 or later and nothing else: every target makes .venv first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export TOKENIZERS_PARALLELISM ?= true

.PHONY: install quickstart real test test-slow test-browser test-gpu check bench bench-gate format docs clean

install: $(VENV)/.installed
	@echo 'installed; to activate it in this shell: . $(BIN)/activate'

# torch first and by its exact version: the range in pyproject.toml would fetch a build for other hardware.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo 'installing torch, the largest part: minutes on a slow connection'
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	@echo 'installing the rest'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: $(VENV)/.installed
	$(BIN)/python scripts/quickstart/run.py

# The whole loop on real weights: make real MODEL=DIR, a folder or Hub name (SmolLM2-135M-Instruct or Gemma-3-270m).
real: $(VENV)/.installed
	$(BIN)/python scripts/real_run.py $(MODEL) $(if $(OUTPUT),--output $(OUTPUT))

# A process for each core, with one thread each: half the time of one process with all of them.
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal -m "not slow and not gpu and not browser"

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m "slow and not gpu"

test-browser: $(VENV)/.installed
	$(BIN)/python -m pytest -m "browser and not gpu"

# On a machine with one or more GPUs; elsewhere the table says that everything was skipped.
test-gpu: $(VENV)/.installed
	$(BIN)/python scripts/gpu_tests.py

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.preparation $(if $(DATA),--data $(DATA)) $(if $(TOKENIZER),--tokenizer $(TOKENIZER))
	$(BIN)/python -m benchmarks.first_step
	$(BIN)/python -m benchmarks.near_duplicates
	$(BIN)/python -m benchmarks.generation
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.training_step $(if $(DATA),--data $(DATA)) $(if $(TOKENIZER),--tokenizer $(TOKENIZER))

# Over an hour: twenty faults and twenty healthy seeds of the quickstart. Stopped, it goes on where it was.
bench-gate: $(VENV)/.installed
	$(BIN)/python -m benchmarks.gate_faults --jobs 2 --work $(or $(WORK),.bench-gate)

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The pages that follow from the code; a test fails where they are not up to date.
docs: $(VENV)/.installed
	$(BIN)/python scripts/reference.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
