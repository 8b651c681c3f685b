"""A layer's hidden states through its selector, as a step of a forward pass needs it."""

import functools
from typing import Any, NamedTuple

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


class Rotation(NamedTuple):
    """Where tokens stand in the tables of a RopeTable."""

    cos: Tensor  # [positions, rope_dims / 2] float32
    sin: Tensor
    positions: Tensor  # [T] int64

    def of_tokens(self) -> tuple[Tensor, Tensor]:
        return self.cos[self.positions], self.sin[self.positions]


class LayerProjection:
    """One layer of a selector. T tokens are the rows of hidden [T, hidden_size]; rotation says where they stand, None where
    nothing turns.

    q = RoPE(x W_q) [T, 4, 128] of x's dtype; k = RoPE(norm(x W_k)); w = x W_w / sqrt(512) [T, groups, 4] float32
    (SpotAttention, arXiv 2606.22874, section 2.2).
    """

    def __init__(self, selector: Selector, layer: int, cache_format: str | None = None) -> None:
        config = selector.config
        self.config, self.layer = config, layer
        self.groups = selector.groups
        self.fitted = functools.cache(lambda rule: selector.fitted(layer, rule))
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

    def prologue(self, pool: Tensor, slots: Tensor, hidden: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        """q and w of the tokens, whose k it writes into the pool as append does."""
        w = self.weights
        if self._turns_alone(rotation):
            self.append(pool, slots, hidden, rotation)
            query = torch.nn.functional.linear(hidden, w.query_key[: self.query_rows])
            weight = torch.nn.functional.linear(hidden.float(), w.mix) * self.mix_scale
            query = rotate(query.view(-1, self.config.num_heads, self.config.head_dim), *rotation.of_tokens())
            return query, weight.view(-1, self.groups, 4)
        projected = torch.nn.functional.linear(hidden, w.query_key)
        scale = GLOBAL_SCALE.get(self.format, 1.0)
        return ops.selector_prologue(
            pool, slots, projected, hidden, w.mix, self.format, scale, self.mix_scale, **self._preparation(rotation)
        )

    def append(self, pool: Tensor, slots: Tensor, hidden: Tensor, rotation: Rotation | None) -> None:
        """Writes k of the tokens into a pool of selector keys at slots [T] int64, in place; negative ones are skipped."""
        key = torch.nn.functional.linear(hidden, self.weights.query_key[self.query_rows :])
        key = key.view(-1, self.config.key_heads, self.config.head_dim)
        scale = GLOBAL_SCALE.get(self.format, 1.0)
        if self._turns_alone(rotation):
            ops.selector_key_append(pool, slots, rotate(self._normed(key), *rotation.of_tokens()), self.format, scale)
            return
        ops.selector_key_append(pool, slots, key, self.format, scale, **self._preparation(rotation))

    def _turns_alone(self, rotation: Rotation | None) -> bool:
        """Whether the operators do not turn this selector's keys: they turn 64 dims or none."""
        return rotation is not None and self.config.rope_dims != 64

    def _preparation(self, rotation: Rotation | None) -> dict[str, Any]:
        w = self.weights
        made = {
            "norm": self.config.key_norm,
            "norm_weight": w.norm_weight,
            "norm_bias": w.norm_bias,
            "norm_eps": self.config.norm_eps,
        }
        return made if rotation is None else made | rotation._asdict()

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
