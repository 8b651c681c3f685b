# make demo   distil a selector on a small real model, generate dense and sparse, print and plot the comparison (CPU)
# make test   build and run every test (CPU); compiles the CUDA kernels too where nvcc is found
# make fuzz   give the file readers random bytes for some seconds each (needs clang; tests/fuzz)
# make build  the spot binary, build/cpu/spot
# make test-vllm  the vLLM plug-in inside vLLM's CPU build, in an environment of its own (.venv-vllm, 2.5 GB)
# make gpu    on a machine with a GPU: build with CUDA, run the GPU tests and benchmarks
PYTHON := $(CURDIR)/.venv/bin/python
export SPOT_BUILD := $(CURDIR)/build/cpu
# Waiting threads yield: test programs run side by side.
export OMP_WAIT_POLICY := passive
NVCC := $(shell command -v nvcc 2>/dev/null)

.PHONY: setup build demo test test-cpp test-python test-vllm cuda-compile fuzz gpu clean

setup:
	@scripts/setup.sh

build: setup
	@cmake --preset cpu -DPython3_EXECUTABLE=$(PYTHON) >/dev/null
	@cmake --build build/cpu

# Of the build only what the demo runs.
demo: setup
	@cmake --preset cpu -DPython3_EXECUTABLE=$(PYTHON) >/dev/null
	@begin=$$(date +%s) && cmake --build build/cpu --target spot && echo "Built spot in $$(($$(date +%s) - begin)) s."
	@$(PYTHON) tools/demo.py

# The CUDA code must compile and link everywhere; only a GPU machine can run it (make gpu).
cuda-compile: setup
ifeq ($(NVCC),)
	@echo "nvcc was not found: the CUDA compile check was NOT run"
else
	@cmake --preset cuda -DPython3_EXECUTABLE=$(PYTHON) >/dev/null
	@cmake --build build/cuda --target cuda_parts
endif

test: build cuda-compile test-python test-cpp

test-python: build
	@$(PYTHON) -m pytest -q tests

test-cpp: build
	@ctest --test-dir build/cpu --output-on-failure -j2

test-vllm: build
	@scripts/setup_vllm.sh
	@.venv-vllm/bin/python -m pytest -q tests/vllm

# SECONDS_EACH=300 make fuzz for a long run.
fuzz: build
	@$(MAKE) -f tests/fuzz/Makefile -j2 all
	@$(MAKE) -f tests/fuzz/Makefile run

gpu:
	@bench/run_gpu.sh

clean:
	rm -rf build out
