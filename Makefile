# make test | make demo | make bench | make setup | make clean. Everything is installed into $(VENV); a second run starts at once.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules
.PHONY: help setup test demo bench clean

VENV ?= .venv
# A GPU or TPU build of JAX as well: make setup EXTRAS=test,cuda12 (or cuda13, tpu).
EXTRAS ?= test
# Test processes at once; each takes up to 6 GB.
WORKERS ?= 2
# The first Python that is new enough; name another by make PYTHON=/path/to/python.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)

BIN := $(VENV)/bin
comma := ,
INSTALLED := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))
DEMO_DATA := data/demo/manifest.json
# Progress must be seen as it happens, also through a pipe.
export PYTHONUNBUFFERED := 1

help:
	@head -1 Makefile

setup: $(INSTALLED)

$(INSTALLED): setup.cfg pyproject.toml third_party/constraints.txt
	@[[ -n "$(PYTHON)" ]] || { echo "no Python 3.11 or newer found; name one: make PYTHON=/path/to/python3"; exit 1; }
	[[ -x $(BIN)/python ]] || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c third_party/constraints.txt torch
	$(BIN)/python -m pip install -c third_party/constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

test: $(INSTALLED)
	@command -v node >/dev/null || echo "notice: no Node here, tests of JavaScript tasks are left out"
	@command -v javac >/dev/null || echo "notice: no JDK here, tests of Java tasks are left out"
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

demo: $(DEMO_DATA)
	$(BIN)/python launch/train.py --config=configs/smollm2_cpu.py --workdir=runs/demo

$(DEMO_DATA): configs/data_demo.py | $(INSTALLED)
	$(BIN)/python launch/prepare_data.py --config=configs/data_demo.py --out=$(@D)

# Beside its peers, which are installed for it; alone on the machine, or the times are worth little.
bench: $(DEMO_DATA)
	$(MAKE) setup EXTRAS=test,bench
	$(BIN)/python launch/benchmark.py --out=runs/bench --compare=hf,trl,tunix --config=configs/smollm2_cpu.py \
		--parts=workloads,reward,grammar,tags,ablation

# What was installed and cached; data/ and runs/ are yours.
clean:
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
