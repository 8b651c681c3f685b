"""Self-check of sparse decoding: how much of the exact attention the chosen tokens captured, on sampled steps.

A selector can fail silently: out of its lengths, on another kind of text, with a cache that was not kept up to date. One
exact pass over the keys of one row, now and then, tells.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from spotattention.attention import chosen_tokens


def captured_mass(
    query: Tensor, key_pool: Tensor, page_table: Tensor, length: int, scale: float, indices: Tensor, counts: Tensor
) -> float:
    """The share of one row's exact attention, averaged over query heads, that lies on the chosen tokens.

    query [num_heads, head_dim], page_table [pages], indices [groups, width] and counts [groups] of that row; key_pool as
    ops.sparse_decode_attention takes it.
    """
    kv_heads, dim = key_pool.shape[0], key_pool.shape[3]
    pages = page_table[: (length + 15) // 16].long()
    keys = key_pool[:, pages].reshape(kv_heads, -1, dim)[:, :length].float()
    logits = torch.einsum("hgd,htd->hgt", query.view(kv_heads, -1, dim).float(), keys) * scale
    mass = logits.softmax(-1)  # [kv_heads, queries, length]
    lengths = torch.tensor([length], dtype=torch.int32, device=query.device)
    token, there = chosen_tokens(indices[None], counts[None], lengths)
    chosen = torch.zeros(token.shape[1], length + 1, dtype=torch.bool, device=query.device)
    chosen.scatter_(1, token[0].masked_fill(~there[0], length), True)
    chosen = chosen[:, :length].expand(kv_heads, -1)[:, None]
    return float((mass * chosen).sum(-1).mean())


class Judge:
    """Warns once of each layer whose mean captured mass is below a bound."""

    SAMPLES = 8  # before a mean is judged: a single step may look anywhere

    def __init__(self, least: float) -> None:
        self.least = least
        self._warned: set[int] = set()

    def __call__(self, layer: int, samples: int, mean: float) -> None:
        if samples < self.SAMPLES or layer in self._warned or mean >= self.least:
            return
        self._warned.add(layer)
        warnings.warn(
            f"layer {layer}: the attended tokens held {mean:.2f} of the exact attention in {samples} sampled steps, less "
            f"than {self.least:g}; raise the budget or p, or distil a selector on such texts and lengths",
            RuntimeWarning,
            stacklevel=3,
        )


class SelfCheck:
    """Samples decode steps of each layer: one of every `every`, one row of it in turn (0: none)."""

    def __init__(
        self, every: int = 64, least: float = 0.5, callback: Callable[[int, float, int], None] | None = None
    ) -> None:
        if not 0 <= least <= 1:
            raise ValueError(f"the least captured mass is {least}; it must be 0 to 1")
        self.every, self.callback = every, callback
        self._steps: dict[int, int] = {}
        self._sums: dict[int, tuple[int, float]] = {}
        self._judge = Judge(least)

    @property
    def captured_mass(self) -> dict[int, float]:
        """By layer, the mean over its samples."""
        return {layer: total / count for layer, (count, total) in sorted(self._sums.items())}

    def step(
        self,
        layer: int,
        query: Tensor,
        key_pool: Tensor,
        page_table: Tensor,
        lengths: Tensor,
        scale: float,
        indices: Tensor,
        counts: Tensor,
    ) -> None:
        """A decode step of a layer: rows as ops.sparse_decode_attention takes them."""
        if self.every == 0:
            return
        step = self._steps.get(layer, 0)
        self._steps[layer] = step + 1
        # Layers take turns, so that no step pays for all of them.
        if (step + layer) % self.every:
            return
        row = step // self.every % len(query)
        length = int(lengths[row])
        mass = captured_mass(query[row], key_pool, page_table[row], length, scale, indices[row], counts[row])
        count, total = self._sums.get(layer, (0, 0.0))
        self._sums[layer] = count + 1, total + mass
        if self.callback is not None:
            self.callback(layer, mass, length)
        self._judge(layer, count + 1, (total + mass) / (count + 1))
