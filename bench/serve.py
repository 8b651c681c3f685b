#!/usr/bin/env python3
"""Requests a second of an OpenAI completions server under an open-arrival load (bench/serve_load.py), and the largest number of
them that `spot serve` reaches sparse and dense, each side at its own best chunk of prefill under a bound on the time between tokens.

    bench/serve.py load --url http://127.0.0.1:8000 --requests 64 --prompt 1024 --answer 128 --rate 2 [--attention spot]
    bench/serve.py search --model models/tiny-qwen3 --spot build/cpu/spot --shape 1024/32x12 --chunks dense=256,512 --chunks spot=256,512

`load` works on any such server, vLLM among them. `search` starts `spot serve` for each chunk (--max-step-tokens), sends every side
its own random prompts, so that nothing is taken from the prefix cache, prints each measurement with the number of its requests, and
the ratio of the best of the second side to the best of the first. The bound is --bound (100 ms, 99th percentile), or --loose-bound
(200 ms) for both sides where the first cannot hold it. Without --rate all requests arrive at once: the server is never idle, and
requests a second are what it can do.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import pathlib
import re
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from serve_load import Load, measure, served_model  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Shape:
    prompt: int
    answer: int
    requests: int

    @staticmethod
    def of(text: str) -> Shape:
        found = re.fullmatch(r"(\d+)/(\d+)x(\d+)", text)
        if not found or not all(int(n) > 0 for n in found.groups()):
            raise argparse.ArgumentTypeError(
                f"'{text}' is no shape; write PROMPT/ANSWERxREQUESTS, such as 32768/2048x12"
            )
        return Shape(*map(int, found.groups()))

    def __str__(self) -> str:
        return f"{self.prompt}/{self.answer}"


def chunks_of(text: str) -> tuple[str, list[int]]:
    side, equals, numbers = text.rpartition("=")
    if not equals or not re.fullmatch(r"\d+(,\d+)*", numbers):
        raise argparse.ArgumentTypeError(f"'{text}' names no chunks; write SIDE=N,N, such as spot:k=4096=512,1024")
    return side, [int(n) for n in numbers.split(",")]


def best(rows: list[dict], side: str, bound: float) -> dict | None:
    """Of a side's rows the one of most requests a second among those with every answer whole and the 99th percentile of the time
    between tokens at most `bound` ms."""
    fit = [
        row
        for row in rows
        if row["side"] == side and row["whole"] == row["requests"] and row["between_tokens_ms"]["p99"] <= bound
    ]
    return max(fit, key=lambda row: row["requests_per_second"], default=None)


def compare(rows: list[dict], sides: list[str], bound: float, loose: float) -> dict:
    """The best row of each side under the bound that the first side can hold, and the ratio of the last to the first."""
    used = bound if best(rows, sides[0], bound) else loose
    found = {side: best(rows, side, used) for side in sides}
    ratio = None
    if found[sides[0]] and found[sides[-1]]:
        ratio = found[sides[-1]]["requests_per_second"] / found[sides[0]]["requests_per_second"]
    return {"bound_ms": used, "best": found, "ratio": ratio}


def line(row: dict) -> str:
    first, between = row["first_token_ms"], row["between_tokens_ms"]
    text = (
        f"{row['shape']:>12} {row['side']:<22} {row.get('chunk', ''):>6} {row['whole']:>4}/{row['requests']:<4}"
        f"{row['requests_per_second']:9.3f} {row['tokens_per_second']:9.1f} {first['p50']:9.0f} {first['p99']:9.0f}"
        f" {between['p50']:8.1f} {between['p99']:8.1f}"
    )
    if row["errors"]:
        text += f"  {row['errors'][0]}"
    if row["prefix_hits"]:
        text += f"  ({row['prefix_hits']:.0f} tokens came from the prefix cache: not comparable)"
    return text


HEAD = (
    f"{'prompt/answ.':>12} {'side':<22} {'chunk':>6} {'answered':>9}{'requests/s':>9} {'tokens/s':>8} {'TTFT p50':>9} {'p99 ms':>9}"
    f" {'ITL p50':>8} {'p99 ms':>8}"
)


@contextlib.contextmanager
def serving(command: list[str], log: pathlib.Path):
    """The address of a `spot serve` that runs as long as the context."""
    with log.open("w") as notes:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=notes, text=True)
        try:
            found = re.search(r"http://\S+", process.stdout.readline())
            if not found:
                sys.exit(f"error: the server did not start; {log} says why: {log.read_text().strip()[-300:]}")
            yield found[0]
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def search(options: argparse.Namespace) -> dict:
    end = time.monotonic() + 60 * options.minutes if options.minutes else math.inf
    sides = [side for side, _ in options.chunks]
    longest = max(shape.prompt + shape.answer for shape in options.shape)
    rows, skipped, seed = [], [], options.seed
    print(HEAD, flush=True)
    for chunk in sorted({chunk for _, chunks in options.chunks for chunk in chunks}):
        command = [options.spot, "serve", options.model, "--port", "0", "--max-step-tokens", str(chunk)]
        command += ["--max-tokens", str(longest), *options.serve]
        wanted = [(shape, side) for shape in options.shape for side, chunks in options.chunks if chunk in chunks]
        if time.monotonic() >= end:
            skipped += [f"{shape} {side} {chunk}" for shape, side in wanted]
            continue
        log = pathlib.Path(options.out).with_suffix(f".{chunk}.log")
        with serving(command, log) as url:
            model = served_model(url)["id"]
            for side in dict.fromkeys(side for _, side in wanted):  # graphs are captured, memory is found
                warm = Load(
                    3, min(longest - 8, 2 * chunk), 8, None, options.first_id, options.end_id, seed, {"attention": side}
                )
                measure(url, model, warm)
                seed += 1
            for shape, side in wanted:
                if time.monotonic() >= end:
                    skipped.append(f"{shape} {side} {chunk}")
                    continue
                load = Load(
                    shape.requests, shape.prompt, shape.answer, options.rate, options.first_id, options.end_id, seed,
                    {"attention": side},
                )  # fmt: skip
                seed += 1
                left = None if end == math.inf else max(1.0, end - time.monotonic())
                row = {"shape": str(shape), "side": side, "chunk": chunk, **measure(url, model, load, timeout=left)}
                rows.append(row)
                print(line(row), flush=True)
    results = {}
    for shape in dict.fromkeys(map(str, options.shape)):
        of_shape = [row for row in rows if row["shape"] == shape]
        results[shape] = found = compare(of_shape, sides, options.bound, options.loose_bound)
        for side, row in found["best"].items():
            if row is None:
                print(f"{shape}: {side} held {found['bound_ms']:.0f} ms with no chunk that was measured")
        if found["ratio"]:
            chunks = ", ".join(f"{side} at {row['chunk']}" for side, row in found["best"].items())
            print(
                f"{shape}: {sides[-1]} over {sides[0]} {found['ratio']:.2f} ({chunks}; p99 between tokens <= {found['bound_ms']:.0f} ms)"
            )
    if skipped:
        print(f"not run, the {options.minutes} minutes were over: {', '.join(skipped)}")
    return {"rows": rows, "results": results, "skipped": skipped}


def load(options: argparse.Namespace) -> dict:
    model = options.model or served_model(options.url, options.api_key)["id"]
    fields = json.loads(options.fields)
    if options.attention:
        fields["attention"] = options.attention
    asked = Load(
        options.requests,
        options.prompt,
        options.answer,
        options.rate,
        options.first_id,
        options.end_id,
        options.seed,
        fields,
    )
    row = {"shape": f"{options.prompt}/{options.answer}", "side": options.attention or model}
    row |= measure(options.url, model, asked, options.api_key)
    print(HEAD)
    print(line(row))
    return {"rows": [row]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("load", help="one load on a server that runs")
    one.add_argument("--url", required=True, help="without /v1")
    one.add_argument("--model", default="", help="as requests name it (the first of /v1/models)")
    one.add_argument("--requests", type=int, default=64)
    one.add_argument("--prompt", type=int, default=1024, help="tokens")
    one.add_argument("--answer", type=int, default=128, help="tokens")
    one.add_argument("--attention", default="", help="of spot serve: how the requests attend")
    one.add_argument("--api-key", default="")
    one.add_argument("--fields", default="{}", help="JSON object that is added to every request")
    two = commands.add_parser("search", help="the best chunk of each side of spot serve")
    two.add_argument("--spot", default="build/cpu/spot", help="the program")
    two.add_argument("--model", required=True, help="folder")
    two.add_argument(
        "--serve",
        nargs="*",
        default=[],
        action="extend",
        help="further options of spot serve, each as --serve=--WORD=VALUE",
    )
    two.add_argument(
        "--shape", type=Shape.of, action="append", required=True, help="PROMPT/ANSWERxREQUESTS; may be repeated"
    )
    two.add_argument(
        "--chunks", type=chunks_of, action="append", required=True, help="SIDE=N,N; the first side is the reference"
    )
    two.add_argument("--bound", type=float, default=100, help="ms, on the 99th percentile of the time between tokens")
    two.add_argument("--loose-bound", type=float, default=200)
    two.add_argument("--minutes", type=float, default=0, help="start nothing after this many (0: no limit)")
    for command in (one, two):
        command.add_argument("--rate", type=float, default=None, help="requests a second (without: all at once)")
        command.add_argument("--first-id", type=int, default=300, help="least token id of prompts")
        command.add_argument("--end-id", type=int, default=4000, help="one past the largest")
        command.add_argument("--seed", type=int, default=1)
        command.add_argument("--out", default="out/serve.json" if command is two else "", help="JSON file")
    options = parser.parse_args()
    if options.end_id <= options.first_id or (options.rate is not None and options.rate <= 0):
        parser.error("--end-id must pass --first-id, and --rate be above 0")
    if options.out:
        pathlib.Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    result = search(options) if options.command == "search" else load(options)
    if options.out:
        pathlib.Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
    broken = [row for row in result["rows"] if row["whole"] < row["requests"]]
    sys.exit(1 if broken and options.command == "load" else 0)


if __name__ == "__main__":
    main()
