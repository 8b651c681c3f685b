#!/usr/bin/env python3
"""Writes a checkpoint with random weights and the shapes of a config.json, as transformers publishes one (sharded
safetensors, bfloat16), so that loading can be measured where no published weights are at hand.

    python bench/make_checkpoint.py bench/configs/qwen3-8b OUT [--device cpu]
"""

import argparse
import json
import pathlib
import shutil

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=pathlib.Path, help="folder with a config.json")
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    config = AutoConfig.from_pretrained(options.config)
    # A vision-language config holds the text model's; only that is made.
    config = getattr(config, "text_config", config)
    with torch.device(options.device), torch.no_grad():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(options.out, max_shard_size="4GB")
    shutil.copy(options.config / "config.json", options.out / "config.json")  # ours, with its YaRN and positions
    size = sum(file.stat().st_size for file in options.out.glob("*.safetensors"))
    print(json.dumps({"checkpoint": str(options.out), "bytes": size}))


if __name__ == "__main__":
    main()
