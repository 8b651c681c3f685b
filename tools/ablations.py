#!/usr/bin/env python3
"""One change at a time against the default selector: distils each variant briefly and measures it beyond its training length.

    tools/ablations.py --model models/tiny-qwen3 --train text/train.jsonl --heldout text/heldout.txt --out out/ablations

Writes OUT/NAME/ (selector, metrics, report) for each variant and OUT/table.md. Variants that are there already are not run again, so that
a stopped run goes on and --only may add to it. `spot distill --help` explains the options below.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import statistics
import subprocess

ROOT = pathlib.Path(__file__).resolve().parent.parent
SPOT = pathlib.Path(os.environ.get("SPOT_BUILD", ROOT / "build" / "cpu")) / "spot"
# Name: what differs from the base run, which is preset spot with the dense loss.
VARIANTS = {
    "base": [],
    "start random": ["--start", "random"],
    "start random, lr 1e-3": ["--start", "random", "--lr", "1e-3"],
    "lr 1e-3": ["--lr", "1e-3"],
    "sparse loss": ["--loss", "sparse"],
    "sparse loss, rest bucket": ["--loss", "sparse", "--rest-bucket"],
    "key per head": ["--key-heads", "4"],
    "set per KV head": ["--per", "kv_group"],
    "teacher block max": ["--teacher", "block_max"],
    "teacher residual": ["--teacher-scope", "residual"],
    "no RoPE": ["--rope-dims", "0"],
    "key norm rmsnorm": ["--key-norm", "rmsnorm"],
    "key norm none": ["--key-norm", "none"],
    "half of the lengths 512": ["--length-mix", "512:0.5,2048:0.5"],
}
METHODS = ["spot:k=512", "spot:k=1024", "spot:p=0.7"]


def run(name, options):
    folder = options.out / name.replace(" ", "-").replace(",", "")
    report = folder / "report" / "report.json"
    if not report.is_file():
        common = ["--model", options.model, "--threads", 1]
        distill = [SPOT, "distill", *common, "--data", options.train, "--out", folder / "selector", "--length", options.length,
                   "--steps", options.steps, "--sequences-per-step", 2, "--warmup-steps", 12, "--query-rows", 512, "--resume"]
        variant = VARIANTS[name]
        for option, value in (("--lr", options.lr), ("--loss", "dense")):
            if option not in variant:
                variant = [*variant, option, value]
        evaluate = [SPOT, "eval", "text", *common, "--selector", folder / "selector", "--text", options.heldout, "--length",
                    4 * options.length, "--sequences", 1, "--methods", ",".join(METHODS), "--out", folder / "report"]
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "log.txt", "w") as log:
            for command in (distill + variant, evaluate):
                subprocess.run([str(word) for word in command], check=True, stdout=log, stderr=log)
    return json.loads(report.read_text())


def row(name, report):
    dense = report["dense"]["perplexity"]
    cells = [name]
    for method in report["methods"]:
        layers = method["layers"]
        mass = statistics.mean(layer["captured_mass"] for layer in layers)
        cells.append(f"{100 * (method['perplexity'] / dense - 1):+.1f}% / {mass:.3f}")
    cells.append(f"{100 * report['methods'][-1]['attended_share']:.0f}%")
    return "| " + " | ".join(cells) + " |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "train", "heldout", "out"):
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
    parser.add_argument("--length", type=int, default=2048, help="training length; measured at four times that")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", default="4e-3")
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="variants at a time, one thread each")
    options = parser.parse_args()
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        reports = list(pool.map(lambda name: run(name, options), options.only))
    lines = ["| variant | " + " | ".join(METHODS) + " | attended at p |", "| --- " * (len(METHODS) + 2) + "|"]
    lines += [row(name, report) for name, report in zip(options.only, reports)]
    table = "\n".join(lines) + "\n"
    (options.out / "table.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
