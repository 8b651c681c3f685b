"""The operators as typed functions over torch.ops.spot.*; the same names, arguments checked there.

Shapes: R rows (a row is one query; decode has one a sequence), T tokens. A page holds 16 tokens, which is also a selection
block. Page tables hold page ids, [R, pages] int32; lengths [R] int32 count a row's visible tokens, its own included; slots
[T] int64 are page * 16 + offset, and a negative one is skipped. Pools of keys and values are [num_kv_heads, pages, 16,
head_dim] of any strides with contiguous dims (other layouts are views: [pages, 16, heads, dim] is pool.permute(2, 0, 1, 3)).
Pools of selector keys are contiguous uint8 [pages, key_heads, page_head_bytes(format)], key_heads 1 (shared) or 4.

Every function raises RuntimeError in one sentence when shapes, dtypes or devices do not fit. All run on the CPU; on CUDA
where the library was built with it (spotattention.built_for_cuda). Formulas: SpotAttention, arXiv 2606.22874.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from spotattention import _library  # noqa: F401  registers torch.ops.spot

PAGE_TOKENS = 16
KeyFormat = Literal["f32", "bf16", "int8", "int4", "mxfp4", "nvfp4"]
KeyNorm = Literal["none", "layernorm", "rmsnorm"]
Mode = Literal["top_p", "top_k", "threshold"]

_PAGE_HEAD_BYTES = {"f32": 8192, "bf16": 4096, "int8": 2176, "int4": 1152, "mxfp4": 1088, "nvfp4": 1152}


class Projection(NamedTuple):
    query: Tensor
    weight: Tensor
    key: Tensor


class Prologue(NamedTuple):
    query: Tensor
    weight: Tensor


class Selection(NamedTuple):
    indices: Tensor
    counts: Tensor
    predicted_mass: Tensor


class SelectedAttention(NamedTuple):
    output: Tensor
    indices: Tensor
    counts: Tensor
    predicted_mass: Tensor


class Mass(NamedTuple):
    mass: Tensor
    total: Tensor


class Divergence(NamedTuple):
    loss: Tensor
    entropy: Tensor
    grad_query: Tensor
    grad_weight: Tensor


def device_refusal(device: torch.device | str) -> str:
    """One sentence where `device` is a CUDA card that this build's kernels do not run on, else nothing."""
    return torch.ops.spot.device_refusal(torch.device(device))


def page_head_bytes(format: KeyFormat) -> int:
    """Bytes of one page and key head of a selector key pool: 16 keys of 128 numbers with their scales."""
    if format not in _PAGE_HEAD_BYTES:
        raise ValueError(f"a selector key format is {format!r}; it must be one of {', '.join(_PAGE_HEAD_BYTES)}")
    return _PAGE_HEAD_BYTES[format]


def selector_project(
    hidden: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    mix_weight: Tensor,
    positions: Tensor,
    norm: KeyNorm = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-6,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    mix_scale: float = 512**-0.5,
) -> Projection:
    """A layer's hidden states through its selector (section 2.2).

    hidden [T, hidden_size] is the state entering attention, after its input norm; query_weight [512, hidden_size],
    key_weight [key_heads * 128, hidden_size], mix_weight [groups * 4, hidden_size], positions [T] int64. cos and sin
    [positions, half] float32 turn the first 2 * half dims, half-split; without them nothing turns.

    Returns query [T, 4, 128] = RoPE(hidden W_q) and key [T, key_heads, 128] = RoPE(norm(hidden W_k)) of hidden's dtype, and
    weight [T, groups, 4] = mix_scale * hidden W_w in float32 (float64 for float64). Differentiable in hidden and weights.
    """
    return Projection(
        *torch.ops.spot.selector_project(
            hidden,
            query_weight,
            key_weight,
            mix_weight,
            positions,
            norm,
            norm_weight,
            norm_bias,
            norm_eps,
            cos,
            sin,
            mix_scale,
        )
    )


