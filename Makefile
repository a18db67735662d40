# Every target sets up what it needs: `make test` works on a machine where nothing was done before.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NATIVE_SOURCES := $(shell find csrc -type f 2>/dev/null)
CXX_FILES = $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh')
SANITIZE := build/sanitize
# Has vLLM, of this version; another environment can be named.
VLLM ?= 0.32.0
ENGINES_VENV ?= build/engines-$(VLLM)
# Processes that run tests side by side.
WORKERS ?= auto

.DEFAULT_GOAL := help
.PHONY: help dev demo test test-fast test-zoo test-trees test-engines test-native soak fuzz gpu-report on-card wheel lint format docs bench lines

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

dev: $(VENV)/.package  ## Create the environment and install the package in place

$(VENV)/.requirements: requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

$(VENV)/.package: $(VENV)/.requirements pyproject.toml setup.py CMakeLists.txt $(NATIVE_SOURCES)
	@echo "Building the package and its native kernels: minutes on a small machine"
	$(BIN)/python -m pip install --quiet --no-build-isolation -e .
	@ls specens_kernels/_C.*.so >/dev/null 2>&1 || echo "No native kernels were built; the reference will run. Why: touch setup.py && SPECENS_NATIVE=1 make dev"
	touch $@

demo: dev  ## Decode with the shipped models
	$(BIN)/specens demo

test: dev test-native  ## Run every test this machine can run
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

test-fast: dev  ## Run the tests that take less than a second
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not slow"

# Minutes to an hour, by the number of cores.
test-zoo: dev  ## Write with every architecture of transformers, and print what became of each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --zoo -q -r fE tests/decoding/test_families.py

test-trees: dev  ## Run the ops for trees on many random ones, and kernels with bugs: half an hour
	$(BIN)/python tests/kernels/many_trees.py
	OMP_NUM_THREADS=1 VERIFY_TREE_CASES=10000 $(BIN)/python -m pytest -q -s tests/kernels/test_verify_trees.py

# vLLM asks for other releases than the ones above: it has an environment of its own.
test-engines: dev  ## Run ensembles in vLLM; installs its CPU build, 3 GB, unless ENGINES_VENV has one
	test -x $(ENGINES_VENV)/bin/vllm || $(BIN)/python tests/tools/vllm_environment.py $(ENGINES_VENV) $(VLLM)
	OMP_NUM_THREADS=1 ENGINES_PYTHON=$(abspath $(ENGINES_VENV))/bin/python $(BIN)/python -m pytest tests/engines

test-native: $(VENV)/.requirements  ## Run the native kernels under sanitizers
	@if [ "$(SPECENS_NATIVE)" != 1 ] && ! command -v $(CXX) >/dev/null; then \
	  echo "No C++ compiler: the native tests are skipped."; exit 0; fi; \
	set -ex; \
	for sanitize in address,undefined thread; do \
	  $(BIN)/cmake -Wno-unused-cli -S . -B $(SANITIZE)/$$sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	    -DPython_EXECUTABLE=$(abspath $(BIN))/python -Dpybind11_DIR=$$($(BIN)/pybind11-config --cmakedir) \
	    -DSPECENS_SANITIZE=$$sanitize -DSPECENS_WERROR=ON --log-level=WARNING; \
	done; \
	$(BIN)/cmake --build $(SANITIZE)/address,undefined; \
	$(BIN)/ctest --test-dir $(SANITIZE)/address,undefined --output-on-failure; \
	$(BIN)/cmake --build $(SANITIZE)/thread --target test_cuda; \
	$(BIN)/ctest --test-dir $(SANITIZE)/thread -R cuda --output-on-failure

soak: dev  ## Write 100,000 tokens with cancellations at random places: half an hour
	OMP_NUM_THREADS=1 SOAK_TOKENS=100000 $(BIN)/python -m pytest -s tests/decoding/test_soak.py

fuzz: test-native  ## Run 20,000 random native calls under sanitizers, most of them wrong
	$(BIN)/cmake $(SANITIZE)/address,undefined -DSPECENS_FUZZ_CALLS=20000 --log-level=WARNING
	$(BIN)/ctest --test-dir $(SANITIZE)/address,undefined -R fuzz --verbose --timeout 0
	$(BIN)/cmake $(SANITIZE)/address,undefined -DSPECENS_FUZZ_CALLS=500 --log-level=WARNING

gpu-report: dev  ## Compile the GPU kernels: registers, spills, occupancy, against their budget
	$(BIN)/python benchmarks/gpu_report.py --check

# Not `dev`: a machine that is lent with its own Python and no network.
on-card:  ## Run what only a GPU can show, in nine minutes, without a network; DRY=1 rehearses it
	$(PYTHON) benchmarks/on_card.py $(if $(DRY),--dry-run)

# Installs torch and transformers in two environments outside of the repository.
wheel: $(VENV)/.requirements  ## Build the wheel and the source distribution into dist/, and try both
	$(BIN)/python recipes/wheel.py

lint: dev  ## Check style and types; change nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: dev  ## Rewrite the sources in the house style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

docs: dev  ## Write the generated parts of the pages, and build them as a site in build/site
	$(BIN)/python benchmarks/report.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: dev  ## Run the benchmarks
	$(BIN)/python benchmarks/bench_verify.py
	$(BIN)/python benchmarks/bench_attention.py
	$(BIN)/python benchmarks/bench_compact.py
	$(BIN)/python benchmarks/bench_forward.py
	$(BIN)/python benchmarks/bench_loop.py
	$(BIN)/python benchmarks/bench_generate.py
	$(BIN)/python benchmarks/bench_traffic.py
	$(BIN)/python benchmarks/bench_methods.py

lines:  ## Print the lines of each part, and what is too long
	@$(PYTHON) benchmarks/lines.py
