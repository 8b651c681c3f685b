"""Random, valid arguments for every operator, by name: what opcheck runs over and what the wrappers' tests start from."""

import random

import torch

PAGE = 16
PAGE_HEAD_BYTES = {"f32": 8192, "bf16": 4096, "int8": 2176, "int4": 1152, "mxfp4": 1088, "nvfp4": 1152}


def paged(rows: int, most: int):
    """Lengths with their corner cases and a table that scatters the pages: (page_table, lengths, pages)."""
    lengths = torch.randint(1, most * PAGE + 1, (rows,), dtype=torch.int32)
    lengths[0] = most * PAGE
    pages = rows * most + 2
    return torch.randperm(pages, dtype=torch.int32)[: rows * most].view(rows, most), lengths, pages


def tables(half: int):
    angle = torch.rand(100, half) * 6
    return angle.cos(), angle.sin()


def pools(heads: int, pages: int, dim: int, dtype: torch.dtype):
    """Keys and values: by heads, or by pages with the heads inside, as other engines keep them."""
    if random.random() < 0.5:
        return torch.randn(heads, pages, PAGE, dim).to(dtype), torch.randn(heads, pages, PAGE, dim).to(dtype)
    both = torch.randn(pages, 2, PAGE, heads, dim).to(dtype)
    return both[:, 0].permute(2, 0, 1, 3), both[:, 1].permute(2, 0, 1, 3)


def filled_key_pool(pages: int, key_heads: int, fmt: str):
    pool = torch.zeros(pages, key_heads, PAGE_HEAD_BYTES[fmt], dtype=torch.uint8)
    keys = torch.randn(pages * PAGE, key_heads, 128)
    torch.ops.spot.selector_key_append(pool, torch.arange(pages * PAGE), keys, fmt, 0.0625)
    return pool


def selector_key_append():
    fmt, key_heads, tokens = random.choice(list(PAGE_HEAD_BYTES)), random.choice([1, 4]), random.randint(1, 40)
    pool = torch.zeros(5, key_heads, PAGE_HEAD_BYTES[fmt], dtype=torch.uint8)
    slots = torch.randperm(5 * PAGE)[:tokens]
    slots[random.randrange(tokens)] = -1
    keys = torch.randn(tokens, key_heads, 128).to(random.choice([torch.float32, torch.bfloat16]))
    cos, sin = tables(32)
    prepared = dict(norm="layernorm", norm_weight=torch.rand(128) + 0.5, norm_bias=torch.randn(128), cos=cos, sin=sin)
    extra = dict(prepared, positions=torch.randint(100, (tokens,))) if random.random() < 0.5 else {}
    return (pool, slots, keys, fmt, 0.0625), extra


def selector_key_gather():
    fmt, key_heads = random.choice(list(PAGE_HEAD_BYTES)), random.choice([1, 4])
    length = random.randint(1, 5 * PAGE)
    return (filled_key_pool(5, key_heads, fmt), torch.randperm(5, dtype=torch.int32), length, fmt, 0.0625), {}


def score_blocks():
    fmt, key_heads, rows, groups = random.choice(list(PAGE_HEAD_BYTES)), random.choice([1, 4]), 3, random.randint(1, 3)
    table, lengths, pages = paged(rows, random.randint(1, 6))
    pool = filled_key_pool(pages, key_heads, fmt)
    arguments = (torch.randn(rows, 4, 128), torch.randn(rows, groups, 4), pool, table, lengths, fmt, 0.0625)
    return arguments, {}


def selector_project():
    tokens, size, key_heads = random.randint(2, 9), 2 * random.randint(3, 40), random.choice([1, 4])
    groups, norm = random.randint(1, 3), random.choice(["none", "layernorm", "rmsnorm"])
    dtype = random.choice([torch.float32, torch.bfloat16])
    cos, sin = tables(random.choice([32, 64, 8]))
    wanted = dict(norm=norm, cos=cos, sin=sin) if random.random() < 0.8 else dict(norm=norm)
    if norm != "none":
        wanted["norm_weight"] = torch.rand(128) + 0.5
    if norm == "layernorm":
        wanted["norm_bias"] = torch.randn(128)
    weights = (torch.randn(512, size), torch.randn(key_heads * 128, size), torch.randn(groups * 4, size))
    return (torch.randn(tokens, size).to(dtype), *weights, torch.randint(100, (tokens,))), wanted


def rule(groups):
    if random.random() < 0.3:
        number = [10 ** random.uniform(-3, 0) for _ in range(groups)]
        own = dict(threshold=number[0]) if random.random() < 0.5 else dict(thresholds=number)
        return dict(mode="threshold", sinks=16, recency=32, floor=48, temperature=0.7, **own)
    if random.random() < 0.5:
        return dict(mode="top_p", sinks=16, recency=32, floor=48, p=random.uniform(0.1, 1), temperature=0.7)
    budget = dict(budget=random.randint(0, 300)) if random.random() < 0.5 else dict(budget_fraction=random.random())
    return dict(mode="top_k", sinks=16, recency=32, floor=48, **budget)


def select_blocks():
    rows, groups, most = random.randint(1, 5), random.randint(1, 3), random.randint(1, 30)
    _, lengths, _ = paged(rows, most)
    return (torch.randn(rows, groups, most) * 3, lengths), rule(groups)


def attention(kv_heads=2):
    rows, dim, dtype = 3, random.choice([64, 72, 128]), random.choice([torch.float32, torch.bfloat16, torch.float16])
    table, lengths, pages = paged(rows, random.randint(2, 20))
    query = torch.randn(rows, kv_heads * random.randint(1, 3), dim).to(dtype)
    return query, *pools(kv_heads, pages, dim, dtype), table, lengths


def e4m3(keys, values):
    """Pools as they are or of codes, and the scales of the latter in one of their forms."""
    if random.random() < 0.5:
        return keys, values, {}
    heads = keys.shape[0]
    scales = {
        name: torch.rand(random.choice([(), (1,), (heads,)])) + 0.25
        for name in ("key_scale", "value_scale")
        if random.random() < 0.7
    }
    return keys.to(torch.float8_e4m3fn), values.to(torch.float8_e4m3fn), scales


def chosen(lengths, groups, blocks):
    scores = torch.randn(len(lengths), groups, blocks)
    indices, counts, _ = torch.ops.spot.select_blocks(
        scores, lengths, mode="top_k", sinks=16, recency=16, budget=96, floor=0
    )
    return indices, counts


def sparse_decode_attention():
    query, keys, values, table, lengths = attention()
    keys, values, scales = e4m3(keys, values)
    lists = chosen(lengths, random.choice([1, 2]), table.shape[1]) if random.random() < 0.7 else (None, None)
    return (query, keys, values, table, lengths, 0.1, *lists), scales


def select_and_attend():
    query, keys, values, table, lengths = attention()
    keys, values, scales = e4m3(keys, values)
    scores = torch.randn(len(lengths), random.choice([1, 2]), table.shape[1]) * 3
    return (scores, query, keys, values, table, lengths, 0.1), dict(
        rule(scores.shape[1]), with_mass=random.random() < 0.5, **scales
    )


def tiles_of(starts, counts, tile_queries: int):
    """The tiles of a batch whose sequences bring `counts` queries from positions `starts` on (ops/prefill/prefill.h)."""
    rows, first = [], 0
    for sequence, (start, count) in enumerate(zip(starts, counts, strict=True)):
        end = start + count
        for strip in range(start // 64 * 64, end if count else 0, 64):
            for tile in range(strip, strip + 64, tile_queries):
                low, high = max(tile, start), min(tile + tile_queries, end)
                rows.append((sequence, first + low - start, high - low, low) if low < high else (0, 0, 0, 0))
        first += count
    return torch.tensor(rows, dtype=torch.int32).view(-1, 4)


def ragged(sequences: int = 3, most: int = 90):
    """Starts and counts of a batch of chunks, the first from position 0: (starts, counts, page_table, pages)."""
    starts = [0] + [random.randint(0, most) for _ in range(sequences - 1)]
    counts = [random.randint(1, most) for _ in range(sequences)]
    width = (max(map(sum, zip(starts, counts, strict=True))) + PAGE - 1) // PAGE
    pages = sequences * width + 2
    table = torch.randperm(pages, dtype=torch.int32)[: sequences * width].view(sequences, width)
    return starts, counts, table, pages


def selector_key_stage():
    fmt, key_heads = random.choice(list(PAGE_HEAD_BYTES)), random.choice([1, 4])
    starts, counts, table, pages = ragged()
    lengths = torch.tensor([a + b for a, b in zip(starts, counts, strict=True)], dtype=torch.int32)
    begins = (lengths.cumsum(0) - lengths).to(torch.int32)
    tokens = int(lengths.sum()) + random.randint(0, 5)
    return (filled_key_pool(pages, key_heads, fmt), table, lengths, begins, tokens, fmt, 0.0625), {}


def score_tiles():
    starts, counts, table, _ = ragged()
    tile_queries, tokens = random.choice([16, 32, 64]), sum(counts)
    lengths = torch.tensor([a + b for a, b in zip(starts, counts, strict=True)], dtype=torch.int32)
    begins = (lengths.cumsum(0) - lengths).to(torch.int32)
    keys = torch.randn(random.choice([1, 4]), int(lengths.sum()), 128, dtype=torch.bfloat16)
    query = torch.randn(tokens, 4, 128).to(random.choice([torch.float32, torch.bfloat16]))
    weight = torch.randn(tokens, random.randint(1, 3), 4)
    tiles = tiles_of(starts, counts, tile_queries)
    return (query, weight, keys, begins, tiles, tile_queries, table.shape[1] + random.randint(0, 2)), {}


def attend_tiles(dtype=None, groups=None):
    starts, counts, table, pages = ragged()
    tile_queries, kv_heads, dim = random.choice([16, 32, 64]), 2, random.choice([64, 128])
    dtype = dtype or random.choice([torch.float32, torch.bfloat16, torch.float16])
    query = torch.randn(sum(counts), kv_heads * random.randint(1, 3), dim).to(dtype)
    tiles = tiles_of(starts, counts, tile_queries)
    indices, numbers = chosen(tiles[:, 2] + tiles[:, 3], groups or random.choice([1, kv_heads]), table.shape[1])
    return (query, *pools(kv_heads, pages, dim, dtype), table, tiles, tile_queries, indices, numbers, 0.1), {}


def rms_norm():
    dtype, width = random.choice([torch.float32, torch.bfloat16]), random.randint(1, 100)
    factor = torch.randn(width).to(random.choice([dtype, torch.float32]))
    return (torch.randn(random.randint(1, 7), width).to(dtype), factor, 1e-6), {}


def gated_product():
    sizes = (random.randint(1, 7), 3, 2 * random.randint(1, 50))
    both = torch.randn(sizes).to(random.choice([torch.float32, torch.bfloat16]))
    return (*both.chunk(2, 2), random.choice(["silu", "sigmoid"])), {}


def attention_prologue():
    tokens, heads, kv_heads, dim = random.randint(2, 20), 6, 2, 64
    gate, dtype = random.random() < 0.5, random.choice([torch.float32, torch.bfloat16])
    projected = torch.randn(tokens, ((2 if gate else 1) * heads + 2 * kv_heads) * dim).to(dtype)
    cos, sin = tables(random.choice([16, 32]))
    arguments = (projected, heads, kv_heads, dim, cos, sin, torch.randint(100, (tokens,)))
    extra = dict(output_gate=gate)
    if random.random() < 0.7:
        extra["qk_norm"] = torch.randn(heads + kv_heads, dim)
    codes = random.random() < 0.3
    keys, values = (pool.to(torch.float8_e4m3fn if codes else dtype) for pool in pools(kv_heads, 5, dim, dtype))
    slots = torch.randperm(5 * PAGE)[:tokens]
    slots[random.randrange(tokens)] = -1
    if random.random() < 0.8:
        extra.update(key_pool=keys, value_pool=values, slots=slots)
        if codes:
            extra.update(key_scale=torch.rand(kv_heads) + 0.1, value_scale=torch.rand(kv_heads) + 0.1)
    if "slots" in extra and random.random() < 0.7:
        key_heads, fmt, size = random.choice([1, 4]), random.choice(list(PAGE_HEAD_BYTES)), 50
        cos, sin = tables(32)
        extra.update(
            selector_projected=torch.randn(tokens, (4 + key_heads) * 128).to(dtype),
            hidden=torch.randn(tokens, size).to(dtype),
            mix=torch.randn(8, size),
            mix_scale=0.04,
            key_norm="layernorm",
            key_norm_weight=torch.rand(128) + 0.5,
            key_norm_bias=torch.randn(128),
            selector_cos=cos,
            selector_sin=sin,
            selector_pool=torch.zeros(5, key_heads, PAGE_HEAD_BYTES[fmt], dtype=torch.uint8),
            format=fmt,
        )
    return arguments, extra


def selector_prologue():
    tokens, key_heads, fmt, size = (
        random.randint(1, 20),
        random.choice([1, 4]),
        random.choice(list(PAGE_HEAD_BYTES)),
        50,
    )
    dtype = random.choice([torch.float32, torch.bfloat16])
    slots = torch.randperm(5 * PAGE)[:tokens]
    slots[random.randrange(tokens)] = -1
    cos, sin = tables(32)
    arguments = (
        torch.zeros(5, key_heads, PAGE_HEAD_BYTES[fmt], dtype=torch.uint8),
        slots,
        torch.randn(tokens, (4 + key_heads) * 128).to(dtype),
        torch.randn(tokens, size).to(dtype),
        torch.randn(random.choice([4, 8]), size),
        fmt,
    )
    extra = dict(norm="layernorm", norm_weight=torch.rand(128) + 0.5, norm_bias=torch.randn(128))
    if random.random() < 0.7:
        extra.update(cos=cos, sin=sin, positions=torch.randint(100, (tokens,)))
    return arguments, extra


def key_summary_append():
    heads, pages, dim, dtype = 2, 5, 2 * random.randint(2, 40), random.choice([torch.float32, torch.bfloat16])
    keys, _ = pools(heads, pages, dim, dtype)
    slots = torch.arange(random.randint(1, pages * PAGE))
    slots[random.randrange(len(slots))] = -1
    extra = {}
    if random.random() < 0.7:
        extra["codes"] = torch.zeros(heads, pages * PAGE, dim // 2, dtype=torch.uint8)
        extra["ranges"] = torch.zeros(heads, pages * PAGE, 2, dtype=torch.float16)
    return (torch.zeros(heads, pages, 2, dim, dtype=dtype), keys, slots), extra


def summaries(keys):
    heads, pages, _, dim = keys.shape
    bounds = torch.zeros(heads, pages, 2, dim, dtype=keys.dtype)
    codes = torch.zeros(heads, pages * PAGE, dim // 2, dtype=torch.uint8)
    ranges = torch.zeros(heads, pages * PAGE, 2, dtype=torch.float16)
    torch.ops.spot.key_summary_append(bounds, keys, torch.arange(pages * PAGE), codes, ranges)
    return bounds, codes, ranges


def quest_score():
    query, keys, _, table, lengths = attention()
    return (query, summaries(keys)[0], table, lengths, 0.1, random.random() < 0.5), {}


def estimate_logits():
    query, keys, _, table, lengths = attention()
    _, codes, ranges = summaries(keys)
    return (query, codes, ranges, table, lengths, *chosen(lengths, keys.shape[0], table.shape[1]), 0.1), {}


def prune_tokens():
    (query, codes, ranges, table, lengths, indices, counts, scale), _ = estimate_logits()
    logits = torch.ops.spot.estimate_logits(query, codes, ranges, table, lengths, indices, counts, scale)
    return (logits, indices, counts, lengths, random.uniform(0.1, 1), 40), {}


def token_attention():
    query, keys, values, table, lengths = attention()
    heads, width = keys.shape[0], 20
    positions = torch.zeros(len(lengths), heads, width, dtype=torch.int32)
    counts = torch.zeros(len(lengths), heads, dtype=torch.int32)
    for row, length in enumerate(lengths.tolist()):
        for head in range(heads):
            some = torch.randperm(length)[: random.randint(0, width)].sort().values
            positions[row, head, : len(some)] = some
            counts[row, head] = len(some)
    return (query, keys, values, table, lengths, positions, counts, 0.1), {}


def strip(tokens: int, rows: int):
    which = torch.randperm(tokens)[:rows].sort().values.to(torch.int32)
    return which, torch.zeros_like(which), which.clone()


def teacher_mass():
    tokens, heads, kv_heads, dim, dtype = 24, 4, 2, 16, random.choice([torch.float32, torch.float64])
    query, key = torch.randn(tokens, heads, dim).to(dtype), torch.randn(tokens, kv_heads, dim).to(dtype)
    logits = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(2, 1)) * 0.2
    seen = torch.arange(tokens) <= torch.arange(tokens)[:, None]
    sums = logits.masked_fill(~seen, float("-inf")).logsumexp(-1)
    return (query, key, sums, *strip(tokens, 9), 0, tokens, 0.2, random.choice([1, 2])), {}


def selector_kl():
    tokens, dim, key_heads, rows = 24, 16, random.choice([1, 4]), 9
    which, low, last = strip(tokens, rows)
    mass = torch.rand(rows, tokens) * (torch.arange(tokens) <= last[:, None])
    arguments = (mass, mass.sum(1), torch.randn(tokens, 4, dim), torch.randn(tokens, key_heads, dim))
    extra = dict(k_train=random.choice([0, 5]))
    if random.random() < 0.7:
        extra["grad_key"] = torch.zeros(key_heads, tokens, dim)
    return (*arguments, torch.randn(tokens, 4), which, low, last, 0), extra


def gated_delta(tokens: int, sequences: int):
    key_heads, value_heads, key_dim, value_dim, taps, slots = 2, 4, 16, 24, 4, sequences + 2
    channels = 2 * key_heads * key_dim + value_heads * value_dim
    dtype = random.choice([torch.float32, torch.bfloat16])
    inputs = [
        torch.randn(tokens, width).to(dtype) for width in (channels, value_heads * value_dim, value_heads, value_heads)
    ]
    weights = (
        torch.randn(taps, channels),
        torch.rand(value_heads) + 0.1,
        torch.randn(value_heads),
        torch.rand(value_dim),
    )
    states = (torch.randn(slots, taps - 1, channels), torch.randn(slots, value_heads, key_dim, value_dim))
    return (*inputs, *weights, 1e-6, *states, torch.randperm(slots)[:sequences])


def gated_delta_decode():
    sequences = random.randint(2, 5)
    return gated_delta(sequences, sequences), {}


def gated_delta_prefill():
    lengths = [random.randint(0, 90), random.randint(1, 90)]
    return (*gated_delta(sum(lengths), 2), lengths), {}


def linear():
    dtype = random.choice([torch.float32, torch.bfloat16, torch.float16])
    tokens, width, out = random.choice([1, 5, 40]), random.choice([16, 144, 300]), random.randint(1, 300)
    weight = torch.randn(out, width)
    extra = dict(bias=torch.randn(out).to(dtype)) if random.random() < 0.5 else {}
    if random.random() < 0.5:
        extra["scales"] = torch.rand(-(-out // 128), -(-width // 128)) + 0.1
        weight = weight.to(torch.float8_e4m3fn)
    else:
        weight = weight.to(dtype)
    return (torch.randn(tokens, width).to(dtype), weight, torch.randn(tokens, out).to(dtype)), extra | dict(
        accumulate=random.random() < 0.5
    )


MAKERS = {
    maker.__name__: maker
    for maker in (
        selector_key_append,
        selector_key_gather,
        score_blocks,
        selector_project,
        select_blocks,
        sparse_decode_attention,
        select_and_attend,
        selector_key_stage,
        score_tiles,
        attend_tiles,
        rms_norm,
        gated_product,
        attention_prologue,
        selector_prologue,
        key_summary_append,
        quest_score,
        estimate_logits,
        prune_tokens,
        token_attention,
        teacher_mass,
        selector_kl,
        gated_delta_decode,
        gated_delta_prefill,
        linear,
    )
}
