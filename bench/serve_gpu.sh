#!/usr/bin/env bash
# Requests a second of `spot serve` on one GPU, sparse over dense in one run and each at its own best chunk, under a 99th percentile
# of 100 ms between tokens (200 where dense cannot hold 100): shapes of Qwen3-8B with random weights, prompts of random tokens without
# prefix hits, all requests at once. Short contexts are read and attended to by the automatic policy; a budget in tokens, since what p
# takes of random weights says nothing. With PARTS=vllm the same generator against vLLM, where PYTHON can import it.
#   SPOT=build/gpu/spot OUT=out/gpu [MINUTES=8] [PARTS="128k 32k short"] [PYTHON=python3] bench/serve_gpu.sh
# Seconds on an H200: 128k 290 (dense took 35 a request with chunks of 256, between which its answers wait 104 ms; with 512 they wait
# 230), 32k 160, short 40, and 10 for each start of the server; of these only 128k was measured. Nothing is begun after MINUTES
# (a whole number) in all; what was left out is named.
set -euo pipefail
cd "$(dirname "$0")/.."
spot=${SPOT:-build/gpu/spot} out=${OUT:-out/gpu} python=${PYTHON:-python3} minutes=${MINUTES:-8} parts=${PARTS:-128k 32k short}
model=$out/serve-model sparse=spot:k=4096,prefill=auto deadline=$((SECONDS + minutes * 60))
mkdir -p "$out"
"$python" bench/stand_in_tokenizer.py bench/configs/qwen3-8b "$model"
SPOT_OPS_LIBRARY=$(dirname "$spot")/libspot_ops.so PYTHONPATH=python "$python" bench/random_selector.py "$model"
search() {  # NAME, then options of bench/serve.py search
  local name=$1 left=$((deadline - SECONDS))
  shift
  if [ $left -le 0 ]; then echo "$name: not run, the $minutes minutes were over"; return; fi
  "$python" bench/serve.py search --spot "$spot" --model "$model" --serve=--random --serve=--selector=spot \
    --first-id 1000 --end-id 150000 --minutes "$(awk "BEGIN { print $left / 60 }")" --out "$out/serve-$name.json" "$@" |
    tee "$out/serve-$name.txt"
}
for part in $parts; do
  case $part in
    128k) search 128k --shape 131072/512x4 --chunks dense=256 --chunks "$sparse=1024,2048" ;;
    32k) search 32k --shape 32768/2048x12 --chunks dense=512,1024 --chunks "$sparse=1024,2048" ;;
    short) search short --shape 2048/128x48 --shape 7168/256x24 --chunks dense=1024,2048 --chunks "$sparse=1024,2048" ;;
    vllm)
      "$python" -c 'import vllm' 2>/dev/null || { echo "vLLM: not run, $python cannot import it"; continue; }
      for chunk in ${CHUNKS:-512 1024 2048}; do
        "$python" -m vllm.entrypoints.openai.api_server --model "$model" --load-format dummy --port 8123 --max-model-len 131584 \
          --max-num-batched-tokens "$chunk" --enable-chunked-prefill --no-enable-prefix-caching >"$out/vllm-$chunk.log" 2>&1 &
        server=$!
        trap 'kill $server 2>/dev/null || true' EXIT
        until curl -sf http://127.0.0.1:8123/health >/dev/null; do
          kill -0 $server 2>/dev/null || { tail -20 "$out/vllm-$chunk.log"; exit 1; }
          sleep 1
        done
        for shape in ${SHAPES:-131072/512/6 32768/2048/12}; do
          IFS=/ read -r prompt answer requests <<<"$shape"
          "$python" bench/serve.py load --url http://127.0.0.1:8123 --first-id 1000 --end-id 150000 --prompt "$prompt" --answer "$answer" \
            --requests "$requests" --out "$out/serve-vllm-$prompt-$chunk.json" | tee -a "$out/serve-vllm.txt" || true
        done
        kill $server
        wait $server || true
      done
      ;;
    *) echo "error: PARTS holds '$part'; it may hold 128k, 32k, short and vllm" >&2; exit 2 ;;
  esac
done
