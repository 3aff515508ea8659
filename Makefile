# LoRABERTa: `make` lists the targets. Each one first sets up what it needs, once, in .venv.

PYTHON ?= python3
CONFIG ?= experiments/quickstart.toml
TABLE_CONFIG = $(if $(filter file,$(origin CONFIG)),experiments/agnews,$(CONFIG))
ARGS ?=
FILES ?= 100000

VENV := .venv
ADAPTERS_VENV := .venv-adapters
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help setup train table test proofs adapters-env fuzz faults bench bench-scaling lint clean
.DELETE_ON_ERROR:

help: ## list the targets
	@echo "LoRABERTa: LoRA for RoBERTa, from scratch"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo '  make train CONFIG=experiments/agnews/base_r6_a14_qkv.toml ARGS="--lora.rank 8"'
	@echo "  PYTHON=python3.12 make setup   chooses the interpreter (3.11 or later)"

setup: $(VENV)/.installed ## create .venv and install what running needs (the other targets do it themselves)

train: $(VENV)/.installed ## train and score: CONFIG=file.toml, ARGS="--lora.rank 8 ..."
	@$(BIN)/python train.py $(CONFIG) $(ARGS)

table: $(VENV)/.installed ## run a set of configurations into one table: CONFIG=folder or file, ARGS="--seeds 3 --jobs 2"
	@$(BIN)/python -m experiments.table $(TABLE_CONFIG) $(ARGS)

# One thread per worker: two workers with two threads each slow each other down.
test: $(VENV)/.installed-dev ## run all proofs and tests
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -q -n 2 $(ARGS)

proofs: $(VENV)/.installed-dev ## print one table: how far each result is from peft and transformers
	@OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m tests.parity.proofs -n 2 $(ARGS)

adapters-env: $(ADAPTERS_VENV)/.installed ## compute what AdapterHub's library gives, in .venv-adapters, and load files both ways
	@OMP_NUM_THREADS=1 $(ADAPTERS_VENV)/bin/python -m tests.parity.adapterhub

fuzz: $(VENV)/.installed-dev ## give every reader 100,000 broken files (FILES=...)
	LORABERTA_FUZZ=$(FILES) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -s -n 2 tests/fuzz $(ARGS)

faults: $(VENV)/.installed-dev ## break runs (disk, memory, clock, kill, damage), resume them, print what was lost
	@OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m tests.faults.campaign $(ARGS)

bench: $(VENV)/.installed-dev ## compare with peft + transformers side by side: ARGS="--device cuda --json out.json"
	@$(BIN)/python -m benchmarks.against_peft $(ARGS)

bench-scaling: $(VENV)/.installed-dev ## measure how time and memory grow with batch, length, rank, layers and rows
	@$(BIN)/python -m benchmarks.scaling $(ARGS)

lint: $(VENV)/.installed-dev ## check style, security and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove .venv, .venv-adapters and caches of tools (not runs/)
	rm -rf $(VENV) $(ADAPTERS_VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written last: an interrupted step is repeated, and so is one whose stamp is older than pyproject.toml. The
# project is installed in place ("editable"): lora and roberta can be imported from anywhere, the rest runs from here.
$(VENV)/.installed: pyproject.toml | $(VENV)/.created
	@echo "installing what LoRABERTa needs into $(VENV) (once; a few minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing what the tests need into $(VENV) (once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "error: $(PYTHON) is missing or older than Python 3.11; choose another: PYTHON=python3.12 make" >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "error: $(PYTHON) lacks venv or pip; on Debian: apt install python3-venv python3-pip" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# The library pins another transformers than the tests.
$(ADAPTERS_VENV)/.installed:
	@echo "installing AdapterHub's library into $(ADAPTERS_VENV) (once; a few minutes)"
	@$(PYTHON) -m venv $(ADAPTERS_VENV)
	@$(ADAPTERS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check "adapters==1.2.*" torch==2.13.0
	@touch $@
