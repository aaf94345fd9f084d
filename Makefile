# Every target makes the environment in .venv first where it is not there yet, and builds the extension when it is out of
# date. pip's own settings apply (PIP_INDEX_URL, ...): an index with CPU-only torch builds saves several GB.

VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
CXX ?= g++
export CXX
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 10))
PYTHON ?= $(firstword $(foreach p,python3 python3.14 python3.13 python3.12 python3.11 python3.10,$(shell \
	$p -c '$(NEW_ENOUGH)' 2>/dev/null && echo $p)))
# Of test-gpu and bench-gpu: torch is there already, nothing is downloaded.
GPU_PYTHON ?= python3
# Of test-wheel: the torch beside which the wheel is tested.
OTHER_TORCH ?= torch==2.14.1
FREE_GB := 3
# More arguments for pytest, the demo or the benchmarks: make test ARGS='-k relu'
ARGS ?=

CPP := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')
EMULATION := $(shell find tests/cuda_emulation -name '*.cpp' -o -name '*.h' -o -name '*.cu')
# For the GPU that is there alone, and nothing is installed: what is missing is said first, in one line.
BUILD_FOR_GPU = arch=$$($(GPU_PYTHON) tests/check_gpu.py $(1)) && \
	FASTNN_CUDA=1 TORCH_CUDA_ARCH_LIST=$${TORCH_CUDA_ARCH_LIST:-$$arch} $(GPU_PYTHON) setup.py -q build_ext --inplace && \
	$(GPU_PYTHON) -c 'import sys; from fastnn.dispatch import CUDA_OFF; sys.exit(CUDA_OFF and "fastnn: " + CUDA_OFF)'
missing = { echo "fastnn: $(1)" >&2; exit 1; }

.PHONY: help demo test test-asan test-gpu wheel test-wheel lint bench bench-gpu clean
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.built  ## train on real images three ways (native, fastnn, converted) and compare; about 5 minutes
	@$(BIN)/python examples/compare.py --epochs 2 $(ARGS)

# Threads that wait must not keep the other process's from the cores.
test: $(VENV)/.built  ## run the test suite, in two processes
	@OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-asan: $(VENV)/.built  ## build with AddressSanitizer and UBSan, and run the kernel tests
	@PYTHON=$(BIN)/python sh tests/asan.sh $(ARGS)

test-gpu:  ## where python3 has a CUDA build of torch: build in place for it, and run the tests that use the GPU
	@$(call BUILD_FOR_GPU,pytest hypothesis tqdm)
	@$(GPU_PYTHON) -m pytest -m gpu $$($(GPU_PYTHON) -c 'import xdist' 2>/dev/null && \
		echo --numprocesses auto --maxprocesses 16 --dist worksteal) $(ARGS)

wheel: $(VENV)/.built  ## build a wheel into dist/, and say what it needs of a system
	@rm -rf build/lib.* dist/fastnn-*.whl
	@$(BIN)/pip wheel -qq --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir dist .
	@$(BIN)/python tests/check_wheel.py dist/fastnn-*.whl

test-wheel: wheel  ## install the wheel beside another torch (some GB, in a folder that is then removed) and test it
	@$(BIN)/python tests/check_wheel.py dist/fastnn-*.whl --torch "$(OTHER_TORCH)"

lint: $(VENV)/.built  ## ruff, mypy and clang-format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/clang-format --dry-run --Werror $(CPP) $(EMULATION)

bench: $(VENV)/.built  ## run every benchmark and rewrite its results, plots and the README's table
	@$(BIN)/python -m benchmarks --json benchmarks/results/cpu.json --plot docs/benchmarks --readme $(ARGS)

bench-gpu:  ## the same there on the GPU, into benchmarks/results/ under its name and the README's table of GPUs
	@$(call BUILD_FOR_GPU,tqdm PIL matplotlib)
	@$(GPU_PYTHON) -m benchmarks --device cuda --plot docs/benchmarks/gpu --readme --json "benchmarks/results/$$($(GPU_PYTHON) -c \
		'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))').json" $(ARGS)

clean:  ## remove what was built or written, but not .venv
	rm -rf build dist *.egg-info fastnn/*.so demo-results $(VENV)/.built
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# The environment: torch and what the build needs. Its checks come first, so that each says what is missing in one line.
# Without bytecode: to write all of it takes pip a minute, and Python writes what is imported.
$(VENV)/.torch: Makefile
	@test -n "$(PYTHON)" && $(PYTHON) -c '$(NEW_ENOUGH)' 2>/dev/null || \
		$(call missing,Python 3.10 or newer is needed: install it or name it with make PYTHON=/path/to/python3)
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		$(call missing,$(PYTHON) cannot make virtual environments: install its venv package (python3-venv))
	@$(PYTHON) -c 'import os, sysconfig; open(os.path.join(sysconfig.get_path("include"), "Python.h"))' 2>/dev/null || \
		$(call missing,the headers of $(PYTHON) are needed: install its development package (python3-dev))
	@command -v $(CXX) >/dev/null || \
		$(call missing,a C++17 compiler is needed: install g++ or name one with make CXX=/path/to/compiler)
	@test $$(df -Pk . | awk 'NR == 2 { print int($$4 / 1024 / 1024) }') -ge $(FREE_GB) || \
		$(call missing,$(FREE_GB) GB of free disk are needed in $(CURDIR))
	@echo "fastnn: making $(VENV) with $(TORCH) (a large download, some minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -qq --no-compile --disable-pip-version-check "$(TORCH)" numpy "setuptools>=77" wheel pybind11 ninja
	@touch $@

$(VENV)/.built: $(VENV)/.torch setup.py pyproject.toml $(CPP)
	@command -v $(CXX) >/dev/null || \
		$(call missing,a C++17 compiler is needed: install g++ or name one with make CXX=/path/to/compiler)
	@echo "fastnn: building the extension (some minutes)"
	@$(BIN)/pip install -qq --no-compile --disable-pip-version-check --no-build-isolation -e ".[examples,test,lint]"
	@touch $@
