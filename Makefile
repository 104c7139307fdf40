# make demo | test | test-all | lint | docs | bench | clean
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: demo test test-all lint docs bench clean browser
demo: $(VENV)/.ready
	$(BIN)/leadline demo --out leadline-demo

# One process per test file and core; models of this size do not profit from threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist loadfile

test: $(VENV)/.ready browser
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.ready browser
	$(PYTEST)

# A Chromium or Chrome for the tests of the report pages: installed if that is possible, otherwise
# one line that says what to install.
browser: $(VENV)/.ready
	@$(BIN)/python -m tests.browser >/dev/null

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The generated tables in docs/.
docs: $(VENV)/.ready
	$(BIN)/python docs/tables.py

bench: $(VENV)/.ready
	$(BIN)/python benchmarks/engine.py
	$(BIN)/python benchmarks/refusal_judge.py
	$(BIN)/python benchmarks/attacks.py
	$(BIN)/python benchmarks/kl.py
	$(BIN)/python benchmarks/prefill.py
	$(BIN)/python benchmarks/constrained.py

# torch first: a package that is named takes the pinned build, whatever the others would allow.
# judgezoo without dependencies: only its prompt texts are used.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[local,hub,train,dev]'
	$(BIN)/pip install --quiet -c constraints.txt --no-deps judgezoo
	touch $@

clean:
	rm -rf $(VENV) leadline-demo build dist .pytest_cache .mypy_cache .ruff_cache
