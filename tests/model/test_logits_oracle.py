"""Logits of every supported architecture against transformers' eager float32, on small random models."""

import copy
import json
import os
import random
import statistics
import subprocess

import pytest
import torch
from patience import SLOWER
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")

VOCAB = 211
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}


def llama(**changes):
    fields = dict(
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=136,
        vocab_size=VOCAB,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    return transformers.LlamaConfig(**(fields | changes))


def qwen3(**changes):
    fields = dict(
        hidden_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        intermediate_size=120,
        vocab_size=VOCAB,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    return transformers.Qwen3Config(**(fields | changes))


def qwen3_5(**changes):
    # The 4B and 9B models scaled down: two value heads a key head, gates, 64 of 256 dims rotated.
    fields = dict(
        hidden_size=72,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        intermediate_size=104,
        vocab_size=VOCAB,
        max_position_embeddings=512,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=24,
        linear_value_head_dim=16,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.25,
            "mrope_interleaved": True,
            "mrope_section": [2, 1, 1],
        },
    )
    return transformers.Qwen3_5TextConfig(**(fields | changes))


def others(family, **changes):
    """Mistral, Qwen2 and SmolLM3: five query heads on one KV head, a head of 24 dims."""
    fields = dict(
        hidden_size=120,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=1,
        intermediate_size=104,
        vocab_size=VOCAB,
        max_position_embeddings=512,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return getattr(transformers, f"{family}Config")(**(fields | changes))


CONFIGS = {
    "llama": lambda: llama(),
    "llama-multi-head-tied": lambda: llama(num_key_value_heads=6, tie_word_embeddings=True),
    "llama-biases": lambda: llama(attention_bias=True, mlp_bias=True, num_key_value_heads=3),
    "llama3-rope": lambda: llama(rope_parameters=LLAMA3_ROPE, head_dim=64),
    "qwen3-tied": lambda: qwen3(),
    "qwen3-untied-bias": lambda: qwen3(tie_word_embeddings=False, attention_bias=True, num_key_value_heads=1),
    "qwen3-yarn": lambda: qwen3(rope_parameters=YARN_ROPE),
    "llama-linear-rope": lambda: llama(
        rope_parameters={"rope_type": "linear", "rope_theta": 7000.0, "factor": 3.7}, head_dim=22
    ),
    "llama-dynamic-rope": lambda: llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.5}),
    "mistral": lambda: others("Mistral", sliding_window=None),
    "mistral-own-head-dim": lambda: others("Mistral", sliding_window=None, head_dim=40, rms_norm_eps=1e-5),
    "mistral-window-as-long-as-the-context": lambda: others("Mistral", sliding_window=512, num_attention_heads=6),
    "mistral-shorter-window": lambda: others("Mistral", sliding_window=261),
    "qwen2": lambda: others("Qwen2"),
    "qwen2-tied-yarn": lambda: others("Qwen2", tie_word_embeddings=True, rope_parameters=YARN_ROPE),
    "qwen2-some-layers-slide": lambda: others(
        "Qwen2", use_sliding_window=True, sliding_window=260, max_window_layers=2, num_key_value_heads=5
    ),
    "smollm3": lambda: others("SmolLM3"),
    "smollm3-own-layers": lambda: others("SmolLM3", no_rope_layers=[0, 1, 1, 0], tie_word_embeddings=False),
    "smollm3-biases": lambda: others(
        "SmolLM3", attention_bias=True, mlp_bias=True, no_rope_layer_interval=2, rope_parameters=YARN_ROPE
    ),
    "qwen3.5-tied": lambda: qwen3_5(),
    "qwen3.5-untied": lambda: qwen3_5(
        tie_word_embeddings=False, num_key_value_heads=2, linear_num_value_heads=2, linear_value_head_dim=32
    ),
    "qwen3.5-bias": lambda: qwen3_5(num_hidden_layers=4, attention_bias=True),
    "qwen3.5-wide-groups": lambda: qwen3_5(
        num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2, linear_num_value_heads=6
    ),
}


