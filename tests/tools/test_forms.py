"""tools/forms.py: the curves against sets written out plainly, attention against transformers' own, an LRU against a dict."""

import collections
import fractions
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from choice import decode, forms, tables  # noqa: E402
from choice.blocks_kept import miss_shares  # noqa: E402


@pytest.fixture(autouse=True)
def seeded(seed):
    torch.manual_seed(seed)
    random.seed(seed)


def attention(layers, heads, length):
    """Sharp and flat rows, with a heavy beginning."""
    logits = torch.randn(layers, heads, length) * (0.5 + 3 * torch.rand(layers, heads, 1))
    logits[..., :3] += 4
    return logits.softmax(-1)


@pytest.mark.parametrize("heads, kv_heads", [(6, 2), (4, 4), (7, 1)])
@pytest.mark.parametrize("rule", ["count", "top_p", "threshold", "share", "relative"])
def test_curves_equal_sets_written_out(heads, kv_heads, rule):
    length = random.randrange(300, 900)
    probabilities = attention(3, heads, length)
    step = forms.Step(probabilities, kv_heads)
    for sets in ("layer", "group"):
        block, sinks, recent = random.choice([(16, 32, 64), (8, 0, 5), (1, 4, 16), (5, 7, 11)])
        for prune in (0, 0.5) if rule in ("count", "threshold") else (0,):
            form = forms.Form(sets, block, sinks, recent, rule, prune=prune)
            read, mass = step.curve(form)
            assert (read.mean(0).diff() >= -1e-6).all() or prune
            for at in random.sample(range(len(form.grid)), 6):
                kept = [forms.kept_tokens(form, p, kv_heads, form.grid[at]) for p in probabilities]
                share = sum((p * k).sum(-1).mean() for p, k in zip(probabilities, kept)) / 3
                assert float(mass[:, at].mean()) == pytest.approx(float(share), abs=2e-5), (form.label, form.grid[at])
                if not prune:
                    tokens = sum(k.float().mean() for k in kept) / 3
                    assert float(read[:, at].mean()) == pytest.approx(float(tokens), abs=1e-6), (
                        form.label,
                        form.grid[at],
                    )


