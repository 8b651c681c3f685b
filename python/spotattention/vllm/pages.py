"""vLLM's blocks as our operators' pages of 16 tokens.

vLLM gives each layer a view [blocks, heads, tokens, content] of one storage, in which a block may hold several pages and
blocks of a layer may lie far apart, with other layers between them. Operators address a page by one number times one
stride. So pages are counted in steps of their own size through the whole storage from the layer's first byte on: page j
of block b has the id b * block_pages + j, and the ids between belong to others.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from spotattention.ops import PAGE_TOKENS


class Pages(NamedTuple):
    """How a layer's blocks are counted in pages. Equal for all layers of a KV cache group."""

    per_block: int  # pages of a block
    block_pages: int  # page ids from one block to the next

    @property
    def identity(self) -> bool:
        """Page ids are block ids."""
        return self.per_block == self.block_pages == 1

    def table(self, block_table: Tensor) -> Tensor:
        """Page table [rows, blocks * per_block] of a block table [rows, blocks] int32."""
        if self.identity:
            return block_table
        within = torch.arange(self.per_block, dtype=block_table.dtype, device=block_table.device)
        return (block_table[:, :, None] * self.block_pages + within).flatten(1)

    def slots(self, slot_mapping: Tensor) -> Tensor:
        """Slots page * 16 + offset of vLLM's, block * block_tokens + offset; negative ones stay."""
        tokens = self.per_block * PAGE_TOKENS
        if self.per_block == self.block_pages:
            return slot_mapping
        block = torch.div(slot_mapping, tokens, rounding_mode="floor")
        moved = slot_mapping + block * (self.block_pages * PAGE_TOKENS - tokens)
        return torch.where(slot_mapping < 0, slot_mapping, moved)


def _count(view: Tensor, page: int, what: str) -> Pages:
    """Pages of a view whose block is made of pages that lie `page` elements apart."""
    tokens, stride = view.shape[2], view.stride(0)
    if tokens % PAGE_TOKENS != 0:
        raise ValueError(f"{what}: vLLM's blocks hold {tokens} tokens; give a --block-size that is a multiple of 16")
    if stride % page != 0:
        raise ValueError(
            f"{what}: vLLM lays blocks {stride} elements apart, which is no multiple of a page's {page}; "
            "this layout of its cache is not supported"
        )
    return Pages(tokens // PAGE_TOKENS, stride // page)


def selector_key_pool(view: Tensor, key_heads: int, page_head_bytes: int) -> tuple[Tensor, Pages]:
    """The pool that selector operators take, uint8 [pages, key_heads, page_head_bytes], and how it counts.

    view [blocks, 1, tokens, bytes of a token] uint8, each block's bytes in one run.
    """
    page = key_heads * page_head_bytes
    if view.shape[3] * PAGE_TOKENS != page or view.stride(3) != 1 or view.stride(2) != view.shape[3]:
        raise ValueError(
            f"selector keys: vLLM gave pages {list(view.shape)} with strides {list(view.stride())}; "
            f"{page // PAGE_TOKENS} bytes a token in one run were asked for"
        )
    pages = _count(view, page, "selector keys")
    count = (view.shape[0] - 1) * pages.block_pages + pages.per_block
    return view.as_strided((count, key_heads, page_head_bytes), (page, page_head_bytes, 1)), pages


def e4m3_codes(x: Tensor, scale: Tensor) -> Tensor:
    """x [T, heads, dim] over scale (of one number or [heads]) as float8_e4m3fn, saturated."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    return (x.float() / scale.view(-1, 1)).clamp(-largest, largest).to(torch.float8_e4m3fn)


def e4m3_numbers(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """codes [heads, T, dim] float8_e4m3fn times scale (of one number or [heads]) in dtype."""
    return (codes.float() * scale.view(-1, 1, 1)).to(dtype)


def key_value_pools(view: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Pages]:
    """Pools of keys and of values, [kv_heads, pages, 16, head_dim], and how they count.

    view [blocks, kv_heads, tokens, 2 * head_dim], a token's key before its value, heads and tokens in either order.
    """
    blocks, heads, tokens, content = view.shape
    if content != 2 * head_dim or view.stride(3) != 1:
        raise ValueError(
            f"keys and values: vLLM gave pages {list(view.shape)} with strides {list(view.stride())}; "
            f"a token's {2 * head_dim} numbers in one run were expected"
        )
    if tokens == PAGE_TOKENS:
        page, pages = view.stride(0), Pages(1, 1)
    else:
        page = PAGE_TOKENS * view.stride(2)
        pages = _count(view, page, "keys and values")
    count = (blocks - 1) * pages.block_pages + pages.per_block
    shape, strides = (heads, count, PAGE_TOKENS, head_dim), (view.stride(1), page, view.stride(2), 1)
    keys = view.as_strided(shape, strides)
    return keys, view.as_strided(shape, strides, view.storage_offset() + head_dim), pages
