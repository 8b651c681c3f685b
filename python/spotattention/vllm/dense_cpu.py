"""Prompts on the CPU: torch's attention over the pages of each sequence, gathered."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata

from spotattention.vllm.pages import e4m3_codes, e4m3_numbers


class Chunk(NamedTuple):
    """Tokens of one prompt that a step brings."""

    first: int  # row of the query tensor
    count: int
    length: int  # of the sequence, the chunk included
    blocks: Tensor  # of vLLM's, [ceil(length / block)] int64


def prefill(m: CommonAttentionMetadata, rows: int, tokens: int) -> list[Chunk]:
    """The chunks of a step behind its first `rows` rows."""
    starts, lengths = m.query_start_loc_cpu.tolist(), m.seq_lens.tolist()
    chunks = []
    for row in range(rows, m.num_reqs):
        first, count = starts[row], starts[row + 1] - starts[row]
        if count > 0:
            chunks.append(Chunk(first, count, lengths[row], m.block_table_tensor[row].long()))
    return chunks


class Dense:
    def __init__(self, impl: Any) -> None:
        self.impl = impl

    def store(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        """Writes key and value [T, kv_heads, head_size] to their slots; a negative slot is skipped."""
        block_tokens, dim = kv_cache.shape[2], self.impl.head_size
        there = (slot_mapping >= 0).nonzero()[:, 0]
        slots = slot_mapping[there]
        block, offset = slots // block_tokens, slots % block_tokens
        key, value = key[there], value[there]
        if self.impl.codes:
            key = e4m3_codes(key, layer._k_scale).view(kv_cache.dtype)
            value = e4m3_codes(value, layer._v_scale).view(kv_cache.dtype)
        kv_cache[block, :, offset, :dim] = key
        kv_cache[block, :, offset, dim:] = value

    def attend(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        chunks: list[Chunk],
        output: Tensor,
    ) -> None:
        block_tokens, dim = kv_cache.shape[2], self.impl.head_size
        kv_heads, group = self.impl.num_kv_heads, self.impl.num_heads // self.impl.num_kv_heads
        for first, count, length, blocks in chunks:
            blocks = blocks[: -(-length // block_tokens)]
            content = kv_cache[blocks].transpose(0, 1).flatten(1, 2)[:, :length]
            keys, values = content[..., :dim], content[..., dim:]
            if self.impl.codes:
                keys = e4m3_numbers(keys.view(torch.float8_e4m3fn), layer._k_scale, query.dtype)
                values = e4m3_numbers(values.view(torch.float8_e4m3fn), layer._v_scale, query.dtype)
            start = length - count
            mask = None
            if start > 0:
                positions = torch.arange(length)
                mask = positions <= positions[start:, None]
            grouped = query[first : first + count].view(count, kv_heads, group, dim).permute(2, 1, 0, 3)
            for member in range(group):  # keys and values are not repeated for their query heads
                attended = torch.nn.functional.scaled_dot_product_attention(
                    grouped[member][None], keys[None], values[None], mask, is_causal=mask is None, scale=self.impl.scale
                )
                into = output[first : first + count].view(count, kv_heads, group, dim)[:, :, member]
                into.copy_(attended[0].transpose(0, 1))
