#!/usr/bin/env python3
"""Distillation on one and on several GPUs of this machine: the same steps, their speed and the agreement of their losses.

    python bench/scaling.py --config bench/configs/qwen3-8b --tokenizer models/tiny-qwen3 --data TEXT --gpus 1,2

Writes a checkpoint with random weights of the config's shapes (bench/make_checkpoint.py; --model takes an existing one), then
distils with the same global batch on every number of GPUs, whole backbones first, then with --shard-backbone. Efficiency is
tokens/s a GPU over that of the first run, `loss` the largest relative difference to its losses in any step.
Last, one process of the largest number is killed in mid-run, and the run is continued on one GPU: the error line and the
agreement of the continued losses are printed. SPOT_BUILD names the folder with libspot.so. Without GPUs the processes share the
CPU: that checks the runs, their speed means little.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(gpus: int, words: list[str]) -> list[subprocess.Popen]:
    """One process a GPU, as a launcher starts them."""
    shared = {"WORLD_SIZE": str(gpus), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        subprocess.Popen(
            [sys.executable, ROOT / "tools" / "distill.py", "--timeout", "60", *words],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(gpus)
    ]


def finish(processes: list[subprocess.Popen]) -> tuple[list[int], list[str]]:
    errors = []
    try:
        for process in processes:
            _, text = process.communicate(timeout=300)
            errors += [line for line in text.splitlines() if line.startswith("error:")] or (
                [text[-500:]] if text and process.returncode else []
            )
    finally:
        for process in processes:
            process.kill()  # one that hangs would keep its GPU
    return [process.returncode for process in processes], errors


def metrics(out: pathlib.Path) -> list[dict]:
    file = out / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def difference(run: list[dict], reference: list[dict]) -> float:
    return max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(run, reference, strict=True))


def counts(text: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"{text} does not list numbers of GPUs, as 1,2 does")
    return [int(word) for word in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=pathlib.Path, help="folder with the config.json of a random checkpoint")
    parser.add_argument("--tokenizer", type=pathlib.Path, help="folder with its tokenizer.json")
    parser.add_argument("--model", type=pathlib.Path, help="a whole checkpoint instead")
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/scaling"))
    parser.add_argument("--gpus", type=counts, default=[1, 2])
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--sequences-per-step", type=int, default=4, help="of the whole run")
    parser.add_argument("--steps", type=int, default=6, help="of which the first two are not timed")
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    if options.steps < 4:
        parser.error(
            f"--steps {options.steps}: at least 4 are needed, as two are not timed and a process is killed after the third"
        )
    # Before a checkpoint of many GiB is written.
    for path in (
        options.data,
        options.config and options.config / "config.json",
        options.tokenizer and options.tokenizer / "tokenizer.json",
    ):
        if path and not path.exists():
            parser.error(f"{path} does not exist")
    model = options.model
    if model is None:
        if options.config is None or options.tokenizer is None:
            parser.error("give --model, or --config and --tokenizer")
        model = options.out / f"model-{options.config.resolve().name}"
        if not (model / "tokenizer.json").exists():
            subprocess.run([sys.executable, ROOT / "bench" / "make_checkpoint.py", options.config, model], check=True)
            shutil.copy(options.tokenizer / "tokenizer.json", model)
            # The config's ids for the end of a text are those of another tokenizer.
            config = json.loads((model / "config.json").read_text()) | {"bos_token_id": 0, "eos_token_id": 0}
            (model / "config.json").write_text(json.dumps(config))
            (model / "generation_config.json").unlink(missing_ok=True)
    base = [
        "--model",
        model,
        "--data",
        options.data,
        "--length",
        options.length,
        "--steps",
        options.steps,
        "--sequences-per-step",
        options.sequences_per_step,
        "--warmup-steps",
        2,
        "--start",
        "random",
        "--held-out-sequences",
        1,
        "--held-out-interval",
        options.steps,
        "--checkpoint-interval",
        2,
        "--no-calibrate",
    ]

    def words(name: str, *more) -> tuple[pathlib.Path, list[str]]:
        out = options.out / name
        return out, [str(word) for word in [*base, "--out", out, *more]]

    rows, reference, alone = [], None, 0.0
    settings = [(gpus, False) for gpus in options.gpus] + [(gpus, True) for gpus in options.gpus if gpus > 1]
    for gpus, sharded in settings:
        out, command = words(f"{gpus}{'-sharded' if sharded else ''}", *(["--shard-backbone"] if sharded else []))
        shutil.rmtree(out, ignore_errors=True)
        statuses, errors = finish(start(gpus, command))
        if any(statuses):
            sys.exit(f"error: the run of {gpus} processes ended with {statuses}: {errors}")
        run = metrics(out)
        reference = reference or run
        speed = statistics.median(line["tokens_per_second"] for line in run[2:])
        alone = alone or speed / gpus
        rows.append(
            {
                "gpus": gpus,
                "sharded": sharded,
                "tokens_per_second": speed,
                "efficiency": speed / (gpus * alone),
                "loss_difference": difference(run, reference),
            }
        )
        print(
            "{gpus} processes{0}: {tokens_per_second:,.0f} tokens/s, efficiency {efficiency:.3f}, loss {loss_difference:.1e}".format(
                ", backbone sharded" if sharded else "", **rows[-1]
            ),
            flush=True,
        )

    out, command = words("killed")
    shutil.rmtree(out, ignore_errors=True)
    processes = start(max(options.gpus), command)
    while len(metrics(out)) < 3 and all(process.poll() is None for process in processes):
        time.sleep(0.02)
    processes[-1].send_signal(signal.SIGKILL)
    statuses, errors = finish(processes)
    if statuses[-1] != -signal.SIGKILL:
        sys.exit(f"error: the run ended with {statuses} before one of its processes could be killed: {errors}")
    print(f"one of {len(processes)} killed after step {len(metrics(out))}: statuses {statuses}, {errors}", flush=True)
    statuses, errors = finish(start(1, [*command, "--resume"]))
    if any(statuses):
        sys.exit(f"error: --resume by one process ended with {statuses}: {errors}")
    again = difference(metrics(out), reference)
    print(f"continued by one process: {len(metrics(out))} steps, loss {again:.1e}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            json.dumps(
                {
                    "model": str(options.config or model),
                    "length": options.length,
                    "rows": rows,
                    "continued_loss_difference": again,
                },
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
