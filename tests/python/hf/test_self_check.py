"""The self-check: captured mass is what exact attention says, and a selector that fails is warned about."""

import warnings

import pytest
import torch
from support import CACHE

TIGHT = "spot:k=96,sinks=16,recency=32,floor=0"


def test_captured_mass_is_that_of_the_exact_attention(spotattention, small, random_selector):
    """One layer: transformers' own eager weights, summed over the tokens that were chosen."""
    model = small("Qwen3", num_hidden_layers=1)
    selector = random_selector(model)
    ids = torch.randint(1, 151, (1, 277))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(ids, output_attentions=True).attentions[0][0, :, -1].mean(0)
    model.set_attn_implementation("sdpa")
    reports = []
    attached = spotattention.attach(
        model, selector, TIGHT, self_check=1, callback=lambda *report: reports.append(report)
    )
    chosen = []
    check = attached.check.step
    attached.check.step = lambda *step: (chosen.append(step), check(*step))
    with torch.no_grad():
        cache = getattr(model(ids[:, :-1], use_cache=True), CACHE)
        model(ids[:, -1:], **{CACHE: cache}, use_cache=True)
    indices, counts = chosen[0][-2:]
    blocks = indices[0, 0, : counts[0, 0]].tolist()
    assert len(blocks) == 6
    want = sum(float(weights[16 * b : 16 * b + 16].sum()) for b in blocks)
    ((layer, mass, length),) = reports
    assert (layer, length) == (0, 277) and mass == pytest.approx(want, abs=1e-4)
    assert attached.captured_mass == {0: mass}


def test_samples_are_as_rare_as_asked_for(spotattention, small, random_selector):
    model, reports = small("Llama"), []
    spotattention.attach(model, random_selector(model), TIGHT, self_check=5, callback=lambda *r: reports.append(r))
    ids = torch.randint(1, 151, (1, 130))
    model.generate(ids, max_new_tokens=21, min_new_tokens=21, do_sample=False)
    assert sorted(layer for layer, _, _ in reports) == [0] * 4 + [1] * 4  # of 20 decode steps
    model.spot.detach()
    spotattention.attach(model, random_selector(model), TIGHT, self_check=0)
    model.generate(ids, max_new_tokens=4, do_sample=False)
    assert model.spot.captured_mass == {}


def test_a_layer_that_captures_little_is_warned_about_once(spotattention, small, random_selector):
    model = small("Llama", num_hidden_layers=1)
    selector = random_selector(model)
    ids = torch.randint(1, 151, (1, 400))
    spotattention.attach(model, selector, "spot:k=16,sinks=0,recency=1,floor=0", self_check=1, least_captured=0.9)
    with pytest.warns(
        RuntimeWarning, match=r"layer 0: the attended tokens held 0\.\d\d of the exact attention"
    ) as caught:
        model.generate(ids, max_new_tokens=24, min_new_tokens=24, do_sample=False)
    assert len(caught) == 1
    model.spot.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spotattention.attach(model, selector, "spot:k=100%", self_check=1, least_captured=0.99)
        model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    model.spot.detach()
    with pytest.raises(ValueError, match="least captured mass is 1.5; it must be 0 to 1"):
        spotattention.attach(model, selector, least_captured=1.5)
    with pytest.raises(ValueError, match="self_check must be 0 or more"):
        spotattention.attach(model, selector, self_check=-1)


def test_attention_without_a_kernel_is_the_operators(spotattention):
    """The gathering form that serves other GPUs, head sizes and dtypes, against the operator."""
    from spotattention.attention import gathered_attention

    ops = spotattention.ops
    rows, heads, kv_heads, dim, pages = 3, 6, 2, 24, 40
    for groups in (1, kv_heads):
        lengths = torch.tensor([401, 77, 640], dtype=torch.int32)
        table = torch.stack([torch.randperm(pages) for _ in range(rows)]).to(torch.int32)
        pools = [torch.randn(kv_heads, pages, 16, dim) for _ in range(2)]
        query = torch.randn(rows, heads, dim)
        chosen = ops.select_blocks(
            torch.randn(rows, groups, pages), lengths, "top_k", sinks=16, recency=16, floor=0, budget=128
        )
        arguments = (query, *pools, table, lengths, dim**-0.5, chosen.indices, chosen.counts)
        torch.testing.assert_close(
            gathered_attention(*arguments), ops.sparse_decode_attention(*arguments), rtol=1e-4, atol=1e-5
        )
