"""Selection and attention of decode rows, whatever the device's kernels cover."""

from typing import Any

import torch
from torch import Tensor

from spotattention import ops


def has_kernel(query: Tensor, key_pool: Tensor) -> bool:
    """Whether the operators attend to these: what ops.sparse_decode_attention says."""
    if not query.is_cuda:
        return query.dtype in (torch.float32, torch.bfloat16, torch.float16)
    group = query.shape[1] // key_pool.shape[0]
    return query.dtype in (torch.bfloat16, torch.float16) and query.shape[2] in (64, 128, 256) and group <= 16


def attend(
    scores: Tensor,
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    scale: float,
    rule: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [R, num_heads, head_dim], indices and counts of select_blocks; arguments as ops.select_and_attend has them."""
    if has_kernel(query, key_pool):
        made = ops.select_and_attend(
            scores, query, key_pool, value_pool, page_table, lengths, scale, **rule, with_mass=False
        )
        return made.output, made.indices, made.counts
    chosen = ops.select_blocks(scores, lengths, **rule)
    output = gathered_attention(query, key_pool, value_pool, page_table, lengths, scale, chosen.indices, chosen.counts)
    return output, chosen.indices, chosen.counts


def chosen_tokens(indices: Tensor, counts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Positions [R, groups, width * 16] of the tokens on the chosen blocks, and which of them there are."""
    place = torch.arange(indices.shape[2], device=indices.device)
    token = indices.clamp_min(0).long()[..., None] * ops.PAGE_TOKENS + torch.arange(
        ops.PAGE_TOKENS, device=indices.device
    )
    there = (place < counts[..., None])[..., None] & (token < lengths[:, None, None, None])
    return token.flatten(2), there.flatten(2)


def gathered_attention(
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    scale: float,
    indices: Tensor,
    counts: Tensor,
) -> Tensor:
    """ops.sparse_decode_attention by torch's own operators, for the shapes and dtypes that no kernel covers."""
    rows, heads, dim = query.shape
    kv_heads = key_pool.shape[0]
    token, there = chosen_tokens(indices, counts, lengths)
    groups = token.shape[1]
    page = (
        page_table.long()[:, None]
        .expand(-1, groups, -1)
        .gather(2, (token // ops.PAGE_TOKENS).clamp_max(page_table.shape[1] - 1))
    )
    page, offset = page.expand(-1, kv_heads, -1), (token % ops.PAGE_TOKENS).expand(-1, kv_heads, -1)
    head = torch.arange(kv_heads, device=query.device)[None, :, None]
    key, value = key_pool[head, page, offset], value_pool[head, page, offset]  # [R, kv_heads, tokens, dim]
    grouped = query.view(rows, kv_heads, heads // kv_heads, dim)
    mask = there.expand(-1, kv_heads, -1)[:, :, None]
    output = torch.nn.functional.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale)
    return output.reshape(rows, heads, dim)
