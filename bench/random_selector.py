"""A selector of the preset `spot` with random weights, for measurements of speed."""

from typing import Any

import torch
from spotattention.selector import LayerWeights, Selector, SelectorConfig


def random_selector(facts: dict[str, Any], seed: int = 1) -> Selector:
    """For a backbone of these facts (spotattention.selector.BACKBONE_FACTS), in every layer."""
    config, hidden = SelectorConfig.from_preset("spot"), facts["hidden_size"]
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int) -> torch.Tensor:
        return torch.randn(rows, hidden, generator=generator) * hidden**-0.5

    rows = (config.num_heads + config.key_heads) * config.head_dim
    layers = list(range(facts["num_layers"]))
    weights = {
        layer: LayerWeights(normal(rows), normal(config.num_heads), torch.ones(128), torch.zeros(128))
        for layer in layers
    }
    name = facts["architecture"]  # or all the names that a model goes by
    own = facts | {"architecture": name if isinstance(name, str) else name[0], "fingerprint": ""}
    return Selector(config, own, layers, weights)
