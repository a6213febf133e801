# Everything a newcomer needs: `make demo`, `make test`. Only Python 3.11+, git and make are assumed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= out/demo
# Without an NVIDIA GPU, keep pip from installing CUDA packages.
ifeq ($(shell command -v nvidia-smi 2>/dev/null),)
export PIP_CONSTRAINT := $(CURDIR)/constraints-cpu.txt
endif
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export HF_HUB_DISABLE_TELEMETRY := 1

.DEFAULT_GOAL := help
.PHONY: help demo scoreboard guards speed test fast lint types format clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

$(VENV)/run.stamp: pyproject.toml constraints-cpu.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "steerclear needs Python 3.11 or newer; set PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -e .
	touch $@

$(VENV)/test.stamp: $(VENV)/run.stamp
	$(BIN)/python -m pip install -q -e '.[test]'
	touch $@

demo: $(VENV)/run.stamp ## pictures without and with the guards, a table and OUT/report.html
	$(BIN)/steerclear demo --out $(OUT)

SCOREBOARDS := scoreboard scoreboard_controls scoreboard_stochastic
scoreboard: $(VENV)/run.stamp ## the tables of the README and the docs: an hour on 2 cores, goes on where it stopped
	for task in $(SCOREBOARDS); do $(BIN)/steerclear evaluate run benchmarks/$$task.yaml -o out/$$task --workers 2 || exit 1; done
	$(BIN)/python benchmarks/tables.py --collect $(SCOREBOARDS:%=out/%)

GUARDS := guards guards_stochastic guards_unconditional
guards: $(VENV)/run.stamp ## the tables of docs/choosing.md, every guard on every model: an hour on 2 cores
	for task in $(GUARDS); do $(BIN)/steerclear evaluate run benchmarks/$$task.yaml -o out/$$task --workers 2 || exit 1; done
	$(BIN)/python benchmarks/class_conditional.py --samples 320 --bf16
	$(BIN)/python benchmarks/tables.py --collect $(GUARDS:%=out/%)
	$(BIN)/python benchmarks/guards_figure.py

speed: $(VENV)/test.stamp ## what posteriors, the index and guards cost: docs/large-sets.md; 15 minutes on a quiet machine
	$(BIN)/python benchmarks/posterior.py
	$(BIN)/python benchmarks/guard_cost.py --unet
	$(BIN)/python benchmarks/index.py
	$(BIN)/python benchmarks/index_figure.py
	$(BIN)/python benchmarks/tables.py

test: $(VENV)/test.stamp lint types ## lint, types and the whole test suite
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

fast: $(VENV)/test.stamp ## the tests that take seconds
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m 'not slow'

lint: $(VENV)/test.stamp ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/test.stamp ## pyright, strict
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/test.stamp ## format and fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and everything built
	rm -rf $(VENV) out build dist .pytest_cache .ruff_cache
