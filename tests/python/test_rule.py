"""The grammar of methods: the same sentences as `spot`, and the fields that select_blocks takes."""

import subprocess

import pytest

WRONG = [
    "spots:k=1",
    "spot:k",
    "spot:k=",
    "spot:k=1.5",
    "spot:k=2e9",
    "spot:k= 5",
    "spot:q=5",
    "spot:,p=0.9",
    "spot:p=50%",
    "spot:p=0",
    "spot:p=nan",
    "spot:p=0.9,k=5",
    "spot:k=5,k=10%",
    "spot:k=5%,k=10%",
    "spot:p=0.9,p=0.9",
    "spot:sinks=16,sinks=32",
    "spot:k=0",
    "spot:k=101%",
    "spot:t=0.1,k=512",
    "twilight:t=0.1",
    "spot:m=0.9999999",
    "spot:m=0",
    "spot:m=nan",
    "spot:m=80%",
    "spot:m=0.8,p=0.9",
    "spot:m=0.8,t=0.1",
    "spot:m=0.8,k=5%",
    "oracle:m=0.8",
    "spot:sinks=-1",
    "spot:cap=100",
    "spot:dense=-1",
    "spot:cache=int5",
    "quest:cache=int4",
    "dense:prefill=sparse",
    "dense:prefill=dense",
    "streaming:p=0.3",
    "streaming:k=10%,sinks=16",
    "spot:k=512,cap=4096",
    "oracle:k=10%,temperature=2,cap=4096",
    "twilight:k=512,cap=900",
    "spot:dense=10001",
    "spot:prefill=maybe",
    "spot:tile=32",
    "spot:prefill=dense,tile=32",
    "spot:prefill=sparse,tile=8",
    "quest:prefill=auto,tile=1.5",
    "dense:tile=32",
    "spot:temperature=inf",
    "spot:per=kv_group",
    "oracle:per=head",
]


@pytest.mark.parametrize("text", WRONG)
def test_wrong_methods_are_refused_in_the_programs_words(spotattention, build_folder, tiny_qwen3, text):
    command = [build_folder / "spot", "generate", "--model", tiny_qwen3, "--selector", "spot", "--prompt", "a"]
    done = subprocess.run([*map(str, command), "--attention", text], capture_output=True, text=True)
    assert done.returncode == 1
    config = spotattention.Selector.load("spot", tiny_qwen3).config
    with pytest.raises(ValueError) as caught:
        config.method(text)
    assert f"error: {caught.value}" == done.stderr.strip().splitlines()[-1]


def test_methods_say_what_was_written(spotattention):
    parse, rule = spotattention.parse_method, spotattention.SelectionRule
    assert parse("spot").rule == rule()
    assert parse("spot:p=.8,floor=0,cap=1e3").rule == rule(p=0.8, floor=0, cap=1000)
    method = parse("spot:k=10%,dense=2,cache=bf16,prefill=sparse,tile=64,")
    assert method.rule == rule(mode="top_k", budget_fraction=0.1)
    assert (method.word, method.dense_layers, method.cache_format) == ("spot", 2, "bf16")
    assert (method.prefill, method.tile) == ("sparse", 64)
    assert (parse("quest:prefill=auto").prefill, parse("quest").prefill, parse("quest").tile) == ("auto", "dense", None)
    assert parse("spot:k=20%").rule.budget_fraction == 0.2
    assert parse("twilight").rule == rule(mode="top_k", budget_fraction=0.25, p=0.95)
    assert parse("twilight:k=512,p=0.9").rule == rule(mode="top_k", budget=512, p=0.9)
    assert parse("spot:t=1e-3").rule.describe() == "threshold 0.001"
    assert parse("oracle:k=5%,per=kv_group").scope == "kv_group" and parse("oracle").scope is None
    defaults = rule(p=0.7, recency=64)
    assert parse("spot:sinks=16", defaults).rule == rule(p=0.7, recency=64, sinks=16)


