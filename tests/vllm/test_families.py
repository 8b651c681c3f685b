"""Families without a trained selector here: small random models, a random selector, every token kept.

With all blocks chosen the attention over pages is exact, so that vLLM's answers with the plug-in are transformers'.
"""

import json
import pathlib
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.timeout(1800)


def random_selector(folder, config, architecture):
    """A selector folder for a transformers config."""
    from spotattention.selector import LayerWeights, Selector
    from spotattention.selector_config import SelectorConfig

    layers, hidden = list(range(config.num_hidden_layers)), config.hidden_size
    chosen = SelectorConfig(per="kv_group")
    weights = {
        layer: LayerWeights(
            torch.randn(5 * 128, hidden) / hidden**0.5,
            torch.randn(config.num_key_value_heads * 4, hidden) / hidden**0.5,
            torch.rand(128) + 0.5,
            torch.randn(128) / 8,
        )
        for layer in layers
    }
    facts = {
        "architecture": architecture,
        "hidden_size": hidden,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": hidden // config.num_attention_heads,
        "fingerprint": "",
    }
    Selector(chosen, facts, layers, weights).save(folder)


@pytest.mark.parametrize("family", ["Qwen2", "Llama"])
def test_exact_over_all_blocks_is_transformers(family, ask, plugin_path, seed, tmp_path):
    import transformers

    torch.manual_seed(seed)
    shape = {
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "initializer_range": 0.15,
    }
    if family == "Llama":
        shape["rope_parameters"] = {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1024,
        }
    config = getattr(transformers, f"{family}Config")(**shape)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    random_selector(folder / "selectors" / "spot", config, f"{family}ForCausalLM")
    prompts = [torch.randint(0, 320, (length,)).tolist() for length in (37, 641, 1300)]
    answer = ask(
        folder,
        prompts,
        {"method": "spot:k=100%,cache=bf16", "check_every": 1},
        sampling={"max_tokens": 12, "ignore_eos": True, "logprobs": 5, "detokenize": False},
        dtype="float32",
        max_model_len=2048,
        skip_tokenizer_init=True,
    )
    assert answer["statistics"][0]["captured_mass"] == pytest.approx(1.0, abs=1e-4), json.dumps(answer["statistics"])
    for prompt, result in zip(prompts, answer["passes"][0]):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + result["tokens"]])).logits[0]
        wanted = logits[len(prompt) - 1 : -1].log_softmax(-1)
        for position, step in enumerate(result["logprobs"]):
            for token, logprob in step.items():
                assert logprob == pytest.approx(float(wanted[position, int(token)]), abs=2e-3)


def test_a_model_class_that_cannot_carry_a_selector_is_refused(environment, plugin_path, seed, tmp_path):
    """Mistral's in vLLM is a class of its own: it would load, and decode densely in silence."""
    import transformers

    torch.manual_seed(seed)
    shape = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 320}
    config = transformers.MistralConfig(**shape, num_attention_heads=4, num_key_value_heads=2, sliding_window=None)
    folder = tmp_path / "model"
    transformers.MistralForCausalLM(config).save_pretrained(folder)
    random_selector(folder / "selectors" / "spot", config, "MistralForCausalLM")
    for selector, refused in (({"selector": "spot"}, True), (None, False)):
        request = {
            "engine": {
                "model": str(folder),
                "additional_config": {"spot": selector},
                "skip_tokenizer_init": True,
                "enforce_eager": True,
                "max_model_len": 512,
            },
            "prompts": [[5, 6, 7]],
            "passes": 1,
            "sampling": {"max_tokens": 2, "detokenize": False},
        }
        (tmp_path / "request.json").write_text(json.dumps(request))
        command = [sys.executable, pathlib.Path(__file__).with_name("ask.py"), "request.json", "answer.json"]
        done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=500)
        said = "names a selector, but MistralForCausalLM cannot carry one and would attend densely" in done.stderr
        assert (done.returncode != 0, said) == (refused, refused), done.stderr[-3000:]
