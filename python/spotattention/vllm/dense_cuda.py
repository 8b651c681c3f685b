"""Prompts on CUDA: vLLM's own FlashAttention over the same pages."""

from typing import Any

from torch import Tensor
from vllm import _custom_ops
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
        # FlashAttention 3 multiplies codes with codes. vLLM's attention layer would make them of the queries for a backend
        # that asks for it, but decode rows take queries as they are.
        self.query_codes = impl.codes and self.flash.supports_quant_query_input

    def store(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        self.flash.do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)

    def attend(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, step: Any, output: Tensor
    ) -> None:
        tokens, metadata = step
        query = query[tokens:]
        if self.query_codes:
            scale, rows = layer._q_scale, query.flatten(1).contiguous()
            group = None if scale.numel() == 1 else (-1, rows.shape[1] // scale.numel())
            query = _custom_ops.scaled_fp8_quant(rows, scale, group_shape=group)[0].view(query.shape)
        self.flash.forward(layer, query, key[tokens:], value[tokens:], kv_cache, metadata, output[tokens:])
