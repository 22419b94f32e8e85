# `make run` and `make test` are all that a fresh machine with Python 3.10-3.14 and make needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Processes that run the tests side by side.
JOBS ?= auto

.PHONY: help run test quick lint fix evaluate-checks benchmark lock audit licences clean

help: ## show these targets
	@grep -E '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed 's/:.*## /\t/' | expand -t 18

run: $(VENV)/.run-ready ## install what the service needs, and run it (ARGS="--port 7000")
	@exec $(BIN)/python app.py $(ARGS)

test: $(VENV)/.test-ready lint ## everything that CI runs: lint, types, all tests (under 10 minutes on two cores)
	$(BIN)/python -m pytest -n $(JOBS) -m "slow or not slow"

quick: $(VENV)/.test-ready lint ## lint, types, and the tests that need no face model (40 seconds)
	$(BIN)/python -m pytest -n $(JOBS) -q -m "not slow and not heavy"

lint: $(VENV)/.test-ready ## ruff, mypy --strict, codespell
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

fix: $(VENV)/.test-ready ## mend what ruff and codespell can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/codespell --write-changes

# DATA holds photos/ (with labels.csv, or none/ mask/ sunglasses/ other/), and perhaps covering/, people/ and pack/.
evaluate-checks: $(VENV)/.run-ready ## write docs/checks.md anew (DATA=folder of labelled photos, MODELS=more packs)
	@test -d "$(DATA)" || { echo "It takes a folder of photos: make $@ DATA=<folder>"; exit 1; }
	$(BIN)/python -m benchmarks.evaluate_checks $(wildcard $(DATA)/photos $(DATA)/covering) \
		$(if $(wildcard $(DATA)/people),--people $(DATA)/people) \
		$(if $(wildcard $(DATA)/pack),--model $(DATA)/pack --model compact $(MODELS:%=--model %) --thresholds 0.38 0.5) $(ARGS)

# DATA holds people/ (a folder a person), photos/ and pack/; MODELS may name more packs.
benchmark: $(VENV)/.run-ready ## write docs/performance.md anew (DATA=folder of photos)
	@test -d "$(DATA)" || { echo "It takes a folder of photos: make $@ DATA=<folder>"; exit 1; }
	$(BIN)/python benchmarks/performance.py $(wildcard $(DATA)/pack) $(MODELS) compact \
		--photos $$(ls $(DATA)/people/*/*.jpg | awk 'NR % 6 == 0') $$(ls $(DATA)/photos/*.jpg | awk 'NR % 12 == 0')

# bin/pip, not bin/python: a venv made without python3-venv's pip is only half a one.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "$(PYTHON) is no Python 3.10 or newer; name one: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV)/, once and for some minutes:" $(1)
	@rm -f $@
	@{ $(BIN)/python -m pip install --disable-pip-version-check --no-deps --progress-bar off -r $< && touch $@; } \
		| grep --line-buffered '^Collecting' | sed 's/ (from.*//'; test -f $@
endef

# --no-deps: the lock names everything, and takes OpenCV's headless wheel where insightface asks for the one that
# needs system libraries.
$(VENV)/.run-ready: requirements.lock
	$(call install,"what the service runs on: about 800 MB")

$(VENV)/.test-ready: requirements-dev.lock
	$(call install,"the tests' tools and what the service runs on")

# Needs uv (pip install uv). One lock serves every supported Python: its lines carry markers.
COMPILE := uv pip compile --quiet --universal --python-version 3.10 --no-header --no-annotate --no-emit-index-url \
	--no-emit-find-links --generate-hashes --override overrides.txt
lock: ## pin the newest versions of everything anew
	sed 's/^opencv-python>/opencv-python-headless>/' requirements.txt | $(COMPILE) - -o requirements.lock
	$(COMPILE) --no-deps requirements-openvino.txt -o requirements-openvino.lock
	sed 's/^opencv-python>/opencv-python-headless>/' requirements.txt | cat - requirements-openvino.txt requirements-dev.txt \
		| grep -v '^-r ' | $(COMPILE) - -c requirements.lock -c requirements-openvino.lock -o requirements-dev.lock

# Known vulnerabilities of everything that the lock pins, also for other Pythons and platforms: pip-audit would pass over
# those, and takes one version of a package a file. Needs pip-audit, and asks PyPI: whatever it has no answer for fails.
audit: ## ask PyPI for known vulnerabilities of what the locks pin
	rm -rf .audit && mkdir .audit
	awk -F '[ ;]' '/^[a-z0-9]/ { split($$1, pin, "=="); print $$1 > (".audit/" seen[pin[1]]++) }' \
		requirements.lock requirements-openvino.lock
	for pins in .audit/*; do pip-audit --strict --no-deps --disable-pip --requirement $$pins || failed=1; done; \
		test -z "$$failed"

# What the service's packages are licensed under; fails on a licence that nobody has looked at.
licences: $(VENV)/.test-ready ## list the packages' licences; fails on one that nobody has looked at
	$(BIN)/python deploy/licences.py requirements.lock
	$(BIN)/python deploy/licences.py requirements-openvino.lock

clean: ## remove the environment and the caches
	rm -rf $(VENV) .audit .pytest_cache .mypy_cache .ruff_cache
