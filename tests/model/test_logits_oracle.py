"""Logits of every supported architecture against transformers' eager float32, on small random models."""

import json
import random
import subprocess

import pytest
import torch
from safetensors.torch import load_file

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
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}


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


CONFIGS = {
    "llama": lambda: llama(),
    "llama-multi-head-tied": lambda: llama(num_key_value_heads=6, tie_word_embeddings=True),
    "llama-biases": lambda: llama(attention_bias=True, mlp_bias=True, num_key_value_heads=3),
    "llama3-rope": lambda: llama(rope_parameters=LLAMA3_ROPE, head_dim=64),
    "qwen3-tied": lambda: qwen3(),
    "qwen3-untied-bias": lambda: qwen3(tie_word_embeddings=False, attention_bias=True, num_key_value_heads=1),
    "qwen3-yarn": lambda: qwen3(rope_parameters=YARN_ROPE),
    "qwen3.5-tied": lambda: qwen3_5(),
    "qwen3.5-untied": lambda: qwen3_5(
        tie_word_embeddings=False, num_key_value_heads=2, linear_num_value_heads=2, linear_value_head_dim=32
    ),
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


def run_tool(build_folder, folder, tmp_path, rng, sequences, dtype="float32"):
    tool = build_folder / "tests" / "model" / "logits_tool"
    assert tool.is_file(), f"{tool} is not built"
    chunks = [rng.randrange(1, 90) for _ in range(4)]
    prompts = [rng.randrange(max(1, len(s) - 40), len(s) + 1) for s in sequences]
    (tmp_path / "input.json").write_text(
        json.dumps({"sequences": sequences, "chunks": chunks, "prompts": prompts})
    )
    output = tmp_path / "output.safetensors"
    done = subprocess.run(
        [tool, folder, tmp_path / "input.json", output, dtype], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return load_file(output), done.stderr


def check(outputs, reference, sequences, tolerance=1e-4):
    for i, sequence in enumerate(sequences):
        with torch.no_grad():
            expected = reference(torch.tensor([sequence])).logits[0].float()
        for mode in ("prefill", "chunked", "decode", "batch"):
            actual = outputs[f"{mode}.{i}"]
            assert actual.shape == expected.shape
            error = ((actual - expected).norm(dim=1) / expected.norm(dim=1)).max().item()
            assert error <= tolerance, f"{mode} of sequence {i} ({len(sequence)} tokens): {error:.2e}"


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


@pytest.mark.parametrize("name", ["llama", "qwen3-tied", "qwen3.5-tied"])
def test_bfloat16_stays_close(name, build_folder, tmp_path, seed):
    rng = random.Random(seed)
    config = CONFIGS[name]()
    config._attn_implementation = "eager"
    model = randomise(transformers.AutoModelForCausalLM.from_config(config).eval(), seed).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    model = model.float()
    sequences = random_sequences(rng, [rng.randrange(100, 160), 5])
    outputs, _ = run_tool(build_folder, tmp_path / "model", tmp_path, rng, sequences, "bfloat16")
    for i, sequence in enumerate(sequences):
        with torch.no_grad():
            expected = model(torch.tensor([sequence])).logits[0]
        for mode in ("prefill", "chunked", "decode", "batch"):
            error = (outputs[f"{mode}.{i}"] - expected).norm() / expected.norm()
            assert error < 0.05, f"{mode}: {error:.3f}"
