#!/usr/bin/env bash
# Installs everything the project needs on a bare Debian 12 machine: system packages and a virtual environment
# in .venv. Safe to repeat; each part is skipped when it is there. A failing step stops with its own message.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(g++ cmake ninja-build make ccache python3-venv python3-dev nlohmann-json3-dev libcli11-dev libfmt-dev
  libpcre2-dev libutf8proc-dev libboost1.81-dev libgtest-dev libbenchmark-dev zlib1g-dev libzstd-dev
  libxxhash-dev)
missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
  as_root=""
  [ "$(id -u)" = 0 ] || as_root="sudo"
  echo "Installing Debian packages: ${missing[*]}"
  $as_root apt-get update -q >/dev/null
  DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -q --no-install-recommends "${missing[@]}" >/dev/null
fi

stamp=.venv/.installed
if [ ! -f "$stamp" ] || [ requirements.txt -nt "$stamp" ] || [ constraints.txt -nt "$stamp" ] ||
  [ requirements.lock -nt "$stamp" ]; then
  echo "Installing Python packages into .venv (torch among them; a few minutes)"
  [ -x .venv/bin/python ] || python3 -m venv .venv
  .venv/bin/python -m pip install -q 'torch==2.13.0'
  # The files' hashes are known for the Python of Debian 12; another takes the same versions.
  if [ "$(.venv/bin/python -c 'import sys; print(*sys.version_info[:2])') $(uname -sm)" = "3 11 Linux $(uname -m)" ] &&
    [[ "$(uname -m)" =~ ^(x86_64|aarch64)$ ]]; then
    .venv/bin/python -m pip install -q --require-hashes -r requirements.lock
  else
    .venv/bin/python -m pip install -q -r requirements.txt
  fi
  touch "$stamp"
fi

# The sources of xgrammar, for JSON-schema output (cmake/XGrammar.cmake). pip asks a source package for its metadata even where it
# is only to be fetched, in an environment of its own.
sources=.venv/src/$(sed -n 's/^\(xgrammar\)==\([^ ]*\).*/\1-\2/p' cmake/xgrammar.lock)
if [ ! -d "$sources" ]; then
  echo "Fetching the sources of xgrammar"
  fetched=$(mktemp -d)
  trap 'rm -rf "$fetched"' EXIT
  if PIP_CONSTRAINT="$PWD/constraints.txt" .venv/bin/python -m pip download -q --no-deps --no-binary xgrammar --require-hashes \
    -r cmake/xgrammar.lock -d "$fetched"; then
    tar -xzf "$fetched"/xgrammar-*.tar.gz -C "$fetched"
    mkdir -p .venv/src
    mv "$fetched/$(basename "$sources")" .venv/src/
  else
    echo "xgrammar's sources could not be fetched: what is built will answer without JSON schemas"
  fi
fi
