"""Puts selectors into a model that vLLM has just built."""

import logging
import math
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index

from spotattention.rope import RopeConfig, RopeTable
from spotattention.vllm.settings import Settings, load

logger = logging.getLogger("vllm.spotattention")


class WithSelectors:
    """Before a model class of vLLM in a list of bases. Without a configuration it is that class."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        settings = load(vllm_config)
        if settings is not None:
            install(self, settings, vllm_config)  # type: ignore[arg-type]


def install(model: nn.Module, settings: Settings, config: VllmConfig) -> None:
    """Gives each layer that has a selector one, and an attention that reads by it.

    Raises ValueError when a layer of the selector is not there or not of a kind that it can choose for.
    """
    # Imported here: these register an operator and need the model's platform.
    from spotattention.vllm import backend as backends
    from spotattention.vllm import layer as selectors

    hybrid = config.model_config.is_hybrid
    kv_backend = backends.SpotHybridBackend if hybrid else backends.SpotBackend
    key_backend = backends.SpotHybridKeysBackend if hybrid else backends.SpotKeysBackend
    chosen = settings.selector.config
    rope = (
        RopeTable(RopeConfig.of_model(config.model_config.hf_text_config), chosen.rope_dims)
        if chosen.rope_dims
        else None
    )
    found = {
        extract_layer_index(name): (name, module)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "attn", None), Attention)
    }
    covered = [layer for layer in settings.selector.layers if settings.covers(layer)]
    context = config.compilation_config.static_forward_context
    for index in covered:
        if index not in found:
            raise ValueError(f"the selector has layer {index}, which is no attention layer of this model")
        name, module = found[index]
        name = module.attn.layer_name.removesuffix(".attn")
        alignment = None
        if hybrid:  # blocks of several pages must lie whole pages of both caches apart
            page = 16 * 2 * module.head_dim * module.attn.kv_cache_torch_dtype.itemsize
            alignment = math.lcm(page, chosen.key_heads * selectors.ops.page_head_bytes(settings.key_format))
        spot = selectors.SelectorLayer(settings, index, rope, f"{name}.selector", key_backend, config, alignment)
        del context[module.attn.layer_name]
        module.attn = Attention(
            module.num_heads,
            module.head_dim,
            module.scaling,
            num_kv_heads=module.num_kv_heads,
            cache_config=config.cache_config,
            quant_config=config.quant_config,
            prefix=f"{name}.attn",
            attn_backend=kv_backend,
            spot_layer=spot,
        )
        module.__class__ = _with_selection(type(module))
        module.spot_layer_name = spot.layer_name
    splitting = config.compilation_config.splitting_ops
    operator = f"vllm::{selectors.OPERATOR}"
    if splitting and operator not in splitting:
        splitting.append(operator)  # a piece of a graph must not hold the lengths of the step that it was captured in
    logger.info(
        "spot: %s in %d of %d attention layers, %s keys, prompts read densely",
        settings.method.rule.describe(),
        len(covered),
        len(found),
        settings.key_format,
    )


def _with_selection(attention: type[nn.Module]) -> type[nn.Module]:
    """A vLLM attention module whose selector runs before its projections. hidden_states come normed."""

    def forward(self: Any, positions: Tensor, hidden_states: Tensor) -> Tensor:
        torch.ops.vllm.spot_select(hidden_states, positions, self.spot_layer_name)
        return attention.forward(self, positions, hidden_states)

    return type(f"Spot{attention.__name__}", (attention,), {"forward": forward})
