#!/usr/bin/env python3
"""The main job in one command, on a CPU: distil a selector for a small real model, then compare sparse with dense attention.

1. makes a training text from the docstrings of the installed Python packages (tools/make_text.py);
2. `spot distill`: a selector for models/tiny-qwen3, at 2K tokens;
3. `spot generate`: the same needle question answered densely and sparsely;
4. `spot eval needle`: prompts of 16K tokens (8 times the training length), dense, sparse and with a StreamingLLM window;
5. `spot eval text`: perplexity and captured attention mass on held-out text.

Everything lands in out/demo; a second run reuses a finished selector (--fresh starts over).
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
OUT = ROOT / "out" / "demo"
MODEL = ROOT / "models" / "tiny-qwen3"
# Dual top-p, a fixed budget of an eighth of the context, the window and the ceiling at the same budget.
METHODS = "spot:p=0.7,spot:k=2048,streaming:k=2048,oracle:k=2048"
SPOT = pathlib.Path(os.environ.get("SPOT_BUILD", ROOT / "build" / "cpu")) / "spot"


def run(title: str, *command: object) -> None:
    """Runs one command, shown as a user would type it; ends the demo if it fails."""
    words = [str(word) for word in command]
    shown = " ".join(word.replace(str(ROOT) + "/", "") for word in words)
    print(f"\n\033[1m{title}\033[0m\n$ {shown}" if sys.stdout.isatty() else f"\n{title}\n$ {shown}", flush=True)
    start = time.time()
    code = subprocess.run(words, cwd=ROOT).returncode
    if code:
        sys.exit(f"error: the step above failed with status {code}")
    print(f"({time.time() - start:.0f} s)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="distil again even if out/demo holds a selector")
    parser.add_argument("--steps", type=int, default=100, help="distillation steps")
    parser.add_argument("--samples", type=int, default=8, help="needle prompts")
    parser.add_argument("--length", type=int, default=16384, help="tokens of a needle prompt; held-out text has half")
    parser.add_argument("--out", type=pathlib.Path, default=OUT, help="where everything lands (out/demo)")
    options = parser.parse_args()
    start, out = time.time(), options.out.resolve()
    if options.fresh and out.exists():
        shutil.rmtree(out)
    text, selector = out / "text", out / "selector"
    if not (text / "heldout.txt").exists():
        run("1. Make a text", sys.executable, ROOT / "tools/make_text.py", "--out", text)
    if not (selector / "selector.json").exists():
        run(
            "2. Distil a selector (2K tokens)",
            SPOT,
            "distill",
            "--model",
            MODEL,
            "--data",
            text / "train.jsonl",
            "--out",
            selector,
            "--length",
            2048,
            "--sequences-per-step",
            2,
            "--steps",
            options.steps,
            "--warmup-steps",
            min(15, options.steps // 2),
            "--loss",
            "dense",
            "--query-rows",
            512,
            "--lr",
            4e-3,
        )
    prompt = out / "prompt.txt"
    filler = (text / "heldout.txt").read_text()
    before, whole = (share * options.length // 16384 for share in (14000, 30000))
    prompt.write_text(
        filler[:before]
        + "\nThe special magic number for amber-river is: 483920.\n"
        + filler[before:whole]
        + "\nWhat is the special magic number for amber-river? The special magic number for amber-river is:"
    )
    for attention, choice in (("dense", ()), ("spot", ("--selector", selector, "--top-p", 0.7))):
        run(
            f"3. Generate, {attention}",
            SPOT,
            "generate",
            "--model",
            MODEL,
            "--prompt-file",
            prompt,
            "--attention",
            attention,
            *choice,
            "--max-new-tokens",
            8,
        )
    run(
        f"4. Needles at {options.length:,} tokens; the training length was 2,048",
        SPOT,
        "eval",
        "needle",
        "--model",
        MODEL,
        "--selector",
        selector,
        "--text",
        text / "heldout.txt",
        "--length",
        options.length,
        "--samples",
        options.samples,
        "--methods",
        METHODS,
        "--out",
        out / "needle",
    )
    run(
        f"5. Held-out text at {options.length // 2:,} tokens",
        SPOT,
        "eval",
        "text",
        "--model",
        MODEL,
        "--selector",
        selector,
        "--text",
        text / "heldout.txt",
        "--length",
        options.length // 2,
        "--sequences",
        1,
        "--methods",
        METHODS,
        "--out",
        out / "heldout",
    )

    needle = json.loads((out / "needle" / "report.json").read_text())["lengths"][0]
    print(f"\nDone in {(time.time() - start) / 60:.1f} minutes.")
    for method in needle["methods"]:
        print(
            f"  {method['name']:18} {method['exact_match']:3}/{needle['samples']} right, "
            f"{100 * method['attended_share']:5.1f}% of tokens attended, {method['milliseconds_per_token']:6.2f} ms/token"
        )
    print(f"Plots: {out / 'needle' / 'report.html'}\n       {out / 'heldout' / 'report.html'}")


if __name__ == "__main__":
    main()
