#!/usr/bin/env python3
"""Gives changed GGUF files to tools/convert_gguf.py: nothing but its error may come of them, within 20 s and 4 GiB, and what
it writes must be readable. Files are made anew each run, by values of another kind in place of one and by changed bytes.

    tests/fuzz/fuzz_gguf.py --seconds 5 [--seed N] [--crash FILE]
"""

import argparse
import contextlib
import io
import json
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
from pathlib import Path

import gguf
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from convert_gguf import ConversionError, convert  # noqa: E402

TYPES = gguf.GGUFValueType
NUMBERS = [0, 1, 2, 3, 7, 2**15, 2**24 + 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]
FLOATS = [0.0, -1.0, 1e-30, 1e30, 3.4e38, float("nan"), float("inf"), float("-inf")]
KINDS = [(TYPES.UINT8, 8, False), (TYPES.UINT32, 32, False), (TYPES.INT32, 32, True), (TYPES.UINT64, 64, False)]


def base(rng):
    """Keys and values of a small model, and its tensors: both architectures, both tokenizers, some quantised."""
    architecture, sentencepiece = rng.choice(["llama", "qwen2"]), rng.random() < 0.5
    hidden, heads, kv_heads, inner, layers, vocab = 32, 4, 2, 64, rng.choice([1, 2]), 12
    tokens = ["<unk>", "<s>", "</s>", "a", "b", "ab", "\u2581", "\u2581a", "c", "bc", "abc", "<0x0A>"]
    number = lambda value: (value, TYPES.UINT32, None)
    keys = {
        "general.architecture": (architecture, TYPES.STRING, None),
        "context_length": number(64),
        "embedding_length": number(hidden),
        "block_count": number(layers),
        "feed_forward_length": number(inner),
        "attention.head_count": number(heads),
        "attention.head_count_kv": number(kv_heads),
        "attention.layer_norm_rms_epsilon": (1e-5, TYPES.FLOAT32, None),
        "rope.freq_base": (10000.0, TYPES.FLOAT32, None),
        "rope.dimension_count": number(hidden // heads),
        "rope.scaling.type": (rng.choice(["none", "linear", "yarn"]), TYPES.STRING, None),
        "rope.scaling.factor": (2.0, TYPES.FLOAT32, None),
        "rope.scaling.original_context_length": number(32),
        "tokenizer.ggml.model": ("llama" if sentencepiece else "gpt2", TYPES.STRING, None),
        "tokenizer.ggml.pre": (rng.choice(["smollm", "qwen2", "llama-bpe"]), TYPES.STRING, None),
        "tokenizer.ggml.tokens": (tokens, TYPES.ARRAY, TYPES.STRING),
        "tokenizer.ggml.token_type": ([2, 3, 3] + [1] * 8 + [6], TYPES.ARRAY, TYPES.INT32),
        "tokenizer.ggml.scores": ([-float(i) for i in range(vocab)], TYPES.ARRAY, TYPES.FLOAT32),
        "tokenizer.ggml.merges": (["a b", "b c", "ab c"], TYPES.ARRAY, TYPES.STRING),
        "tokenizer.ggml.bos_token_id": number(1),
        "tokenizer.ggml.eos_token_id": number(2),
        "tokenizer.ggml.unknown_token_id": number(0),
        "tokenizer.ggml.add_bos_token": (rng.random() < 0.5, TYPES.BOOL, None),
        "tokenizer.chat_template": ("{{ messages }}", TYPES.STRING, None),
    }
    keys = {name if "." in name and name.split(".")[0] in ("general", "tokenizer") else f"{architecture}.{name}": value
            for name, value in keys.items()}  # fmt: skip
    head_dim = hidden // heads
    shapes = {"token_embd.weight": (vocab, hidden), "output_norm.weight": (hidden,)}
    for layer in range(layers):
        shapes |= {
            f"blk.{layer}.{name}.weight": shape
            for name, shape in {
                "attn_norm": (hidden,),
                "ffn_norm": (hidden,),
                "attn_q": (hidden, hidden),
                "attn_k": (kv_heads * head_dim, hidden),
                "attn_v": (kv_heads * head_dim, hidden),
                "attn_output": (hidden, hidden),
                "ffn_gate": (inner, hidden),
                "ffn_up": (inner, hidden),
                "ffn_down": (hidden, inner),
            }.items()
        }
        if architecture == "qwen2":
            sizes = {"q": hidden, "k": kv_heads * head_dim, "v": kv_heads * head_dim}
            shapes |= {f"blk.{layer}.attn_{part}.bias": (size,) for part, size in sizes.items()}
    if rng.random() < 0.3:
        shapes["rope_freqs.weight"] = (head_dim // 2,)
    return keys, shapes


def other_value(rng):
    choice = rng.randrange(6)
    if choice == 0:
        kind, bits, signed = rng.choice(KINDS)
        value = rng.choice(NUMBERS) % 2**bits
        return (value - 2**bits if signed and value >= 2 ** (bits - 1) else value, kind, None)
    if choice == 1:
        return (rng.choice(FLOATS), rng.choice([TYPES.FLOAT32, TYPES.FLOAT64]), None)
    if choice == 2:
        return (rng.choice(["", "llama", "\x00", "a" * 5000, "\u2581" * 300]), TYPES.STRING, None)
    if choice == 3:
        return (rng.random() < 0.5, TYPES.BOOL, None)
    if choice == 4:
        words = ["a", "b", "ab", "", "x" * rng.choice([1, 3000]), "é", "a b c"]
        return ([rng.choice(words) for _ in range(rng.randrange(1, 20))], TYPES.ARRAY, TYPES.STRING)
    return ([rng.choice(NUMBERS) % 2**31 for _ in range(rng.randrange(1, 20))], TYPES.ARRAY, TYPES.INT32)


def write(path, rng):
    keys, shapes = base(rng)
    for _ in range(rng.choice([0, 1, 1, 2])):
        name = rng.choice(list(keys))
        if rng.random() < 0.2:
            del keys[name]
        else:
            keys[name] = other_value(rng)
    for _ in range(rng.choice([0, 0, 1])):
        name = rng.choice(list(shapes))
        if rng.random() < 0.3:
            del shapes[name]
        else:
            shapes[name] = tuple(rng.choice([1, 2, 3, 12, 32, 64]) for _ in range(rng.randrange(1, 4)))
    writer = gguf.GGUFWriter(path, "llama")
    del writer.kv_data[0]["general.architecture"]
    for name, (value, kind, part) in keys.items():
        writer.add_key_value(name, value, kind, part)
    quantization = rng.choice([None, gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F16])
    for name, shape in shapes.items():
        value = np.random.default_rng(rng.randrange(2**32)).standard_normal(shape, np.float32)
        if quantization is not None and value.ndim == 2 and value.shape[-1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(value, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def change_bytes(data, rng):
    for _ in range(rng.choice([0, 1, 1, 2, 5])):
        # The header is what is read closely, and its beginning holds the counts.
        at = rng.randrange(min(len(data) - 8, rng.choice([40, 1500, len(data)])))
        choice = rng.randrange(4)
        if choice == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif choice == 1:
            data[at : at + 8] = struct.pack("<Q", rng.choice(NUMBERS))
        elif choice == 2:
            data[at : at + 4] = struct.pack("<I", rng.choice([8, 9, *NUMBERS]) % 2**32)
        else:
            data[at : at + rng.choice([1, 4, 8, 100])] = b""
        if len(data) < 64:
            return data
    return data[: rng.randrange(len(data))] if rng.random() < 0.1 else data


def no_constant(name):
    raise ValueError(f"{name} is no JSON")


def check_result(out):
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        json.loads((out / name).read_text(encoding="utf-8"), parse_constant=no_constant)
    data = (out / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    assert (
        max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        == len(data) - 8 - size
    )


def too_slow(signum, frame):
    raise TimeoutError("more than 20 s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--crash", default="gguf-crash.gguf", help="where a file that leads to something else is kept")
    arguments = parser.parse_args()
    seed = random.randrange(2**32) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    rng = random.Random(seed)
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    signal.signal(signal.SIGALRM, too_slow)
    converted = refused = 0
    end = time.monotonic() + arguments.seconds
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        source, out = Path(folder) / "m.gguf", Path(folder) / "out"
        while time.monotonic() < end:
            write(source, rng)
            source.write_bytes(
                change_bytes(bytearray(source.read_bytes()), rng) if rng.random() < 0.6 else source.read_bytes()
            )
            signal.alarm(20)
            try:
                with np.errstate(all="ignore"), contextlib.redirect_stderr(io.StringIO()):
                    convert(source, out, rng.choice(["bf16", "f32"]), overwrite=True)
                check_result(out)
                converted += 1
            except ConversionError:
                refused += 1
            except BaseException:
                traceback.print_exc(file=sys.stdout)
                Path(arguments.crash).write_bytes(source.read_bytes())
                sys.exit(f"the file is kept in {arguments.crash}")
            finally:
                signal.alarm(0)
            left = set(os.listdir(folder)) - {"m.gguf", "out"}
            assert not left, f"left behind: {left}"
    print(f"executed_units: {converted + refused}\n{converted} converted, {refused} refused")
    assert converted and refused


if __name__ == "__main__":
    main()
