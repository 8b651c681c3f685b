"""Memory that does not suffice: found before it is taken, and said with what it is for."""

import resource

import pytest
from program import make_model

GIB = 1 << 30


def within(gib):
    """For a process that may have that many GiB of addresses."""
    return lambda: resource.setrlimit(resource.RLIMIT_AS, (int(gib * GIB), int(gib * GIB)))


@pytest.fixture(scope="module")
def long_model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("memory") / "model", positions=1 << 22)


def says(done, *parts):
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and lines[-1].startswith("error: out of memory"), done.stderr
    for part in parts:
        assert part in lines[-1], lines[-1]
    assert not any(word in done.stderr for word in ("Exception", "bad_alloc", "c10::", "terminate"))


# 2 layers of 2 heads of 32 numbers, keys and values of 4 bytes: 1 KiB a token.
@pytest.mark.parametrize(
    "words, need, remedy",
    [
        (
            ["generate", "--prompt", "Hi", "--max-new-tokens", 4_000_000, "--completions", 256],
            "976.5",
            "fewer sequences",
        ),
        (["bench", "--context", 4_000_000, "--batch", 200, "--steps", 2], "762.", "shorter context"),
        (["serve", "--port", 0, "--cache-gib", 5000], "512.", "the cache of 53687"),
    ],
)
def test_a_cache_that_does_not_fit(spot, long_model, words, need, remedy):
    says(spot(words[0], "--model", long_model, *words[1:]), "the cache of", " needs ", " are available", need, remedy)


def test_an_address_space_that_ends(spot, long_model):
    """The same under `ulimit -v`, with a cache that the machine could hold."""
    words = ["generate", "--model", long_model, "--prompt", "Hi", "--max-new-tokens", 4_000_000, "--threads", 1]
    says(spot(*words, preexec_fn=within(3.5)), "the cache of 40000", " needs 3.8", "shorter context")


def test_weights_that_do_not_fit(spot, tmp_path):
    """Named with the model's folder, before they are read."""
    import json

    import torch
    from safetensors.torch import save_file

    model = make_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["num_hidden_layers"], config["layer_types"] = 1, ["full_attention"]
    config["vocab_size"], config["hidden_size"] = 4_000_000, 48
    (model / "config.json").write_text(json.dumps(config))
    tensors = {"model.embed_tokens.weight": torch.zeros(4_000_000, 48, dtype=torch.float16)}
    head, inner = 32, 72
    shapes = {
        "norm.weight": [48],
        "layers.0.input_layernorm.weight": [48],
        "layers.0.post_attention_layernorm.weight": [48],
        "layers.0.self_attn.q_norm.weight": [head],
        "layers.0.self_attn.k_norm.weight": [head],
        "layers.0.self_attn.q_proj.weight": [4 * head, 48],
        "layers.0.self_attn.k_proj.weight": [2 * head, 48],
        "layers.0.self_attn.v_proj.weight": [2 * head, 48],
        "layers.0.self_attn.o_proj.weight": [48, 4 * head],
        "layers.0.mlp.gate_proj.weight": [inner, 48],
        "layers.0.mlp.up_proj.weight": [inner, 48],
        "layers.0.mlp.down_proj.weight": [48, inner],
    }
    tensors |= {f"model.{name}": torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}
    save_file(tensors, model / "model.safetensors")
    words = ["generate", "--model", model, "--prompt", "Hi", "--max-new-tokens", 1, "--threads", 1]
    says(spot(*words, preexec_fn=within(1.2)), str(model), "needs 732", "--dtype bfloat16")


def test_positions_that_do_not_fit(spot, tmp_path):
    """A configuration may promise any number of them, and each has its angles."""
    model = make_model(tmp_path / "model", positions=(1 << 31) - 1)
    says(spot("generate", "--model", model, "--prompt", "Hi"), "2147483647 positions", "max_position_embeddings")
