#!/usr/bin/env bash
# xgrammar 0.2.8 (2026-11-30): the grammar of a JSON schema admits strings that no JSON parser takes.
#   {"type": "string", "maxLength": 9}             admits a raw tab or U+0001 within the string (so does minLength; without a
#                                                  length the string refuses them)
#   {"type": "string", "pattern": "^say \".+\"$"}  admits "say "x"", quotes not escaped
# Needs torch and transformers, which it imports: those of the project's .venv.
# Exits 0 while this holds, 1 when it has changed.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
.venv/bin/python -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-deps xgrammar==0.2.8 apache-tvm-ffi==0.1.15.post2
site() { "$1" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])'; }
site .venv/bin/python >"$(site "$folder/venv/bin/python")/project.pth"
"$folder/venv/bin/python" - <<'PY'
import json

import xgrammar
from xgrammar.testing import _is_grammar_accept_string


def admitted(schema, text):
    try:
        json.loads(text)
        raise SystemExit(f"{text!r} is JSON after all")
    except json.JSONDecodeError:
        return _is_grammar_accept_string(xgrammar.Grammar.from_json_schema(json.dumps(schema)), text)


tab, control, quotes = '"a\tb"', '"a\x01b"', '"say "x""'
found = {
    "plain": [admitted({"type": "string"}, text) for text in (tab, control)],
    "maxLength": [admitted({"type": "string", "maxLength": 9}, text) for text in (tab, control)],
    "minLength": [admitted({"type": "string", "minLength": 2}, text) for text in (tab, control)],
    "pattern": [admitted({"type": "string", "pattern": '^say ".+"$'}, quotes)],
}
print(found)
expected = {"plain": [False, False], "maxLength": [True, True], "minLength": [True, True], "pattern": [True]}
raise SystemExit(0 if found == expected else 1)
PY
