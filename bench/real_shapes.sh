#!/usr/bin/env bash
# Whole models of real shapes on one GPU: loading, prefill of 131,072 tokens in chunks, decode dense and sparse, a
# distillation step at 16,384 tokens, peak memory.
# Qwen3-8B and Qwen3.5-9B are loaded from a checkpoint generated for it (bench/make_checkpoint.py; under CHECKPOINTS, default a
# temporary folder), Qwen3-32B has random weights in memory and is left out below 120 GiB of GPU memory.
#   SPOT=build/gpu/spot OUT=out/gpu bench/real_shapes.sh
set -euo pipefail
cd "$(dirname "$0")/.."
spot=${SPOT:-build/gpu/spot} out=${OUT:-out/gpu} python=${PYTHON:-python3}
mkdir -p "$out"
checkpoints=${CHECKPOINTS:-$(mktemp -d)}
common=(--context 131072 --top-k-tokens 4096 --steps 24)
measure() { # NAME, then options of spot bench
  local name=$1
  shift
  "$spot" bench "${common[@]}" --prefill dense --prefill-chunk 8192 --attention spot --out "$out/$name-prefill.json" "$@"
  "$spot" bench "${common[@]}" --attention dense,spot --out "$out/$name-decode.json" "$@" --random
}
for name in qwen3.5-9b qwen3-8b; do
  "$python" bench/make_checkpoint.py bench/configs/$name "$checkpoints/$name"
  measure $name --model "$checkpoints/$name"
  rm -r "${checkpoints:?}/$name"
done
for name in qwen3.5-9b qwen3-8b; do
  for loss in sparse dense; do
    "$spot" bench distill --model bench/configs/$name --random --loss $loss --out "$out/$name-distill-$loss.json"
  done
done
memory=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | head -1)
if [ "$memory" -ge 122880 ]; then
  measure qwen3-32b --model bench/configs/qwen3-32b --random
else
  echo "Qwen3-32B: not run, its weights and 128K of KV cache need 120 GiB of GPU memory"
fi
