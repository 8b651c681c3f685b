#!/usr/bin/env bash
# jinja2 3.1.6 (Python 3.11, 2026-11-30): slicing a constant that cannot be sliced renders as nothing, slicing a variable of
# the same value raises.
#   {{ (10)[:1] }}                     -> ''
#   {% set a = 10 %}{{ a[:1] }}        -> TypeError: 'int' object is not subscriptable
# Constants are folded when the template is compiled, through the environment's lenient item lookup; variables are subscripted
# as Python does. So a template's error can vanish when a value is written into it.
# Exits 0 while this holds, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jinja2==3.1.6 markupsafe==3.0.3
"$folder/venv/bin/python" - <<'PY'
from jinja2 import Environment

environment = Environment()
constant = environment.from_string("{{ (10)[:1] }}").render()
try:
    variable = environment.from_string("{% set a = 10 %}{{ a[:1] }}").render()
except TypeError as error:
    variable = f"TypeError: {error}"
print(f"constant: {constant!r}; variable: {variable!r}")
raise SystemExit(0 if constant == "" and variable.startswith("TypeError") else 1)
PY
