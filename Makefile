# These two targets install everything they need, with Python 3.11 or newer:
#   make quickstart   data, the three stages, export, evaluation -> runs/quickstart/report.html
#   make test         linting, types and tests

SHELL := /bin/sh
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

# The first of these that works and is new enough; set PYTHON to choose another one.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { command -v $$p; break; }; done)

# Huge pages for XLA's buffers, and freed memory stays in the process, so that steps need not map and clear it again: a quarter to a third faster.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184

# glibc returns XLA's largest buffer to the system after every step; jemalloc keeps it, which saves another tenth.
JEMALLOC := $(firstword $(wildcard /usr/lib/*/libjemalloc.so.2 /usr/lib64/libjemalloc.so.2))
ifneq ($(JEMALLOC),)
quickstart: export LD_PRELOAD ?= $(JEMALLOC)
quickstart: export MALLOC_CONF ?= dirty_decay_ms:-1,muzzy_decay_ms:-1,thp:always
endif

.PHONY: quickstart test test-scale lint clean

quickstart: $(INSTALLED)
	$(PY) -m launch.quickstart --workdir=runs/quickstart

# One process per core, up to four: compilation takes most of the tests' time and uses one core.
test: lint
	$(PY) -m pytest -m "not scale" -n logical --maxprocesses=4 --dist=loadfile

test-scale: $(INSTALLED)
	$(PY) -m pytest -m scale

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# Installed again when the dependencies change; the stamp is written once everything is installed.
$(INSTALLED): setup.py
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer with venv and ensurepip was found (Debian: python3-venv): install one, or name it with PYTHON=/path/to/python" >&2; exit 2; }
	"$(PYTHON)" -m venv $(VENV)
	$(PY) -m pip install --upgrade pip
	$(PY) -m pip install -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
