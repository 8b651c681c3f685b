#!/usr/bin/env bash
# Runs the fuzzers of build/asan, two at a time: tests/fuzz/run.sh SECONDS [NAME...]; all of them without names. What they
# find stays in build/asan/corpus; a crash is written to build/asan/fuzz/NAME-crash-..., and ends with status 1.
set -euo pipefail
cd "$(dirname "$0")/../.."
seconds=$1
shift
build=$PWD/build/asan
python=${PYTHON:-.venv/bin/python}
names=("$@")
[ $# -gt 0 ] || { for seed in tests/fuzz/*/; do names+=("$(basename "$seed")"); done; names+=(gguf); }

run_one() {
  local name=$1 log=$build/fuzz/$1.log
  mkdir -p "$build/corpus/$name"
  if [ "$name" = schema ] && [ ! -x "$build/tests/fuzz/fuzz_schema" ]; then
    echo "fuzz schema: NOT run, built without xgrammar's sources"
    return
  fi
  if [ "$name" = gguf ]; then
    "$python" tests/fuzz/fuzz_gguf.py --seconds "$seconds" --crash "$build/fuzz/gguf-crash.gguf" >"$log" 2>&1
  else
    # A leak is looked for at the end of each run; a template may hold 1 GB, and a zstd window 2.
    ASAN_OPTIONS=allocator_may_return_null=1:detect_stack_use_after_return=0 OMP_NUM_THREADS=1 nice -n 10 \
      "$build/tests/fuzz/fuzz_$name" -max_total_time="$seconds" -timeout=20 -rss_limit_mb=4096 -close_fd_mask=2 -detect_leaks=0 \
      -print_final_stats=1 -artifact_prefix="$build/fuzz/$name-" "$build/corpus/$name" "$PWD/tests/fuzz/$name" >"$log" 2>&1
  fi || { tail -40 "$log"; echo "fuzz $name: FAILED after $(grep -oE 'executed_units: *[0-9]+' "$log" | tail -1)"; return 1; }
  echo "fuzz $name: $seconds s, $(grep -oE 'executed_units: *[0-9]+' "$log" | grep -oE '[0-9]+') executions"
}
export -f run_one
export build python seconds
mkdir -p "$build/fuzz"
printf '%s\n' "${names[@]}" | xargs -P 2 -I{} bash -c 'set -o pipefail; run_one {}'
