PYTHON ?= python3
BIN := .venv/bin
PHASE := sh scripts/phase.sh

# The demo and the checks need no network: the model is a package, the data lie in the tree.
# Passive waiting keeps the threads of several processes from spinning on shared cores.
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export OMP_WAIT_POLICY := passive
export GOMP_SPINCOUNT := 0

# Memory that one step frees is kept for the next one, not given back and faulted in again.
quickstart test-recipes bench bench-runs: export MALLOC_TRIM_THRESHOLD_ := 8000000000
quickstart test-recipes bench bench-runs: export MALLOC_MMAP_THRESHOLD_ := 4000000000

.DEFAULT_GOAL := help
.PHONY: help env quickstart test test-quick test-engines test-recipes test-gpu lint types conformance bench bench-runs docs clean distclean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-12s %s\n", $$1, $$2}' Makefile

env:  ## make or mend .venv (instant when nothing changed)
	@$(PYTHON) scripts/bootstrap.py

quickstart: env  ## fine-tune a small model on the CPU with the shipped recipe
	@$(PHASE) quickstart $(BIN)/sft train recipes/quickstart.yaml overwrite=true

test: lint types  ## ruff, mypy --strict, the whole suite
	@echo "== tests: the whole suite"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 -m "not engines and not recipes"

test-quick: env  ## the suite without the tests marked slow
	@echo "== tests: all but the slow ones"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 -m "not slow and not engines and not recipes"

test-engines: env  ## sharded runs, offload and quantised bases end to end (slow)
	@echo "== tests: engines"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m engines

test-recipes: env  ## every small recipe, whole, on the real model (up to 25 minutes)
	@echo "== tests: recipes"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal -m recipes --durations 0 tests/recipes

test-gpu: env  ## the cases of every kernel on this machine's GPU
	@echo "== tests: kernels on the GPU"
	@$(BIN)/python -m pytest tests/kernels -m gpu

lint: env  ## ruff: rules and format
	@$(PHASE) "ruff check" $(BIN)/ruff check .
	@$(PHASE) "ruff format" $(BIN)/ruff format --check .

types: env  ## mypy --strict
	@$(PHASE) mypy $(BIN)/python -m mypy --strict -p sft

conformance: env  ## PEFT's own tests on our methods (fetches them from PyPI)
	@$(PHASE) conformance $(BIN)/python tests/conformance/run.py

bench: env  ## measure methods, peers and kernels side by side (about 25 minutes) and write docs
	@$(PHASE) "methods and peers" $(BIN)/python benchmarks/methods.py
	@$(PHASE) "several adapters" $(BIN)/python benchmarks/switching.py
	@$(PHASE) crossover $(BIN)/python benchmarks/crossover.py
	@$(PHASE) kernels $(BIN)/python benchmarks/kernel_costs.py
	@$(PHASE) imports $(BIN)/python benchmarks/imports.py
	@$(PHASE) plans $(BIN)/python benchmarks/plan.py
	@$(BIN)/python benchmarks/report.py

bench-runs: env  ## measure whole runs of the recipes (about 70 minutes) and write docs
	@$(PHASE) quickstart $(BIN)/python benchmarks/quickstart.py
	@$(PHASE) recipes env OMP_NUM_THREADS=1 $(BIN)/python benchmarks/recipes.py --jobs 2
	@$(PHASE) "learning rates" env OMP_NUM_THREADS=1 $(BIN)/python benchmarks/rates.py --jobs 2
	@$(PHASE) "kept inputs" $(BIN)/python benchmarks/saved_inputs.py
	@$(PHASE) "zeroth-order step" $(BIN)/python benchmarks/zeroth_order_step.py
	@$(PHASE) "bases in 4 bits" $(BIN)/python benchmarks/quantized.py
	@$(PHASE) memory $(BIN)/python benchmarks/memory.py
	@$(BIN)/python benchmarks/report.py

docs: env  ## build the site into docs/_build
	@$(PHASE) docs $(BIN)/python -m sphinx -q -W -b html docs docs/_build

clean:  ## remove caches and build products, keep .venv and runs
	rm -rf build dist docs/_build *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean  ## remove .venv too
	rm -rf .venv
