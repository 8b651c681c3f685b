#!/usr/bin/env bash
# What the Python side has to show on a GPU, in one call of less than nine minutes: the vLLM plug-in over stock vLLM at 131,072
# tokens for one and four sequences, needles and the hybrid inside vLLM, tensor parallel where two GPUs are, and attached
# transformers over its own sdpa. Results in ${OUT:-out/gpu}/, a line for each at the end; a step that fails does not stop the others.
#   PYTHON=/path/to/python SPOT_BUILD=build/gpu bench/plugin_gpu.sh
#   bench/plugin_gpu.sh --dry-run   the same on small shapes and vLLM's CPU build (times say nothing)
# PYTHON: an interpreter with torch 2.13 (CUDA 13.0), vLLM 0.32 or 0.33 and its transformers (default: python3). SPOT_BUILD: a
# CMake build of spot_ops_library against that torch (default: build/gpu).
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} out=${OUT:-out/gpu} seconds=${SECONDS_IN_ALL:-530}
export SPOT_BUILD=${SPOT_BUILD:-build/gpu}
device=cuda dry=() few=() patience=1
case "${1:-}" in
  --dry-run) device=cpu dry=(--device cpu --tiny) few=(--prompts 2) patience=4 ;;
  "") ;;
  *) echo "error: $1 is not an option of bench/plugin_gpu.sh; it has --dry-run" >&2; exit 2 ;;
esac
library=$PWD/$SPOT_BUILD/libspot_ops.so
[[ $SPOT_BUILD != /* ]] || library=$SPOT_BUILD/libspot_ops.so
[ -f "$library" ] || { echo "error: $library does not exist; build spot_ops_library, or name the build folder in SPOT_BUILD" >&2; exit 1; }
"$python" -c 'import vllm, transformers' >/dev/null 2>&1 || { echo "error: $python has not both vllm and transformers; name another in PYTHON" >&2; exit 1; }
gpus=0
[ $device = cpu ] || gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)
[ $device = cpu ] || [ "$gpus" -gt 0 ] || { echo "error: no GPU was found; --dry-run needs none" >&2; exit 1; }
mkdir -p "$out"
out=$(realpath "$out")
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"$python" -c 'import pathlib, sys; from tests.vllm.environment import make_site; make_site(pathlib.Path(sys.argv[1]))' "$site"
path=$site:$PWD/python
[ $device = cuda ] || path=$site:$PWD/tests/vllm/cpu_build:$PWD/python
[ $device = cuda ] || export VLLM_TARGET_DEVICE=cpu VLLM_CPU_KVCACHE_SPACE=1

names=() pids=()
# start NAME GPUS MOST_SECONDS COMMAND...: in the background, with what is left of the time at most.
start() {
  local name=$1 visible=$2 most=$((patience * $3)) left=$((patience * seconds - SECONDS))
  shift 3
  [ "$left" -ge "$most" ] || most=$left
  echo "$name (GPU $visible, at most $most s)"
  (
    [ $device = cpu ] || export CUDA_VISIBLE_DEVICES=$visible
    [ "$most" -gt 0 ] || { echo "no time was left"; exit 124; }
    PYTHONPATH=$path SPOT_OPS_LIBRARY=$library timeout "$most" "$@"
  ) >"$out/$name.log" 2>&1 &
  names+=("$name") pids+=($!)
}
plugin() { start vllm_plugin 0 290 "$python" bench/vllm_plugin.py --fill --context 130816 --repeats 2 --batch 1,4 --out "$out/vllm_plugin.json" "${dry[@]}"; }
needles() { start vllm_needles "$1" 180 "$python" bench/vllm_needles.py --device $device --cases qwen3,hybrid --out "$out/vllm_needles.json" "${few[@]}"; }
ranks() { start vllm_ranks 0,1 150 "$python" bench/vllm_needles.py --device $device --cases ranks --out "$out/vllm_ranks.json" "${few[@]}"; }
attach() { start attach "$1" 180 "$python" bench/attach.py --no-compiled --out "$out/attach.json" "${dry[@]}"; }
if [ "$gpus" -ge 2 ]; then
  plugin
  needles 1
  wait "${pids[1]}"
  attach 1
  wait "${pids[0]}" "${pids[2]}"
  ranks
else
  plugin
  wait "${pids[0]}"
  needles 0
  wait "${pids[1]}"
  attach 0
  wait "${pids[2]}"
  if [ $device = cpu ]; then ranks; else echo "vllm_ranks: left out, one GPU"; fi
fi
failed=0
for i in "${!pids[@]}"; do
  status=0
  wait "${pids[$i]}" || status=$?
  [ $status = 0 ] || failed=1
  echo "${names[$i]}: status $status, $out/${names[$i]}.json"
  [ $status = 0 ] || tail -n 5 "$out/${names[$i]}.log"
done
"$python" - "$out" <<'PY'
import json
import pathlib
import sys

out = pathlib.Path(sys.argv[1])
for name in ("vllm_plugin", "attach", "vllm_needles", "vllm_ranks"):
    path = out / f"{name}.json"
    if not path.exists():
        continue
    found = json.loads(path.read_text())
    for key in ("ratio", "qwen3", "hybrid", "ranks"):
        if key in found:
            print(name, key, json.dumps(found[key]))
PY
echo "$SECONDS s in all"
exit $failed