def randomise(model, seed):
    """Weights under which every part matters: norms away from 1, biases away from 0, decays of all speeds."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if name.endswith("A_log"):
                weight.copy_(torch.empty(weight.shape).uniform_(0.01, 4, generator=generator).log())
            elif name.endswith("dt_bias"):
                weight.copy_(noise - 2)
            elif "norm" in name:
                weight.add_(0.3 * noise)
            elif name.endswith(".bias"):
                weight.copy_(0.5 * noise)
            elif "conv1d" in name:
                weight.copy_(0.5 * noise)
            elif "embed_tokens" in name:
                weight.copy_(noise)
            else:
                weight.copy_(noise * 1.5 / weight.shape[-1] ** 0.5)
    return model


def run_tool(build_folder, folder, tmp_path, rng, sequences, dtype="float32", most_steps=30, threads=1):
    tool = build_folder / "tests" / "model" / "logits_tool"
    assert tool.is_file(), f"{tool} is not built"
    chunks = [rng.randrange(1, 90) for _ in range(4)]
    prompts = [rng.randrange(max(1, len(s) - most_steps), len(s) + 1) for s in sequences]
    (tmp_path / "input.json").write_text(json.dumps({"sequences": sequences, "chunks": chunks, "prompts": prompts}))
    output = tmp_path / "output.safetensors"
    done = subprocess.run(
        [tool, folder, tmp_path / "input.json", output, dtype],
        capture_output=True,
        text=True,
        timeout=600 * SLOWER,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},  # more threads than cores left make tiny models crawl
    )
    assert done.returncode == 0, done.stderr
    return load_file(output), done.stderr


def row_errors(actual, expected):
    return (actual - expected).norm(dim=1) / expected.norm(dim=1)


def logits_of(model, sequence):
    with torch.no_grad():
        return model(torch.tensor([sequence])).logits[0]


def check(outputs, model, sequences, tolerance=1e-4):
    """Every row within the tolerance of float32 transformers. In a sequence where float32 itself strays further (trained
    models have such tokens, random ones near-singular states), every row must instead lie as near to float64 as
    transformers' own float32 does where it strays most, give or take a factor 10: which row rounding hits is chance."""
    for i, sequence in enumerate(sequences):
        expected = logits_of(model, sequence)
        exact = own = None
        for mode in ("prefill", "chunked", "decode", "batch"):
            actual = outputs[f"{mode}.{i}"]
            assert actual.shape == expected.shape
            if (row_errors(actual, expected) <= tolerance).all():
                continue
            if exact is None:
                exact = logits_of(copy.deepcopy(model).double(), sequence)
                own = row_errors(expected.double(), exact).max().item()
            errors = row_errors(actual.double(), exact)
            worst = errors.argmax().item()
            assert errors[worst] <= max(10 * own, tolerance), (
                f"{mode} of sequence {i} ({len(sequence)} tokens): row {worst} is off by {errors[worst]:.2e}, "
                f"transformers' float32 by {own:.2e} at most"
            )


