"""Checkpoints as transformers loads them."""

import json
import os
import pathlib
import shutil

import safetensors.torch
import torch


def _write(path: pathlib.Path, text: str) -> None:
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text)
    os.replace(temporary, path)


def save(folder: pathlib.Path, config: dict, weights: dict[str, torch.Tensor], tokenizer_file: pathlib.Path) -> None:
    """config, tokenizer and bfloat16 weights; each file is replaced at once, so that a cut-off run leaves whole ones."""
    folder.mkdir(parents=True, exist_ok=True)
    rounded = {name: weight.detach().bfloat16().cpu().contiguous() for name, weight in weights.items()}
    temporary = folder / "model.safetensors.partial"
    safetensors.torch.save_file(rounded, temporary, metadata={"format": "pt"})
    temporary.chmod(0o644)
    os.replace(temporary, folder / "model.safetensors")
    _write(folder / "config.json", json.dumps(config, indent=1))
    _write(
        folder / "generation_config.json",
        json.dumps({"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 3, "do_sample": False}, indent=1),
    )
    _write(
        folder / "tokenizer_config.json",
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": "<|endoftext|>",
                "pad_token": "<|pad|>",
                "model_max_length": config["max_position_embeddings"],
            }
        ),
    )
    if not (folder / "tokenizer.json").is_file():
        shutil.copyfile(tokenizer_file, folder / "tokenizer.json")


@torch.no_grad()
def load(folder: pathlib.Path, weights: dict[str, torch.Tensor]) -> None:
    """Copies a checkpoint's weights into `weights`; names and shapes must be the same."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= safetensors.torch.load_file(file)
    if found.keys() != weights.keys():
        raise SystemExit(
            f"{folder}: tensors {sorted(found.keys() ^ weights.keys())[:4]} are not in both, checkpoint and model"
        )
    for name, weight in weights.items():
        if weight.shape != found[name].shape:
            raise SystemExit(f"{folder}: {name} is {tuple(found[name].shape)}, the model's is {tuple(weight.shape)}")
        weight.copy_(found[name])


@torch.no_grad()
def round_weights(weights: dict[str, torch.Tensor]) -> None:
    """Rounds to what a checkpoint holds."""
    for weight in weights.values():
        weight.copy_(weight.bfloat16())