def selector_key_append(
    pool: Tensor,
    slots: Tensor,
    keys: Tensor,
    format: KeyFormat,
    global_scale: float = 1.0,
    norm: KeyNorm = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-6,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    positions: Tensor | None = None,
) -> None:
    """Writes keys [T, key_heads, 128] of any floating dtype into `pool` at `slots`, in place.

    With norm (weight and bias [128] float32) or cos and sin ([positions, 32] float32, with positions [T] int64) the keys
    are projections that are normalised and turned on the way, in float32 throughout. global_scale is nvfp4's.
    """
    torch.ops.spot.selector_key_append(
        pool, slots, keys, format, global_scale, norm, norm_weight, norm_bias, norm_eps, cos, sin, positions
    )


def selector_prologue(
    pool: Tensor,
    slots: Tensor,
    projected: Tensor,
    hidden: Tensor,
    mix: Tensor,
    format: KeyFormat,
    global_scale: float = 1.0,
    mix_scale: float = 1.0,
    norm: KeyNorm = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-6,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    positions: Tensor | None = None,
) -> Prologue:
    """What lies between a selector's projections and its scores; on CUDA one launch.

    projected [T, (4 + key_heads) * 128] = hidden [W_q; W_k] of hidden [T, hidden_size] and its dtype; mix
    [groups * 4, hidden_size] float32. The keys are written into `pool` at `slots`, in place, as selector_key_append does
    with the same arguments. Returns query [T, 4, 128] of hidden's dtype, turned by the same tables, and weight
    [T, groups, 4] float32 = mix_scale * hidden mix.
    """
    return Prologue(
        *torch.ops.spot.selector_prologue(
            pool,
            slots,
            projected,
            hidden,
            mix,
            format,
            global_scale,
            mix_scale,
            norm,
            norm_weight,
            norm_bias,
            norm_eps,
            cos,
            sin,
            positions,
        )
    )


def selector_key_gather(
    pool: Tensor, page_table: Tensor, length: int, format: KeyFormat, global_scale: float = 1.0
) -> Tensor:
    """The first `length` keys behind page_table [pages] int32, dequantised: [length, key_heads, 128] float32."""
    return torch.ops.spot.selector_key_gather(pool, page_table, length, format, global_scale)


def score_blocks(
    query: Tensor,
    weight: Tensor,
    pool: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    format: KeyFormat,
    global_scale: float = 1.0,
    max_blocks: int = 0,
) -> Tensor:
    """Block scores [R, groups, max_blocks] float32, -inf past a row's length.

    A block's score is the maximum over its visible tokens of sum_h weight[r, g, h] ReLU(query[r, h] . key[token, h]);
    query [R, 4, 128], weight [R, groups, 4] float32. max_blocks 0: the page table's width.
    """
    return torch.ops.spot.score_blocks(query, weight, pool, page_table, lengths, format, global_scale, max_blocks)


def select_blocks(
    scores: Tensor,
    lengths: Tensor,
    mode: Mode = "top_p",
    sinks: int = 128,
    recency: int = 256,
    floor: int = 512,
    cap: int = 0,
    budget: int = 2048,
    budget_fraction: float = 0.0,
    p: float = 0.9,
    threshold: float = 1e-3,
    temperature: float = 1.0,
    thresholds: Sequence[float] = (),
    max_selected: int = 0,
) -> Selection:
    """Which blocks each row keeps of scores [R, groups, blocks] float32 (section 2.3); exact and deterministic.

    Always kept: the blocks of the first `sinks` and of the last `recency` tokens; everything up to `floor` tokens. top_k
    keeps `budget` tokens in all (or budget_fraction of the length); top_p the fewest further blocks whose softmax (at
    `temperature`) over the scores that are not reserved reaches p, at least `floor` tokens and at most `cap` (0: no cap);
    threshold each block whose share of that softmax is at least `threshold`, or its set's number of `thresholds` (one a
    group), within the same floor and cap.

    Returns indices [R, groups, width] int32, ascending, padded with -1; counts [R, groups] int32; predicted_mass
    [R, groups] float32, the kept share of the residual mass. width: max_selected blocks, or the most the rule can keep.
    """
    return Selection(
        *torch.ops.spot.select_blocks(
            scores,
            lengths,
            mode,
            sinks,
            recency,
            floor,
            cap,
            budget,
            budget_fraction,
            p,
            threshold,
            temperature,
            thresholds,
            max_selected,
        )
    )


