"""What selectors need to know of a transformers model: its attention layers, their facts, its fingerprint."""

from typing import Any

from torch import Tensor, nn

from spotattention.arguments import wrong_type
from spotattention.fingerprint import fingerprint_of, weight_order

_ATTENTION_NAMES = ("self_attn", "self_attention", "attention", "attn")


def text_config(model: nn.Module) -> Any:
    """The config of the language model, of a vision-language one too."""
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not hasattr(config, "get_text_config"):
        raise wrong_type("model", model, "a transformers model")
    return config.get_text_config(decoder=True)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder's layers. Raises ValueError where a model has none that can be found."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(
            f"{type(model).__name__} has no list of decoder layers; decoder-only transformers models have one"
        )
    return layers


def _module_of(layer: nn.Module) -> nn.Module | None:
    for name in _ATTENTION_NAMES:
        module = getattr(layer, name, None)
        if isinstance(module, nn.Module) and hasattr(module, "layer_idx"):
            return module
    return None


def hidden_of(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The hidden states that an attention module is called with."""
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def refuse_other_scores(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Raises ValueError where an attention function is asked for more than softmax of scaled products."""
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"layer {module.layer_idx} attends with {name}; selectors estimate standard softmax")


def sliding_window(config: Any, module: nn.Module) -> int:
    """The window that an attention layer sees, 0 where it sees the whole context."""
    types = getattr(config, "layer_types", None)
    kind = types[module.layer_idx] if types else None
    window = getattr(module, "sliding_window", None)
    if kind == "full_attention":
        return 0
    if kind == "sliding_attention" or window:
        window = window or getattr(config, "sliding_window", None)
    elif kind is None and getattr(config, "use_sliding_window", True):
        window = getattr(config, "sliding_window", None)
    elif kind is not None:
        return -1  # chunked and other kinds
    return int(window) if window and window < config.max_position_embeddings else 0


def full_attention(model: nn.Module) -> dict[int, nn.Module]:
    """The modules that attend to the whole context by standard softmax attention, by layer.

    Sliding-window and linear layers are left out. Raises ValueError when the scores of some are soft-capped, biased or
    have sinks, or when keys are latent: no selector estimates these.
    """
    config = text_config(model)
    for name, what in (
        ("attn_logit_softcapping", "caps its attention scores"),
        ("kv_lora_rank", "keeps latent keys"),
        ("alibi", "adds biases to its attention scores"),
        ("position_embedding_type", "adds biases to its attention scores"),
    ):
        value = getattr(config, name, None)
        if value and value not in ("rope", "rotary"):
            raise ValueError(
                f"{type(model).__name__} {what} ({name} is {value}); selectors are for standard softmax attention"
            )
    found = {}
    for index, layer in enumerate(decoder_layers(model)):
        module = _module_of(layer)
        if module is None:
            continue
        if hasattr(module, "sinks"):
            raise ValueError(
                f"{type(model).__name__} has learned attention sinks; selectors are for standard softmax attention"
            )
        if module.layer_idx != index:
            raise ValueError(f"layer {index} of {type(model).__name__} calls itself {module.layer_idx}")
        if sliding_window(config, module) == 0:
            found[index] = module
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no attention layer that sees the whole context, so there is nothing to select"
        )
    return found


def facts(model: nn.Module) -> dict[str, Any]:
    """What a selector stores of its backbone; `architecture` is a tuple of the names that the model goes by."""
    config = text_config(model)
    heads = config.num_attention_heads
    named = [type(model).__name__, *(getattr(model.config, "architectures", None) or [])]
    return {
        "architecture": tuple(dict.fromkeys(named)),
        "hidden_size": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": heads,
        "num_kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "fingerprint": fingerprint(model),
    }


def decoder_layers_owner(model: nn.Module) -> nn.Module:
    return model.get_decoder() if hasattr(model, "get_decoder") else model


def fingerprint(model: nn.Module) -> str:
    """That of the weights (spotattention.fingerprint); empty where they are not in memory (offloaded, meta) or quantised."""
    config = text_config(model)
    state = decoder_layers_owner(model).state_dict()
    tied = bool(getattr(model.config, "tie_word_embeddings", False) or getattr(config, "tie_word_embeddings", False))
    tensors = [(name, state[name]) for name in weight_order(state, config.num_hidden_layers)]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None and not tied:
        tensors.append(("lm_head.weight", head.weight))
    if any(t.is_meta or not t.is_floating_point() or t.element_size() == 1 for _, t in tensors):
        return ""
    return fingerprint_of(config, tensors)
