# make demo | test | test-all | lint | bench | clean
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: demo test test-all lint bench clean
demo: $(VENV)/.ready
	$(BIN)/leadline demo --out leadline-demo

# Side by side, a file to a process: models of this size gain nothing from threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist loadfile

test: $(VENV)/.ready
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.ready
	$(PYTEST)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.ready
	$(BIN)/python benchmarks/engine.py
	$(BIN)/python benchmarks/refusal_judge.py
	$(BIN)/python benchmarks/attacks.py
	$(BIN)/python benchmarks/kl.py
	$(BIN)/python benchmarks/prefill.py
	$(BIN)/python benchmarks/constrained.py

# torch first: what is asked for by name takes the pinned build, whatever other packages allow.
# judgezoo alone: the judges read its texts and need none of the providers' clients it depends on.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[local,hub,train,dev]'
	$(BIN)/pip install --quiet -c constraints.txt --no-deps judgezoo
	touch $@

clean:
	rm -rf $(VENV) leadline-demo build dist .pytest_cache .mypy_cache .ruff_cache