def sparse_decode_attention(
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    scale: float,
    indices: Tensor | None = None,
    counts: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q K^T) V over the selected blocks' visible tokens, accumulated in float32.

    query [R, num_heads, head_dim] float32 (CPU), bfloat16 or float16, the pools of its dtype or float8_e4m3fn; indices and
    counts as select_blocks gives them, with 1 or num_kv_heads groups; without them every block. Of float8_e4m3fn pools K and V
    are the stored numbers times key_scale and value_scale, float32 of one number or [num_kv_heads] (None: 1). Returns query's
    shape and dtype. A row without blocks gives zeros. CUDA: head_dim 64, 128 or 256 and at most 16 query heads a KV head.
    """
    return torch.ops.spot.sparse_decode_attention(
        query, key_pool, value_pool, page_table, lengths, scale, indices, counts, key_scale, value_scale
    )


def select_and_attend(
    scores: Tensor,
    query: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    scale: float,
    mode: Mode = "top_p",
    sinks: int = 128,
    recency: int = 256,
    floor: int = 512,
    cap: int = 0,
    budget: int = 2048,
    budget_fraction: float = 0.0,
    p: float = 0.9,
    threshold: float = 1e-3,
    temperature: float = 1.0,
    thresholds: Sequence[float] = (),
    max_selected: int = 0,
    with_mass: bool = True,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> SelectedAttention:
    """select_blocks, then sparse_decode_attention over its choice: the same bits, in one launch where the GPU has room.

    predicted_mass is empty without with_mass, which saves time under top_k.
    """
    return SelectedAttention(
        *torch.ops.spot.select_and_attend(
            scores,
            query,
            key_pool,
            value_pool,
            page_table,
            lengths,
            scale,
            mode,
            sinks,
            recency,
            floor,
            cap,
            budget,
            budget_fraction,
            p,
            threshold,
            temperature,
            thresholds,
            max_selected,
            with_mass,
            key_scale,
            value_scale,
        )
    )


def teacher_mass(
    query: Tensor,
    key: Tensor,
    logsumexp: Tensor,
    tokens: Tensor,
    low: Tensor,
    last: Tensor,
    first_key: int,
    width: int,
    scale: float,
    groups: int = 1,
) -> Mass:
    """The teacher of distillation: attention probabilities averaged over query heads, for some queries and columns.

    query [T, num_heads, head_dim], key [T, num_kv_heads, head_dim], logsumexp [num_heads, T] float32 or float64 (natural,
    of e^(scale q . k)). Row r is query tokens[r] and sees keys low[r] .. last[r] (each [rows] int32); columns are the
    `width` tokens from first_key on. Returns mass [rows, groups, width] float32 (float64), 0 where a row does not see, and
    total [rows, groups], its sums.
    """
    return Mass(*torch.ops.spot.teacher_mass(query, key, logsumexp, tokens, low, last, first_key, width, scale, groups))


def selector_kl(
    mass: Tensor,
    total: Tensor,
    query: Tensor,
    key: Tensor,
    weight: Tensor,
    tokens: Tensor,
    low: Tensor,
    last: Tensor,
    first_key: int,
    k_train: int = 0,
    grad_key: Tensor | None = None,
) -> Divergence:
    """KL(teacher || student) of each row and its gradients (section 2.2, forward KL).

    mass [rows, width] and total [rows] of teacher_mass with one group; query [T, 4, 128], key [T, 1 or 4, 128], weight
    [T, 4] of mass's dtype. k_train > 0: teacher and student renormalised on the k_train keys of highest score; mass may
    then be overwritten. grad_key [1 or 4, T, 128]: the keys' gradient is added to it; without it no gradients (both
    empty). Returns loss and entropy [rows] in nats, grad_query [rows, 4, 128], grad_weight [rows, 4].
    """
    return Divergence(
        *torch.ops.spot.selector_kl(mass, total, query, key, weight, tokens, low, last, first_key, k_train, grad_key)
    )
