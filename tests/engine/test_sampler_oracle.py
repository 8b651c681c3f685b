"""The sampler's probabilities against transformers' logits processors, random logits and settings in one batch."""

import json
import random
import subprocess

import pytest
import torch
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers")

VOCAB = 257


def random_row(seed):
    generator = random.Random(seed)
    torch.manual_seed(seed)
    options = {"temperature": generator.choice([0.3, 0.7, 1.0, 1.9])}
    if generator.random() < 0.6:
        options["top_k"] = generator.choice([1, 2, 20, 200, 256, 257, 1000])
    if generator.random() < 0.6:
        options["top_p"] = generator.uniform(0.05, 0.99)
    if generator.random() < 0.6:
        options["min_p"] = generator.uniform(0, 0.5)
    if generator.random() < 0.6:
        options["repetition_penalty"] = generator.uniform(0.5, 2)
    if generator.random() < 0.4:
        options["presence_penalty"] = generator.uniform(-2, 2)
    if generator.random() < 0.4:
        options["frequency_penalty"] = generator.uniform(-2, 2)
    if generator.random() < 0.5:
        tokens = generator.sample(range(VOCAB), 7)
        options["logit_bias"] = [[token, generator.uniform(-5, 5)] for token in tokens]
    return {
        "logits": (torch.randn(VOCAB) * generator.choice([0.5, 2, 6])).tolist(),
        "prompt": [generator.randrange(VOCAB) for _ in range(generator.choice([1, 40]))],
        "output": [generator.randrange(60) for _ in range(generator.choice([0, 1, 50]))],
        "options": options,
    }


def expected(row):
    """By transformers, but for the penalties of OpenAI's API, which it does not have."""
    options = row["options"]
    ids = torch.tensor([row["prompt"] + row["output"]])
    scores = torch.tensor([row["logits"]])
    if "logit_bias" in options:
        bias = {(token,): value for token, value in options["logit_bias"]}
        scores = transformers.SequenceBiasLogitsProcessor(bias)(ids, scores)
    if "repetition_penalty" in options:
        scores = transformers.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"])(ids, scores)
    counts = torch.bincount(torch.tensor(row["output"], dtype=torch.long), minlength=VOCAB)
    scores = scores - options.get("frequency_penalty", 0) * counts - options.get("presence_penalty", 0) * (counts > 0)
    scores = transformers.TemperatureLogitsWarper(options["temperature"])(ids, scores)
    if "top_k" in options:
        scores = transformers.TopKLogitsWarper(options["top_k"])(ids, scores)
    if "top_p" in options:
        scores = transformers.TopPLogitsWarper(options["top_p"])(ids, scores)
    if "min_p" in options:
        scores = transformers.MinPLogitsWarper(options["min_p"])(ids, scores)
    return torch.softmax(scores.double(), 1)[0]


def test_probabilities_equal_transformers(build_folder, tmp_path, seed):
    rows = [random_row(seed + i) for i in range(120)]
    (tmp_path / "in.json").write_text(json.dumps({"vocab_size": VOCAB, "rows": rows}))
    tool = build_folder / "tests" / "engine" / "sampler_tool"
    subprocess.run([tool, tmp_path / "in.json", tmp_path / "out.safetensors"], check=True)
    ours = load_file(tmp_path / "out.safetensors")["probabilities"].double()
    differing = 0
    for row, mine in zip(rows, ours, strict=True):
        wanted = expected(row)
        assert mine.sum().item() == pytest.approx(1, abs=1e-5)
        # A token at the very edge of top-p or min-p may fall to either side in float32; one too unlikely to ever be drawn
        # may vanish in either's softmax.
        drawn = torch.maximum(mine, wanted) > 1e-8
        if (((mine > 0) != (wanted > 0)) & drawn).any():
            differing += 1
            continue
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-6)
    assert differing <= 2
