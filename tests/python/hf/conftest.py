"""Small random transformers models and selectors for them."""

import pytest
import torch


@pytest.fixture(scope="session")
def transformers(spotattention):
    import transformers

    transformers.utils.logging.set_verbosity_error()
    return transformers


@pytest.fixture(autouse=True)
def fresh(seed):
    torch.manual_seed(seed)


SHAPE = dict(
    vocab_size=151,
    hidden_size=72,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=4096,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
    attn_implementation="sdpa",
)


@pytest.fixture(scope="session")
def small(transformers):
    """small("Llama", num_hidden_layers=1): a random float32 model of a family."""

    def make(family, **changes):
        config = getattr(transformers, f"{family}Config")(**(SHAPE | changes))
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        with torch.no_grad():  # larger than a fresh model's, so that attention is not flat
            for name, parameter in model.named_parameters():
                if name.endswith(("q_proj.weight", "k_proj.weight", "qkv_proj.weight")):
                    parameter.mul_(8)
        return model

    return make


HYBRID = dict(
    num_hidden_layers=3,
    layer_types=["linear_attention", "full_attention", "full_attention"],
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    linear_conv_kernel_dim=4,
)
FAMILIES = {"Llama": {}, "Qwen2": {}, "Qwen3": {}, "Mistral": {"sliding_window": None}, "Qwen3_5Text": HYBRID}


@pytest.fixture(params=FAMILIES)
def family_model(request, small, transformers):
    if request.param == "Qwen3_5Text":
        config = transformers.Qwen3_5TextConfig(**(SHAPE | HYBRID))
        return transformers.Qwen3_5ForCausalLM(config).eval()
    return small(request.param, **FAMILIES[request.param])


@pytest.fixture(scope="session")
def random_selector(spotattention):
    """random_selector(model, key_heads=4): weights as they are before the first step."""
    from spotattention.hf import backbone
    from spotattention.hf.loss import LayerParameters
    from spotattention.selector import Selector
    from spotattention.selector_config import SelectorConfig

    def make(model, **changes):
        config = SelectorConfig(**({"cache_format": "f32"} | changes))
        facts = backbone.facts(model)
        facts["architecture"] = type(model).__name__
        layers = list(backbone.full_attention(model))
        generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        weights = {i: LayerParameters(config, facts["hidden_size"], None, generator).weights() for i in layers}
        return Selector(config, facts, layers, weights)

    return make
