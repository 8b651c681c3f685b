#!/usr/bin/env bash
# tokenizers 0.23.3 (2026-11-30): its parts follow different versions of Unicode.
#   Lowercase maps U+A7CB (Unicode 16) to U+0264, so it knows Unicode 16 or later;
#   Punctuation does not split at U+2E43 (punctuation since Unicode 9) nor at U+061D (since 14), but does at U+2E42 (since 7).
# Whoever rebuilds a tokenizer.json with one table of character properties gets other ids on such text.
# Exits 0 while this holds, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-deps tokenizers==0.23.3
"$folder/venv/bin/python" - <<'PY'
from tokenizers import normalizers, pre_tokenizers

lower = normalizers.Lowercase().normalize_str("\ua7cb")
split = {c: len(pre_tokenizers.Punctuation().pre_tokenize_str(f"a{c}b")) for c in "\u2e42\u2e43\u061d!"}
print(f"lowercase of U+A7CB: U+{ord(lower[0]):04X}; pieces around: " + ", ".join(f"U+{ord(c):04X} {n}" for c, n in split.items()))
raise SystemExit(0 if lower == "\u0264" and list(split.values()) == [3, 1, 1, 3] else 1)
PY