def random_sequences(rng, lengths, vocab=VOCAB):
    return [[rng.randrange(vocab) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name, build_folder, tmp_path, seed):
    rng = random.Random(seed)
    config = CONFIGS[name]()
    config._attn_implementation = "eager"
    model = randomise(transformers.AutoModelForCausalLM.from_config(config).eval(), seed)
    shards = {"max_shard_size": "100KB"} if rng.random() < 0.5 else {}
    model.save_pretrained(tmp_path / "model", **shards)
    # Past the YaRN original length, over several chunks of 64, one token, and a repeated token.
    sequences = random_sequences(rng, [rng.randrange(140, 260), 1, rng.randrange(2, 70)]) + [[7] * 67]
    outputs, _ = run_tool(build_folder, tmp_path / "model", tmp_path, rng, sequences)
    check(outputs, model, sequences)


@pytest.mark.parametrize("name", ["llama", "qwen3-tied", "qwen3.5-tied", "qwen2", "smollm3-biases"])
def test_bfloat16_stays_close(name, build_folder, tmp_path, seed):
    """In bfloat16 no further from float32 than transformers' own bfloat16 is, at the median: of a random hybrid some sequence in
    forty is off by several times of it, in either."""
    rng = random.Random(seed)
    config = CONFIGS[name]()
    config._attn_implementation = "eager"
    model = randomise(transformers.AutoModelForCausalLM.from_config(config).eval(), seed).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    sequences = random_sequences(rng, [rng.randrange(100, 160), 5] + [rng.randrange(2, 60) for _ in range(7)])
    outputs, _ = run_tool(build_folder, tmp_path / "model", tmp_path, rng, sequences, "bfloat16")
    rounded = [logits_of(model, sequence).float() for sequence in sequences]
    model = model.float()
    exact = [logits_of(model, sequence) for sequence in sequences]

    def error(values) -> float:
        return statistics.median(((a - b).norm() / b.norm()).item() for a, b in zip(values, exact, strict=True))

    # Measured 0.65 to 1.02 times transformers' over 20 seeds.
    for mode in ("prefill", "chunked", "decode", "batch"):
        ours = error([outputs[f"{mode}.{i}"] for i in range(len(sequences))])
        assert ours <= 1.5 * error(rounded) + 0.005, f"{mode}: {ours:.4f}, transformers {error(rounded):.4f}"


def test_vision_language_checkpoint(build_folder, tmp_path, seed):
    """Qwen3.5 as published: text model under model.language_model., beside a vision tower and a next-token head."""
    rng = random.Random(seed)
    config = transformers.Qwen3_5Config(
        text_config=qwen3_5(num_hidden_layers=4).to_dict(),
        vision_config=dict(
            depth=1, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=72, num_position_embeddings=16
        ),
        tie_word_embeddings=True,
    )
    config._attn_implementation = "eager"
    model = randomise(transformers.Qwen3_5ForConditionalGeneration(config).eval(), seed)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    assert any(name.startswith("model.language_model.") for name in tensors)
    vision = sum(name.startswith("model.visual.") for name in tensors)
    assert vision > 0
    tensors["mtp.fc.weight"] = torch.randn(72, 144)
    tensors["mtp.norm.weight"] = torch.randn(72)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    sequences = random_sequences(rng, [rng.randrange(70, 150), rng.randrange(2, 30)])
    outputs, said = run_tool(build_folder, folder, tmp_path, rng, sequences)
    check(outputs, model, sequences)
    assert f"{vision} vision and 2 multi-token-prediction tensors are skipped" in said


def trained(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def test_tiny_qwen3(build_folder, tiny_qwen3, tmp_path, seed):
    """A trained model: float32 against transformers, bfloat16 by the divergence of its distributions."""
    rng = random.Random(seed)
    model = trained(tiny_qwen3)
    sequences = random_sequences(rng, [rng.randrange(250, 400), rng.randrange(2, 40)], model.config.vocab_size)
    outputs, _ = run_tool(build_folder, tiny_qwen3, tmp_path, rng, sequences, most_steps=12)
    check(outputs, model, sequences)
    rounded, _ = run_tool(build_folder, tiny_qwen3, tmp_path, rng, sequences, "bfloat16", most_steps=12)
    for name, exact in outputs.items():
        if name.startswith("rope."):
            continue
        expected = exact.log_softmax(1)
        divergence = (expected.exp() * (expected - rounded[name].log_softmax(1))).sum(1)
        assert divergence.mean() < 5e-3, f"{name}: {divergence.mean():.2e}"
        agree = (exact.argmax(1) == rounded[name].argmax(1)).float().mean()
        assert agree > 0.9 or exact.shape[0] < 40, f"{name}: argmax agrees on {agree:.3f}"


@pytest.mark.timeout(300)  # the package may have to be downloaded
def test_smollm2(build_folder, smollm2, tmp_path, seed):
    rng = random.Random(seed)
    model = trained(smollm2)
    sequences = random_sequences(rng, [48, 5], model.config.vocab_size)
    outputs, _ = run_tool(build_folder, smollm2, tmp_path, rng, sequences, most_steps=4, threads=2)
    check(outputs, model, sequences)


ROPE_SPELLINGS = {
    "linear, type": (dict(rope_theta=5e4, rope_scaling={"type": "linear", "factor": 4.0}), "linear"),
    "linear, rope_type": (dict(rope_theta=5e4, rope_scaling={"rope_type": "linear", "factor": 4}), "linear"),
    "both keys": (
        dict(
            rope_theta=5e4,
            rope_scaling={"type": "linear", "factor": 4.0},
            rope_parameters={"rope_type": "default", "rope_theta": 9e5},
        ),
        "linear",
    ),
    "empty rope_scaling": (
        dict(rope_scaling={}, rope_parameters={"rope_type": "linear", "rope_theta": 5e4, "factor": 4.0}),
        "linear",
    ),
    "theta at the top": (dict(rope_theta=5e4, rope_parameters={"type": "linear", "factor": 4.0}), "linear"),
    "theta in both": (
        dict(rope_theta=1e3, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4}),
        "linear",
    ),
    "no theta": (dict(rope_scaling={"type": "linear", "factor": 4.0}), "linear"),
    "dynamic": (dict(rope_theta=5e4, rope_scaling={"type": "dynamic", "factor": 2.0}), "dynamic"),
    "yarn, no original": (dict(rope_theta=5e4, rope_scaling={"type": "yarn", "factor": 2.0}), "yarn"),
    "yarn, original at the top": (
        dict(
            rope_theta=5e4,
            original_max_position_embeddings=128,
            rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 400},
        ),
        "yarn",
    ),
    "nothing": (dict(), "default"),
}


