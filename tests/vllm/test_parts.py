"""The plug-in's parts without an engine: its pages, its self-check, its configuration and what it refuses."""

import math
import random
import shutil
import types

import pytest
import torch

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def plugin(plugin_path):
    import spotattention.vllm as module
    from spotattention.vllm import check, pages, settings

    return types.SimpleNamespace(module=module, check=check, pages=pages, settings=settings)


def packed_views(rng, dtype, tokens, kv_heads, dim, heads_first):
    """A storage in which each block holds other bytes, keys and values, and selector keys, as vLLM packs layers."""
    size = torch.empty(0, dtype=dtype).element_size()
    kv_page, key_page = 16 * 2 * dim * size, 1152
    if not heads_first:
        kv_page *= kv_heads
    kv_bytes, key_bytes = tokens * kv_heads * 2 * dim * size, tokens * 72
    step = math.lcm(kv_page, key_page)
    stride = -(-(kv_bytes + key_bytes + rng.randrange(4096)) // step) * step
    blocks, lead = rng.randrange(5, 9), 16 * rng.randrange(1, 9)
    raw = torch.randint(-128, 128, (lead + blocks * stride,), dtype=torch.int8)
    content = 2 * dim * size
    shape = (blocks, kv_heads, tokens, content)
    strides = (stride, tokens * content, content, 1) if heads_first else (stride, content, kv_heads * content, 1)
    kv = raw.as_strided(shape, strides, lead).view(dtype)
    keys = raw.as_strided((blocks, 1, tokens, 72), (stride, tokens * 72, 72, 1), lead + kv_bytes).view(torch.uint8)
    return kv, keys


@pytest.mark.parametrize("tokens", [16, 48, 128])
@pytest.mark.parametrize("heads_first", [True, False])
def test_pages_name_the_tokens_that_vllm_stored(plugin, seed, tokens, heads_first):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    heads, dim, dtype = rng.choice([1, 2, 3]), rng.choice([64, 128]), rng.choice([torch.float32, torch.bfloat16])
    kv, keys = packed_views(rng, dtype, tokens, heads, dim, heads_first)
    kv.copy_(torch.randn(kv.shape))
    key_pool, value_pool, pages = plugin.pages.key_value_pools(kv, dim)
    selector_pool, selector_pages = plugin.pages.selector_key_pool(keys, 1, 1152)
    table = torch.tensor([rng.sample(range(kv.shape[0]), 3) for _ in range(2)], dtype=torch.int32)
    ours, theirs = pages.table(table), selector_pages.table(table)
    for row in range(2):
        stored = kv[table[row].long()].transpose(0, 1).flatten(1, 2)  # [heads, 3 * tokens, 2 * dim]
        assert torch.equal(key_pool[:, ours[row].long()].flatten(1, 2), stored[..., :dim])
        assert torch.equal(value_pool[:, ours[row].long()].flatten(1, 2), stored[..., dim:])
        assert torch.equal(selector_pool[theirs[row].long()].flatten(), keys[table[row].long()].flatten())
    slots = torch.tensor([-1, 0, tokens - 1, tokens, 3 * tokens + 17 % tokens, -1])
    moved = selector_pages.slots(slots)
    for slot, own in zip(slots.tolist(), moved.tolist()):
        block, offset = slot // tokens, slot % tokens
        want = (
            slot if slot < 0 else int(selector_pages.table(torch.tensor([[block]]))[0, offset // 16]) * 16 + offset % 16
        )
        assert own == want


def test_pages_refuse_what_they_cannot_count(plugin):
    pages = plugin.pages
    with pytest.raises(ValueError, match="hold 24 tokens; give a --block-size"):
        pages.key_value_pools(torch.zeros(4, 2, 24, 128), 64)
    raw = torch.zeros(100_000, dtype=torch.uint8)
    with pytest.raises(ValueError, match="no multiple of a page's 1152"):
        pages.selector_key_pool(raw.as_strided((4, 1, 32, 72), (3000, 2304, 72, 1)), 1, 1152)
    with pytest.raises(ValueError, match="72 bytes a token in one run were asked for"):
        pages.selector_key_pool(torch.zeros(4, 1, 32, 64, dtype=torch.uint8), 1, 1152)


class Written:
    """What an attention layer of vLLM holds of a cache of codes: scales of one number or one a head."""

    def __init__(self, rng, heads):
        shape = (heads,) if rng.random() < 0.5 else ()
        self._k_scale, self._v_scale = torch.rand(shape) / 50 + 0.01, torch.rand(shape) / 50 + 0.01


@pytest.mark.parametrize("tokens", [16, 48])
@pytest.mark.parametrize("heads_first", [True, False])
def test_a_cache_of_codes_is_written_and_read(plugin, seed, tokens, heads_first):
    """Stored by the CPU's module, read by it and by the decode operator: both attend to what was rounded."""
    from spotattention import ops
    from spotattention.vllm import dense_cpu

    rng = random.Random(seed)
    torch.manual_seed(seed)
    heads, group, dim = rng.choice([1, 2, 3]), rng.choice([1, 2, 5]), 64
    kv, _ = packed_views(rng, torch.uint8, tokens, heads, dim, heads_first)
    layer, length, blocks = Written(rng, heads), rng.randrange(tokens + 1, 3 * tokens), kv.shape[0]
    impl = types.SimpleNamespace(codes=True, head_size=dim, num_kv_heads=heads, num_heads=heads * group, scale=0.125)
    dense, table = dense_cpu.Dense(impl), torch.randperm(blocks)[:3].int()
    key, value = torch.randn(length + 1, heads, dim), torch.randn(length + 1, heads, dim)
    key[0, 0, 0] = 1e6  # saturates
    where = torch.arange(length)
    slots = table.long()[where // tokens] * tokens + where % tokens
    dense.store(layer, key, value, kv, torch.cat([slots, torch.tensor([-1])]))

    codes = kv.view(torch.float8_e4m3fn)
    stored = codes[table.long()].transpose(0, 1).flatten(1, 2)[:, :length].double()
    keys = stored[..., :dim] * layer._k_scale.double().view(-1, 1, 1)
    values = stored[..., dim:] * layer._v_scale.double().view(-1, 1, 1)
    assert keys[0, 0, 0] == pytest.approx(448 * float(layer._k_scale.view(-1)[0]))
    assert (keys[:, 1:] - key[1:length].transpose(0, 1)).norm() < 0.04 * key[1:length].norm()
    query, output = torch.randn(1, heads * group, dim), torch.empty(1, heads * group, dim)
    dense.attend(layer, query, key, value, kv, [dense_cpu.Chunk(0, 1, length, table.long())], output)
    logits = query[0].double().view(heads, group, dim) @ keys.transpose(1, 2) * 0.125
    want = (logits.softmax(-1) @ values).view(1, heads * group, dim)
    torch.testing.assert_close(output.double(), want, rtol=1e-4, atol=1e-4)

    key_pool, value_pool, pages = plugin.pages.key_value_pools(codes, dim)
    decoded = ops.sparse_decode_attention(
        query,
        key_pool,
        value_pool,
        pages.table(table[None]),
        torch.tensor([length], dtype=torch.int32),
        0.125,
        key_scale=layer._k_scale,
        value_scale=layer._v_scale,
    )
    torch.testing.assert_close(decoded.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [None, (), (3,)])
@pytest.mark.parametrize("sets", [1, 3])
def test_captured_mass_is_that_of_float64(plugin, seed, sets, scale):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    heads, kv_heads, dim, length = 6, 3, 64, rng.randrange(5000, 9000)
    blocks = -(-length // 16)
    pool = torch.randn(kv_heads, blocks + 40, 16, dim)
    table = torch.randperm(blocks + 40, dtype=torch.int32)[: blocks + 5]
    pool[:, int(table[blocks - 1]), 1 + (length - 1) % 16 :] = torch.nan  # what is not written is not read
    key_scale = None if scale is None else torch.rand(scale) + 0.5
    if key_scale is not None:
        pool = pool.to(torch.float8_e4m3fn)
    query, scale = torch.randn(heads, dim), dim**-0.5
    counts = torch.tensor([rng.randrange(1, blocks) for _ in range(sets)], dtype=torch.int32)
    indices = torch.full((sets, int(counts.max()) + 2), -1, dtype=torch.int32)
    for s in range(sets):
        indices[s, : counts[s]] = torch.randperm(blocks)[: counts[s]].sort().values.int()
    got = plugin.check.captured_mass(query, pool, table, length, indices, counts, scale, key_scale)

    numbers = pool.double() if key_scale is None else pool.double() * key_scale.double().view(-1, 1, 1, 1)
    keys = numbers[:, table[:blocks].long()].flatten(1, 2)[:, :length].repeat_interleave(heads // kv_heads, 0)
    mass = (torch.einsum("hd,hld->hl", query.double(), keys) * scale).softmax(-1).view(kv_heads, -1, length).mean(1)
    mass = mass.mean(0, keepdim=True) if sets == 1 else mass
    want, attended = 0.0, 0
    for s in range(sets):
        seen = torch.zeros(blocks * 16, dtype=torch.bool).view(blocks, 16)
        seen[indices[s, : counts[s]].long()] = True
        seen = seen.flatten()[:length]
        want += float(mass[s][seen].sum()) / sets
        attended += int(seen.sum())
    assert got.mass == pytest.approx(want, abs=1e-5)
    assert abs(got.attended - attended / sets) <= 1 and got.visible == length


def checked(plugin, query, pool, table, lengths, chosen, bound=0.0):
    """A self-check of one layer, and the steps that vLLM would take with it."""
    rule = {"floor": 64}
    spot = types.SimpleNamespace(
        check_every=1, check_bound=bound, in_graphs=True, rule=rule, layer=7, mix_weight=torch.zeros(1)
    )
    impl = types.SimpleNamespace(spot=spot, record=None, _pools=(None, (pool,)), scale=0.125, key_scale=None)
    check = plugin.check.SelfCheck([impl])
    check.next_step(len(lengths), table)
    impl.record.take(query, chosen, table, lengths)
    return check, impl


def a_step(seed, rows=3):
    torch.manual_seed(seed)
    pool = torch.randn(2, 300, 16, 64)
    lengths = torch.randint(600, 1500, (rows,), dtype=torch.int32)
    table = torch.randperm(300, dtype=torch.int32).view(rows, -1)
    indices = torch.stack([torch.randperm(37)[:20].sort().values.int() for _ in range(rows)])[:, None]
    chosen = types.SimpleNamespace(indices=indices, counts=torch.full((rows, 1), 20, dtype=torch.int32))
    return torch.randn(rows, 4, 64), pool, table, lengths, chosen


def test_a_step_is_judged_before_the_next_whatever_its_width(plugin, seed, monkeypatch):
    statistics = plugin.check.Statistics()
    monkeypatch.setattr(plugin.check, "STATISTICS", statistics)
    query, pool, table, lengths, chosen = a_step(seed)
    check, impl = checked(plugin, query, pool, table, lengths, chosen)
    where = [part.data_ptr() for part in impl.record.parts]
    for pages in (95, 100):  # a narrower step and one as wide as the first
        check.next_step(len(lengths), table[:, :pages])
        row = int(check.row)
        impl.record.take(query, chosen, table[:, :pages], lengths)
        seen = plugin.check.captured_mass(
            query[row], pool, table[row], int(lengths[row]), chosen.indices[row], chosen.counts[row], 0.125
        )
        before = statistics.sums.get(7, [0.0, 0])[0]
        check.next_step(len(lengths), table)
        assert statistics.sums[7][0] - before == pytest.approx(seen.mass, rel=1e-5)
    assert [part.data_ptr() for part in impl.record.parts] == where  # as a captured graph needs it


def test_a_row_whose_request_has_ended_is_dropped(plugin, seed, monkeypatch):
    statistics = plugin.check.Statistics()
    monkeypatch.setattr(plugin.check, "STATISTICS", statistics)
    query, pool, table, lengths, chosen = a_step(seed)
    check, _ = checked(plugin, query, pool, table, lengths, chosen)
    others = [i for i in range(len(lengths)) if i != int(check.row)]
    check.next_step(len(others), table[others])
    assert statistics.checks == 0


def test_a_low_mass_is_warned_about_once_a_minute(plugin, seed, caplog):
    query, pool, table, lengths, chosen = a_step(seed)
    check, impl = checked(plugin, query, pool, table, lengths, chosen, bound=1.0)
    with caplog.at_level("INFO", logger="vllm.spotattention"):
        for _ in range(3):
            check.next_step(len(lengths), table)
            impl.record.take(query, chosen, table, lengths)
    warned = [r for r in caplog.records if r.levelname == "WARNING"]
    assert len(caplog.records) == 3 and len(warned) == 1
    assert "below check_bound 1" in warned[0].getMessage()


@pytest.mark.parametrize(
    ("lengths", "prefilling", "decodes"),
    [
        ([1, 1, 1, 0], [False] * 3, 4),  # rows that fill a batch up to a captured graph's size decode nothing
        ([1, 1, 1, 0], [False, False, True], 2),  # a prompt's last chunk of one token
        ([1, 1, 1], [False] * 3, 3),
        ([1, 5, 0, 0], [False, True], 1),
        ([1, 1, 0], None, 3),
    ],
)
def test_rows_that_fill_up_a_graph_need_no_word_on_prefilling(plugin, lengths, prefilling, decodes):
    from spotattention.vllm.backend import SpotMetadataBuilder
    from vllm.v1.attention.backend import CommonAttentionMetadata

    starts, rows = torch.tensor([0, *lengths]).cumsum(0).int(), len(lengths)
    step = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor([9 if length else 0 for length in lengths]).int(),
        num_reqs=rows,
        num_actual_tokens=sum(lengths),
        max_query_len=max(lengths),
        max_seq_len=9,
        block_table_tensor=torch.arange(rows).int()[:, None],
        slot_mapping=torch.arange(sum(lengths)),
        is_prefilling=None if prefilling is None else torch.tensor(prefilling),
    )
    builder = SpotMetadataBuilder.__new__(SpotMetadataBuilder)
    pages = types.SimpleNamespace(identity=True, per_block=1)
    pools = types.SimpleNamespace(pools=lambda cache: (None, None, pages))
    builder.layers, builder.check = [types.SimpleNamespace(impl=pools, kv_cache=None)], None
    builder.dense = types.SimpleNamespace(prefill=lambda m, first, tokens: (first, tokens, m.num_reqs))
    made = builder.build(0, step)
    assert made.num_decodes == decodes and made.page_table.shape == (rows, 1)
    assert made.prefill == (None if decodes == rows else (decodes, sum(lengths[:decodes]), rows))


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "1.0.0", "nightly"])
def test_other_versions_of_vllm_are_named_in_one_sentence(plugin, version):
    sentence = plugin.module.unsupported(version)
    assert f"but vLLM {version} is installed" in sentence and "\n" not in sentence
    assert plugin.module.unsupported("0.32.0+cpu") == plugin.module.unsupported("0.33.1") == ""


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        ({"method": "spot"}, "names no selector"),
        ({"selector": "spot", "budget": 3}, 'has no field "budget"; it has selector, method'),
        ({"selector": 3}, "selector is 3, of the wrong type"),
        ({"selector": "spot", "check_every": -1}, "check_every is -1; give 0"),
        ({"selector": "spot", "check_bound": 2}, "check_bound is 2; give a share"),
        (["spot"], "must be an object"),
    ],
)
def test_a_wrong_configuration_is_named_in_one_sentence(plugin, document, sentence):
    with pytest.raises(ValueError, match=sentence):
        plugin.settings.Options.read(document)


def configuration(**changes):
    """What settings.py reads of a VllmConfig for tiny-qwen3."""
    made = types.SimpleNamespace
    text = made(hidden_size=256, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2, head_dim=64)
    config = made(
        additional_config={"spot": {"selector": "spot"}},
        parallel_config=made(pipeline_parallel_size=1, decode_context_parallel_size=1),
        cache_config=made(cache_dtype="auto", sliding_window=None, kv_cache_dtype_skip_layers=[]),
        compilation_config=made(pass_config=made(enable_sp=False)),
        kv_transfer_config=None,
        lora_config=None,
        quant_config=None,
        speculative_config=None,
        model_config=made(
            model=str(ROOT / "models" / "tiny-qwen3"),
            dtype=torch.bfloat16,
            hf_text_config=text,
            hf_config=made(architectures=["Qwen3ForCausalLM"]),
        ),
    )
    for path, value in changes.items():
        *parents, name = path.split("__")
        target = config
        for parent in parents:
            target = getattr(target, parent)
        setattr(target, name, value)
    return config


def test_settings_of_the_shipped_selector(plugin):
    settings = plugin.settings.load(configuration())
    assert settings.method.rule.mode == "top_p" and settings.key_format == "int4"
    assert [settings.covers(layer) for layer in range(9)] == [True] * 8 + [False]
    own = configuration(additional_config={"spot": {"selector": "spot", "method": "spot:k=10%,dense=2,cache=bf16"}})
    settings = plugin.settings.load(own)
    assert settings.key_format == "bf16" and [settings.covers(layer) for layer in range(3)] == [False, False, True]
    assert plugin.settings.load(configuration(additional_config={})) is None
    for word in ("fp8", "fp8_e4m3", "bfloat16"):
        assert plugin.settings.load(configuration(cache_config__cache_dtype=word)) is not None


def test_other_weights_are_warned_of_and_checked_more_often(plugin, tmp_path, caplog):
    """The folder's weights are told from those that the selector remembers, without the model."""
    from safetensors.torch import load_file, save_file

    plugin.settings.load(configuration())
    assert not caplog.records
    shutil.copytree(ROOT / "models" / "tiny-qwen3", tmp_path / "tuned")
    weights = load_file(tmp_path / "tuned" / "model.safetensors")
    weights["model.layers.5.mlp.up_proj.weight"] *= 1.1
    save_file(weights, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    settings = plugin.settings.load(configuration(model_config__model=str(tmp_path / "tuned")))
    assert "distilled on other weights of this architecture" in caplog.text
    assert settings.options.check_every == 32


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"kv_transfer_config": object()}, "not tested with a KV connector"),
        ({"cache_config__cache_dtype": "fp8_e5m2"}, "KV cache of fp8_e5m2; give --kv-cache-dtype auto or fp8"),
        ({"cache_config__cache_dtype": "fp8_per_token_head"}, "not tested with a KV cache of fp8_per_token_head"),
        ({"cache_config__kv_cache_dtype_skip_layers": ["3"]}, "KV caches of several dtypes"),
        ({"speculative_config": object()}, "not tested with speculative decoding"),
        ({"lora_config": object()}, "not tested with LoRA"),
        ({"quant_config": types.SimpleNamespace(get_name=lambda: "modelopt")}, "weights quantised as modelopt"),
        ({"parallel_config__pipeline_parallel_size": 2}, "not tested with pipeline parallelism"),
        ({"parallel_config__decode_context_parallel_size": 2}, "not tested with context parallelism"),
        ({"model_config__hf_text_config__num_hidden_layers": 6}, "its num_layers is 8, this model's is 6"),
        ({"additional_config": {"spot": {"selector": "none"}}}, 'there is no selector "none"'),
        ({"additional_config": {"spot": {"selector": "spot", "method": "quest"}}}, "has the method spot only"),
        ({"additional_config": {"spot": {"selector": "spot", "method": "spot:prefill=sparse"}}}, "read densely"),
        ({"additional_config": {"spot": {"selector": "spot", "method": "spot:x=1"}}}, "'x=1' is not one of"),
    ],
)
def test_what_was_not_tested_is_refused_in_one_sentence(plugin, changes, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as error:
        plugin.settings.load(configuration(**changes))
    assert "\n" not in str(error.value)


def test_a_card_without_code_is_refused(plugin, monkeypatch):
    from spotattention import ops
    from spotattention.vllm import backend

    monkeypatch.setattr(ops, "device_refusal", lambda device: f"nothing was built for {device}")
    layer = types.SimpleNamespace(query_key_weight=torch.zeros(1))
    with pytest.raises(ValueError, match="nothing was built for cpu"):
        backend.SpotImpl._check_cuda(types.SimpleNamespace(num_heads=8, num_kv_heads=8), layer, 128)
