#!/usr/bin/env bash
# tokenizers 0.23.3 (2026-12-01): a setting of a BPE model that is changed after a word was encoded does not hold for that word.
#   BPE of "a", "b", "<unk>" and the 256 byte tokens; encode("ac") -> a <unk>; then model.byte_fallback = True:
#     encode("ac") -> a <unk> still, encode("bc") -> b <0x63>; saved with to_str and read again: encode("ac") -> a <0x63>
# unk_token and fuse_unk likewise. The model keeps the tokens of words it has seen, and these settings do not empty that store, so
# the ids of a text depend on what was encoded before, and differ from those of the tokenizer.json that is saved.
# Whoever changes a setting has to read the tokenizer anew before its next use.
# Exits 0 while this holds, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-deps tokenizers==0.23.3
"$folder/venv/bin/python" - <<'PY'
from tokenizers import Tokenizer, models

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def tokens(setting, value, seen, other):
    """Of the word `seen` before the change; then of `seen`, of `other`, and of `seen` after a save."""
    vocabulary = {token: number for number, token in enumerate(["a", "b", "<unk>", *BYTES])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    before = tokenizer.encode(seen).tokens
    setattr(tokenizer.model, setting, value)
    assert getattr(tokenizer.model, setting) == value
    saved = Tokenizer.from_str(tokenizer.to_str())
    after = [x.encode(word).tokens for x, word in ((tokenizer, seen), (tokenizer, other), (saved, seen))]
    return [" ".join(found) for found in (before, *after)]


expected = {
    ("byte_fallback", True): ["a <unk>", "a <unk>", "b <0x63>", "a <0x63>"],
    ("unk_token", "b"): ["a <unk>", "a <unk>", "b b", "a b"],
    ("fuse_unk", True): ["a <unk> <unk>", "a <unk> <unk>", "b <unk>", "a <unk>"],
}
held = True
for (setting, value), wanted in expected.items():
    found = tokens(setting, value, *(("acc", "bcc") if setting == "fuse_unk" else ("ac", "bc")))
    before, after, another, saved = found
    print(f"{setting} = {value!r}: before: {before}; the same word after: {after}; another: {another}; after a save: {saved}")
    held &= found == wanted
raise SystemExit(0 if held else 1)
PY
