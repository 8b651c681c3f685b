"""The typed wrappers: the operators' own names, order and defaults, and the same results."""

import inspect

import pytest
import torch


def wrapped(module):
    return [
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and name != "page_head_bytes"
    ]


def test_signatures_are_the_schemas(spotattention):
    names = wrapped(spotattention.ops)
    assert len(names) >= 9
    for name in names:
        schema = getattr(torch.ops.spot, name).default._schema
        parameters = inspect.signature(getattr(spotattention.ops, name)).parameters.values()
        assert [p.name for p in parameters] == [a.name for a in schema.arguments], name
        for parameter, argument in zip(parameters, schema.arguments, strict=True):
            has_default = parameter.default is not inspect.Parameter.empty
            assert has_default == argument.has_default_value(), (name, parameter.name)
            if has_default and isinstance(parameter.default, float):
                assert parameter.default == pytest.approx(argument.default_value, rel=1e-12), (name, parameter.name)
            elif has_default and isinstance(parameter.default, tuple):
                assert list(parameter.default) == argument.default_value, (name, parameter.name)
            elif has_default:
                assert parameter.default == argument.default_value, (name, parameter.name)
        assert getattr(spotattention.ops, name).__doc__


def test_the_cpu_is_never_refused(spotattention):
    assert spotattention.ops.device_refusal("cpu") == ""


def test_page_head_bytes_are_what_a_pool_needs(spotattention):
    ops = spotattention.ops
    for word in ("f32", "bf16", "int8", "int4", "mxfp4", "nvfp4"):
        pool = torch.zeros(3, 4, ops.page_head_bytes(word), dtype=torch.uint8)
        keys = torch.randn(40, 4, 128)
        ops.selector_key_append(pool, torch.arange(40), keys, word, 0.0625)
        stored = ops.selector_key_gather(pool, torch.arange(3, dtype=torch.int32), 40, word, 0.0625)
        assert (stored - keys).norm() / keys.norm() < (0.2 if "4" in word else 0.02)
        with pytest.raises(RuntimeError, match=f"a {word} pool is contiguous uint8"):
            ops.selector_key_append(pool[..., 1:].contiguous(), torch.arange(40), keys, word)
    with pytest.raises(ValueError, match="'fp8'; it must be one of f32, bf16"):
        ops.page_head_bytes("fp8")


def test_a_decode_step_from_hidden_states(spotattention):
    """Project, store, score, select and attend: the blocks of highest score by plain torch, exact attention on them."""
    ops = spotattention.ops
    torch.manual_seed(torch.seed() % 2**31)
    length, size, heads, kv_heads, dim = 700, 96, 6, 2, 64
    pages = torch.randperm(50, dtype=torch.int32)[:44]
    hidden, positions = torch.randn(length, size), torch.arange(length)
    weights = [torch.randn(rows, size) / size**0.5 for rows in (512, 128, 4)]
    angle = positions[:, None] / 10000 ** (torch.arange(32) / 32)
    made = ops.selector_project(hidden, *weights, positions, "layernorm", cos=angle.cos(), sin=angle.sin())
    pool = torch.zeros(50, 1, ops.page_head_bytes("bf16"), dtype=torch.uint8)
    slots = pages.long()[positions // 16] * 16 + positions % 16
    ops.selector_key_append(pool, slots, made.key, "bf16")
    table, lengths = pages[None], torch.tensor([length], dtype=torch.int32)
    scores = ops.score_blocks(made.query[-1:], made.weight[-1:], pool, table, lengths, "bf16")

    token = (torch.relu(made.query[-1] @ made.key.to(torch.bfloat16).float()[:, 0].T).T * made.weight[-1, 0]).sum(1)
    padded = torch.nn.functional.pad(token, (0, 4), value=float("-inf")).view(44, 16).amax(1)
    torch.testing.assert_close(scores[0, 0], padded, rtol=1e-3, atol=1e-3)

    chosen = ops.select_blocks(scores, lengths, "top_k", sinks=16, recency=32, floor=0, budget=160)
    blocks = chosen.indices[0, 0, : chosen.counts[0, 0]].tolist()
    reserved = {0, 41, 42, 43}
    best = sorted(set(range(44)) - reserved, key=lambda b: -scores[0, 0, b])[: 10 - len(reserved)]
    assert blocks == sorted(reserved | set(best))

    keys, values = torch.randn(50, 16, kv_heads, dim), torch.randn(50, 16, kv_heads, dim)
    query = torch.randn(1, heads, dim)
    got = ops.sparse_decode_attention(
        query,
        keys.permute(2, 0, 1, 3),
        values.permute(2, 0, 1, 3),
        table,
        lengths,
        dim**-0.5,
        chosen.indices,
        chosen.counts,
    )
    seen = [b * 16 + t for b in blocks for t in range(16) if b * 16 + t < length]
    rows = [
        x.view(-1, kv_heads, dim)[slots[seen]].repeat_interleave(3, 1).transpose(0, 1)[None] for x in (keys, values)
    ]
    want = torch.nn.functional.scaled_dot_product_attention(query.transpose(0, 1)[None], *rows)[0, :, 0]
    torch.testing.assert_close(got[0], want, rtol=1e-4, atol=1e-5)


def test_another_torch_is_named_in_one_sentence(spotattention, monkeypatch):
    from spotattention import _library

    assert _library.mismatch() == ""
    monkeypatch.setattr(_library, "built_for_torch", "2.1.0+cpu")
    sentence = _library.mismatch()
    assert "was built for torch 2.1.0+cpu, but torch " + torch.__version__ in sentence and sentence.count("\n") == 0


def test_a_missing_library_is_named(spotattention, monkeypatch, tmp_path):
    from spotattention import _library

    monkeypatch.setenv("SPOT_OPS_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(ImportError, match="none.so does not exist"):
        _library.load()
