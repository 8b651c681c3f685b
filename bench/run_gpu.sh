#!/usr/bin/env bash
# Builds the kernels, tests them on this GPU, times them, and prints the ratios to torch's dense attention.
#   bench/run_gpu.sh [--quick]        results also in ${OUT:-out}/
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-out}
mkdir -p "$out"
cmake -S kernels -B build/kernels -G Ninja >"$out/configure.log" || { cat "$out/configure.log"; exit 1; }
ninja -C build/kernels test_kernels_gpu decode_kernels >"$out/build.log" || { tail -50 "$out/build.log"; exit 1; }
build/kernels/test_kernels_gpu --gtest_brief=1
build/kernels/decode_kernels --json "$out/decode_kernels.json" "$@" | tee "$out/decode_kernels.txt"
python3 bench/dense_sdpa.py --against "$out/decode_kernels.json" --json "$out/dense_sdpa.json" | tee "$out/ratios.txt"
