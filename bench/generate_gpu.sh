#!/usr/bin/env bash
# What the engine of `spot generate` keeps of `spot bench`'s decode step: tokens a second of both at 131,072 tokens on the
# shapes of Qwen3-8B, dense and sparse, and four sequences at 32,768.
#   SPOT=build/gpu/spot OUT=out/gpu bench/generate_gpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."
spot=${SPOT:-build/gpu/spot} out=${OUT:-out/gpu}
mkdir -p "$out"
common=(--model bench/configs/qwen3-8b --random --top-k-tokens 4096 --prefill-chunk 8192 --engine)
"$spot" bench "${common[@]}" --context 131072 --steps 64 --attention dense,spot --out "$out/generate-128k.json"
"$spot" bench "${common[@]}" --context 32768 --batch 4 --steps 64 --attention dense,spot --out "$out/generate-32k-b4.json"
