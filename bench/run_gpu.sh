#!/usr/bin/env bash
# The whole GPU check: builds the CUDA code, tests kernels, operators, attention and backbones on this GPU, times the
# kernels beside torch's own, and whole models of real shapes. Results also in ${OUT:-out/gpu}/.
#   bench/run_gpu.sh [--quick] [--no-models] [--no-build]
#   --quick      fewer shapes of the kernel benchmarks
#   --no-models  without bench/real_shapes.sh (which needs 20 to 110 GiB of GPU memory)
#   --no-build   run what build/gpu already holds
# PYTHON names an interpreter with a CUDA build of torch (default: python3).
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-out/gpu}
python=${PYTHON:-python3}
models=yes build=yes quick=()
for word in "$@"; do
  case $word in
    --quick) quick=(--quick) ;;
    --no-models) models=no ;;
    --no-build) build=no ;;
    *) echo "error: $word is not an option of bench/run_gpu.sh" >&2; exit 2 ;;
  esac
done
mkdir -p "$out"
tests=(test_kernels_gpu test_layer_ops_gpu test_operators_gpu test_layer_loss test_distill_operators_gpu test_attention_gpu test_backbone_gpu test_decode_step_gpu)
if [ $build = yes ]; then
  cmake --preset cuda -B build/gpu -DPython3_EXECUTABLE="$(command -v "$python")" >"$out/configure.log" ||
    { cat "$out/configure.log"; exit 1; }
  ninja -C build/gpu spot decode_kernels "${tests[@]}" >"$out/build.log" || { tail -50 "$out/build.log"; exit 1; }
fi
for test in "${tests[@]}"; do
  "$(find build/gpu -type f -name "$test")" --gtest_brief=1
done
build/gpu/kernels/decode_kernels --json "$out/decode_kernels.json" "${quick[@]}" | tee "$out/decode_kernels.txt"
"$python" bench/dense_sdpa.py --against "$out/decode_kernels.json" --json "$out/dense_sdpa.json" | tee "$out/ratios.txt"
"$python" bench/gated_delta.py "${quick[@]}" --json "$out/gated_delta.json" | tee "$out/gated_delta.txt"
[ $models = no ] || SPOT=build/gpu/spot OUT="$out" bench/real_shapes.sh
