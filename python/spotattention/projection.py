"""A layer's hidden states through its selector, as a step of a forward pass needs it."""

import torch
from torch import Tensor

from spotattention import ops
from spotattention.selector import LayerWeights, Selector

GLOBAL_SCALE = {"nvfp4": 0.0625}  # multiplies every nvfp4 block scale; other formats have none


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, dim] turned by cos and sin [T, half] float32, half-split, in float32; x's dtype again."""
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    lower, upper = x[..., :half].float(), x[..., half : 2 * half].float()
    turned = torch.cat([lower * cos - upper * sin, upper * cos + lower * sin], -1).to(x.dtype)
    return torch.cat([turned, x[..., 2 * half :]], -1) if x.shape[-1] > 2 * half else turned


class LayerProjection:
    """One layer of a selector. T tokens are the rows of hidden [T, hidden_size]; rotation is cos and sin [T, rope_dims / 2]
    of their positions (RopeTable), None where nothing turns.

    q = RoPE(x W_q) [T, 4, 128] of x's dtype; k = RoPE(norm(x W_k)); w = x W_w / sqrt(512) [T, groups, 4] float32
    (SpotAttention, arXiv 2606.22874, section 2.2).
    """

    def __init__(self, selector: Selector, layer: int, cache_format: str | None = None) -> None:
        config = selector.config
        self.config, self.layer = config, layer
        self.groups, self.temperature = selector.groups, selector.temperature(layer)
        self.format = cache_format or config.cache_format
        self.weights: LayerWeights = selector.weights[layer]
        self.query_rows = config.num_heads * config.head_dim
        self.mix_scale = self.query_rows**-0.5
        self.page_bytes = ops.page_head_bytes(self.format)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Moves the weights where the layer's hidden states are, once."""
        w = self.weights
        if w.query_key.device != device or w.query_key.dtype != dtype:
            norms = [None if n is None else n.to(device) for n in (w.norm_weight, w.norm_bias)]
            self.weights = LayerWeights(w.query_key.to(device, dtype), w.mix.to(device), *norms)

    def query(self, hidden: Tensor, rotation: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """q and w of some tokens."""
        query = torch.nn.functional.linear(hidden, self.weights.query_key[: self.query_rows])
        query = query.view(-1, self.config.num_heads, self.config.head_dim)
        weight = torch.nn.functional.linear(hidden.float(), self.weights.mix) * self.mix_scale
        return (query if rotation is None else rotate(query, *rotation)), weight.view(-1, self.groups, 4)

    def append(self, pool: Tensor, slots: Tensor, hidden: Tensor, rotation: tuple[Tensor, Tensor] | None) -> None:
        """Writes k of the tokens into a pool of selector keys at slots [T] int64, in place; negative ones are skipped."""
        config, w = self.config, self.weights
        key = torch.nn.functional.linear(hidden, w.query_key[self.query_rows :])
        key = key.view(-1, config.key_heads, config.head_dim)
        scale = GLOBAL_SCALE.get(self.format, 1.0)
        if rotation is not None and config.rope_dims != 64:  # the operator turns 64 dims or none
            key = rotate(self._normed(key), *rotation)
            ops.selector_key_append(pool, slots, key, self.format, scale)
            return
        cos, sin = rotation if rotation is not None else (None, None)
        rows = torch.arange(len(slots), device=slots.device) if rotation is not None else None
        ops.selector_key_append(
            pool,
            slots,
            key,
            self.format,
            scale,
            config.key_norm,
            w.norm_weight,
            w.norm_bias,
            config.norm_eps,
            cos,
            sin,
            rows,
        )

    def _normed(self, key: Tensor) -> Tensor:
        if self.config.key_norm == "none":
            return key
        x = key.float()
        if self.config.key_norm == "layernorm":
            x = x - x.mean(-1, keepdim=True)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.norm_eps) * self.weights.norm_weight
        return (x if self.weights.norm_bias is None else x + self.weights.norm_bias).to(key.dtype)

    def scores(
        self, query: Tensor, weight: Tensor, pool: Tensor, page_table: Tensor, lengths: Tensor, max_blocks: int = 0
    ) -> Tensor:
        """Block scores [R, groups, blocks] float32 of rows' queries over the pool."""
        scale = GLOBAL_SCALE.get(self.format, 1.0)
        return ops.score_blocks(query, weight, pool, page_table, lengths, self.format, scale, max_blocks)
