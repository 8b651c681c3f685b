"""Every operator under torch.library.opcheck (schema, aliasing, fake tensors, torch.compile's tracing with symbolic
shapes), what torch.compile makes of a chain of them, and errors in words."""

import random

import pytest
import samples
import torch


@pytest.fixture(scope="module", autouse=True)
def library(request):
    path = request.getfixturevalue("build_folder") / "libspot_ops.so"
    assert path.is_file(), f"{path} does not exist: build the target spot_ops_library"
    torch.ops.load_library(str(path))


@pytest.fixture(autouse=True)
def seeded(seed):
    torch.manual_seed(seed)
    random.seed(seed)


ALL_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def operator(name):
    return getattr(torch.ops.spot, name).default


def test_every_operator_has_samples():
    registered = {
        name.removeprefix("spot::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("spot::")
    }
    without_tensors = {"device_refusal", "file_checksum", "sealed", "check_sealed"}
    assert registered - without_tensors == set(samples.MAKERS)


@pytest.mark.parametrize("name", samples.MAKERS)
def test_opcheck(name):
    for _ in range(3):
        arguments, keywords = samples.MAKERS[name]()
        tensors = [x for x in (*arguments, *keywords.values()) if isinstance(x, torch.Tensor)]
        checks = list(ALL_CHECKS)
        fp8 = [(x, x.view(torch.uint8).clone()) for x in tensors if x.dtype == torch.float8_e4m3fn]
        if fp8:
            # It compares what went in with what is there afterwards, which torch cannot do for FP8 on a CPU.
            checks.remove("test_schema")
        torch.library.opcheck(operator(name), arguments, keywords, test_utils=checks)
        assert all(torch.equal(x.view(torch.uint8), before) for x, before in fp8)


@pytest.mark.parametrize("name", samples.MAKERS)
def test_the_fake_gives_the_real_shapes_dtypes_and_strides(name):
    from torch._subclasses.fake_tensor import FakeTensorMode

    for _ in range(5):
        arguments, keywords = samples.MAKERS[name]()
        with FakeTensorMode() as mode:
            fake = lambda x: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x  # noqa: B023
            supposed = operator(name)(*map(fake, arguments), **{key: fake(x) for key, x in keywords.items()})
        real = operator(name)(*arguments, **keywords)
        listed = lambda x: x if isinstance(x, (tuple, list)) else [x]
        for want, got in zip(listed(real), listed(supposed), strict=True):
            if want is not None:
                assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())


def test_a_compiled_chain_gives_the_eager_bits():
    def chain(query, weight, pool, table, lengths, fmt, scale, attended, keys, values):
        scores = torch.ops.spot.score_blocks(query, weight, pool, table, lengths, fmt, scale)
        indices, counts, _ = torch.ops.spot.select_blocks(
            scores, lengths, mode="top_k", sinks=16, recency=16, budget=64, floor=32
        )
        return torch.ops.spot.sparse_decode_attention(attended, keys, values, table, lengths, 0.1, indices, counts) * 2

    compiled = torch.compile(chain, backend="aot_eager", fullgraph=True, dynamic=True)
    for _ in range(3):
        (query, weight, pool, table, lengths, fmt, scale), _ = samples.score_blocks()
        keys, values = torch.randn(1, pool.shape[0], 16, 64), torch.randn(1, pool.shape[0], 16, 64)
        arguments = (query, weight[:, :1], pool, table, lengths, fmt, scale, torch.randn(3, 2, 64), keys, values)
        assert torch.equal(compiled(*arguments), chain(*arguments))


def test_selector_project_is_differentiable_and_compiles():
    arguments, keywords = samples.selector_project()
    arguments = tuple(x.to(torch.float32) if x.is_floating_point() else x for x in arguments)
    for x in arguments[:4]:
        x.requires_grad_()

    def loss(*arguments):
        query, weight, key = torch.ops.spot.selector_project(*arguments, **keywords)
        return query.sin().sum() + weight.sin().sum() + key.sin().sum()

    eager = torch.autograd.grad(loss(*arguments), arguments[:4])
    compiled = torch.autograd.grad(torch.compile(loss, backend="aot_eager")(*arguments), arguments[:4])
    for want, got in zip(eager, compiled, strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want)
    # Against the same lines in float64, by finite differences of one direction.
    direction = [torch.randn_like(x) for x in arguments[:4]]
    step = 1e-3
    ends = [
        loss(*(x.detach() + sign * step * d for x, d in zip(arguments[:4], direction, strict=True)), arguments[4])
        for sign in (1, -1)
    ]
    slope = sum((g * d).sum() for g, d in zip(eager, direction, strict=True))
    torch.testing.assert_close((ends[0] - ends[1]) / (2 * step), slope.detach(), rtol=0.05, atol=0.5)