@pytest.mark.parametrize("rule", ["count", "threshold"])
def test_sets_of_query_heads_read_their_union(rule):
    heads, kv_heads, length = 6, 2, 333
    probabilities = attention(2, heads, length)
    form = forms.Form("head", 8, 16, 32, rule)
    read, mass = forms.Step(probabilities, kv_heads).curve(form)
    begin, end = 2, (length - 32) // 8
    for at in random.sample(range(len(form.grid)), 5):
        tokens = captured = 0.0
        for layer in probabilities:
            for group in layer.view(kv_heads, heads // kv_heads, length):
                union = set()
                for row in group:
                    sums = {b: float(row[8 * b : 8 * b + 8].sum()) for b in range(begin, end)}
                    if rule == "threshold":
                        own = {b for b, v in sums.items() if v >= form.grid[at]}
                    else:
                        reserved = -(-length // 8) - (end - begin)
                        wanted = max(0, int(-(-form.grid[at] * length // 8)) - reserved)
                        own = set(sorted(sums, key=lambda b: -sums[b])[:wanted])
                    union |= own
                    captured += sum(sums[b] for b in own) + float(row[: 8 * begin].sum() + row[8 * end :].sum())
                tokens += 8 * len(union) + 8 * begin + length - 8 * end
        assert float(read[:, at].mean()) == pytest.approx(tokens / length / 2 / kv_heads, abs=1e-6)
        assert float(mass[:, at].mean()) == pytest.approx(captured / 2 / heads, abs=2e-5)


def test_what_is_known_in_advance():
    """Known from the very step itself, the residual mass scales a share back to the mass, and counts are the threshold's."""
    step = forms.Step(attention(3, 4, 500), 2)
    for sets in ("layer", "group"):
        known = forms.Calibration()
        threshold = forms.Form(sets, 4, 16, 64, "threshold")
        known.add(threshold.key, step.ranking(threshold))
        expected = forms.counts(threshold, step.ranking(threshold))
        for rule in ("fixed", "scaled"):
            form = forms.Form(sets, 4, 16, 64, rule)
            taken = forms.counts(form, step.ranking(form), known)
            assert (taken - expected).abs().max() <= (
                1 if rule == "scaled" else 0
            )  # a division's rounding may move one block
    longer = forms.Step(attention(3, 4, 700), 2)
    known.add(threshold.key, longer.ranking(threshold))
    scores = known.mean_scores(threshold.key)
    assert scores.shape[-1] == longer.ranking(threshold).scores.shape[-1]
    assert torch.allclose(scores[..., -1], longer.ranking(threshold).scores[..., -1] / 2)


def test_one_threshold_a_step_reads_its_share_and_holds_the_most():
    step = forms.Step(attention(4, 4, 1000), 2)
    one, count = (forms.Form("group", 4, 16, 64, rule) for rule in ("step", "count"))
    (read, mass), (_, same_mass) = step.curve(one), step.curve(count)
    inside = [at for at, share in enumerate(one.grid) if 0.15 < share < 0.8]
    assert torch.allclose(read.mean(0)[inside], torch.tensor(one.grid).float()[inside], atol=0.01)
    # Both read the same within a block a set; the one threshold holds at least as much.
    assert (mass.mean(0)[inside] >= same_mass.mean(0)[inside] - 0.003).all()


def test_labels():
    for form in forms.all_forms():
        assert forms.Form.parse(form.label) == form
    for label in (
        "group/16/64/threshold",
        "group/x/16/64/count",
        "pair/16/16/64/count",
        "group/16/16/64/most",
        "layer/0/1/1/count",
    ):
        with pytest.raises(ValueError):
            forms.Form.parse(label)


def test_misses_of_an_lru():
    """Against an ordered dict, a step's blocks touched in ascending order, reserved ones always there."""
    layers, sets, blocks, steps = 2, 2, 40, 30
    weights = torch.rand(layers, sets, blocks) ** 4
    chosen = [(torch.rand(layers, sets, blocks) < weights) for _ in range(steps)]
    reserved = []
    for time in range(steps):
        always = torch.zeros(blocks, dtype=torch.bool)
        always[:2] = True
        always[-3 - time // 15 :] = True
        reserved.append(always)
        chosen[time] &= ~always
    sizes, warm = (0.5, 1, 2), 7
    total = torch.stack(chosen).sum((0, -1))
    for size, share in zip(sizes, miss_shares(chosen, reserved, sizes, warm)):
        missed = wanted = 0
        for layer in range(layers):
            for s in range(sets):
                held = collections.OrderedDict()
                room = max(1, math.ceil(fractions.Fraction(int(total[layer, s])) * fractions.Fraction(size) / steps))
                for time in range(steps):
                    if time >= warm:
                        newest = list(held)[-(room + int(reserved[time - 1].sum())) :]
                        now = chosen[time][layer, s].nonzero().flatten().tolist()
                        missed += sum(b not in newest for b in now)
                        wanted += len(now)
                    for b in (chosen[time][layer, s] | reserved[time]).nonzero().flatten().tolist():
                        held.pop(b, None)
                        held[b] = True
        assert share == pytest.approx(missed / wanted)


def make_model(tmp_path, tokenizer_folder):
    shape = dict(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=2048,
    )
    vocab = len(AutoTokenizer.from_pretrained(tokenizer_folder))
    if random.random() < 0.5:
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=vocab, **shape))
    else:
        model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, attention_bias=True, **shape))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(tmp_path / "model")
    return tmp_path / "model", model.eval()


def test_watched_attention_is_transformers_own(tmp_path, tiny_qwen3):
    folder, reference = make_model(tmp_path, tiny_qwen3)
    reference.set_attn_implementation("eager")
    model = decode.Model(str(folder), "cpu")
    ids = [random.randrange(len(model.tokenizer)) for _ in range(random.randrange(50, 300))]
    cache, token = model.prefill(ids)
    for _ in range(3):
        ids.append(token)
        cache, token, probabilities = model.watched_step(token, cache)
        out = reference(torch.tensor([ids]), output_attentions=True)
        expected = torch.stack([a[0, :, -1] for a in out.attentions])
        assert torch.allclose(probabilities, expected, atol=1e-5)
        assert int(out.logits[0, -1].argmax()) == token


def spot_forms(*arguments):
    command = [sys.executable, str(ROOT / "tools" / "forms.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_prompts_records_answers_and_tables(tmp_path, tiny_qwen3):
    folder, _ = make_model(tmp_path, tiny_qwen3)
    prose = tmp_path / "prose.txt"
    words = [
        w for w in "of the river and its slow brown water that nobody ever crossed by night without a lamp".split()
    ]
    prose.write_text("\n\n".join(" ".join(random.choices(words, k=90)) + ". And so on." for _ in range(400)))
    done = spot_forms(
        "prompts", "--length", 700, "--code", ROOT / "tools", "--prose", prose, "--needles", folder, "--count", 3, "--seed", 5,
        "--out", tmp_path / "prompts.jsonl",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    prompts = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert [p["kind"] for p in prompts] == ["code"] * 3 + ["prose"] * 3 + ["needles"] * 3
    for prompt in prompts[6:]:
        assert all(reference in prompt["context"] for reference in prompt["references"])
    few = ["layer/16/128/256/count", "group/8/16/64/threshold", "group/8/16/64/fixed"]
    record = (
        "record",
        "--model",
        folder,
        "--prompts",
        tmp_path / "prompts.jsonl",
        "--length",
        700,
        "--calibrate",
        1,
        "--steps",
        2,
    )
    record += (
        "--consecutive",
        6,
        "--consecutive-prompts",
        1,
        "--forms",
        *few,
        "--layers",
        few[1],
        "--out",
        tmp_path / "a.jsonl",
    )
    for part in range(2):  # in two parts, the second of which finds the first one's prompts done
        done = spot_forms(*record, "--part", f"{part}/2")
        assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and {len(row["layers"][few[1]]["read"]) for row in rows} == {3}
    for row in rows:
        for label in few:
            assert row["forms"][label]["mass"][-1] > row["forms"][label]["mass"][0] > 0

    done = spot_forms(
        "answers", "--model", folder, "--prompts", tmp_path / "prompts.jsonl", "--length", 700, "--tokens", 4, "--curves",
        tmp_path / "a.jsonl", "--forms", "layer/16/128/256/count@0.7", "--out", tmp_path / "b.jsonl",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads((tmp_path / "b.jsonl").read_text().splitlines()[0])
    assert answer["read"]["layer/16/128/256/count@0.7"] == pytest.approx(0.7, abs=0.05)
    done = spot_forms("report", tmp_path / "a.jsonl", "--answers", tmp_path / "b.jsonl", "--out", tmp_path / "tables")
    assert done.returncode == 0, done.stderr
    assert all(label in (tmp_path / "tables" / "forms.md").read_text() for label in few)
    bad = spot_forms(
        "record", "--model", folder, "--prompts", tmp_path / "prompts.jsonl", "--length", 9000, "--out", tmp_path / "c"
    )
    assert bad.returncode == 1 and "9" in bad.stderr and bad.stderr.startswith("error") or "error:" in bad.stderr


def test_crossings_and_intervals():
    read = [0.1, 0.2, 0.4]
    rows = [
        {"kind": kind, "forms": {"f": {"read": read, "mass": [0.5 + shift, 0.7 + shift, 1.0]}}}
        for kind, shifts in (("a", (0.0, 0.1)), ("b", (0.05, 0.05)))
        for shift in shifts
    ]
    sample = tables.Sample(rows, resamples=200)
    reads, masses = sample.curves("f")
    assert masses[0].tolist() == pytest.approx([0.55, 0.75, 1.0])
    assert tables.cross(masses, reads, 0.65)[0] == pytest.approx(0.15)
    value, low, high = tables.interval(tables.cross(masses, reads, 0.65))
    assert low <= value <= high and high - low == pytest.approx(0.025, abs=0.003)
