# make compare   the main job: norms compared on MNIST, with a table, a picture and a page (ARGS="..." for options)
# make test      the tests
# make check     formatting, lint and types
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: compare reproduce test check clean

compare: .venv/run
	$(BIN)/normlab compare $(ARGS)

reproduce: .venv/run
	$(BIN)/normlab reproduce $(ARGS)

test: .venv/dev
	$(BIN)/python -m pytest $(ARGS)

check: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "normlab needs Python 3.11 or newer; name one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv

.venv/run: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) -e .
	@touch $@

.venv/dev: .venv/run
	$(PIP) -e ".[dev]"
	@touch $@

clean:
	rm -rf .venv runs
