# make demo and make test need Python 3.10 or newer and a C++ compiler; nvcc on the PATH adds the CUDA kernels.
#   make test TORCH=2.11.0   another torch       make test PYTHON=python3.12   another Python
#   make test WORKERS=1      one pytest process, with torch's threads
#   make cpp-test SANITIZE=ON                    GPU_PYTHON=...  make gpu-check: on a machine with a GPU
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV ?= .venv
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)
GPU_PYTHON ?= python3
SANITIZE ?= OFF

comma := ,
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
STAMPS := $(VENV)/.stamps
BUILD_INPUTS := CMakeLists.txt pyproject.toml tools/kernel_manifest.py \
  $(shell find cmake csrc kernels -type f -not -name '*.pyc') $(wildcard benchmarks/results/*/verified.json)
CXX_FILES = $(shell find csrc kernels tests/csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
CPP_BUILD := build/cpp$(if $(filter ON,$(SANITIZE)),-sanitize)
PYTEST := $(PY) -m pytest -q
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 8 ? n : 8))) # each takes a gigabyte
IN_PARALLEL := $(if $(filter-out 1,$(WORKERS)),-n $(strip $(WORKERS)) --dist loadfile --no-loadscope-reorder)

.PHONY: help demo bench test py-test cpp-test lint format docs gpu-check clean

help: ## the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

demo: $(STAMPS)/examples ## what genfast does, in a minute
	$(VENV)/bin/genfast demo

bench: $(STAMPS)/bench ## benchmarks on this machine
	$(VENV)/bin/genfast bench

test: $(STAMPS)/test cpp-test py-test ## every test that needs no GPU
	@$(PY) -c "from genfast import _ledger; print('Kernels with no verified GPU run:', ', '.join(_ledger.pending()) or 'none')"

# pytest-xdist's workers have a thread each, but for tests that choose a number. Each instruction set of this machine beside
# the best one runs the op tests again, with two threads, but for those that choose theirs (attention's in C++).
# Triton's interpreter must be chosen before Triton is imported, hence its own process.
py-test: $(STAMPS)/test
	$(PYTEST) $(IN_PARALLEL) tests --ignore=tests/triton -m "not gpu"
	set -- $$($(PY) -c "from genfast._native import C; print(*[isa for isa in C.cpu_isas() if isa != C.cpu_isa()])"); \
	named=$$($(PY) -c "from genfast._native import C; print(' or '.join(C.cpu_isas()))"); \
	for isa; do echo "GENFAST_CPU=$$isa"; GENFAST_CPU=$$isa OMP_NUM_THREADS=2 $(PYTEST) $(IN_PARALLEL) tests/ops --ignore-glob="*/test_rbm_*" --ignore-glob="*/test_attention*" -m "not gpu and not slow" -k "not ($$named)"; done
	$(PYTEST) --doctest-modules --doctest-ignore-import-errors genfast # transformers and diffusers need Python 3.11
	if $(PY) -c "import triton" 2>/dev/null; then TRITON_INTERPRET=1 $(PYTEST) $(IN_PARALLEL) tests/triton -m "not gpu and not exhaustive"; \
	else echo "Triton is not installed: its tests are skipped"; fi

cpp-test: ## the C++ tests
	if command -v cmake >/dev/null && cmake -P cmake/version.cmake 2>/dev/null; then \
	  cmake -S . -B $(CPP_BUILD) -DGENFAST_CUDA=OFF -DGENFAST_CPP_TESTS=ON -DGENFAST_SANITIZE=$(SANITIZE) >/dev/null; \
	  cmake --build $(CPP_BUILD) --target genfast_cpp_tests --parallel $$(getconf _NPROCESSORS_ONLN); \
	  ctest --test-dir $(CPP_BUILD) --output-on-failure --parallel $$(getconf _NPROCESSORS_ONLN); \
	else echo "cmake 3.24 or newer is not on the PATH: the C++ tests are skipped"; fi

lint: $(STAMPS)/dev ## ruff, clang-format, mypy, yamllint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)
	$(VENV)/bin/mypy
	$(VENV)/bin/yamllint --strict .github

format: $(STAMPS)/dev ## formats Python, C++ and CUDA
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

docs: $(STAMPS)/docs ## the documentation, to site/
	$(VENV)/bin/mkdocs build --strict

# Builds for this GPU's architecture into GPU_PYTHON's own environment (its torch, no download), tests, and writes the ledger
# under benchmarks/results.
gpu-check: ## checks and benchmarks the kernels on this machine's GPU
	@$(GPU_PYTHON) -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || { \
	  echo "make gpu-check: $(GPU_PYTHON) has no torch that sees a CUDA GPU; set GPU_PYTHON to one that does"; exit 1; }
	arch=$$($(GPU_PYTHON) -c "import torch; v = torch.cuda.get_device_capability(); print('%d%d%s-real' % (*v, 'a' * (v == (9, 0))))"); \
	GENFAST_CUDA=ON CMAKE_ARGS="$${CMAKE_ARGS:-} -DCMAKE_CUDA_ARCHITECTURES=$$arch" \
	PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_INDEX=1 \
	$(GPU_PYTHON) -m pip install --disable-pip-version-check --no-build-isolation --no-deps -e .
	TRITON_INTERPRET=0 $(GPU_PYTHON) -m pytest tests --ignore=tests/triton -m gpu -q
	TRITON_INTERPRET=0 $(GPU_PYTHON) -m genfast.verify --results benchmarks/results

clean: ## removes what make made
	rm -rf $(STAMPS) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	if [ -e $(VENV)/.made-by-make ]; then rm -rf $(VENV); fi
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# ---- the environment: each stamp stands for something installed in it ----
$(STAMPS)/venv:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || { \
	  echo "genfast needs Python 3.10 or newer; $(PYTHON) is older: make PYTHON=python3.12 ..."; exit 1; }
	if [ ! -x $(PY) ]; then $(PYTHON) -m venv $(VENV); touch $(VENV)/.made-by-make; fi
	mkdir -p $(STAMPS)
	touch $@

$(STAMPS)/torch-$(TORCH): | $(STAMPS)/venv
	$(PIP) "torch==$(TORCH)"
	rm -f $(STAMPS)/torch-*
	touch $@

$(STAMPS)/genfast: $(STAMPS)/torch-$(TORCH) $(BUILD_INPUTS)
	$(PIP) "torch==$(TORCH)" -e .
	touch $@

# genfast is installed by now: these install what its extras ask for. Triton 3.6, torch 2.11's, needs an older numpy. timm
# and pythae come alone: timm's torchvision would have to fit torch, and where that is a build for CPUs, an index may have
# none that does; pythae asks for a backport that no Python needs today.
$(STAMPS)/test $(STAMPS)/examples $(STAMPS)/bench $(STAMPS)/docs $(STAMPS)/dev: $(STAMPS)/%: $(STAMPS)/genfast
	$(PIP) "torch==$(TORCH)" "genfast[$*$(if $(filter test,$*),$(comma)integrations)]" $(if $(filter 2.11.%,$(TORCH)),"numpy<2.4")
	$(if $(filter test,$*),$(PIP) --no-deps timm pythae)
	touch $@
