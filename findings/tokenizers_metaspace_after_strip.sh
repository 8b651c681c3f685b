#!/usr/bin/env bash
# tokenizers 0.23.3 (2026-11-30): Metaspace with prepend_scheme "first" asks where a piece stood in the text before it was
# normalised. After a Strip normalizer that removed leading spaces, the first piece does not begin at 0 and gets no prefix.
#   Strip, Metaspace(prepend_scheme="first"):  "a" -> ["▁a"],  " a" -> ["a"]
# Both texts are normalised to "a", yet their ids differ.
# Exits 0 while this holds, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-deps tokenizers==0.23.3
"$folder/venv/bin/python" - <<'PY'
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

tokenizer = Tokenizer(models.WordLevel({"▁a": 0, "a": 1, "?": 2}, unk_token="?"))
tokenizer.normalizer = normalizers.Strip()
tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
tokens = {text: tokenizer.encode(text, add_special_tokens=False).tokens for text in ("a", " a")}
print(tokens)
raise SystemExit(0 if tokens == {"a": ["▁a"], " a": ["a"]} else 1)
PY
