# `make run` and `make test` are all that a fresh machine with Python 3.10-3.14 and make needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: run test test-fast lint lock clean

run: $(VENV)/.run-ready
	@exec $(BIN)/python app.py $(ARGS)

test: $(VENV)/.test-ready lint
	$(BIN)/python -m pytest

test-fast: $(VENV)/.test-ready
	$(BIN)/python -m pytest -m "not slow"

lint: $(VENV)/.test-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# --no-deps: the lock names everything, and takes OpenCV's headless wheel where insightface asks for the one that
# needs system libraries.
$(VENV)/.run-ready: requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	@touch $@

$(VENV)/.test-ready: requirements-dev.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-dev.lock
	@touch $@

# Needs uv (pip install uv). One lock serves every supported Python: its lines carry markers.
COMPILE := uv pip compile --quiet --universal --python-version 3.10 --no-header --no-annotate --no-emit-index-url \
	--no-emit-find-links --override overrides.txt
lock:
	sed 's/^opencv-python>/opencv-python-headless>/' requirements.txt | $(COMPILE) - -o requirements.lock
	sed 's/^opencv-python>/opencv-python-headless>/' requirements.txt | cat - requirements-dev.txt | grep -v '^-r ' \
		| $(COMPILE) - -c requirements.lock -o requirements-dev.lock

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
