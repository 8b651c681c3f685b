#!/usr/bin/env python3
"""Pretrains tiny long-context models (a Qwen3 and a Qwen3.5 hybrid, up to 12M parameters) that retrieve over 32K tokens and more.

usage: pretrain_tiny.py --data TEXT --tokenizer tokenizer.json --out DIR [--models qwen3,qwen3_5] [--wall SECONDS] ...

Any text does (a file or .gz; documents may be separated by NUL): most of what is learned are needles, chains of variables, word
lists and questions that tools/pretrain/ puts into it. The models are trained at the same time, each in a process of its own; one
model goes to several GPUs with torchrun --nproc-per-node N pretrain_tiny.py --models qwen3_5 ... (--tokens are each process's then).
Writes DIR/tiny-MODEL/: a checkpoint as transformers loads it, train.jsonl, results.json and results.md.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODELS = ("qwen3", "qwen3_5")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=pathlib.Path, required=True, help="text file, or .gz of one")
    add(
        "--tokenizer",
        type=pathlib.Path,
        default=ROOT / "models" / "tiny-qwen3" / "tokenizer.json",
        help="4096 tokens, single digits",
    )
    add("--out", type=pathlib.Path, required=True, help="where tiny-MODEL folders go")
    add("--work", type=pathlib.Path, default=pathlib.Path("/tmp/pretrain_tiny"), help="where the tokenised text goes")
    add("--models", default=",".join(MODELS), help="which, separated by commas")
    add("--seconds", default="100000", help="of training, one number or one for each model; --wall may end it sooner")
    add(
        "--wall",
        type=float,
        default=0,
        help="seconds after which everything is over, preparation and evaluation included; 0: no limit",
    )
    add("--init", default="", help="MODEL=FOLDER,...: weights to go on from")
    add("--rate", default="1", help="factor of the learning rates, one number or one for each model")
    add("--warmup", type=int, default=100, help="steps in which the rates rise")
    add("--phases", default="", help="lengths and shares of time, such as 256:.3,512+1024:.7")
    add("--tokens", type=int, default=65_536, help="of a step")
    add("--binding", type=float, default=0.2, help="weight of the losses of tools/pretrain/binding.py; 0: without them")
    add("--workers", type=int, default=4, help="processes that make batches, for each model")
    add("--eval-seconds", type=float, default=35, help="kept for the evaluation of each model")
    add("--eval-lengths", default="4096,16384,32768,65536,131072")
    add("--log-every", type=float, default=10)
    add("--seed", type=int, default=0)
    add("--hidden", type=int, default=256)
    add("--layers", type=int, default=0, help="0: 8 of qwen3, 12 of qwen3_5")
    add("--mlp", type=int, default=768)
    add("--device", default="", help="cuda where there is one, else cpu")
    add("--evaluate-only", action="store_true", help="evaluates the weights of --init")
    add(
        "--until", type=float, default=0, help=argparse.SUPPRESS
    )  # the end in seconds since the epoch, for the children
    options = parser.parse_args()
    unknown = set(options.models.split(",")) - set(MODELS)
    if unknown:
        parser.error(
            f"--models {options.models}: {', '.join(sorted(unknown))} is not known; {' and '.join(MODELS)} are"
        )
    if options.evaluate_only and not options.init:
        parser.error("--evaluate-only needs --init: the weights to evaluate")
    for file in (options.data, options.tokenizer):
        if not file.is_file():
            parser.error(f"{file} does not exist")
    return options


def one_of(values: str, at: int) -> float:
    """The at-th of numbers separated by commas, or the only one."""
    parts = values.split(",")
    return float(parts[min(at, len(parts) - 1)])


def pretrain(options: argparse.Namespace, name: str) -> None:
    """One model, in this process."""
    import torch
    from pretrain import checkpoint, models, train

    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    torch.set_float32_matmul_precision("high")
    config = models.published_config(name, options.hidden, options.layers, options.mlp)
    model = models.TinyModel(config, device, compiled=device.type == "cuda", seed=options.seed)
    folders = dict(part.split("=", 1) for part in options.init.split(",") if part)
    if name in folders:
        checkpoint.load(pathlib.Path(folders[name]), model.weights)
    rate = one_of(options.rate, 0)
    run = train.Options(
        work=options.work,
        tokenizer=options.tokenizer,
        out=options.out / f"tiny-{name}",
        seconds=one_of(options.seconds, 0),
        until=options.until,
        eval_seconds=options.eval_seconds,
        eval_lengths=[int(n) for n in options.eval_lengths.split(",") if n],
        phases=train.parse_phases(options.phases or train.PHASES),
        tokens=options.tokens,
        muon_rate=0.015 * rate,
        adam_rate=0.004 * rate,
        warmup=options.warmup,
        binding=options.binding,
        workers=options.workers,
        log_every=options.log_every,
        seed=options.seed,
    )
    if options.evaluate_only:
        run.out.mkdir(parents=True, exist_ok=True)
        train.assess(model, run, name)
    else:
        train.train(model, run, name)


def train_together(options: argparse.Namespace, names: list[str]) -> int:
    """One model, by all processes of a launcher."""
    if len(names) > 1:
        sys.exit(f"error: --models {options.models}: several processes train one model; name one")
    import torch
    import torch.distributed as dist
    from pretrain import corpus

    # Decisions by the clock go over gloo: a GPU need not be waited for.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() and options.device != "cpu" else "gloo")
    together = torch.zeros(1)
    if dist.get_rank() == 0:
        corpus.prepare(options.data, options.tokenizer, options.work)
    dist.broadcast(together, 0)
    pretrain(options, names[0])
    dist.broadcast(together, 0)  # nobody leaves before the first process has evaluated
    dist.destroy_process_group()
    return 0


def main() -> int:
    options = arguments()
    begun = time.time()
    names = options.models.split(",")
    if options.wall and not options.until:
        options.until = begun + options.wall
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return train_together(options, names)
    from pretrain import corpus

    corpus.prepare(options.data, options.tokenizer, options.work)
    if len(names) == 1:
        pretrain(options, names[0])
        return 0
    children = []
    for at, name in enumerate(names):
        command = [
            sys.executable,
            __file__,
            *sys.argv[1:],
            "--models",
            name,
            "--seconds",
            str(one_of(options.seconds, at)),
            "--rate",
            str(one_of(options.rate, at)),
            "--until",
            str(options.until),
        ]
        children.append(subprocess.Popen(command))
    return max(abs(child.wait()) for child in children)


if __name__ == "__main__":
    sys.exit(main())
