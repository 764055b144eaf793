# make demo: the whole job on a handful of generated images.   make test: the test suite.   make lint: ruff.
# make chaos: the real commands under random SIGKILLs (25 over scoring, 10 over training, 10 over the loop), 20 minutes; CHAOS_SEED=N: other moments.
# Each sets up .venv by itself, and again when setup.py or constraints.txt changes. PYTHON=... picks another interpreter (3.11 or newer).

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST_ARGS ?=
CHAOS_SEED ?= 0

# The first interpreter that runs and is new enough for the pinned versions (a name on PATH may be a shim that does not run).
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do $$p -c "$(NEW_ENOUGH)" 2>/dev/null && echo $$p && break; done)

# Tests and demo make their own models and data; the hub is never asked. One thread per process: the test workers share the cores.
test chaos demo: export HF_HUB_OFFLINE := 1
test chaos demo: export TOKENIZERS_PARALLELISM := false
test chaos: export OMP_NUM_THREADS := 1

.PHONY: demo test chaos lint

demo: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/demo.sh

# A later -m in PYTEST_ARGS replaces this one. loadfile: the tests of a file share their fixtures in one worker.
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" $(PYTEST_ARGS)

chaos: $(STAMP)
	$(BIN)/python -m pytest -v -s --chaos --chaos_seed $(CHAOS_SEED) tests/chaos $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(STAMP): setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "muffin needs Python 3.11 or newer, found none on PATH; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	touch $@
