"""Tensors of a GGUF file, dequantised and under Hugging Face's names."""

import json
import os
from dataclasses import dataclass

import numpy as np
from gguf.quants import dequantize
from tqdm import tqdm

from .structure import ConversionError


def dequantized(tensor, path):
    """float32 values in the tensor's row-major shape (GGUF lists its axes fastest first)."""
    try:
        values = dequantize(tensor.data, tensor.tensor_type)
    except (NotImplementedError, KeyError):
        raise ConversionError(
            f"{path}: the tensor {tensor.name} is of type {tensor.tensor_type.name}, which the package gguf cannot dequantise"
        ) from None
    return values.reshape(tuple(int(n) for n in tensor.shape[::-1]))


def undo_rope_permutation(weight, num_heads):
    """llama.cpp pairs neighbouring rows (2i, 2i+1) of a head in a Llama model's RoPE, Hugging Face rows
    (i, i + head_dim / 2): its converter interleaves the two halves of every head of the query and key projections,
    weights and biases. This is the inverse."""
    rows = weight.shape[0]
    return weight.reshape(num_heads, rows // num_heads // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


@dataclass(frozen=True)
class Move:
    """One tensor's way: its GGUF name, its Hugging Face name and shape, and the heads to undo the permutation of."""

    source: str
    name: str
    shape: tuple
    permuted_heads: int = 0


def tensor_plan(config):
    """The Moves of all tensors, in file order."""
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim, kv_heads = config.get("head_dim", hidden // heads), config["num_key_value_heads"]
    qwen2 = config["model_type"] == "qwen2"
    # (GGUF name, Hugging Face name, rows, columns, heads permuted, has a bias)
    bias = config.get("attention_bias", False)
    projections = [
        ("attn_q", "self_attn.q_proj", heads * head_dim, hidden, 0 if qwen2 else heads, bias or qwen2),
        ("attn_k", "self_attn.k_proj", kv_heads * head_dim, hidden, 0 if qwen2 else kv_heads, bias or qwen2),
        ("attn_v", "self_attn.v_proj", kv_heads * head_dim, hidden, 0, bias or qwen2),
        ("attn_output", "self_attn.o_proj", hidden, heads * head_dim, 0, bias),
        ("ffn_gate", "mlp.gate_proj", inner, hidden, 0, False),
        ("ffn_up", "mlp.up_proj", inner, hidden, 0, False),
        ("ffn_down", "mlp.down_proj", hidden, inner, 0, False),
    ]
    plan = [Move("token_embd.weight", "model.embed_tokens.weight", (config["vocab_size"], hidden))]
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."
        plan.append(Move(theirs + "attn_norm.weight", ours + "input_layernorm.weight", (hidden,)))
        plan.append(Move(theirs + "ffn_norm.weight", ours + "post_attention_layernorm.weight", (hidden,)))
        for source, name, rows, columns, permuted, has_bias in projections:
            plan.append(Move(f"{theirs}{source}.weight", f"{ours}{name}.weight", (rows, columns), permuted))
            if has_bias:
                plan.append(Move(f"{theirs}{source}.bias", f"{ours}{name}.bias", (rows,), permuted))
    plan.append(Move("output_norm.weight", "model.norm.weight", (hidden,)))
    if not config["tie_word_embeddings"]:
        plan.append(Move("output.weight", "lm_head.weight", (config["vocab_size"], hidden)))
    return plan


def check_tensors(plan, tensors, path, architecture):
    for move in plan:
        if move.source not in tensors:
            raise ConversionError(f"{path}: the tensor {move.source} is missing, so the file cannot be converted")
        found = tuple(int(n) for n in tensors[move.source].shape[::-1])
        if found != move.shape:
            raise ConversionError(f"{path}: the tensor {move.source} has shape {found}, the metadata says {move.shape}")
    surplus = set(tensors) - {move.source for move in plan} - {"rope_freqs.weight"}
    if surplus:
        raise ConversionError(f"{path}: the tensor {min(surplus)} has no place in a {architecture} model")


def to_bfloat16(values):
    """float32 to bfloat16 bits, round to nearest even; a NaN stays a NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def write_safetensors(path, plan, tensors, dtype, source):
    """Streams one tensor at a time, so that memory holds one tensor and not the model."""
    size = {"bf16": 2, "f32": 4}[dtype]
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for move in plan:
        begin, end = end, end + size * int(np.prod(move.shape))
        header[move.name] = {"dtype": dtype.upper(), "shape": list(move.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(len(text).to_bytes(8, "little"))
        out.write(text)
        for move in tqdm(plan, desc="tensors", unit="tensor", delay=0.5):
            values = dequantized(tensors[move.source], source)
            if move.permuted_heads:
                values = undo_rope_permutation(values, move.permuted_heads)
            bits = to_bfloat16(values) if dtype == "bf16" else np.ascontiguousarray(values, dtype=np.float32)
            out.write(bits.tobytes())
        out.flush()
        os.fsync(out.fileno())