@pytest.mark.parametrize("spelling", ROPE_SPELLINGS)
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "SmolLM3"])
def test_every_spelling_of_rope(family, spelling, build_folder, tmp_path, seed):
    """The rotary tables and logits of a checkpoint whose config.json says RoPE in one of the ways there are."""
    rng = random.Random(seed)
    folder = tmp_path / "model"
    fields, kind = ROPE_SPELLINGS[spelling]
    model = randomise(transformers.AutoModelForCausalLM.from_config(others(family, num_hidden_layers=2)), seed)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for name in ("rope_parameters", "rope_scaling", "rope_theta"):
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps(config | fields))
    model = trained(folder)
    assert model.config.rope_parameters["rope_type"] == kind
    sequences = random_sequences(rng, [rng.randrange(130, 300)])
    outputs, _ = run_tool(build_folder, folder, tmp_path, rng, sequences)
    check(outputs, model, sequences)
    positions = torch.arange(512)[None]
    cos, sin = model.model.rotary_emb(torch.zeros(1), positions)
    half = outputs["rope.cos"].shape[1]
    torch.testing.assert_close(outputs["rope.cos"][:512], cos[0, :, :half], rtol=0, atol=2e-7)
    torch.testing.assert_close(outputs["rope.sin"][:512], sin[0, :, :half], rtol=0, atol=2e-7)


@pytest.mark.parametrize("family", ["Qwen3", "Qwen2", "Llama"])
def test_names_without_prefix(family, build_folder, tmp_path, seed):
    """As Qwen3-Embedding is published: the model without its head, whose names begin with nothing."""
    rng = random.Random(seed)
    config = qwen3() if family == "Qwen3" else others(family, tie_word_embeddings=True)
    model = randomise(transformers.AutoModelForCausalLM.from_config(config).eval(), seed)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("model."): value for name, value in tensors.items()}
    assert "embed_tokens.weight" in bare and "lm_head.weight" not in bare
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    sequences = random_sequences(rng, [rng.randrange(20, 90)])
    outputs, _ = run_tool(build_folder, folder, tmp_path, rng, sequences)
    check(outputs, model, sequences)


@pytest.mark.parametrize("name", ["llama", "llama3-rope", "qwen3-yarn", "qwen3.5-tied", "llama-linear-rope"])
def test_rotary_table(name, build_folder, tmp_path, seed):
    """The whole cos and sin tables, at every position, against the model's own rotary module."""
    rng = random.Random(seed)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]())
    model.save_pretrained(tmp_path / "model")
    outputs, _ = run_tool(build_folder, tmp_path / "model", tmp_path, rng, [[1, 2]])
    positions = torch.arange(outputs["rope.cos"].shape[0])[None]
    assert positions.numel() >= 512
    cos, sin = model.model.rotary_emb(torch.zeros(1), positions)
    half = outputs["rope.cos"].shape[1]
    torch.testing.assert_close(outputs["rope.cos"], cos[0, :, :half], rtol=0, atol=2e-7)
    torch.testing.assert_close(outputs["rope.sin"], sin[0, :, :half], rtol=0, atol=2e-7)
