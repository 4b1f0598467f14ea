# Each verb does its own set-up: a virtual environment with pinned versions, and the build.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h')
TEST_SOURCES := $(shell find tests -name '*.cpp' -o -name '*.cu' -o -name '*.h')
PYTEST_ARGS ?=
# A build that fails is an error here; `make demo FASTRES_CPU=0` does without a compiler.
export FASTRES_CPU ?= 1
export FASTRES_CUDA ?= $(if $(shell command -v nvcc),1,auto)
export NVCC_APPEND_FLAGS ?= -Werror all-warnings

.DEFAULT_GOAL := help
.PHONY: help demo test test-full lint bench bench-pytest gpu-check clean

help:  ## list the verbs
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(INSTALLED)  ## train a ResNet on handwritten digits, stock and fused; writes report.html
	$(BIN)/fastres demo --out report.html

# A file's tests stay together: what they build is built once.
TESTS := --ignore=tests/triton_backend --ignore=tests/cuda_backend -n 2 --dist loadfile
# Triton's kernels are compiled, and then run in Triton's interpreter, which is a choice of the whole
# process. Neither uses threads: two processes share the work.
TRITON_TESTS := tests/triton_backend -n 2 --dist loadgroup
# CUDA's kernels run on the CPU, compiled for it, under AddressSanitizer and UBSan.
CUDA_TESTS := tests/cuda_backend -n 2
EMULATION := $(BIN)/python tests/cuda_emulation/build.py --environment
test: SOME := -m "not exhaustive"
test: tests  ## run the tests: of the large grids some, ten minutes on two cores
test-full: tests  ## run all of the tests
.PHONY: tests
tests: $(INSTALLED)
	$(BIN)/python -m pytest $(TESTS) $(SOME) $(PYTEST_ARGS)
	emulation=$$($(EMULATION)) && env $$emulation OPENBLAS_NUM_THREADS=1 \
		$(BIN)/python -m pytest $(CUDA_TESTS) $(SOME) $(PYTEST_ARGS)
	$(BIN)/python -m pytest $(TRITON_TESTS) $(SOME) $(PYTEST_ARGS)
	TRITON_INTERPRET=1 OPENBLAS_NUM_THREADS=1 \
		$(BIN)/python -m pytest $(TRITON_TESTS) $(SOME) $(PYTEST_ARGS)

lint: $(INSTALLED)  ## check style, types, layers and C++ formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run -Werror $(SOURCES) $(TEST_SOURCES)

bench: $(INSTALLED)  ## measure speed and memory against eager PyTorch
	$(BIN)/python -m bench block

bench-pytest: $(INSTALLED)  ## the same kernels, convolutions and blocks under pytest-benchmark
	$(BIN)/python -m pytest bench/suites --benchmark-columns=min,median,iqr,rounds $(PYTEST_ARGS)

# Without an environment made by make, the one at hand is used.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu-check:  ## all that a GPU can tell, within nine minutes; STAGE=build|parity|..., DRY=1 on a CPU
	$(GPU_PYTHON) -m bench.gpu_check $(if $(STAGE),--stage '$(STAGE)') \
		$(if $(LIMIT),--seconds $(LIMIT)) $(if $(DRY),--dry)

clean:  ## remove the environment and everything that was built
	rm -rf $(VENV) build dist *.egg-info report.html .ruff_cache .mypy_cache .pytest_cache \
		.import_linter_cache .hypothesis .benchmarks
	rm -f fastres/_c*.so fastres/_c*.pyd
	find fastres tests bench triton_kernels -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml setup.py constraints.txt $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("fastres needs Python 3.11 or newer, got " + sys.version.split()[0] + ": make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,bench]'
	touch $@
