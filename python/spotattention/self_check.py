"""Self-check of sparse decoding: how much of the exact attention the chosen tokens captured, on sampled steps.

A selector can fail silently: out of its lengths, on another kind of text, with a cache that was not kept up to date. One
exact pass over the keys of one row, now and then, tells.
"""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from spotattention.ops import PAGE_TOKENS

FOREIGN_EVERY = 8  # steps between two checks of a layer where the selector was distilled on other weights


class Captured(NamedTuple):
    mass: float  # share of the head-averaged attention on the chosen blocks, a mean over sets
    attended: int  # tokens, a mean over sets
    visible: int


def captured_mass(
    query: Tensor,
    key_pool: Tensor,
    pages: Tensor,
    length: int,
    indices: Tensor,
    counts: Tensor,
    scale: float,
    key_scale: Tensor | None = None,
) -> Captured:
    """Of one row: query [heads, dim], key_pool [kv_heads, pages, 16, dim], pages [at least ceil(length / 16)] int32,
    indices [sets, most] int32 and counts [sets] int32 of select_blocks, sets 1 or kv_heads. In float32. A key is what is
    stored times key_scale, of one number or [kv_heads].
    """
    kv_heads, blocks = key_pool.shape[0], -(-length // PAGE_TOKENS)
    grouped = query.float().view(kv_heads, -1, query.shape[1])
    if key_scale is not None:
        grouped = grouped * key_scale.view(-1, 1, 1)
    stored = (
        key_pool.view(torch.uint8) if key_pool.dtype == torch.float8_e4m3fn else key_pool
    )  # which any torch gathers
    parts = []
    chunk = 2048 if key_pool.is_cuda else 256
    for begin in range(0, blocks, chunk):  # a long sequence's keys are not gathered at once
        some = pages[begin : min(begin + chunk, blocks)].long()
        keys = stored[:, some].view(key_pool.dtype).float()
        parts.append(grouped @ keys.flatten(1, 2).transpose(1, 2))
    logits = torch.cat(parts, -1) * scale
    logits[..., length:] = -torch.inf
    block_mass = logits.softmax(-1).view(kv_heads, -1, blocks, PAGE_TOKENS).sum(-1).mean(1)
    if counts.shape[0] == 1:
        block_mass = block_mass.mean(0, keepdim=True)
    chosen = torch.arange(indices.shape[1], device=indices.device) < counts[:, None]
    kept = torch.zeros(counts.shape[0], blocks + 1, device=indices.device)
    kept.scatter_(1, torch.where(chosen, indices, blocks).long(), 1.0)
    kept = kept[:, :blocks]
    tokens = torch.full((blocks,), float(PAGE_TOKENS), device=kept.device)
    tokens[-1] = length - (blocks - 1) * PAGE_TOKENS
    return Captured(float((block_mass * kept).sum(1).mean()), round(float((kept @ tokens).mean())), length)


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
        mass = captured_mass(query[row], key_pool, page_table[row], length, indices[row], counts[row], scale).mass
        count, total = self._sums.get(layer, (0, 0.0))
        self._sums[layer] = count + 1, total + mass
        if self.callback is not None:
            self.callback(layer, mass, length)
        self._judge(layer, count + 1, (total + mass) / (count + 1))
