#!/usr/bin/env python3
"""One change at a time against the default selector: distils each variant briefly and measures it up to eight times its length.

    tools/ablations.py --model models/tiny-qwen3 --train text/train.jsonl --heldout text/heldout.txt --out out/ablations

Writes OUT/NAME/ (selector, metrics, reports) for each variant, and OUT/ablations.md and OUT/ablations.json, anew after every step:
whatever stops the run, they hold what was measured. Steps that are done are not run again, so that the same command goes on with a
stopped run and --only may add to it. `spot distill --help` explains the variants' options.

How a variant is measured, on text that it was not trained on, every query selecting for itself:

    budgets   blocks of --budgets percent of the context at --budget-multiple times the training length, only the first and the last
              16 tokens reserved: the share of the true attention mass that they hold, mean over layers
    lengths   at each of --multiples of the training length, queries of the second half: perplexity against dense attention with
              --fixed tokens and with dual top-p 0.7 (reserved tiers and floor as usual), and the share of the mass outside the
              reserved tiers that the selector takes for p = 0.7 and 0.9, median layer (calibrated: p itself)
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import statistics
import subprocess
import sys
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
SPOT = pathlib.Path(os.environ.get("SPOT_BUILD", ROOT / "build" / "cpu")) / "spot"
# Name: what differs from the base run, which is preset spot with the dense loss. The most telling ones first: time may end.
VARIANTS = {
    "base": [],
    "base, another seed": ["--seed", "43"],
    "sparse loss": ["--loss", "sparse"],
    "key per head": ["--key-heads", "4"],
    "key norm none": ["--key-norm", "none"],
    "no RoPE": ["--rope-dims", "0"],
    "RoPE on 128 dims": ["--rope-dims", "128"],
    "start random": ["--start", "random"],
    "teacher block max": ["--teacher", "block_max"],
    "set per KV head": ["--per", "kv_group"],
    "teacher over all keys": ["--teacher-scope", "all"],
    "mixed lengths": ["--length-mix", "{quarter}:0.5,{length}:0.5"],
    "lr 1e-3": ["--lr", "1e-3"],
    "lr 8e-3": ["--lr", "8e-3"],
    "sparse loss, rest bucket": ["--loss", "sparse", "--rest-bucket"],
    "preset paper": ["--preset", "paper", "--loss", "sparse"],
    "key norm rmsnorm": ["--key-norm", "rmsnorm"],
    "base, third seed": ["--seed", "44"],
    "start only": ["--steps", "1", "--lr", "1e-9", "--final-lr", "1e-9"],
    "lr 2e-3": ["--lr", "2e-3"],
    "RoPE on 32 dims": ["--rope-dims", "32"],
    "start random, lr 1e-3": ["--start", "random", "--lr", "1e-3"],
}
ORACLE = "oracle"  # the exact attention under the same rules
P = 0.7


class OutOfTime(Exception):
    """--seconds are over."""


def folder_of(name, options):
    return options.out / name.replace(" ", "-").replace(",", "")


def report_of(name, step, options):
    return folder_of(name, options) / step / "report.json"


def distill_command(name, options):
    lengths = {"quarter": options.length // 4, "length": options.length}
    variant = [word.format(**lengths) for word in VARIANTS[name]]
    for option, value in (("--lr", options.lr), ("--loss", "dense"), ("--steps", options.steps)):
        if option not in variant:
            variant += [option, value]
    return [
        "distill",
        "--data",
        options.train,
        "--out",
        folder_of(name, options) / "selector",
        "--length",
        options.length,
        "--sequences-per-step",
        options.sequences_per_step,
        "--warmup-steps",
        options.steps // 5,
        "--query-rows",
        options.query_rows,
        "--held-out-interval",
        options.steps,
        "--resume",
        *variant,
    ]


def text_command(name, step, length, rules, options):
    kind = "oracle" if name == ORACLE else "spot"
    selector = [] if name == ORACLE else ["--selector", folder_of(name, options) / "selector"]
    return [
        "eval",
        "text",
        *selector,
        "--text",
        options.heldout,
        "--length",
        length,
        "--sequences",
        max(options.text_tokens // length, 1),
        "--skip",
        length // 2,
        "--chunk",
        options.chunk,
        "--measured-queries",
        options.measured_queries,
        "--methods",
        ",".join(f"{kind}:{rule}" for rule in rules),
        "--out",
        report_of(name, step, options).parent,
    ]


def steps_of(name, options):
    """What to run for a variant, in order: (file that exists once it is done, options of the program)."""
    if name != ORACLE:
        yield folder_of(name, options) / "selector" / "selector.json", distill_command(name, options)
    yield (
        report_of(name, "budgets", options),
        text_command(
            name,
            "budgets",
            options.budget_multiple * options.length,
            [f"k={budget}%" for budget in options.budgets],
            options,
        )
        + ["--sinks", 16, "--recency", 16, "--floor", 16],
    )
    for multiple in options.multiples:
        yield (
            report_of(name, f"{multiple}x", options),
            text_command(name, f"{multiple}x", multiple * options.length, [f"k={options.fixed}", f"p={P}"], options),
        )


def run(name, options, step_done):
    folder = folder_of(name, options)
    folder.mkdir(parents=True, exist_ok=True)
    for done, command in steps_of(name, options):
        if done.is_file():
            continue
        left = options.deadline - time.monotonic()
        if left <= 0:
            raise OutOfTime
        words = [SPOT, *command, "--model", options.model, "--device", options.device, "--threads", 1]
        with open(folder / "log.txt", "a+") as log:
            begin = log.seek(0, os.SEEK_END)
            try:
                subprocess.run(
                    [str(word) for word in words],
                    check=True,
                    stdout=log,
                    stderr=log,
                    timeout=None if left == float("inf") else left,
                )
            except subprocess.TimeoutExpired:
                raise OutOfTime from None
            except subprocess.CalledProcessError as error:
                log.seek(begin)
                lines = log.read().strip().splitlines() or [f"exit status {error.returncode}"]
                raise RuntimeError(f"{name}: {lines[-1]} ({log.name})") from None
        step_done()


def mean_mass(method):
    # A run whose floor held every query measured no layer: all was attended.
    return statistics.mean([layer["captured_mass"] for layer in method.get("layers", [])] or [1.0])


def calibration(method, p):
    """Share of the residual mass captured at nominal p, median layer; None where nothing was measured, as for the oracle."""
    captured = [
        entry["captured_residual_mass"]
        for layer in method.get("layers", [])
        for entry in layer.get("calibration", [])
        if entry["p"] == p
    ]
    return statistics.median(captured) if captured else None


def measures(name, options):
    """What was measured of a variant so far."""

    def read(step):
        report = report_of(name, step, options)
        return json.loads(report.read_text()) if report.is_file() else None

    budgets = read("budgets")
    row = {
        "variant": name,
        "options": VARIANTS.get(name, []),
        "mass": {f"{budget}%": mean_mass(method) for budget, method in zip(options.budgets, budgets["methods"])}
        if budgets
        else {},
        "lengths": {},
    }
    for multiple in options.multiples:
        if report := read(f"{multiple}x"):
            fixed, nucleus = report["methods"]
            against = {
                key: method["perplexity"] / report["dense"]["perplexity"] - 1
                for key, method in (("fixed", fixed), ("p", nucleus))
            }
            row["lengths"][f"{multiple}x"] = {
                "dense_perplexity": report["dense"]["perplexity"],
                "perplexity_fixed": against["fixed"],
                "perplexity_p": against["p"],
                "kl_fixed": fixed["kl_from_dense"],
                "kl_p": nucleus["kl_from_dense"],
                "mass_fixed": mean_mass(fixed),
                "mass_p": mean_mass(nucleus),
                "attended_p": nucleus["attended_share"],
                "calibration": {str(p): calibration(nucleus, p) for p in (0.7, 0.9)},
            }
    return row


def table(rows, options):
    """Markdown; what is missing is a dash."""
    multiples = [f"{multiple}x" for multiple in options.multiples]
    header = [
        "variant",
        "mass at " + ", ".join(f"{budget}%" for budget in options.budgets),
        "p 0.7 takes",
        "p 0.9 takes",
        f"tokens at p {P}",
        f"perplexity, {options.fixed} tokens",
        f"perplexity, p {P}",
    ]

    def cells(values, form):
        return " / ".join("–" if value is None else form(value) for value in values)

    def over_lengths(row, read, form):
        return cells(
            [read(row["lengths"][multiple]) if multiple in row["lengths"] else None for multiple in multiples], form
        )

    def mass(value):
        return f"{value:.3f}"

    def change(value):
        return f"{100 * value:+.2f}%"

    lines = ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
    for row in rows:
        lines.append(
            "| "
            + " | ".join(
                [
                    row["variant"],
                    cells([row["mass"].get(f"{budget}%") for budget in options.budgets], mass),
                    over_lengths(row, lambda at: at["calibration"]["0.7"], mass),
                    over_lengths(row, lambda at: at["calibration"]["0.9"], mass),
                    over_lengths(row, lambda at: at["attended_p"], lambda value: f"{100 * value:.0f}%"),
                    over_lengths(row, lambda at: at["perplexity_fixed"], change),
                    over_lengths(row, lambda at: at["perplexity_p"], change),
                ]
            )
            + " |"
        )
    return "\n".join(lines) + "\n"


def write_whole(path, text):
    partial = path.with_name(path.name + ".part")
    partial.write_text(text)
    partial.replace(path)


def write_tables(options):
    rows = [row for row in (measures(name, options) for name in options.only) if row["mass"] or row["lengths"]]
    write_whole(
        options.out / "ablations.json", json.dumps({"settings": settings(options), "rows": rows}, indent=1) + "\n"
    )
    text = table(rows, options)
    write_whole(options.out / "ablations.md", text)
    return text


def settings(options):
    """What all steps of a folder must share to be comparable."""
    names = [
        "length",
        "steps",
        "sequences_per_step",
        "query_rows",
        "lr",
        "multiples",
        "budgets",
        "budget_multiple",
        "fixed",
        "text_tokens",
        "chunk",
        "measured_queries",
    ]
    return {"model": options.model.name, **{name: getattr(options, name) for name in names}}


def check_settings(options):
    file = options.out / "settings.json"
    mine = settings(options)
    if not file.is_file():
        write_whole(file, json.dumps(mine, indent=1) + "\n")
        return
    there = json.loads(file.read_text())
    differing = [name for name in mine if there.get(name) != mine[name]]
    if differing:
        name = differing[0]
        sys.exit(
            f"error: {options.out} holds a run with {name} {there.get(name)}, not {mine[name]}; choose another --out"
        )


def numbers(text):
    return [int(word) for word in text.split(",")]


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "train", "heldout", "out"):
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
    parser.add_argument("--only", nargs="*", choices=[*VARIANTS, ORACLE], default=[ORACLE, *VARIANTS], metavar="NAME")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="variants at a time, one thread each")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after that many")
    training = parser.add_argument_group("distillation")
    training.add_argument("--length", type=int, default=2048, help="tokens a sequence")
    training.add_argument("--steps", type=int, default=60)
    training.add_argument("--sequences-per-step", type=int, default=2)
    training.add_argument(
        "--query-rows", type=int, default=512, help="queries of each sequence that enter the loss (0: all)"
    )
    training.add_argument("--lr", default="4e-3")
    measuring = parser.add_argument_group("measuring")
    measuring.add_argument("--multiples", type=numbers, default=[1, 2, 4, 8], help="of the training length")
    measuring.add_argument("--budgets", type=numbers, default=[1, 2, 5, 10], help="percent of the context")
    measuring.add_argument(
        "--budget-multiple", type=int, default=4, help="of the training length, where budgets are measured"
    )
    measuring.add_argument(
        "--fixed",
        type=int,
        help="tokens of the fixed budget, 384 of them reserved; default: a quarter of the length, at least 512",
    )
    measuring.add_argument("--text-tokens", type=int, help="read at each length; default: one sequence of the longest")
    measuring.add_argument("--chunk", type=int, default=512, help="tokens a forward call")
    measuring.add_argument(
        "--measured-queries", type=int, default=4, help="of each 512 tokens, whose true attention is computed"
    )
    options = parser.parse_args()
    options.fixed = options.fixed or max(options.length // 4, 512)
    options.text_tokens = options.text_tokens or max(options.multiples) * options.length
    options.deadline = time.monotonic() + options.seconds
    return options


def main():
    options = parse_arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    check_settings(options)
    writing = threading.Lock()

    def step_done():
        with writing:
            write_tables(options)

    failures, unfinished = [], []
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        runs = {name: pool.submit(run, name, options, step_done) for name in options.only}
        for name, future in runs.items():
            try:
                future.result()
            except OutOfTime:
                unfinished.append(name)
            except RuntimeError as error:
                failures.append(str(error))
    print(write_tables(options), end="")
    if unfinished:
        print(f"out of time; unfinished: {'; '.join(unfinished)}")
    if failures:
        sys.exit("\n".join(f"error: {failure}" for failure in failures))


if __name__ == "__main__":
    main()
