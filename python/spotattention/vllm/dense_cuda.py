"""Prompts on CUDA: vLLM's own FlashAttention over the same pages. Written against vLLM 0.32; it has not run on a GPU."""

from typing import Any

from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl, FlashAttentionMetadata


def prefill(m: CommonAttentionMetadata, rows: int, tokens: int) -> tuple[int, FlashAttentionMetadata]:
    """The step behind its first `rows` rows and `tokens` tokens, as FlashAttention describes steps."""
    metadata = FlashAttentionMetadata(
        num_actual_tokens=m.num_actual_tokens - tokens,
        max_query_len=m.max_query_len,
        query_start_loc=m.query_start_loc[rows:] - tokens,
        max_seq_len=m.max_seq_len,
        seq_lens=m.seq_lens[rows:],
        block_table=m.block_table_tensor[rows:],
        slot_mapping=m.slot_mapping[tokens:],
    )
    return tokens, metadata


class Dense:
    def __init__(self, impl: Any) -> None:
        self.flash = FlashAttentionImpl(
            impl.num_heads, impl.head_size, impl.scale, impl.num_kv_heads, None, None, impl.kv_cache_dtype
        )

    def store(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        self.flash.do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)

    def attend(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, step: Any, output: Tensor
    ) -> None:
        tokens, metadata = step
        self.flash.forward(layer, query[tokens:], key[tokens:], value[tokens:], kv_cache, metadata, output[tokens:])
