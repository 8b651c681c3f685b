"""The shipped tokenizer with as many tokens as large models have: what a schema takes grows with them."""

import json
import pathlib
import random

SHIPPED = pathlib.Path(__file__).resolve().parents[2] / "models" / "tiny-qwen3"


def write_tokenizer(folder: pathlib.Path, tokens: int = 150_000) -> None:
    """tokenizer.json and tokenizer_config.json; the new tokens are joined out of two others each."""
    tokenizer = json.loads((SHIPPED / "tokenizer.json").read_text())
    vocab, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    special = {token["content"] for token in tokenizer["added_tokens"]}
    parts = [token for token in vocab if token not in special and len(token) < 6]
    dice = random.Random(7)
    while len(vocab) < tokens:
        left, right = dice.choice(parts), dice.choice(parts)
        if left + right not in vocab:
            vocab[left + right] = len(vocab)
            merges.append([left, right])
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_bytes((SHIPPED / "tokenizer_config.json").read_bytes())
