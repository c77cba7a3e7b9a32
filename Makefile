# make demo and make test work on a bare machine with Python 3.10 or newer: each makes a virtual environment (.venv), installs
# what it needs and goes on. PYTHON=/path/to/python uses an existing environment as it is.

SHELL := /bin/sh
VENV := .venv

ifdef PYTHON
PY := $(PYTHON)
train-env dev-env tfds-env:
	@$(PY) -c "import torch" 2>/dev/null || { echo "error: $(PY) has no torch; install requirements-train.txt there or leave PYTHON out"; exit 2; }
else
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt

# the stamps hold what was installed: a changed file installs again
train-env: $(VENV)/train.stamp
dev-env: $(VENV)/dev.stamp

$(PY):
	@command -v python3 >/dev/null || { echo "error: python3 is missing; install Python 3.10 or newer"; exit 2; }
	@python3 -c "import sys; sys.exit(sys.version_info < (3, 10))" || { echo "error: python3 is older than 3.10"; exit 2; }
	@python3 -c "import venv, ensurepip" 2>/dev/null || { echo "error: python3 cannot make virtual environments; install the package python3-venv"; exit 2; }
	@python3 -m venv $(VENV)

$(VENV)/train.stamp: requirements-train.txt constraints.txt | $(PY)
	@echo "installing requirements-train.txt into $(VENV)"
	@$(PIP) -r requirements-train.txt && touch $@

$(VENV)/dev.stamp: requirements-train.txt requirements-dev.txt constraints.txt | $(PY)
	@echo "installing requirements-dev.txt into $(VENV)"
	@$(PIP) -r requirements-dev.txt && touch $@

# TensorFlow Datasets, 600 MB: the tests of its sources run where it is there
tfds-env: dev-env
	@$(PIP) -r requirements.txt
endif

.PHONY: demo test house test-slow test-gpu lint types bench bench-gpu kernels help train-env dev-env tfds-env

help:
	@echo "make demo       a task made on the spot: dense, then sparse, in minutes; what its choice of blocks is worth"
	@echo "make test       the tests; make test-slow: the long ones too; make lint, make types"
	@echo "make bench      benchmarks on this machine"
	@echo "make test-gpu, make bench-gpu: the same on a CUDA device"

# tests run beside other work; OpenMP threads that spin while they wait would slow down both
tests := OMP_WAIT_POLICY=passive $(PY) -m pytest -q
JOBS := 2

# Builds the kernels, then runs a command. Without them everything still runs, on the backend "reference": compile.sh says why,
# here again after the command's output.
define with-kernels
@said=$$(mktemp); PYTHON=$(PY) sh compile.sh 2>"$$said"; cat "$$said" >&2; \
$(1); status=$$?; grep '^compile.sh: ' "$$said" >&2; rm -f "$$said"; exit $$status
endef

kernels:
	@PYTHON=$(PY) sh compile.sh || true

demo: train-env
	$(call with-kernels,PYTHON=$(PY) sh experiments/demo.sh)

test: dev-env
	$(call with-kernels,$(tests) -n $(JOBS) --dist loadfile)

test-slow: dev-env
	$(call with-kernels,$(tests) -m "not gpu")

test-gpu: dev-env
	$(call with-kernels,$(tests) -m gpu)

lint: dev-env
	@$(PY) -m ruff check . && $(PY) -m ruff format --check .

house: dev-env
	@$(PY) -m pytest -q tests/test_house.py

types: dev-env
	@$(PY) -m mypy

bench: train-env kernels
	@$(PY) benchmarks/attention.py

bench-gpu: train-env kernels
	@$(PY) benchmarks/attention_cuda.py && $(PY) benchmarks/attention_cuda.py --dtype fp32 --json benchmarks/attention_cuda_fp32.json \
		&& $(PY) benchmarks/step.py --device cuda --batch 512 --micro_batches 128,512
