"""spotattention.distill: the loss is the definition's, the selector learns, and it moves to `spot` where that knows the family."""

import json
import subprocess

import pytest
import torch
from support import left_padded


def seen_of(model, ids):
    """What the loss gets of each layer, by observing a forward pass."""
    from spotattention.hf import backbone, observe

    seen = {}
    with observe.observing(model, backbone.full_attention(model), lambda s: seen.update({s.layer: s})):
        observe.run(model, ids)
    return seen


@pytest.mark.parametrize("scope", ["all", "residual"])
@pytest.mark.parametrize("loss, k_train", [("dense", 8192), ("sparse", 48)])
@pytest.mark.parametrize("key_heads", [1, 4])
def test_loss_and_gradients_are_the_definitions(spotattention, small, scope, loss, k_train, key_heads):
    """Against whole float64 matrices and autograd, on a part of the queries."""
    from spotattention.hf.loss import LayerParameters, layer_loss
    from spotattention.rope import RopeConfig, RopeTable
    from spotattention.selector_config import SelectorConfig

    model = small("Qwen3", num_hidden_layers=1)
    config = SelectorConfig(key_heads=key_heads)
    config.distillation.loss, config.distillation.k_train, config.distillation.teacher_scope = loss, k_train, scope
    config.selection.sinks, config.selection.recency = 24, 40
    length = 211
    seen = seen_of(model, torch.randint(1, 151, (length,)))[0]
    rope = RopeTable(RopeConfig.of_model(model.config), 64)
    layer = LayerParameters(config, 72, rope, torch.Generator().manual_seed(3))
    rows = torch.randperm(length)[:90].sort().values
    got, entropy, count = layer_loss(layer, seen, rows, gradient_weight=0.5, strip_bytes=1 << 12)

    double = LayerParameters(config, 72, rope, torch.Generator().manual_seed(3)).double()
    made = double.project(seen.hidden.double(), seen.positions)
    dots = torch.einsum("qhd,khd->hqk", made.query, made.key.expand(-1, 4, -1)).relu()
    scores = torch.einsum("hqk,qh->qk", dots, made.weight[:, 0])
    logits = torch.einsum("qhgd,khd->hgqk", seen.query.double().view(length, 2, 3, 16), seen.key.double()) * seen.scale
    column = torch.arange(length)
    teacher = logits.masked_fill(column > column[:, None], -torch.inf).softmax(-1).mean((0, 1))
    total, entropies = [], []
    for row in rows.tolist():
        active = column <= row
        if scope == "residual":
            active = (column >= 32) & (column < max(0, row + 1 - 40) // 16 * 16)
        if not active.any():
            continue
        p, s = teacher[row][active], scores[row][active]
        entropies.append(torch.special.entr(p / p.sum()).sum())
        if loss == "sparse":
            best = s.argsort(descending=True, stable=True)[:k_train]
            p, s = p[best], s[best]
        p = p / p.sum()
        total.append((torch.special.xlogy(p, p) - p * s.log_softmax(-1)).sum())
    want = torch.stack(total).mean()
    assert count == len(total)
    assert got == pytest.approx(float(want), rel=1e-4)
    assert entropy == pytest.approx(float(torch.stack(entropies).mean()), rel=1e-4)
    (want * 0.5).backward()
    for (name, ours), theirs in zip(layer.named_parameters(), double.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=2e-3, atol=1e-6, msg=lambda m: f"{name}: {m}")


def documents(count, length):
    """Token ids with something to find: pieces of a document come again in it."""
    made = []
    for _ in range(count):
        piece = torch.randint(1, 150, (40,))
        made.append(torch.cat([torch.randint(1, 150, (length // 3,)), piece] * 3)[:length].tolist())
    return made


def sharpen(model):
    """Olmo2 has no norm before attention, and norms that undo that queries were made larger."""
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(50)
        for name, parameter in model.named_parameters():
            if name.endswith("q_norm.weight"):
                parameter.mul_(8)


RUN = dict(
    steps=8, sequence_length=512, sequences_per_step=2, peak_lr=4e-3, query_rows=128, held_out_every=4, progress=False
)


@pytest.fixture()
def config():
    from spotattention.selector_config import SelectorConfig

    made = SelectorConfig()
    made.selection.sinks, made.selection.recency, made.selection.floor = 16, 32, 96
    return made


@pytest.mark.parametrize("family", ["Olmo2", "StableLm", "Phi3"])
def test_a_family_that_spot_does_not_know(spotattention, small, tmp_path, config, family):
    """Distilled and attached in Python alone."""
    changes = {"Phi3": {"sliding_window": None, "head_dim": 12}, "StableLm": {"hidden_size": 96}}.get(family, {})
    config.distillation.start = "random"
    model = small(family, eos_token_id=0, **changes)
    sharpen(model)
    before = [p.clone() for p in model.parameters()]
    seen = []
    data = documents(24, 300)
    made = spotattention.distill(model, data, tmp_path / "out", config=config, on_step=seen.append, **RUN)
    assert seen[-1]["held_out_loss"] < 0.97 * seen[0]["held_out_loss"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9)) and lines[-1]["layers"] == [0, 1]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert model.config._attn_implementation == "sdpa" and "_spot_seen" not in vars(model.model.layers[0].self_attn)
    assert len(made.config.selection.temperature) == 2 and "calibration" in made.notes
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{type(model).__name__} with 2 layers" in card and "## What a captured mass reads" in card
    with pytest.raises(ValueError, match="already holds a selector"):
        spotattention.distill(model, data, tmp_path / "out", config=config, **RUN)

    ids, mask = left_padded([torch.tensor(data[0]), torch.tensor(data[1][:201])])
    options = dict(attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    dense = model.generate(ids, **options)
    attached = spotattention.attach(model, tmp_path / "out", "spot:k=100%")
    assert torch.equal(model.generate(ids, **options), dense)
    attached.detach()
    attached = spotattention.attach(model, made, "spot:k=128")
    model.generate(ids, **options)
    assert attached.attended_share < 0.7


def test_a_known_family_moves_to_the_program(spotattention, build_folder, transformers, tiny_qwen3, tmp_path, prose):
    """The folder that Python writes, through attach and through `spot`: fingerprint, weights and temperatures are read."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_qwen3, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_qwen3)
    texts = [prose[i : i + 3000] for i in range(0, 60000, 3000)]
    out = tmp_path / "selector"
    options = RUN | {"steps": 1, "sequence_length": 1024, "sequences_per_step": 1, "held_out_sequences": 1}
    spotattention.distill(model, texts, out, tokenizer=tokenizer, **options)
    # The program fits the same to the same contexts, by its own forward pass, scores and rule.
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    ours = spotattention.Selector.load(out).config.selection
    command = ["calibrate", "--model", tiny_qwen3, "--selector", out, "--data", tmp_path / "texts.jsonl"]
    command += ["--held-out-every", RUN["held_out_every"], "--length", 1024, "--contexts", 1]
    done = subprocess.run([str(c) for c in [build_folder / "spot", *command]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = spotattention.Selector.load(out).config.selection
    assert theirs.residual_mass == pytest.approx(ours.residual_mass, rel=1e-3)
    assert len(ours.mass_table) == 21 and ours.temperature == theirs.temperature
    for one, other in zip(ours.mass_table, theirs.mass_table, strict=True):
        assert one == pytest.approx(other, abs=1e-3)
    assert ours.mass_table[0][1] < ours.mass_table[-1][1] - 0.05

    text = prose[70000:74000]
    method = "spot:p=0.6"
    command = ["generate", "--model", tiny_qwen3, "--selector", out, "--attention", method, "--prompt", text]
    command += ["--max-new-tokens", 12, "--temperature", 0, "--ignore-eos"]
    done = subprocess.run([str(c) for c in [build_folder / "spot", *command]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ids = tokenizer(text, return_tensors="pt").input_ids
    attached = spotattention.attach(model, out, method)
    made = model.generate(
        ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    shares = [float(word.removesuffix("%")) for word in done.stderr.split() if word.endswith("%")]
    assert shares[-1] == pytest.approx(100 * attached.attended_share, abs=0.5)
    tokens = made.sequences[0, ids.shape[1] :]
    if tokenizer.decode(tokens) != done.stdout.removesuffix("\n"):  # then by a tie
        margins = torch.stack([step[0].topk(2).values.diff().abs()[0] for step in made.logits])
        assert margins.min() < 1e-2, (tokenizer.decode(tokens), done.stdout)


def test_what_cannot_be_distilled_is_refused(spotattention, small, tmp_path, config):
    data, out = documents(8, 200), tmp_path / "out"
    capped = small("Gemma2", attn_implementation="eager", eos_token_id=0)
    with pytest.raises(ValueError, match="caps its attention scores"):
        spotattention.distill(capped, data, out, **RUN)
    windows = dict(use_sliding_window=True, sliding_window=64, layer_types=["sliding_attention"] * 2)
    with pytest.raises(ValueError, match="no attention layer that sees the whole context"):
        spotattention.distill(small("Qwen2", **windows), data, out, **RUN)
    model = small("Olmo2", eos_token_id=0)
    for change, sentence in (
        ({"sequence_length": 400}, "the first 128 and the last 256 are left out"),
        ({"sequence_length": 9000}, "must be 2 to the model's 4096 positions"),
        ({"steps": 0}, "steps is 0"),
        ({"clip_norm": float("nan")}, "clip_norm is nan; it must be a finite number"),
        ({"query_rows": 600}, "query_rows is 600"),
        ({"store": "int4"}, "distillation: hidden_size is 72; int4 stores"),
        ({"store": torch.float16}, "in float32, bfloat16, int8 or int4, not torch.float16"),
    ):
        with pytest.raises(ValueError, match=sentence):
            spotattention.distill(model, data, out, **(RUN | change))
    for change, sentence in (
        ({"steps": 1.5}, "^distillation: steps is 1.5; it must be a whole number$"),
        ({"seed": None}, "^distillation: seed is None; it must be a whole number$"),
        ({"peak_lr": "1e-3"}, "^distillation: peak_lr is '1e-3'; it must be a number$"),
        ({"calibrate": 1}, "^distillation: calibrate is 1; it must be True or False$"),
    ):
        with pytest.raises(TypeError, match=sentence):
            spotattention.distill(model, data, out, **(RUN | change))
    with pytest.raises(TypeError, match="^out is None; it must be a path$"):
        spotattention.distill(model, data, None, **RUN)
    with pytest.raises(ValueError, match="pass the model's tokenizer"):
        spotattention.distill(model, ["a text"] * 9, out, config=config, **RUN)
    with pytest.raises(ValueError, match="can be read again"):
        spotattention.distill(model, iter(data), out, config=config, **RUN)
    with pytest.raises(ValueError, match="no text beside held-out"):
        spotattention.distill(model, [], out, config=config, **RUN)
    config.per = "kv_group"
    with pytest.raises(ValueError, match="`spot distill` has rest_bucket, block_max and per kv_group"):
        spotattention.distill(model, data, out, config=config, **RUN)
    assert not out.exists()


@pytest.mark.parametrize("family", ["Llama", "Olmo2"])
def test_the_backbones_own_queries_and_keys_are_a_better_start(spotattention, small, config, family):
    from spotattention.hf import backbone
    from spotattention.hf.initialize import start_from_backbone
    from spotattention.hf.loss import LayerParameters, layer_loss
    from spotattention.rope import RopeConfig, RopeTable

    model = small(family)
    sharpen(model)
    rope = RopeTable(RopeConfig.of_model(model.config), 64)
    modules = backbone.full_attention(model)
    layers = {i: LayerParameters(config, 72, rope, torch.Generator().manual_seed(i)) for i in modules}
    seen = seen_of(model, torch.tensor(documents(1, 600)[0]))
    before = {i: layer_loss(layers[i], seen[i])[0] for i in layers}
    assert start_from_backbone(model, modules, layers, [torch.tensor(d) for d in documents(2, 600)])
    after = {i: layer_loss(layers[i], seen[i])[0] for i in layers}
    assert sum(after.values()) < 0.97 * sum(before.values())


def test_files_are_read_as_documents(spotattention, tmp_path):
    import gzip

    from spotattention.hf.data import TrainingData

    (tmp_path / "b.txt").write_text("one\n\ntwo")
    (tmp_path / "a.jsonl").write_text('{"text": "three"}\n\n{"other": 1}\n{"text": "four"}\n')
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write('{"text": "five"}\n')
    encode = lambda text: [len(text), *(ord(c) for c in text)]  # noqa: E731
    texts = TrainingData(tmp_path, encode, end=0, length=13, held_out_every=4, seed=1)
    first = [tuple(texts.next().tolist()) for _ in range(2)]
    stream = [token for sequence in first for token in sequence][:23]  # the first epoch
    assert {"three", "four", "one\n\ntwo"} == {
        "".join(map(chr, stream[i + 1 : i + 1 + stream[i]])) for i in (0, *(j + 1 for j in range(22) if stream[j] == 0))
    }
    assert texts.epoch == 1
    assert len(texts.held_out(9)) == 0  # "five" alone is too short
    again = TrainingData(tmp_path, encode, end=0, length=13, held_out_every=4, seed=1)
    assert [tuple(again.next().tolist()) for _ in range(2)] == first
    with pytest.raises(ValueError, match="a.jsonl:1: not a JSON object"):
        (tmp_path / "a.jsonl").write_text("[1]\n")
        TrainingData(tmp_path, encode, 0, 13, 0, 1).next()
    with pytest.raises(FileNotFoundError, match="none.txt does not exist"):
        TrainingData(tmp_path / "none.txt", encode, 0, 13, 0, 1).next()
