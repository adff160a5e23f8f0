# Every target sets up what it needs: `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
VENV ?= .venv

# The caller's, whatever PATH has below; it may have been given on the command line.
override PYTHON := $(or $(shell command -v '$(PYTHON)'),$(PYTHON))
# The interpreter, ninja and the lint tools all come from the virtual environment.
export PATH := $(abspath $(VENV))/bin:$(PATH)
PIP_INSTALL := python -m pip install --quiet --constraint constraints.txt
INSTALLED := $(VENV)/.installed
EXTENSION := fusedskip/_C.abi3.so
KIND := $(VENV)/.kind-$(or $(FUSEDSKIP_BUILD),auto)
CSRC := $(wildcard csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
TEST_CPP := $(wildcard tests/*.cpp tests/emulator/*.cpp tests/emulator/*.h)

.PHONY: help build demo test lint format bench bench-compare readme gpu tune choices wheel clean

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' Makefile | expand -t 15

# The install is editable and compiles nothing: build_ext below does, and recompiles only what changed.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) setuptools
	FUSEDSKIP_BUILD=none $(PIP_INSTALL) --no-build-isolation --editable '.[triton,demo,test,dev]'
	touch $@

$(KIND): | $(INSTALLED)
	rm -f $(VENV)/.kind-*
	touch $@

$(EXTENSION): setup.py $(CSRC) $(KIND)
	python setup.py --quiet build_ext --inplace

build: $(INSTALLED) $(EXTENSION)  ## make .venv, install, compile (FUSEDSKIP_BUILD=auto|cpu|cuda|none)

demo: build  ## train one network with eager and with fused blocks, and compare
	python -m fusedskip demo

# One thread a worker: two workers fill two cores. Tests about threads set their own number.
test: build  ## run all tests
	OMP_NUM_THREADS=1 python -m pytest -n 2

lint: $(INSTALLED)  ## check style and types
	ruff check .
	ruff format --check .
	clang-format --dry-run -Werror $(CSRC) $(TEST_CPP)
	mypy

format: $(INSTALLED)  ## rewrite Python, C++ and CUDA in the project's style
	ruff check --fix .
	ruff format .
	clang-format -i $(CSRC) $(TEST_CPP)

# glibc keeps freed memory: otherwise page faults of fresh outputs drown the kernels.
bench bench-compare: export MALLOC_MMAP_THRESHOLD_ := 8000000000
bench bench-compare: export MALLOC_TRIM_THRESHOLD_ := 16000000000
RESULTS := benchmarks/results

bench: build  ## measure speed, FULL=1 for hours; SAVE=name also writes benchmarks/results/name.json
	python -m pytest benchmarks --benchmark-enable --benchmark-only --benchmark-max-time=0.2 \
	    $(if $(FULL),--full) $(if $(SAVE),--benchmark-json=$(RESULTS)/$(SAVE).json)

bench-compare: build  ## the working tree's speed over that of BASE=ref, with its spread; K=cases
	python -m benchmarks.compare '$(BASE)' $(if $(K),-k '$(K)')

readme: $(INSTALLED)  ## rewrite the README's tables and plots from benchmarks/results
	python -m benchmarks.report --readme README.md $(sort $(wildcard $(RESULTS)/*.json))

# Without .venv and network: $(PYTHON) holds torch, and the package is installed there, editable.
gpu tune: OUT ?= gpu-results
gpu:  ## build, test and measure on this machine's GPU into OUT=dir; PARTS=... takes some alone
	$(PYTHON) -m benchmarks.gpu '$(OUT)' $(if $(PARTS),--parts $(PARTS))

tune:  ## measure on this machine's GPU where one launch beats two
	$(PYTHON) -m benchmarks.gpu '$(OUT)' --parts tune-64 tune-256

choices: $(INSTALLED)  ## rewrite csrc/cuda/measured.h from what `make tune` measured
	python -m benchmarks.choices csrc/cuda/measured.h $(wildcard $(RESULTS)/launches/*.json)

# The wheel's tag is in the pattern: one that is for this Python alone fails here.
wheel: $(INSTALLED)  ## build dist/*.tar.gz and, from it, dist/*.whl; TORCH=2.11.0 also tries that torch
	rm -rf dist
	python -m build --no-isolation
	abi3audit --strict --summary dist/*-cp310-abi3-*.whl
	$(if $(TORCH),FUSEDSKIP_TEST_TORCH=$(TORCH) python -m pytest tests/test_wheel.py)

clean:  ## remove what was built; .venv stays
	rm -rf build dist *.egg-info $(EXTENSION) .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
