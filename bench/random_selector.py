#!/usr/bin/env python3
"""A selector of the preset `spot` with random weights, for measurements of speed.

    SPOT_OPS_LIBRARY=build/gpu/libspot_ops.so PYTHONPATH=python python bench/random_selector.py MODEL

writes MODEL/selectors/spot for the shapes in MODEL/config.json.
"""

import argparse
import json
import pathlib
from typing import Any

import torch
from spotattention.selector import LayerWeights, Selector
from spotattention.selector_config import SelectorConfig


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


def save_selector(config: dict[str, Any], folder: pathlib.Path) -> None:
    """For the model of a config.json."""
    facts = {
        "architecture": config["architectures"][0],
        "hidden_size": config["hidden_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "num_kv_heads": config["num_key_value_heads"],
        "head_dim": config["head_dim"],
    }
    random_selector(facts).save(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=pathlib.Path, help="folder with a config.json")
    model = parser.parse_args().model
    save_selector(json.loads((model / "config.json").read_text()), model / "selectors" / "spot")


if __name__ == "__main__":
    main()
