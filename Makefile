# make demo                cross-check, benchmark, plot, train, write reports/out/index.html
# make demo SHORT=1        the same with few lengths and one seed, to see everything work: 3 to 4 minutes
# make test                the tests that take seconds: about 8 minutes
# make test-slow SHARD=1/6 a sixth of the others: 6 to 17 minutes; without SHARD all: over an hour
# make test-all            the linter, the type checker and every test
# make lint                the linter and the type checker: half a minute
# make check-noise         whether a busy neighbour is noticed, and a planted slow-down of 10 % caught:
#                          about 9 minutes
# make install             .venv, with all that these need; each of them does it first
# Times are of two quiet cores. PYTHON=... picks another interpreter (3.11 or newer).
# The tests of the page need a browser (Debian: apt-get install chromium) and are skipped without one.

PYTHON ?= python3
BIN := .venv/bin
OUT := reports/out
# Tests are single-threaded, so that two run side by side. WORKERS=0 runs them in one process.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
ifdef SHORT
SWEEP := --tokens 64,256 --dtypes float32
TABLE := --seeds 1 --epochs 2
BENCH := --seconds 0.3
PROFILE := --steps 2
endif

.PHONY: demo test test-slow test-all check-noise lint install clean

install: .venv/installed

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv || \
	  { echo "venv is missing: install it (Debian: apt-get install python3-venv)"; exit 1; }
	$(BIN)/python -m pip install --editable '.[dev]'
	touch $@

demo: install
	mkdir -p $(OUT)
	$(BIN)/python -m bench check --out $(OUT)/check.json
	$(BIN)/python -m pytest --benchmark-only $(SWEEP) --benchmark-json=$(OUT)/benchmark.json
	$(BIN)/python -m reports scaling $(OUT)/benchmark.json --out $(OUT)
	$(BIN)/python train_minimal.py table --runs $(OUT)/runs --out $(OUT)/training $(TABLE)
	$(BIN)/python train_minimal.py bench --dataset digits --out $(OUT)/training $(BENCH)
	$(BIN)/python train_minimal.py profile --dataset digits --backend torch --out $(OUT)/training $(PROFILE)
	$(BIN)/python -m reports page --out $(OUT)/index.html
	@echo "Open $(OUT)/index.html"

test: install
	$(PYTEST)

test-slow: install
	$(PYTEST) -m slow --durations=10 $(if $(SHARD),--shard $(SHARD)) \
	  $(if $(RECORD),--record-seconds $(RECORD))

test-all: lint test test-slow

# Is a busy neighbour noticed? Is a kernel that does a tenth more caught by `reports compare`?
check-noise: install
	$(BIN)/python -m bench noise --out $(OUT)/noise

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv $(OUT) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
