# make compare   the main job: norms compared on MNIST, with a table, a picture and a page (ARGS="..." for options)
# make test      the tests
# make check     formatting, lint and types
# make sanitize  the tests of the compiled kernels, built to stop at a memory error or undefined behaviour
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: compare reproduce test check sanitize clean

compare: .venv/run
	$(BIN)/normlab compare $(ARGS)

reproduce: .venv/run
	$(BIN)/normlab reproduce $(ARGS)

# As many tests at a time as there are cores, each with a thread; those of several threads ask for them.
test: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

check: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

sanitize: .venv/dev
	$(PIP) -e . -C build-dir=build/sanitize -C cmake.build-type=RelWithDebInfo \
		-C cmake.define.CMAKE_CXX_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined"
	@rm .venv/run # the next command installs without
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
		$(BIN)/python -m pytest tests/kernels/test_cpu.py tests/kernels/test_library.py \
		tests/nn/test_running.py tests/nn/test_activation.py tests/nn/test_residual.py

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "normlab needs Python 3.11 or newer; name one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv

.venv/run: .venv/bin/python pyproject.toml constraints.txt CMakeLists.txt $(shell find src/normlab/kernels/csrc -type f)
	$(PIP) -e .
	@touch $@

.venv/dev: .venv/run
	$(PIP) -e ".[dev]"
	@touch $@

clean:
	rm -rf .venv build runs
