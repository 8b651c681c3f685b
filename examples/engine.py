#!/usr/bin/env python3
"""The C++ engine from Python: requests of several methods in one batch, one of them streamed.

python examples/engine.py [MODEL] [--selector NAME]
"""

import argparse
import pathlib

import spotattention

ROOT = pathlib.Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=ROOT / "models" / "tiny-qwen3", type=pathlib.Path)
    parser.add_argument("--selector", default="spot")
    options = parser.parse_args()

    methods = ["spot:k=512", "dense", "quest:k=512"]
    engine = spotattention.Engine(options.model, options.selector, methods, cache_tokens=8192)
    text = " ".join((ROOT / "docs" / "method.md").read_text().split()[:500])

    # The prompt is read once: what was read densely is shared through the prefix cache.
    for method in methods:
        ((answer,),) = engine.generate([text], method=method, max_new_tokens=12)
        attended = sum(layer.attended for layer in answer.attended)
        visible = sum(layer.visible for layer in answer.attended)
        share = f"{attended / visible:.1%}" if visible else "all"
        print(f"{method}: {answer.text!r}, {share} of the tokens read")
    print(f"{engine.statistics['cached_tokens']} of {engine.statistics['prompt_tokens']} prompt tokens were cached")

    for event in engine.stream(text, max_new_tokens=12, temperature=0.8, seed=1):
        print(event.text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
