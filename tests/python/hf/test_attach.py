"""Attached models: unchanged generate(), the same logits under a full budget, the rule's tokens under a small one."""

import copy
import math
import pickle

import pytest
import torch
from support import CACHE, left_padded

# Few reserved tokens, so that a small context has something to select; the budget counts them in.
TIGHT = "spot:k=96,sinks=16,recency=32,floor=0"


def prompts(*lengths):
    return [torch.randint(1, 151, (length,)) for length in lengths]


def generated(model, rows, tokens=6, **options):
    ids, mask = left_padded(rows)
    made = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        return_dict_in_generate=True,
        output_logits=True,
        **({"do_sample": False} | options),
    )
    logits = torch.stack(made.logits, 1) if made.logits else None
    return made.sequences[:, ids.shape[1] :], logits


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"do_sample": True, "temperature": 0.8, "top_k": 20}],
    ids=["greedy", "beams", "sampling"],
)
def test_a_full_budget_is_the_dense_model(spotattention, family_model, random_selector, options):
    """Against transformers' own sdpa, over a left-padded batch."""
    rows = prompts(143, 77, 201)
    torch.manual_seed(7)
    tokens, logits = generated(family_model, rows, **options)
    attached = spotattention.attach(family_model, random_selector(family_model), "spot:k=100%,floor=0")
    torch.manual_seed(7)
    sparse_tokens, sparse_logits = generated(family_model, rows, **options)
    assert attached.attended_share == 1.0
    torch.testing.assert_close(sparse_logits, logits, rtol=1e-3, atol=1e-3)
    assert torch.equal(sparse_tokens, tokens)
    spotattention.detach(family_model)
    assert not hasattr(family_model, "spot")
    torch.manual_seed(7)
    assert torch.equal(generated(family_model, rows, **options)[1], logits)