def test_selector_project_against_float64():
    for norm in ("none", "layernorm", "rmsnorm"):
        tokens, size, key_heads = 7, 48, random.choice([1, 4])
        hidden, positions = torch.randn(tokens, size), torch.randint(100, (tokens,))
        matrices = [torch.randn(rows, size) for rows in (512, key_heads * 128, 8)]
        weight, bias = torch.rand(128) + 0.5, torch.randn(128)
        angle = torch.rand(100, 32) * 6
        got = torch.ops.spot.selector_project(
            hidden,
            *matrices,
            positions,
            norm,
            *((weight, bias) if norm == "layernorm" else (weight, None) if norm == "rmsnorm" else ()),
            cos=angle.cos(),
            sin=angle.sin(),
        )
        query, key, mix = (hidden.double() @ m.double().T for m in matrices)
        key = key.view(tokens, key_heads, 128)
        if norm == "layernorm":
            key = torch.nn.functional.layer_norm(key, (128,), weight.double(), bias.double(), 1e-6)
        elif norm == "rmsnorm":
            key = torch.nn.functional.rms_norm(key, (128,), weight.double(), 1e-6)

        def turned(x):
            """The first 32 dims are real parts, the next 32 imaginary ones."""
            z = (
                torch.complex(x[..., :32], x[..., 32:64])
                * torch.polar(torch.ones(tokens, 32).double(), angle[positions].double())[:, None]
            )  # noqa: B023
            return torch.cat((z.real, z.imag, x[..., 64:]), -1)

        want = turned(query.view(tokens, 4, 128)), mix.view(tokens, 2, 4) / 512**0.5, turned(key)
        for w, g in zip(want, got, strict=True):
            torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-4)


def test_linear_against_float64():
    for _ in range(20):
        (x, weight, y), extra = samples.linear()
        before, scales = y.double(), extra.get("scales")
        decoded = weight.to(torch.float64)
        if scales is not None:
            out, width = weight.shape
            blocks = scales.double().repeat_interleave(128, 0)[:out].repeat_interleave(128, 1)[:, :width]
            decoded = decoded * blocks
        wanted = x.double() @ decoded.T + (extra["bias"].double() if "bias" in extra else 0)
        size = x.double().abs() @ decoded.abs().T + 1
        if extra["accumulate"]:
            wanted, size = wanted + before, size + before.abs()
        torch.ops.spot.linear(x, weight, y, **extra)
        # The codes' numbers, the sum and with a bias a step between are rounded to x's dtype.
        assert ((y.double() - wanted).abs() <= 4 * torch.finfo(x.dtype).eps * size).all()


def test_the_selectors_prologue_is_projection_and_append():
    """Against selector_project, which is tested above, and selector_key_append of the same keys."""
    for _ in range(6):
        (pool, slots, projected, hidden, mix, fmt), extra = samples.selector_prologue()
        key_heads, tokens = pool.shape[1], len(slots)
        weights = torch.randn(projected.shape[1], hidden.shape[1], dtype=torch.double).to(hidden.dtype)
        projected = hidden @ weights.T
        stored = pool.clone()
        query, weight = torch.ops.spot.selector_prologue(
            pool, slots, projected, hidden, mix, fmt, 0.0625, 0.25, **extra
        )
        positions = extra.get("positions", torch.zeros(tokens, dtype=torch.long))
        tables = {name: extra[name] for name in ("cos", "sin") if name in extra}
        want = torch.ops.spot.selector_project(
            hidden, weights[:512], weights[512:], mix, positions, **tables, mix_scale=0.25
        )
        close = {"rtol": 1e-4, "atol": 1e-4} if hidden.dtype == torch.float32 else {"rtol": 0.02, "atol": 0.1}
        torch.testing.assert_close(query, want[0], **close)
        torch.testing.assert_close(weight, want[1], rtol=1e-4, atol=1e-4)
        keys = projected[:, 512:].view(tokens, key_heads, 128)
        torch.ops.spot.selector_key_append(stored, slots, keys, fmt, 0.0625, **extra)
        assert torch.equal(pool, stored)


