#!/usr/bin/env python3
"""Writes text to distil the tiny models' selectors on, and text to evaluate on: what their training rows are made of.

    python tools/retrieval_text.py --data TEXT.gz --out DIR [--documents 2000] [--tokens 4096]

DIR/train.jsonl holds documents of --tokens tokens each: half training rows (needles, chains of variables, word lists, questions;
tools/pretrain/rows.py), half plain text. DIR/heldout.txt is text that neither these documents nor the models' training hold.
Selectors learn where a model looks; a model looks for needles only where something asks for them.
"""

import argparse
import json
import pathlib

from pretrain import corpus
from pretrain.pieces import Pieces
from pretrain.rows import SHARES, Rows

ROOT = pathlib.Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--data", type=pathlib.Path, required=True, help="text file, or .gz of one; documents may be separated by NUL"
    )
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--tokenizer", type=pathlib.Path, default=ROOT / "models" / "tiny-qwen3" / "tokenizer.json")
    parser.add_argument(
        "--work", type=pathlib.Path, default=pathlib.Path("/tmp/pretrain_tiny"), help="where the tokenised text goes"
    )
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=4096, help="of a document, at least 1024")
    parser.add_argument("--held-out-tokens", type=int, default=600_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.tokens < 1024 or options.documents < 2:
        parser.error(f"--tokens {options.tokens}, --documents {options.documents}: at least 1024 and 2 are needed")
    if not options.data.is_file():
        parser.error(f"{options.data} does not exist")
    corpus.prepare(options.data, options.tokenizer, options.work)
    options.out.mkdir(parents=True, exist_ok=True)
    pieces = Pieces(options.work, options.tokenizer, options.seed)
    plain = Rows(pieces, {"text": 1})
    retrieval = Rows(pieces, {kind: share for kind, share in SHARES.items() if kind != "text"})
    partial = options.out / "train.jsonl.part"
    with open(partial, "w") as file:
        for index in range(options.documents):
            ids, _, _ = (retrieval, plain)[index % 2].row(options.tokens - 1)
            file.write(json.dumps({"text": pieces.tokenizer.decode(ids.tolist(), skip_special_tokens=False)}) + "\n")
    partial.replace(options.out / "train.jsonl")
    held_out = Pieces(options.work, options.tokenizer, options.seed, held_out=True).streams["text"][
        : options.held_out_tokens
    ]
    (options.out / "heldout.txt").write_text(pieces.tokenizer.decode(held_out.tolist(), skip_special_tokens=False))
    print(
        f"written: {options.out}/train.jsonl ({options.documents} documents of {options.tokens} tokens) and heldout.txt ({len(held_out):,} tokens)"
    )


if __name__ == "__main__":
    main()
