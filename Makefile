# Every chore is one command, the same here as in CI. `make help` lists them.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.made

.PHONY: help setup demo demo-tenant test check simulate soak fuzz bench bench-compare format docs lock clean

help:            ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 15

setup: $(STAMP)  ## make .venv with everything in it

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Fleetlift needs Python 3.11 or newer: set PYTHON=..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned dependencies into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

demo: $(STAMP)   ## the main job, end to end, with recorded real vehicles
	@$(BIN)/fleetlift demo $(ARGS)

demo-tenant: $(STAMP) ## one tenant leaves a shared database and cloud, end to end
	@scripts/debian_packages.sh knot
	@$(BIN)/fleetlift demo-tenant $(ARGS)

test: $(STAMP)   ## lint, types, import rules and all tests
	@$(MAKE) --no-print-directory check
	@scripts/debian_packages.sh knot bind9
	@$(BIN)/pytest -n 2 --dist worksteal $(ARGS)

check: $(STAMP)  ## format, lint, types, import rules (changes nothing)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

simulate: $(STAMP) ## whole migrations on a simulated clock and network, with faults; ARGS="--runs 10000 --seed 1"
	@$(BIN)/fleetlift simulate $(ARGS)

soak: $(STAMP)   ## kill every process of a running migration, again and again; ARGS="--for 1h"
	@$(BIN)/fleetlift soak $(ARGS)

fuzz: $(STAMP)   ## coverage-guided fuzzing of all that takes bytes from outside; ARGS="--for 10m"
	@$(BIN)/python -m tests.fuzz $(ARGS)

bench: $(STAMP)  ## measure everything; ONLY=name for one
	@$(BIN)/python -m benchmarks $(if $(ONLY),--only $(ONLY)) $(ARGS)

bench-compare: $(STAMP) ## what has changed since the run before
	@$(BIN)/python -m benchmarks compare $(ARGS)

format: $(STAMP) ## rewrite the code in the house format
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

docs: $(STAMP)   ## write docs/cli.md anew from the commands
	@$(BIN)/python scripts/make_cli_docs.py

lock: $(STAMP)   ## renew requirements.lock from pyproject.toml
	@$(BIN)/python -m pip install --quiet pip-tools
	@$(BIN)/pip-compile --quiet --extra dev --generate-hashes --allow-unsafe --strip-extras --no-header \
	  --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-annotate -o requirements.lock pyproject.toml

clean:           ## remove what was built
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache
