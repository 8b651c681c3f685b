"""The operators of sparse prefill: the CPU's against their formulas in float64, CUDA's against the CPU's."""

import math
import random

import pytest
import samples
import torch

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(scope="module", autouse=True)
def library(request):
    path = request.getfixturevalue("build_folder") / "libspot_ops.so"
    assert path.is_file(), f"{path} does not exist: build the target spot_ops_library"
    torch.ops.load_library(str(path))


@pytest.fixture(autouse=True)
def seeded(seed):
    torch.manual_seed(seed)
    random.seed(seed)


def queries(tiles):
    """(tile, its sequence, row, position) of every query."""
    for i, (sequence, first, count, start) in enumerate(tiles.tolist()):
        for q in range(count):
            yield i, sequence, first + q, start + q


def test_scores_are_the_formula():
    for _ in range(3):
        (query, weight, keys, begins, tiles, tile_queries, blocks), _ = samples.score_tiles()
        got = torch.ops.spot.score_tiles(query, weight, keys, begins, tiles, tile_queries, blocks)
        want = torch.full((len(tiles), weight.shape[1], blocks * 16), -math.inf, dtype=torch.float64)
        rounded = query.to(torch.bfloat16).double()
        for tile, sequence, row, position in queries(tiles):
            key = keys[:, begins[sequence] : begins[sequence] + position + 1].double()
            dots = torch.einsum("hd,htd->ht", rounded[row], key.expand(4, -1, -1)).relu()
            seen = want[tile, :, : position + 1]
            torch.maximum(seen, weight[row].double() @ dots, out=seen)
        torch.testing.assert_close(got.double(), want.unflatten(2, (-1, 16)).amax(3), rtol=1e-4, atol=1e-4)


def attention_in_double(query, keys, values, table, tiles, tile_queries, indices, counts, scale):
    out = torch.zeros(query.shape, dtype=torch.float64)
    group = query.shape[1] // keys.shape[0]
    for tile, sequence, row, position in queries(tiles):
        for head in range(query.shape[1]):
            chosen = min(head // group, counts.shape[1] - 1)
            blocks = indices[tile, chosen, : counts[tile, chosen]].tolist()
            tokens = [t for b in blocks for t in range(16 * b, 16 * b + 16) if t <= position]
            if not tokens:
                continue
            pages = table[sequence, [t // 16 for t in tokens]].long()
            within = [t % 16 for t in tokens]
            logits = keys[head // group, pages, within].double() @ query[row, head].double() * scale
            out[row, head] = logits.softmax(0) @ values[head // group, pages, within].double()
    return out


def poisoned(pool, table, starts, counts):
    """The pool with what lies past every sequence's end not a number."""
    pool = pool.clone()
    width = table.shape[1]
    for row, start, count in zip(table, starts, counts, strict=True):
        for token in range(start + count, 16 * width):
            pool[:, row[token // 16], token % 16] = math.nan
    return pool


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
def test_attention_is_the_formula_and_the_future_does_not_matter(dtype, bound):
    for groups in (1, 2):
        (query, keys, values, table, tiles, *rest), _ = samples.attend_tiles(dtype, groups)
        ends = [0] * len(table)
        for _, sequence, _, position in queries(tiles):
            ends[sequence] = max(ends[sequence], position + 1)
        keys, values = (poisoned(x, table, [0] * len(table), ends) for x in (keys, values))
        got = torch.ops.spot.attend_tiles(query, keys, values, table, tiles, *rest)
        want = attention_in_double(query, keys, values, table, tiles, *rest)
        assert (got.double() - want).norm() <= bound * want.norm()


def test_all_blocks_are_dense_attention():
    starts, counts, table, pages = samples.ragged()
    keys, values = samples.pools(2, pages, 64, torch.float32)
    query, tiles = torch.randn(sum(counts), 4, 64), samples.tiles_of(starts, counts, 32)
    numbers = (tiles[:, 2] + tiles[:, 3] + 15).div(16, rounding_mode="floor").to(torch.int32).unsqueeze(1)
    indices = torch.arange(table.shape[1], dtype=torch.int32).expand(len(tiles), 1, -1).contiguous()
    got = torch.ops.spot.attend_tiles(query, keys, values, table, tiles, 32, indices, numbers, 0.125)
    first = 0
    for sequence, (start, count) in enumerate(zip(starts, counts, strict=True)):
        length = start + count
        dense = [x[:, table[sequence].long()].flatten(1, 2)[:, :length].repeat_interleave(2, 0) for x in (keys, values)]
        mask = torch.arange(length) <= torch.arange(start, length)[:, None]
        own = query[first : first + count].transpose(0, 1)
        want = torch.nn.functional.scaled_dot_product_attention(own, *dense, attn_mask=mask, scale=0.125)
        torch.testing.assert_close(got[first : first + count], want.transpose(0, 1), rtol=1e-5, atol=1e-5)
        first += count


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(tile_queries=24), "tile_queries is 24; it must be 16, 32 or 64"),
        (dict(tiles=torch.zeros(3, 4, dtype=torch.int32)), "a multiple of 2 tiles"),
        (dict(tiles=torch.tensor([[5, 0, 4, 0], [0, 0, 0, 0]], dtype=torch.int32)), r"tile 0 is \(5, 0, 4, 0\)"),
        (dict(counts=torch.full((2, 1), 9, dtype=torch.int32)), "count 9 of tile 0 exceeds 2 indices"),
        (dict(indices=torch.full((2, 1, 2), 3, dtype=torch.int32)), "tile 0 lists a block past its 4 tokens"),
    ],
)
def test_errors_name_what_where_and_what_to_do(change, words):
    arguments = dict(
        query=torch.randn(4, 2, 64),
        key_pool=torch.randn(1, 3, 16, 64),
        value_pool=torch.randn(1, 3, 16, 64),
        page_table=torch.zeros(1, 2, dtype=torch.int32),
        tiles=torch.tensor([[0, 0, 4, 0], [0, 0, 0, 0]], dtype=torch.int32),
        tile_queries=32,
        indices=torch.zeros(2, 1, 2, dtype=torch.int32),
        counts=torch.ones(2, 1, dtype=torch.int32),
        scale=0.1,
    )
    with pytest.raises(RuntimeError, match=words):
        torch.ops.spot.attend_tiles(**{**arguments, **change})


def on_gpu(arguments):
    return [x.cuda() if isinstance(x, torch.Tensor) else x for x in arguments]


@needs_cuda
def test_cuda_stages_and_scores_as_the_cpu():
    for _ in range(6):
        arguments, _ = samples.selector_key_stage()
        if arguments[5] == "f32":
            continue
        want, got = (torch.ops.spot.selector_key_stage(*x).cpu() for x in (arguments, on_gpu(arguments)))
        for begin, length in zip(arguments[3], arguments[2], strict=True):
            assert torch.equal(got[:, begin : begin + length], want[:, begin : begin + length])
        arguments, _ = samples.score_tiles()
        want, got = (torch.ops.spot.score_tiles(*x).cpu() for x in (arguments, on_gpu(arguments)))
        seen = want > -math.inf
        torch.testing.assert_close(got[seen], want[seen], rtol=1e-4, atol=1e-4)


@needs_cuda
def test_cuda_attends_as_the_cpu():
    for dtype in (torch.bfloat16, torch.float16):
        for _ in range(5):
            arguments, _ = samples.attend_tiles(dtype)
            want, got = (torch.ops.spot.attend_tiles(*x).cpu().double() for x in (arguments, on_gpu(arguments)))
            assert (got - want).norm() <= 5e-3 * want.norm()
