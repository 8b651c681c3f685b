#!/usr/bin/env bash
# Prefill on one GPU, dense and sparse (4,096 tokens a tile), beside vLLM where PYTHON can import it: a layer's attention
# by stages, whole models' time to the first token at 32K, 128K, 256K and 512K, shapes of Qwen3-8B and Qwen3.5-9B.
#   SPOT=build/gpu/spot OUT=out/gpu [PYTHON=python3] [PARTS="layers models long vllm"] bench/prefill_gpu.sh
# Predicted on an H200, seconds: layers 30 (8B with tiles of 16, 32 and 64, 9B with 32); models 65 (8B at 128K: dense 2 x 12.3,
# sparse 2 x 4.3; 9B 2 x 5.6 and 2 x 4); long 50 (4 of 32 and of 64 chunks are run; dense 8B would take 44 and 166 in whole);
# vllm 95 (60 of them its start; 9 x 1.2 at 32K, 2 x 11.2 at 128K): 240 in all.
set -euo pipefail
cd "$(dirname "$0")/.."
spot=${SPOT:-build/gpu/spot} out=${OUT:-out/gpu} python=${PYTHON:-python3} parts=${PARTS:-layers models long vllm}
mkdir -p "$out"
bench() {  # NAME MODEL, then options of spot bench prefill
  local name=$1 model=$2 begin=$SECONDS
  shift 2
  "$spot" bench prefill --model "bench/configs/$model" --random --out "$out/prefill-$name-$model.json" "$@" |
    tee "$out/prefill-$name-$model.txt"
  echo "$name, $model: $((SECONDS - begin)) s"
}
for part in $parts; do
  case $part in
    layers)
      all=(--no-model --lengths 16384,32768,65536,131072,262144,524288 --chunks 16)
      bench layers qwen3-8b "${all[@]}" --attention spot:k=4096,spot:k=10%,spot:k=4096,tile=16,spot:k=4096,tile=64
      bench layers qwen3.5-9b "${all[@]}" --attention spot:k=4096,spot:k=10%
      ;;
    models)
      for model in qwen3-8b qwen3.5-9b; do bench models $model --no-layer --lengths 32768,131072; done
      ;;
    long) # with a layer first, which makes cuDNN's plans
      for model in qwen3-8b qwen3.5-9b; do bench long $model --lengths 262144,524288 --chunks 4 --rounds 1; done
      ;;
    vllm)
      if "$python" -c 'import vllm' 2>/dev/null; then
        begin=$SECONDS beside=()
        [ ! -f "$out/prefill-models-qwen3-8b.json" ] || beside=(--beside "$out/prefill-models-qwen3-8b.json")
        "$python" bench/vllm_prefill.py bench/configs/qwen3-8b --out "$out/prefill-vllm.json" "${beside[@]}" 2>"$out/prefill-vllm.log" |
          tee "$out/prefill-vllm.txt" || { tail -30 "$out/prefill-vllm.log"; exit 1; }
        echo "vllm: $((SECONDS - begin)) s"
      else
        echo "vLLM: not run, $python cannot import it"
      fi
      ;;
    *) echo "error: PARTS holds '$part'; it may hold layers, models, long and vllm" >&2; exit 2 ;;
  esac
done