def test_a_mass_becomes_a_threshold(spotattention, seed):
    """Against numpy.interp; of equal masses the largest threshold counts."""
    import numpy as np

    random = np.random.default_rng(seed)
    thresholds = np.sort(random.uniform(1e-5, 1e-1, 12))[::-1]
    masses, tokens = np.sort(random.uniform(0.3, 0.99, (2, 12)))
    table = np.stack([thresholds, masses, tokens], 1).tolist()
    parse = spotattention.parse_method
    for mass in [*masses, *random.uniform(masses[0], masses[-1], 50)]:
        rule = parse(f"spot:m={float(mass)!r},floor=64", None, table).rule
        assert (rule.mode, rule.floor) == ("threshold", 64)
        assert rule.threshold == pytest.approx(np.exp(np.interp(mass, masses, np.log(thresholds))), rel=1e-9)
    flat = [[0.1, 0.5, 0.1], [0.01, 0.5, 0.1], [0.001, 0.75, 0.2], [0.0001, 0.75, 0.3]]
    assert parse("spot:m=0.5", None, flat).rule.threshold == 0.1
    assert parse("spot:m=0.75", None, flat).rule.threshold == 0.001
    with pytest.raises(ValueError, match="is outside what was fitted for the selector, 0.5000 to 0.7500;"):
        parse("spot:m=0.76", None, flat)
    with pytest.raises(ValueError, match="fit that with `spot calibrate`"):
        parse("spot:m=0.76")


def test_rules_are_arguments_of_the_operators(spotattention):
    import torch

    given = spotattention.parse_method("spot:p=0.9,sinks=16,recency=32,floor=0").rule.fitted(1.5, []).arguments()
    assert given["temperature"] == 1.5 and given["thresholds"] == ()
    chosen = spotattention.ops.select_blocks(torch.randn(1, 1, 40), torch.tensor([640], dtype=torch.int32), **given)
    assert 3 <= int(chosen.counts) <= 40


def test_a_threshold_on_all_attention_is_one_on_the_residual_of_each_set(spotattention):
    import torch

    rule = spotattention.parse_method("spot:t=1e-3,sinks=16,recency=32,floor=0").rule
    fitted = rule.fitted(1.0, [0.5, 0.05])
    assert fitted.thresholds == pytest.approx((2e-3, 2e-2))
    scores = torch.randn(1, 2, 400) * 2
    lengths = torch.tensor([6400], dtype=torch.int32)
    both = spotattention.ops.select_blocks(scores, lengths, **fitted.arguments())
    for set_, threshold in enumerate(fitted.thresholds):
        alone = spotattention.ops.select_blocks(
            scores[:, set_ : set_ + 1], lengths, "threshold", 16, 32, 0, threshold=threshold
        )
        count = int(alone.counts)
        assert int(both.counts[0, set_]) == count
        assert torch.equal(both.indices[0, set_, :count], alone.indices[0, 0, :count])
    assert spotattention.parse_method("spot:p=0.9").rule.fitted(1.0, [0.5]).thresholds == ()


@pytest.mark.parametrize("method", [5, None, b"spot", ["spot"]])
def test_a_method_is_a_text(spotattention, method):
    with pytest.raises(TypeError, match=r'^method is .*; it must be a text such as "spot:p=0.9"$'):
        spotattention.parse_method(method)


def test_numbers_of_a_rule_are_numbers(spotattention):
    for name in ("sinks", "recency", "floor", "cap", "budget"):
        for wrong in (1.5, "16", None, True):
            with pytest.raises(TypeError, match=f"^selection rule: {name} is .*; it must be a whole number$"):
                spotattention.SelectionRule(**{name: wrong})
    for name in ("budget_fraction", "p", "threshold", "temperature"):
        for wrong in ("0.5", None, True):
            with pytest.raises(TypeError, match=f"^selection rule: {name} is .*; it must be a number$"):
                spotattention.SelectionRule(**{name: wrong})
        with pytest.raises(ValueError, match=f"^selection rule: {name} is nan; it must be "):
            spotattention.SelectionRule(**{name: float("nan")})
    for wrong, sentence in (
        ("12", "thresholds is '12'; it must be a list of numbers"),
        ([0.1, "x"], r"thresholds\[1\] is 'x'; it must be a number"),
        ([float("nan")], r"thresholds\[0\] is nan; it must be a finite number"),
        ([0.1, 0.0], r"thresholds is \(0.1, 0.0\); it must be positive"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^selection rule: {sentence}$"):
            spotattention.SelectionRule(thresholds=wrong)
    assert spotattention.SelectionRule(thresholds=[1]).thresholds == (1.0,)
    with pytest.raises(TypeError, match="^defaults is 5; it must be a SelectionRule$"):
        spotattention.parse_method("spot", 5)
