"""Static decode steps, what a CUDA graph captures: on the CPU they run uncaptured, and must be the eager steps.

On a GPU the same tests capture and replay (`pytest tests/python/hf/test_graph.py` there; bfloat16 models).
"""

import pytest
import torch
from support import left_padded

CUDA = torch.cuda.is_available()
TIGHT = "spot:k=96,sinks=16,recency=32,floor=0"


def family(small, name, **changes):
    model = small(name, head_dim=64 if CUDA else 16, **changes)
    return model.to("cuda", torch.bfloat16) if CUDA else model


def generated(model, rows, tokens, **options):
    ids, mask = (x.to(model.device) for x in left_padded(rows))
    made = model.generate(
        ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, return_dict_in_generate=True,
        output_logits=True, **({"do_sample": False} | options),
    )  # fmt: skip
    return made.sequences, torch.stack(made.logits, 1) if made.logits else None


def both(spotattention, model, selector, rows, tokens, policy=TIGHT, **options):
    """Sequences, logits, share and masses of eager steps, then of static ones; and how many steps were captured."""
    results = []
    for graphs in (False, True):
        attached = spotattention.attach(model, selector, policy, self_check=5, graphs=graphs)
        attached.graphs.everywhere = graphs
        torch.manual_seed(3)
        made = generated(model, rows, tokens, **options)
        results.append((*made, attached.attended_share, attached.captured_mass, attached.graphs.captured))
        attached.detach()
        assert "forward" not in model.model.__dict__
    assert results[0][4] == 0
    return results


@pytest.mark.parametrize("lengths", [(203,), (143, 77, 201)], ids=["alone", "padded"])
@pytest.mark.parametrize("name", ["Qwen3", "Llama", "Qwen2", "Mistral"])
def test_static_steps_are_the_eager_ones(spotattention, small, random_selector, name, lengths):
    model = family(small, name, **({"sliding_window": None} if name == "Mistral" else {}))
    rows = [torch.randint(1, 151, (length,)) for length in lengths]
    eager, static = both(spotattention, model, random_selector(model), rows, 40)
    assert static[4] >= 1
    assert torch.equal(static[0], eager[0])
    torch.testing.assert_close(static[1], eager[1], **({"rtol": 0.02, "atol": 0.02} if CUDA else {}))
    assert static[2] == pytest.approx(eager[2])
    assert static[3] == pytest.approx(eager[3], rel=1e-2 if CUDA else 1e-4)


def test_a_cache_that_grows_is_captured_again(spotattention, small, random_selector):
    model = family(small, "Qwen3")
    (eager, static) = both(spotattention, model, random_selector(model), [torch.randint(1, 151, (90,))], 120)
    assert static[4] >= 2
    assert torch.equal(static[0], eager[0])


def test_sampling_and_sets_by_kv_group(spotattention, small, random_selector):
    model = family(small, "Llama")
    selector = random_selector(model)
    selector.config.per = "kv_group"
    for layer, w in selector.weights.items():
        selector.weights[layer] = w._replace(mix=torch.randn(8, 72) * 0.2)
    rows = [torch.randint(1, 151, (150,))]
    policy = "spot:k=64,sinks=16,recency=0,floor=0"
    eager, static = both(spotattention, model, selector, rows, 20, policy, do_sample=True, top_k=20)
    assert static[4] == 1
    assert torch.equal(static[0], eager[0])
    assert static[2] == pytest.approx(eager[2])


def test_what_is_not_captured(spotattention, small, random_selector):
    """Beams move the cache at every step; layers that stay dense read it by its length on the host."""
    model = family(small, "Qwen3")
    rows = [torch.randint(1, 151, (150,))]
    eager, static = both(spotattention, model, random_selector(model), rows, 8, num_beams=3)
    assert torch.equal(static[0], eager[0])
    eager, static = both(spotattention, model, random_selector(model), rows, 8, TIGHT + ",dense=1")
    assert static[4] == 0
    assert torch.equal(static[0], eager[0])


def test_a_mask_that_hides_more_is_refused_behind_a_captured_step(spotattention, small, random_selector):
    model = family(small, "Qwen3")
    attached = spotattention.attach(model, random_selector(model), TIGHT)
    attached.graphs.everywhere = True
    ids = torch.randint(1, 151, (1, 150), device=model.device)
    with torch.no_grad():
        cache = model(ids, use_cache=True)
        cache = cache.get("cache", cache.get("past_key_values"))
        for _ in range(4):
            model(ids[:, :1], past_key_values=cache, use_cache=True)
        assert attached.graphs.captured == 1
        mask = torch.ones(1, 155, dtype=torch.long, device=model.device)
        mask[0, 3] = 0
        with pytest.raises(ValueError, match="left"):
            model(ids[:, :1], attention_mask=mask, past_key_values=cache, use_cache=True)
    attached.detach()