def test_the_prologue_stores_through_any_strides():
    for dtype in (torch.float32, torch.bfloat16):
        tokens, heads, kv_heads, dim, pages = 20, 6, 2, 64, 4
        cos, sin = samples.tables(32)
        projected = torch.randn(tokens, (heads + 2 * kv_heads) * dim).to(dtype)
        arguments = (projected, heads, kv_heads, dim, cos, sin, torch.randint(100, (tokens,)))
        slots = torch.randperm(pages * 16)[:tokens]
        slots[random.randrange(tokens)] = -1
        both = torch.full((pages, 2, 16, kv_heads, dim + 6), 9.0).to(dtype)[..., :dim]
        layouts = [
            [torch.full((kv_heads, pages, 16, dim), 9.0).to(dtype) for _ in range(2)],
            [torch.full((pages, 16, kv_heads, dim), 9.0).to(dtype).permute(2, 0, 1, 3) for _ in range(2)],
            [both[:, i].permute(2, 0, 1, 3) for i in range(2)],
        ]
        for keys, values in layouts:
            made = torch.ops.spot.attention_prologue(*arguments, key_pool=keys, value_pool=values, slots=slots)
            for pool, rows in ((keys, made[1]), (values, made[2])):
                want = torch.full((pages * 16, kv_heads, dim), 9.0).to(dtype)
                want[slots[slots >= 0]] = rows[slots >= 0]
                assert torch.equal(pool.permute(1, 2, 0, 3).reshape(-1, kv_heads, dim), want)
    with pytest.raises(RuntimeError, match="value_pool is .* it must match key_pool"):
        torch.ops.spot.attention_prologue(*arguments, key_pool=keys, value_pool=layouts[0][1], slots=slots)


def test_the_prologue_stores_e4m3_codes():
    """The nearest of all codes to each returned number over its head's scale; what lies past the largest saturates."""
    codes = torch.arange(256, dtype=torch.uint8)
    table = codes.view(torch.float8_e4m3fn).double()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tokens, heads, kv_heads, dim, pages = 20, 6, 3, 16, 3
        projected = (3 * torch.randn(tokens, (heads + 2 * kv_heads) * dim)).to(dtype)
        arguments = (projected, heads, kv_heads, dim, *samples.tables(8), torch.randint(100, (tokens,)))
        slots = torch.randperm(pages * 16)[:tokens]
        slots[random.randrange(tokens)] = -1
        scales = dict(key_scale=torch.rand(kv_heads) * 0.1 + 1e-3, value_scale=torch.tensor([2**-9, 0.25, 128.0]))
        pools = [torch.full((kv_heads, pages, 16, dim), 9.0).to(torch.float8_e4m3fn) for _ in range(2)]
        made = torch.ops.spot.attention_prologue(
            *arguments, key_pool=pools[0], value_pool=pools[1], slots=slots, **scales
        )
        for pool, rows, scale in zip(pools, made[1:3], scales.values(), strict=True):
            ratio = (rows.float() / scale[:, None]).double()
            distance = (ratio[..., None] - table).abs().nan_to_num(nan=torch.inf)
            stored = pool.permute(1, 2, 0, 3).reshape(-1, kv_heads, dim)
            got = stored[slots[slots >= 0]].double()
            best = distance.amin(-1)[slots >= 0]
            assert torch.equal((got - ratio[slots >= 0]).abs(), best)
            untouched = torch.ones(pages * 16, dtype=torch.bool)
            untouched[slots[slots >= 0]] = False
            assert (stored[untouched].float() == 9).all()
        assert (got.abs() == 448).any()
    for wrong, words in (
        (dict(key_scale=torch.ones(2)), r"key_scale is Float \[2\]; it must be contiguous float32 \[3\]"),
        (dict(value_scale=torch.ones(3).half()), r"value_scale is Half \[3\]; it must be contiguous float32 \[3\]"),
    ):
        with pytest.raises(RuntimeError, match=words):
            torch.ops.spot.attention_prologue(*arguments, key_pool=pools[0], value_pool=pools[1], slots=slots, **wrong)
    numbers = [torch.zeros(kv_heads, pages, 16, dim).half() for _ in range(2)]
    with pytest.raises(
        RuntimeError, match="key_scale was given for pools of Half; scales are for float8_e4m3fn, leave it out"
    ):
        torch.ops.spot.attention_prologue(
            *arguments, key_pool=numbers[0], value_pool=numbers[1], slots=slots, key_scale=torch.ones(3)
        )
    with pytest.raises(RuntimeError, match="value_scale was given without pools; leave it out"):
        torch.ops.spot.attention_prologue(*arguments, value_scale=torch.ones(3))


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(format="fp8"), 'a selector key format is "fp8"; it must be one of f32, bf16, int8, int4, mxfp4, nvfp4'),
        (dict(norm="batchnorm"), 'a key norm is "batchnorm"; it must be one of none, layernorm, rmsnorm'),
        (
            dict(keys=torch.zeros(3, 2, 128)),
            r"keys are Float \[3, 2, 128\]; they must be floating point \[tokens, 1, 128\]",
        ),
        (dict(slots=torch.zeros(4, dtype=torch.int32)), r"slots are Int \[4\]; they must be int64 \[3\]"),
        (dict(cos=torch.zeros(9, 32)), "cos and sin must be given together"),
    ],
)
def test_errors_name_what_where_and_what_to_do(change, words):
    arguments = dict(
        pool=torch.zeros(2, 1, 1152, dtype=torch.uint8),
        slots=torch.arange(3),
        keys=torch.zeros(3, 1, 128),
        format="int4",
    )
    with pytest.raises((RuntimeError, ValueError), match=words):
        torch.ops.spot.selector_key_append(**{**arguments, **change})


