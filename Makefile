# make demo      cross-check, benchmark, plot, train, and write reports/out/index.html
# make test      the tests that take seconds (under 10 minutes on 2 cores)
# make test-all  those, the slow ones, the linter and the type checker
# make check-noise  whether a planted slow-down of 10 % is caught, end to end
# The tests of the page need a browser (Debian: apt-get install chromium) and are skipped without one.
# Each creates .venv and installs into it first. PYTHON=... picks another interpreter (3.11 or newer).

PYTHON ?= python3
BIN := .venv/bin
OUT := reports/out
# Tests are single-threaded, so that two files run side by side. WORKERS=0 runs them in one process.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
# make demo SHORT=1: a few lengths and one seed, to see everything work; no result to quote.
ifdef SHORT
SWEEP := --seq-lens 64,256 --dtypes float32
TABLE := --seeds 1 --epochs 2
BENCH := --seconds 0.3
PROFILE := --steps 2
endif

.PHONY: demo test test-all check-noise lint install clean

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
	$(BIN)/python -m bench.check --json $(OUT)/check.json
	$(BIN)/python -m pytest --benchmark-only $(SWEEP) --benchmark-json=$(OUT)/benchmark.json
	$(BIN)/python -m reports scaling $(OUT)/benchmark.json --out $(OUT)
	$(BIN)/python train_minimal.py table --runs $(OUT)/runs --out $(OUT)/training $(TABLE)
	$(BIN)/python train_minimal.py bench --dataset digits --out $(OUT)/training $(BENCH)
	$(BIN)/python train_minimal.py profile --dataset digits --backend torch --out $(OUT)/training $(PROFILE)
	$(BIN)/python -m reports page --out $(OUT)/index.html
	@echo "Open $(OUT)/index.html"

test: install
	$(PYTEST) -m "not slow"

test-all: lint test
	$(PYTEST) -m slow

# Is a kernel that does a tenth more caught by `reports compare`, beside a noisy neighbour? Minutes.
check-noise: install
	$(BIN)/python -m bench.noise

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv $(OUT) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