@pytest.mark.parametrize("key_heads", [1, 4])
@pytest.mark.parametrize("per", ["layer", "kv_group"])
def test_a_decode_step_reads_the_tokens_of_the_rule(spotattention, small, random_selector, key_heads, per):
    """One layer, so that its inputs are those of the dense model: against scores, choice and softmax in float64."""
    model = small("Qwen3", num_hidden_layers=1)
    selector = random_selector(model, key_heads=key_heads, per="layer")
    if per == "kv_group":
        selector.config.per = "kv_group"
        w = selector.weights[0]
        selector.weights[0] = w._replace(mix=torch.randn(8, 72) * 0.2)
    (ids,) = prompts(403)
    module = model.model.layers[0].self_attn
    seen = {}
    module.register_forward_pre_hook(lambda m, a, k: seen.update(x=k["hidden_states"]), with_kwargs=True)
    module.o_proj.register_forward_pre_hook(lambda m, a: seen.update(out=a[0]))
    attached = spotattention.attach(model, selector, TIGHT)
    with torch.no_grad():
        model(ids[None])
        hidden = seen["x"][0].double()
        cache = getattr(model(ids[None, :-1], use_cache=True), CACHE)
        model(ids[None, -1:], **{CACHE: cache}, use_cache=True)
    got = seen["out"][0, -1].view(6, 16)

    def turned(x, half):  # theta 10000, half-split
        angle = torch.arange(len(x))[:, None] / 10000 ** (torch.arange(half) / half)
        cos, sin = (f(angle.double())[:, None] for f in (torch.cos, torch.sin))
        a, b = x[..., :half], x[..., half : 2 * half]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]], -1)

    w = selector.weights[0]
    q = turned((hidden @ w.query_key[:512].double().T).view(-1, 4, 128), 32)[-1]
    k = turned(
        torch.nn.functional.layer_norm((hidden @ w.query_key[512:].double().T).view(-1, key_heads, 128), [128]), 32
    )
    dots = (q * k.expand(-1, 4, -1)).sum(-1).relu()  # [T, 4]
    mix = (hidden[-1] @ w.mix.double().T).view(-1, 4)
    backbone = model.model.layers[0].self_attn
    heads = lambda x, n: x.view(-1, n, 16)  # noqa: E731
    query, key, value = (
        heads((hidden @ p.weight.double().T), n)
        for p, n in ((backbone.q_proj, 6), (backbone.k_proj, 2), (backbone.v_proj, 2))
    )
    norm = lambda x: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()  # noqa: E731
    query, key = turned(norm(query), 8)[-1], turned(norm(key), 8)
    for group in range(2):
        score = dots @ mix[group if per == "kv_group" else 0]
        blocks = torch.nn.functional.pad(score, (0, -len(score) % 16), value=-math.inf).view(-1, 16).amax(1)
        last = len(blocks)
        reserved = {0, *range((403 - 32) // 16, last)}
        best = sorted(set(range(last)) - reserved, key=lambda b: -blocks[b])[: 6 - len(reserved)]
        tokens = [t for b in sorted(reserved | set(best)) for t in range(16 * b, min(16 * b + 16, 403))]
        logits = query.view(2, 3, 16)[group] @ key[tokens, group].T / 4
        want = logits.softmax(-1) @ value[tokens, group]
        torch.testing.assert_close(got.view(2, 3, 16)[group].double(), want, rtol=1e-3, atol=1e-4)
    assert attached.attended_share < 0.3


def test_rows_of_a_padded_batch_are_as_they_are_alone(spotattention, family_model, random_selector):
    attached = spotattention.attach(family_model, random_selector(family_model), TIGHT)
    rows = prompts(233, 97, 160, 129)
    together, logits = generated(family_model, rows)
    assert 0.2 < attached.attended_share < 0.9
    for index, row in enumerate(rows):
        alone, own = generated(family_model, [row])
        torch.testing.assert_close(logits[index : index + 1], own, rtol=1e-3, atol=1e-3)
        assert torch.equal(together[index : index + 1], alone)


def test_drafts_are_verified_as_steps_are_taken(spotattention, small, random_selector):
    """What was drafted in vain is cropped; each verified token selects for itself. By prompt lookup and an assistant."""
    model = small("Llama")
    spotattention.attach(model, random_selector(model), TIGHT)
    (piece,) = prompts(61)
    row = torch.cat([piece, piece, piece, piece[:20]])  # what lookup finds drafts in
    plain, _ = generated(model, [row], 24)
    drafted, _ = generated(model, [row], 24, prompt_lookup_num_tokens=5, max_matching_ngram_size=2)
    assert torch.equal(plain, drafted)
    drafted, _ = generated(model, [row], 24, assistant_model=small("Llama", num_hidden_layers=1))
    assert torch.equal(plain, drafted)


def test_a_cache_follows_what_is_done_to_it(spotattention, small, random_selector):
    """Reordered, repeated, selected, cropped: the next step's logits are those of sequences read afresh."""
    model = small("Qwen3")
    spotattention.attach(model, random_selector(model, cache_format="int4"), TIGHT)
    rows = prompts(150, 131, 118)
    ids, mask = left_padded(rows)

    def read(ids, mask):
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        return getattr(model(ids, attention_mask=mask, position_ids=positions, use_cache=True), CACHE)

    def step(cache, mask, token):
        mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.long)], 1)
        positions = mask.sum(1, keepdim=True) - 1
        tokens = torch.full((len(mask), 1), token)
        return model(tokens, attention_mask=mask, position_ids=positions, **{CACHE: cache}, use_cache=True).logits[
            :, -1
        ]

    with torch.no_grad():
        for change, order in (
            (lambda c: c.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
            (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
            (lambda c: c.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
            (lambda c: c.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
        ):
            cache = read(ids, mask)
            change(cache)
            got = step(cache, mask[order], 17)
            want = torch.cat([step(read(ids[i : i + 1], mask[i : i + 1]), mask[i : i + 1], 17) for i in order])
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
            assert cache.get_seq_length() == ids.shape[1] + 1
        cache = read(ids, mask)
        cache.crop(-23)
        assert cache.get_seq_length() == ids.shape[1] - 23
        got = step(cache, mask[:, :-23], 17)
        torch.testing.assert_close(
            got, step(read(ids[:, :-23], mask[:, :-23]), mask[:, :-23], 17), rtol=1e-3, atol=1e-3
        )
        with pytest.raises(ValueError, match="cropped by a negative number"):
            cache.crop(4)
        with pytest.raises(IndexError, match="holds 3 sequences"):
            cache.reorder_cache(torch.tensor([0, 3, 1]))
        keys = cache.layers[0].keys
        assert keys.shape == (3, 2, cache.get_seq_length(), 16)
        cache.reset()
        assert cache.get_seq_length() == 0


def test_a_conversation_goes_on_in_its_cache(spotattention, small, random_selector):
    """A second prompt behind a kept cache is read densely; what follows it is as if both had been one prompt."""
    model = small("Qwen3")
    spotattention.attach(model, random_selector(model), TIGHT)
    first, second = prompts(140, 45)
    with torch.no_grad():
        cache = getattr(model(first[None], use_cache=True), CACHE)
        model(second[None], **{CACHE: cache}, use_cache=True)
        got = [model(torch.tensor([[t]]), **{CACHE: cache}, use_cache=True).logits[0, -1] for t in (3, 5)]
        whole = getattr(model(torch.cat([first, second])[None], use_cache=True), CACHE)
        want = [model(torch.tensor([[t]]), **{CACHE: whole}, use_cache=True).logits[0, -1] for t in (3, 5)]
    torch.testing.assert_close(torch.stack(got), torch.stack(want), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="have no gradients; call the model under torch.no_grad"):
        model(torch.tensor([[7]]), **{CACHE: cache}, use_cache=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(spotattention, small, random_selector, dtype):
    model = small("Llama").to(dtype)
    attached = spotattention.attach(model, random_selector(model, cache_format="int4"), "spot:k=100%,floor=0")
    rows = prompts(201, 90)
    _, logits = generated(model, rows)
    attached.detach()
    _, dense = generated(model, rows)
    # One step, before the two may part by rounding.
    torch.testing.assert_close(logits[:, :2].float(), dense[:, :2].float(), rtol=0.1, atol=0.1)


def test_a_prompt_in_chunks_is_read_densely(spotattention, small, random_selector):
    model = small("Llama")
    spotattention.attach(model, random_selector(model), TIGHT)
    rows = prompts(170, 133)
    whole, logits = generated(model, rows)
    chunked, chunked_logits = generated(model, rows, prefill_chunk_size=50)
    torch.testing.assert_close(chunked_logits, logits, rtol=1e-3, atol=1e-3)
    assert torch.equal(whole, chunked)


def test_sliding_layers_stay_as_they_are(spotattention, small, random_selector):
    windows = dict(use_sliding_window=True, sliding_window=48, layer_types=["sliding_attention", "full_attention"])
    model = small("Qwen2", **windows)
    rows = prompts(133, 90)
    _, logits = generated(model, rows)
    attached = spotattention.attach(model, random_selector(model), "spot:k=100%,floor=0")
    assert attached.sparse_layers == [1]
    torch.testing.assert_close(generated(model, rows)[1], logits, rtol=1e-3, atol=1e-3)
    attached.detach()
    plain = small("Qwen2")
    selector = random_selector(plain)
    selector.backbone["fingerprint"] = ""
    with pytest.raises(ValueError, match=r"the selector has layers \[0\], which do not attend to the whole context"):
        spotattention.attach(model, selector)
    assert not hasattr(model, "spot") and model.config._attn_implementation == "sdpa"


def test_dense_layers_and_the_dense_policy(spotattention, small, random_selector):
    model = small("Llama")
    selector, rows = random_selector(model), prompts(150)
    _, logits = generated(model, rows)
    attached = spotattention.attach(model, selector, TIGHT + ",dense=1")
    assert attached.sparse_layers == [1]
    assert not torch.equal(generated(model, rows)[1], logits)
    attached.detach()
    spotattention.attach(model, selector, "dense")
    assert torch.equal(generated(model, rows)[1], logits)


def test_attached_models_are_not_copied(spotattention, small, random_selector):
    """A copy's layers would read the original's state, and its end would be the original's."""
    model = small("Llama")
    spotattention.attach(model, random_selector(model), TIGHT)
    for copying in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"cannot be copied or pickled; call spotattention\.detach\(model\) first"):
            copying(model.spot if copying is copy.copy else model)
    prompt = torch.randint(1, 90, (1, 70))
    model.generate(prompt, max_new_tokens=2, do_sample=False)
    spotattention.detach(model)
    assert torch.equal(
        copy.deepcopy(model).generate(prompt, max_new_tokens=4, do_sample=False),
        model.generate(prompt, max_new_tokens=4, do_sample=False),
    )
    pickle.dumps(model)


def test_models_and_policies_that_do_not_fit_are_refused(spotattention, small, transformers, random_selector):
    model, other = small("Llama"), small("Llama")
    selector = random_selector(model)
    with pytest.warns(RuntimeWarning, match="distilled on other weights of this architecture"):
        assert spotattention.attach(other, selector).check.every == 8
    spotattention.detach(other)
    with pytest.raises(ValueError, match='its architecture is "LlamaForCausalLM", this model\'s is "Qwen2ForCausalLM"'):
        spotattention.attach(small("Qwen2"), selector)
    with pytest.raises(ValueError, match="attached models run spot and dense"):
        spotattention.attach(model, selector, "quest:k=10%")
    with pytest.raises(ValueError, match="read prompts densely; leave out prefill=sparse"):
        spotattention.attach(model, selector, "spot:prefill=sparse")
    with pytest.raises(ValueError, match=r"'spot:p=1\.5'|p is 1.5; it must be above 0 and at most 1"):
        spotattention.attach(model, selector, "spot:p=1.5")
    with pytest.raises(FileNotFoundError, match='no selector "nowhere": neither .*selectors/nowhere nor a folder'):
        spotattention.attach(model, "nowhere")
    capped = small("Gemma2", sliding_window=4096, attn_implementation="eager")
    with pytest.raises(ValueError, match="Gemma2ForCausalLM caps its attention scores"):
        spotattention.attach(capped, selector)
    assert model.config._attn_implementation == other.config._attn_implementation == "sdpa"
    spotattention.attach(model, selector)
    with pytest.raises(ValueError, match="attached already"):
        spotattention.attach(model, selector)
    spotattention.detach(model)
    with pytest.raises(ValueError, match="no selector attached"):
        spotattention.detach(model)


def test_caches_and_masks_that_do_not_fit_are_refused(spotattention, small, random_selector):
    model = small("Llama")
    selector, (row,) = random_selector(model), prompts(120)
    ids = row[None]
    with torch.no_grad():
        before = getattr(model(ids, use_cache=True), CACHE)
        attached = spotattention.attach(model, selector, TIGHT)
        with pytest.raises(ValueError, match="holds 120 tokens that were read before the selector was attached"):
            model(ids[:, :1], **{CACHE: before}, use_cache=True)
        for kind, what in (("static", "StaticLayer"), ("offloaded", "offloaded cache")):
            with pytest.raises(ValueError, match=what):
                model.generate(ids, max_new_tokens=2, cache_implementation=kind)
        right = torch.ones_like(ids)
        right[:, -30:] = 0
        cache = getattr(model(ids, attention_mask=right, use_cache=True), CACHE)
        right = torch.cat([right, torch.ones(1, 1, dtype=torch.long)], 1)
        with pytest.raises(ValueError, match="takes left padding alone"):
            model(ids[:, :1], attention_mask=right, **{CACHE: cache}, use_cache=True)
        two, mask = left_padded([row, row[:50]])
        cache = getattr(model(two, attention_mask=mask, use_cache=True), CACHE)
        with pytest.raises(ValueError, match="no attention_mask; pass it in every call"):
            model(two[:, :1], **{CACHE: cache}, use_cache=True)
        with pytest.raises(ValueError, match="holds 2 sequences, the model was called with 1"):
            model(ids[:, :1], attention_mask=torch.ones(1, 121), **{CACHE: cache}, use_cache=True)
        attached.detach()
        spotattention.attach(model, selector, TIGHT)
        with pytest.raises(ValueError, match="another selector or before a detach"):
            model(two[:, :1], attention_mask=mask, **{CACHE: cache}, use_cache=True)


def test_arguments_of_other_types_are_refused(spotattention, small, random_selector):
    model = small("Llama")
    selector = random_selector(model)
    for wrong in (None, torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="^model is .*; it must be a transformers model$"):
            spotattention.attach(wrong, selector)
    with pytest.raises(TypeError, match="^model is None; it must be a transformers model$"):
        spotattention.distill(None, ["a"], "nowhere")
    with pytest.raises(TypeError, match="^selector is 5; it must be a path$"):
        spotattention.attach(model, 5)
    with pytest.raises(ValueError, match="^selector is empty; it must name a folder"):
        spotattention.attach(model, "")
    for policy in (5, None):
        with pytest.raises(TypeError, match='^policy is .*; it must be a Method or a text such as "spot:p=0.9"$'):
            spotattention.attach(model, selector, policy)
    for option, value in dict(self_check="1", max_decode_queries=1.5, least_captured="a", graphs=1, callback=5).items():
        with pytest.raises(TypeError, match=f"^{option} is .*; it must be "):
            spotattention.attach(model, selector, **{option: value})
    with pytest.raises(ValueError, match="least_captured is nan; it must be a finite number"):
        spotattention.attach(model, selector, least_captured=math.nan)
    assert not hasattr(model, "spot")