@pytest.mark.parametrize(
    "change, words",
    [
        (
            dict(weight=torch.zeros(8, 15)),
            r"the weight is Float \[8, 15\]; it must be contiguous Float or float8_e4m3fn",
        ),
        (dict(y=torch.zeros(2, 8)), r"y is Float \[2, 8\]; it must be Float \[3, 8\]"),
        (dict(scales=torch.ones(1, 1)), "scales come with float8_e4m3fn weights, and only with them"),
        (
            dict(weight=torch.zeros(8, 16).to(torch.float8_e4m3fn), scales=torch.ones(1, 2)),
            r"the scales must be contiguous float32 \[1, 1\]",
        ),
        (dict(bias=torch.zeros(7)), r"the bias must be contiguous Float \[8\]"),
    ],
)
def test_errors_of_linear(change, words):
    arguments = dict(x=torch.zeros(3, 16), weight=torch.zeros(8, 16), y=torch.zeros(3, 8))
    with pytest.raises(RuntimeError, match=words):
        torch.ops.spot.linear(**{**arguments, **change})


@pytest.mark.parametrize("length", [-1, 65, 2**31 - 1])
@pytest.mark.parametrize("chosen", [False, True])
def test_lengths_that_no_page_table_holds(length, chosen):
    pool, table = torch.zeros(2, 4, 16, 64), torch.arange(4, dtype=torch.int32).expand(2, 4)
    lengths = torch.tensor([64, length], dtype=torch.int32)
    one = torch.ones(2, 1, dtype=torch.int32)
    selection = dict(indices=one[..., None] * 0, counts=one) if chosen else {}
    with pytest.raises(
        RuntimeError, match=f"row 1 has a length of {length}; its page table has room for 0 to 64 tokens"
    ):
        torch.ops.spot.sparse_decode_attention(torch.zeros(2, 4, 64), pool, pool, table, lengths, 0.1, **selection)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(positions=torch.arange(3) + 7), "positions reach from 7 to 9; the rotary table has rows 0 to 8"),
        (dict(positions=torch.arange(3) - 1), "positions reach from -1 to 1; the rotary table has rows 0 to 8"),
        (dict(norm="none", norm_weight=torch.ones(128)), "norm is none, so a norm weight or bias has no effect"),
    ],
)
def test_errors_of_a_projection(change, words):
    arguments = dict(
        hidden=torch.zeros(3, 8), query_weight=torch.zeros(512, 8), key_weight=torch.zeros(128, 8),
        mix_weight=torch.zeros(4, 8), positions=torch.arange(3), cos=torch.ones(9, 32), sin=torch.zeros(9, 32),
    )  # fmt: skip
    torch.ops.spot.selector_project(**arguments)
    with pytest.raises(RuntimeError, match=words):
        torch.ops.spot.selector_project(**{**arguments, **change})


@pytest.mark.parametrize(
    "rule, words",
    [
        (dict(mode="top_q"), 'a selection mode is "top_q"; it must be one of top_k, top_p, threshold'),
        (dict(p=1.5), "p is 1.5; it must be above 0 and at most 1"),
        (dict(sinks=2**40), "does not fit 32 bits"),
        (dict(temperature=0.0), "temperature is 0; it must be positive"),
        (dict(sinks=-1), "sinks is -1; it must be 0 to 2"),
        (dict(max_selected=2**40), "max_selected is 1099511627776; it must be 0 to 2"),
        (dict(max_selected=3), "max_selected is 3 blocks, but the rule may keep at least 32"),
    ],
)
def test_errors_of_a_rule(rule, words):
    with pytest.raises(RuntimeError, match=words):
        torch.ops.spot.select_blocks(torch.zeros(1, 1, 4), torch.full((1,), 64, dtype=torch.int32), **rule)
