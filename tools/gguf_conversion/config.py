"""config.json and generation_config.json of a GGUF file."""

import numpy as np

from .structure import ConversionError
from .tensors import dequantized

# general.architecture -> (architecture, model_type) of config.json
ARCHITECTURES = {"llama": ("LlamaForCausalLM", "llama"), "qwen2": ("Qwen2ForCausalLM", "qwen2")}


def llama3_rule(metadata, tensors, rope_theta, head_dim):
    """GGUF stores Llama-3's rule as its result, one factor a frequency (rope_freqs.weight); the four numbers of the
    rule are recovered from it and checked against it."""
    stored = dequantized(tensors["rope_freqs.weight"], metadata.path).reshape(-1)
    wavelength = 2 * np.pi * rope_theta ** (np.arange(0, head_dim, 2) / head_dim)
    factor, low, high, original = float(stored.max(initial=1)), 1.0, 4.0, 8192
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


def rope_scaling(metadata, tensors, rope_theta, head_dim):
    """The `rope_scaling` entry of config.json, or None."""
    kind = metadata.get_own("rope.scaling.type", str, "none")
    if kind not in ("none", "linear", "yarn"):
        raise ConversionError(
            f"{metadata.path}: RoPE scaling of type {kind} is not supported; none, linear and yarn are"
        )
    if "rope_freqs.weight" in tensors:
        return llama3_rule(metadata, tensors, rope_theta, head_dim)
    if kind == "none":
        return None
    factor = metadata.positive("rope.scaling.factor", metadata.get_own("rope.scaling.factor", float, 1.0))
    # Older readers of config.json know the entry as "type".
    scaling = {"type": kind, "rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = metadata.need_count("rope.scaling.original_context_length")
    return scaling


def special_token_ids(metadata):
    ids = {}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        value = metadata.get(f"tokenizer.ggml.{theirs}_token_id", int)
        if value is not None:
            ids[f"{ours}_token_id"] = value
    return ids


def build_config(metadata, tensors, dtype):
    if metadata.architecture not in ARCHITECTURES:
        raise ConversionError(
            f"{metadata.path}: architecture {metadata.architecture} is not supported; {' and '.join(ARCHITECTURES)} are"
        )
    name, model_type = ARCHITECTURES[metadata.architecture]
    if metadata.get_own("expert_count", int, 0):
        raise ConversionError(f"{metadata.path}: a mixture of experts is not supported; use a dense model")
    positions = metadata.need_count("context_length")
    window = metadata.get_own("attention.sliding_window", int, 0)
    if window and window < positions:
        raise ConversionError(
            f"{metadata.path}: a sliding window of {window} tokens is not supported; use a model with full attention"
        )
    if any(metadata.is_list(f"{metadata.architecture}.attention.head_count{kind}") for kind in ("", "_kv")):
        raise ConversionError(f"{metadata.path}: head counts that differ between layers are not supported")
    hidden_size = metadata.need_count("embedding_length")
    num_heads = metadata.need_count("attention.head_count")
    num_kv_heads = metadata.get_own("attention.head_count_kv", int, num_heads)
    head_dim = metadata.get_own("attention.key_length", int, hidden_size // num_heads)
    if num_kv_heads == 0 or num_heads % num_kv_heads or head_dim == 0 or head_dim % 2:
        raise ConversionError(
            f"{metadata.path}: {num_heads} heads of {head_dim} dimensions do not fit {num_kv_heads} key heads; "
            "a whole number of heads a key head and an even number of dimensions were expected"
        )
    rotated = metadata.get_own("rope.dimension_count", int, head_dim)
    if rotated != head_dim:
        raise ConversionError(f"{metadata.path}: RoPE on {rotated} of {head_dim} dimensions a head is not supported")
    if metadata.architecture == "qwen2" and head_dim * num_heads != hidden_size:
        raise ConversionError(
            f"{metadata.path}: {num_heads} heads of {head_dim} dimensions do not make up the {hidden_size} of a Qwen2 model"
        )
    rope_theta = metadata.between("rope.freq_base", metadata.get_own("rope.freq_base", float, 10000.0), 1, 1e15)
    epsilon_key = "attention.layer_norm_rms_epsilon"
    epsilon = metadata.between(epsilon_key, metadata.need_own(epsilon_key, float), 0, 1)
    if "token_embd.weight" not in tensors:
        raise ConversionError(
            f"{metadata.path}: the tensor token_embd.weight is missing, so the file cannot be converted"
        )
    if len(tensors["token_embd.weight"].shape) != 2:
        raise ConversionError(f"{metadata.path}: the tensor token_embd.weight is no matrix")
    # Each layer has tensors of its own.
    num_layers = metadata.need_count("block_count")
    if num_layers > len(tensors):
        raise ConversionError(f"{metadata.path}: {len(tensors)} tensors are too few for {num_layers} layers")
    config = {
        "architectures": [name],
        "model_type": model_type,
        "hidden_size": hidden_size,
        "intermediate_size": metadata.need_count("feed_forward_length"),
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "max_position_embeddings": positions,
        "rms_norm_eps": epsilon,
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling(metadata, tensors, rope_theta, head_dim),
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "tie_word_embeddings": "output.weight" not in tensors,
        "torch_dtype": {"bf16": "bfloat16", "f32": "float32"}[dtype],
        "use_cache": True,
        "initializer_range": 0.02,
    }
    if metadata.architecture == "llama":
        # Llama has biases on all four projections of its attention or on none.
        biased = any(f"blk.0.attn_{part}.bias" in tensors for part in ("q", "k", "v", "output"))
        config |= {"head_dim": head_dim, "attention_bias": biased, "mlp_bias": False}
    else:
        config |= {"use_sliding_window": False, "sliding_window": None}
    return config | special_token_ids(metadata)


def build_generation_config(metadata, vocab):
    ids = special_token_ids(metadata)
    # Instruct models name the end of a turn apart from the end of a text; either ends a generation.
    ends = [ids.get("eos_token_id"), metadata.get("tokenizer.ggml.eot_token_id", int)]
    if metadata.architecture == "qwen2":
        ends.append(vocab.get("<|endoftext|>"))
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    if len(ends) > 1:
        ids["eos_token_id"] = ends
    return {"_from_model_config": True, **ids}
