#!/usr/bin/env python3
"""A folder to serve random weights from: a config.json, and a byte-level tokenizer of as many tokens as its vocabulary, since the
published one is not at hand where nothing can be downloaded. Every id has a text of its own, of two to four letters.

    python bench/stand_in_tokenizer.py bench/configs/qwen3-8b OUT
"""

import argparse
import itertools
import json
import pathlib
import shutil
import string


def byte_characters() -> list[str]:
    """GPT-2's: a printable character for each of the 256 bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def tokenizer(vocab_size: int) -> dict:
    vocab = {character: i for i, character in enumerate(byte_characters())}
    merges = []
    letters = string.ascii_lowercase
    pairs = ["".join(pair) for pair in itertools.product(letters, repeat=2)]
    longer = ((first, second) for seconds in (letters, pairs) for first in pairs for second in seconds)
    for first, second in itertools.chain(itertools.product(letters, repeat=2), longer):
        if len(vocab) >= vocab_size - 2:
            break
        vocab[first + second] = len(vocab)
        merges.append([first, second])
    special = [{"id": vocab_size - 2 + i, "content": text} for i, text in enumerate(["<|im_start|>", "<|im_end|>"])]
    added = [
        {**t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for t in special
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": level,
        "decoder": level,
        "model": {**model, "fuse_unk": False, "byte_fallback": False, "vocab": vocab, "merges": merges},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=pathlib.Path, help="folder with a config.json")
    parser.add_argument("out", type=pathlib.Path)
    options = parser.parse_args()
    config = json.loads((options.config / "config.json").read_text())
    vocab_size = config.get("text_config", config)["vocab_size"]
    options.out.mkdir(parents=True, exist_ok=True)
    shutil.copy(options.config / "config.json", options.out / "config.json")
    (options.out / "tokenizer.json").write_text(json.dumps(tokenizer(vocab_size)))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "clean_up_tokenization_spaces": False,
    }
    (options.out / "tokenizer_config.json").write_text(json.dumps(settings))


if __name__ == "__main__":
    main()
