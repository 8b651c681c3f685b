#!/usr/bin/env bash
# The whole GPU check: builds the CUDA code, tests kernels, operators, attention and backbones on this GPU, times the
# kernels beside torch's own, and whole models of real shapes. Results also in ${OUT:-out/gpu}/.
#   bench/run_gpu.sh [--quick] [--no-models] [--no-build] [--sanitize] [--portable]
#   --quick      fewer shapes of the kernel benchmarks
#   --no-models  without bench/real_shapes.sh (which needs 20 to 110 GiB of GPU memory)
#   --no-build   run what build/gpu (build/portable) already holds
#   --sanitize   nothing but the kernels' and operators' tests, at small sizes, under compute-sanitizer: memcheck, initcheck, racecheck
#   --portable   nothing but the tests, built as PTX for compute capability 8.0 alone (build/portable), the kernels' also with the
#                shared memory of an A100 and of an RTX 4090; then decode_kernels' times beside this card's own build of them
# PYTHON names an interpreter with a CUDA build of torch (default: python3).
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-out/gpu}
python=${PYTHON:-python3}
models=yes build=yes sanitize=no portable=no quick=()
for word in "$@"; do
  case $word in
    --quick) quick=(--quick) ;;
    --no-models) models=no ;;
    --no-build) build=no ;;
    --sanitize) sanitize=yes ;;
    --portable) portable=yes ;;
    *) echo "error: $word is not an option of bench/run_gpu.sh" >&2; exit 2 ;;
  esac
done
mkdir -p "$out"
tests=(test_kernels_gpu test_layer_ops_gpu test_operators_gpu test_wide_linear test_layer_loss test_distill_operators_gpu test_attention_gpu test_backbone_gpu test_runner_gpu)
if [ $portable = yes ]; then
  if [ $build = yes ]; then
    for folder in portable gpu; do
      architectures=() targets=(decode_kernels)
      [ $folder = gpu ] || architectures=(-DSPOT_CUDA_ARCHITECTURES=80-virtual) targets=(decode_kernels "${tests[@]}")
      cmake --preset cuda -B build/$folder -DPython3_EXECUTABLE="$(command -v "$python")" "${architectures[@]}" >"$out/configure.log" ||
        { cat "$out/configure.log"; exit 1; }
      ninja -C build/$folder "${targets[@]}" >"$out/build.log" || { tail -50 "$out/build.log"; exit 1; }
    done
  fi
  failed=0
  run() {  # NAME SHARED_BYTES FILTER: with a block's shared memory as on another card
    echo "== $1${2:+, $2 bytes of shared memory}"
    env ${2:+SPOT_SHARED_BYTES=$2} "$(find build/portable -type f -name "$1")" --gtest_brief=1 --gtest_filter="$3" || failed=1
  }
  for test in "${tests[@]}"; do run "$test" "" '*'; done
  run test_kernels_gpu 166912 '*'
  # Prefill of linear attention is ATen's there.
  run test_kernels_gpu 101376 '-GatedDeltaKernels.*'
  run test_distill_operators_gpu 101376 '*'
  for folder in gpu portable; do
    build/$folder/kernels/decode_kernels --json "$out/decode_kernels_$folder.json" "${quick[@]}" >"$out/decode_kernels_$folder.txt"
  done
  "$python" bench/kernel_ratio.py "$out/decode_kernels_gpu.json" "$out/decode_kernels_portable.json" | tee "$out/portable.txt" || failed=1
  exit $failed
fi
if [ $build = yes ]; then
  cmake --preset cuda -B build/gpu -DPython3_EXECUTABLE="$(command -v "$python")" >"$out/configure.log" ||
    { cat "$out/configure.log"; exit 1; }
  targets=(spot decode_kernels prefill_kernels "${tests[@]}")
  [ $sanitize = no ] || targets=(test_kernels_gpu test_operators_gpu test_distill_operators_gpu)
  ninja -C build/gpu "${targets[@]}" >"$out/build.log" || { tail -50 "$out/build.log"; exit 1; }
fi
if [ $sanitize = yes ]; then
  sanitizer=$(command -v compute-sanitizer || echo "$(dirname "$(readlink -f "$(command -v nvcc)")")/compute-sanitizer")
  [ -x "$sanitizer" ] || { echo "error: compute-sanitizer was not found: put the CUDA toolkit's bin folder on PATH" >&2; exit 1; }
  # Side by side, in shards: instrumented programs wait for one CPU core most of the time. The kernels of linear attention are long
  # under the two slower tools; initcheck knows nothing of what torch's own kernels and copies initialise.
  pids=()
  check() {  # TOOL TEST SHARDS FILTER
    local shard
    for ((shard = 0; shard < $3; ++shard)); do
      SPOT_SMALL_TESTS=1 GTEST_TOTAL_SHARDS=$3 GTEST_SHARD_INDEX=$shard timeout ${SANITIZE_SECONDS:-540} "$sanitizer" --tool "$1" \
        --error-exitcode 1 "$(find build/gpu -type f -name "$2")" --gtest_brief=1 --gtest_filter="$4" >"$out/$1_$2_$shard.txt" 2>&1 &
      pids+=($!) names+=("$1_$2_$shard")
    done
  }
  names=()
  check memcheck test_kernels_gpu 2 '*'
  check initcheck test_kernels_gpu 2 '-GatedDelta*:*AMillionTokens'
  check racecheck test_kernels_gpu 6 '-GatedDelta*:*AMillionTokens'
  for tool in memcheck racecheck; do
    check $tool test_operators_gpu 1 '*'
    check $tool test_distill_operators_gpu 1 '*'
  done
  failed=0
  for i in "${!pids[@]}"; do
    status=0
    wait "${pids[$i]}" || status=$?
    [ $status = 0 ] || failed=1
    echo "${names[$i]}: status $status; $(grep -hE 'ERROR SUMMARY|RACECHECK SUMMARY' "$out/${names[$i]}.txt" | tail -1 | sed 's/=* *//')"
  done
  exit $failed
fi
for test in "${tests[@]}"; do
  "$(find build/gpu -type f -name "$test")" --gtest_brief=1
done
build/gpu/kernels/decode_kernels --json "$out/decode_kernels.json" "${quick[@]}" | tee "$out/decode_kernels.txt"
"$python" bench/prefill_kernels.py build/gpu/kernels/prefill_kernels --json "$out/prefill_kernels.json" | tee "$out/prefill_kernels.txt"
settings=()
[ ${#quick[@]} = 0 ] || settings=(--shapes qwen3-8b,qwen3.5-9b --lengths 32768,131072 --batch 1,4)
build/gpu/spot bench decode "${settings[@]}" --out "$out/decode.json" --page "$out/decode.html" | tee "$out/decode.txt"
"$python" bench/gated_delta.py "${quick[@]}" --json "$out/gated_delta.json" | tee "$out/gated_delta.txt"
[ $models = no ] || SPOT=build/gpu/spot OUT="$out" bench/real_shapes.sh
