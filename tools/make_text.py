#!/usr/bin/env python3
"""Makes a training and a held-out text for the demo from what is installed: docstrings of Python packages.

Nothing is downloaded and no text is shipped. Documents are prose-like docstrings joined by module; with --needles a
share of the training documents also holds facts ("The special magic number for amber-river is: 123456.") and later
questions for them, as retrieval is what a selector has to learn to see.

usage: make_text.py --out DIR [--bytes N] [--needles SHARE] [--seed N]
writes DIR/train.jsonl ({"text": ...} a line) and DIR/heldout.txt
"""

import argparse
import ast
import json
import pathlib
import random
import sys
import sysconfig


def docstrings(path: pathlib.Path) -> str:
    """All docstrings of one source file of at least three lines, as one text."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(text for text in found if text and text.count("\n") >= 2)


def collect(limit: int, rng: random.Random) -> list[str]:
    """Documents of 2,000 characters or more, about `limit` characters in all."""
    folders = [pathlib.Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib")]
    # Sorted before the shuffle, so that the same installation gives the same text.
    files = sorted({f for folder in folders for f in folder.rglob("*.py") if "test" not in f.as_posix()})
    rng.shuffle(files)
    documents, size = [], 0
    for file in files:
        text = docstrings(file)
        if len(text) >= 2000:
            documents.append(text)
            size += len(text)
            if size >= limit:
                break
    return documents


WORDS = (
    "acorn alpine basil bishop bottle branch breeze bucket butter cactus camel carbon cello chalk cheese clover "
    "cobalt comet cotton cradle dahlia dancer denim diamond dolphin ebony elbow engine fabric ferry fiddle flame "
    "fossil galaxy garlic gravel guitar helmet hollow insect jasmine jigsaw kernel kitten lagoon linen lizard "
    "magnet maple mellow mitten monkey muffin napkin needle nickel onion oyster paddle parrot pearl pencil pigeon "
    "pillow pocket puzzle quartz rabbit radish raven rocket sailor salmon satin shadow shovel signal spruce squash "
    "summit tablet temple tiger tulip tunnel turtle valley violin wagon whale willow window yellow zebra zipper"
).split()


def with_needles(text: str, rng: random.Random) -> str:
    """The text's lines with facts among them, and for each fact one to three questions further down."""
    lines = text.split("\n")
    events = []
    for _ in range(max(2, int(len(text) / rng.choice((250, 400, 800))))):
        key = "-".join(rng.sample(WORDS, 2))
        value = rng.randrange(100000, 1000000)
        at = rng.random() * 0.9
        events.append((at, f"\nThe special magic number for {key} is: {value}.\n"))
        for _ in range(rng.choice((1, 1, 2, 3))):
            question = (
                f"\nWhat is the special magic number for {key}? The special magic number for {key} is: {value}.\n"
            )
            events.append((at + (1 - at) * rng.random(), question))
    for at, line in sorted(events, reverse=True):
        lines.insert(int(at * len(lines)), line)
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--bytes", type=int, default=6_000_000, help="characters of text in all")
    parser.add_argument("--needles", type=float, default=0.75, help="share of training documents that hold facts")
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    documents = collect(options.bytes, rng)
    if len(documents) < 20:
        print(f"error: only {len(documents)} documents with docstrings are installed; 20 are needed", file=sys.stderr)
        return 1
    held = max(4, len(documents) // 10)
    options.out.mkdir(parents=True, exist_ok=True)
    train = [with_needles(d, rng) if rng.random() < options.needles else d for d in documents[held:]]
    (options.out / "train.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in train))
    (options.out / "heldout.txt").write_text("\n\n".join(documents[:held]))
    print(f"{len(train)} training documents, {sum(map(len, train))} characters; {held} held out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
