# From a clean checkout, with nothing but Python 3.11+ and make: `make demo`, `make test`.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=
# Test processes; each one imports JAX anew, so more than cores only cost.
WORKERS ?= 2

.PHONY: help setup demo test quick fuzz oracles lint types bench soak constraints clean

help:
	@echo "make setup   fill $(VENV) with the project and all that it needs"
	@echo "make demo    train a CartPole policy without backpropagation; about a minute, most of it setup"
	@echo "make test    all tests, doctests and notebooks (ARGS='-k noise' to choose)"
	@echo "make quick   the same without those that take longest (tests/slow.txt)"
	@echo "make fuzz    damaged files of runs, and commands typed at random (ARGS='--count 5000 --seed 1')"
	@echo "make oracles packages that some tests need (torch, its optimizers and models, wandb) and are skipped without"
	@echo "make lint    ruff            make types   mypy"
	@echo "make bench   ratios of speed, in one run on this machine"
	@echo "make soak    many more examples of every property, and what make test leaves out for its length"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "Python 3.11 or newer is needed, and $(or $(PYTHON),what is on PATH) is not (set PYTHON=)." >&2; exit 1; }
	@set -e; if command -v uv >/dev/null 2>&1; then \
		test -x $(BIN)/python || uv venv -q --python $(PYTHON) $(VENV); \
		uv pip install -q --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[rl,supervised,reasoning,dev]'; \
	else \
		$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV); \
		$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[rl,supervised,reasoning,dev]'; \
	fi
	@touch $@

demo: setup
	$(BIN)/eggroll rl --preset cartpole --run-dir runs/demo --overwrite

test: setup
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -rs $(ARGS)

# A marker of a later -m takes the place of the one in pyproject.toml.
quick: setup
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'not soak and not slow' $(ARGS)

# A tenth of each is among the tests.
fuzz: setup
	JAX_PLATFORMS=cpu $(BIN)/python tests/helpers/fuzz_files.py $(ARGS)
	JAX_PLATFORMS=cpu $(BIN)/python tests/helpers/fuzz_commands.py $(ARGS)

# What some tests compare with or log to, where it is installed: other people's optimizers and models, W&B. PyTorch
# first, by itself: what needs any PyTorch then finds this one. It asks for a newer setuptools than the pinned.
oracles: setup
	$(BIN)/python -m pip install -q --disable-pip-version-check torch==2.13.0
	grep -v '^setuptools==' constraints.txt > $(VENV)/constraints
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(VENV)/constraints -e '.[oracles]' wandb

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m benchmarks.import_time
	$(BIN)/python -m benchmarks.noise
	$(BIN)/python -m benchmarks.forward
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.optim
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.nodes
	$(BIN)/python -m benchmarks.estimators

soak: setup
	XLA_FLAGS=--xla_cpu_use_fusion_emitters=true $(BIN)/python -m pytest -m 'soak or hypothesis' --hypothesis-profile=soak $(ARGS)

# The versions now in $(VENV), names and numbers alone: make clean first, for those of a fresh one.
constraints: setup
	echo "# The versions that the project is tested with; refreshed by make constraints." > constraints.tmp
	$(BIN)/python -m pip list --format=freeze --exclude-editable --exclude pip --exclude uv > $(VENV)/list
	LC_ALL=C sort -f $(VENV)/list >> constraints.tmp
	mv constraints.tmp constraints.txt

clean:
	rm -rf $(VENV) .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
