"""What a layer's attention sees during a frozen forward pass of a transformers model."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from spotattention.hf import backbone

IMPLEMENTATION = "spot_observe"


@dataclass
class Seen:
    """One layer's attention over one sequence of T tokens."""

    layer: int
    hidden: Tensor  # [T, hidden_size]: what enters attention, after the layer's input norm where it has one
    positions: Tensor  # [T] int64
    query: Tensor  # [T, num_heads, head_dim], after norm and RoPE
    key: Tensor  # [T, num_kv_heads, head_dim]
    scale: float
    rotation: (
        tuple[Tensor, Tensor] | None
    )  # the backbone's cos and sin [T, rotary_dim]; None: the layer does not rotate


@contextlib.contextmanager
def observing(model: nn.Module, modules: dict[int, nn.Module], look: Callable[[Seen], None]) -> Iterator[None]:
    """Inside, `look` is called for each of the attention modules in every forward pass, without gradients.

    Sequences come one at a time, whole and without a cache. The model gets its attention back afterwards.
    """
    previous = model.config._attn_implementation
    handles = []

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = backbone.hidden_of(args, kwargs)
        module._spot_seen = (hidden, kwargs.get("position_ids"), kwargs.get("position_embeddings"), look)

    try:
        model.set_attn_implementation(IMPLEMENTATION)
        for module in modules.values():
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in modules.values():
            module.__dict__.pop("_spot_seen", None)
        model.set_attn_implementation(previous)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    seen = module.__dict__.get("_spot_seen")
    if seen is not None:
        backbone.refuse_other_scores(module, kwargs)
        hidden, positions, rotation, look = seen
        if hidden.shape[0] != 1 or key.shape[2] != query.shape[2]:
            raise ValueError("observed sequences come one at a time and without a cache")
        if positions is None:
            positions = torch.arange(hidden.shape[1], device=hidden.device)
        positions = positions.reshape(-1, hidden.shape[1])[0].long()
        if rotation is not None and getattr(module, "use_rope", True):
            cos, sin = rotation
            rotation = cos.reshape(-1, *cos.shape[-2:])[0].float(), sin.reshape(-1, *sin.shape[-2:])[0].float()
        else:
            rotation = None
        with torch.no_grad():
            look(
                Seen(
                    module.layer_idx,
                    hidden[0],
                    positions,
                    query[0].transpose(0, 1).contiguous(),
                    key[0].transpose(0, 1).contiguous(),
                    query.shape[-1] ** -0.5 if scaling is None else scaling,
                    rotation,
                )
            )
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def run(model: nn.Module, tokens: Tensor) -> None:
    """One frozen forward pass over tokens [T], without logits."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    with torch.no_grad():
        decoder(input_ids=tokens[None].to(next(model.parameters()).device), use_cache=False)


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
