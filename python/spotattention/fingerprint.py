"""Which weights a model has: the fingerprint that a selector remembers of its backbone, as `spot` computes it."""

import json
import os
import pathlib
from collections.abc import Iterable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

_PREFIXES = ("model.language_model.", "model.", "")


def _known_order(layers: int) -> list[str]:
    """The decoder's weights of all families that `spot` knows, in the order in which it reads them."""
    ordered = ["embed_tokens.weight"]
    for index in range(layers):
        prefix = f"layers.{index}."
        own = [f"{prefix}input_layernorm.weight", f"{prefix}post_attention_layernorm.weight"]
        attention, delta = f"{prefix}self_attn.", f"{prefix}linear_attn."
        for suffix in (".weight", ".bias"):
            own += [f"{attention}{part}{suffix}" for part in ("q_proj", "k_proj", "v_proj")]
        own += [f"{attention}o_proj.weight", f"{attention}o_proj.bias"]
        own += [f"{attention}q_norm.weight", f"{attention}k_norm.weight"]
        own += [f"{delta}in_proj_{part}.weight" for part in ("qkv", "z", "b", "a")]
        own += [f"{delta}{part}" for part in ("out_proj.weight", "norm.weight", "dt_bias", "A_log", "conv1d.weight")]
        for suffix in (".weight", ".bias"):
            own += [f"{prefix}mlp.{part}{suffix}" for part in ("gate_proj", "up_proj")]
        own += [f"{prefix}mlp.down_proj.weight", f"{prefix}mlp.down_proj.bias"]
        ordered += own
    ordered.append("norm.weight")
    return ordered


def weight_order(names: Iterable[str], layers: int) -> list[str]:
    """A decoder's weights in the order of its fingerprint: as `spot` reads those that it knows, then others as they come."""
    names = dict.fromkeys(names)
    known = dict.fromkeys(name for name in _known_order(layers) if name in names)
    return [*known, *(name for name in names if name not in known)]


def fingerprint_of(config: Any, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """16 hex digits over a text model's shape and a few values of every weight, whatever dtype it is kept in.

    tensors: of the decoder, by their names in it and in weight_order, then "lm_head.weight" where it is not tied.
    """
    hash_ = 0xCBF29CE484222325

    def add(data: bytes) -> None:
        nonlocal hash_
        for byte in data:
            hash_ = ((hash_ ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF

    add(" ".join(_number(value) for value in _shape(config)).encode())
    for name, tensor in tensors:
        add(name.encode())
        add(_sample(tensor))
    return f"{hash_:016x}"


def folder_fingerprint(folder: str | os.PathLike) -> str:
    """Of a checkpoint in safetensors files, without reading more of it than the samples.

    Empty where there are none, where they are quantised, and for a family that `spot` does not know.
    """
    from safetensors import safe_open

    path = pathlib.Path(folder)
    files = sorted(path.glob("*.safetensors"))
    if not files or not (path / "config.json").is_file():
        return ""
    document = json.loads((path / "config.json").read_text())
    text = document.get("text_config", document)
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, "pt")) for file in files]
        where = {name: file for file in opened for name in file.keys()}  # noqa: SIM118  no mapping
        prefix = next((p for p in _PREFIXES if p + "embed_tokens.weight" in where), None)
        if prefix is None or "quantization_config" in document:
            return ""
        own = [name.removeprefix(prefix) for name in where if name.startswith(prefix)]
        own = [name for name in own if name.startswith(("layers.", "embed_tokens.", "norm."))]
        order = _known_order(text["num_hidden_layers"])
        if set(own) - set(order):
            return ""
        order = [name for name in order if name in set(own)]
        tied = document.get("tie_word_embeddings", text.get("tie_word_embeddings", "lm_head.weight" not in where))
        names = [(name, prefix + name) for name in order]
        if not tied:
            names.append(("lm_head.weight", "lm_head.weight"))
        if any(name not in where for _, name in names):
            return ""
        tensors = ((short, where[name].get_tensor(name)) for short, name in names)
        return fingerprint_of(SimpleNamespace(**text), tensors)


def _shape(config: Any) -> list[int | float]:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    partial = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None)) or 1.0
    return [
        config.hidden_size,
        config.num_hidden_layers,
        heads,
        getattr(config, "num_key_value_heads", None) or heads,
        head_dim,
        getattr(config, "intermediate_size", 0),
        config.vocab_size,
        float(rope.get("rope_theta", getattr(config, "rope_theta", 10000.0)) or 10000.0),
        int(head_dim * partial),
        float(getattr(config, "rms_norm_eps", 0.0)),
    ]


def _number(value: int | float) -> str:
    return repr(value).removesuffix(".0")


def _sample(tensor: Tensor) -> bytes:
    """16 values, evenly spaced, as bfloat16."""
    flat = tensor.detach().reshape(-1)
    stride = max(1, flat.numel() // 16)
    sample = flat[: min(flat.numel(), 16 * stride) : stride].float().to(torch.bfloat16).cpu().contiguous()
    return sample.view(torch.int16).numpy().tobytes()
