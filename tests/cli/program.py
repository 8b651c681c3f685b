"""Drives `spot` as users do: its commands and options as its own --help lists them, tiny models, what it opens and leaves."""

import ctypes
import dataclasses
import fcntl
import json
import os
import pathlib
import random
import re
import shutil
import signal
import struct
import subprocess
import time

import torch
import transformers
from patience import SLOWER

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
SHIPPED = ROOT / "models" / "tiny-qwen3"
PATIENCE = 300 * SLOWER  # seconds until a process counts as hanging, on a busy machine too
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


@dataclasses.dataclass(frozen=True)
class Option:
    name: str  # with its dashes
    kind: str  # INT, UINT, FLOAT, TEXT, ...; empty: a flag


def parse_help(text: str) -> tuple[list[Option], list[str]]:
    """Options and subcommands of a help text."""
    options, commands, section = [], [], ""
    for line in text.splitlines():
        if line and not line.startswith(" "):
            section = line
        elif found := re.match(r"  (?:-\w,)?(--[\w-]+)(?: ([A-Z]+)\b)?", line):
            kind = found[2] or ""
            options.append(Option(found[1], "" if kind in ("REQUIRED", "EXCLUDES", "NEEDS") else kind))
        elif section.startswith("Subcommands:") and (found := re.match(r"  ([a-z]+)\b", line)):
            commands.append(found[1])
    return options, commands


def state_of(process: int) -> str:
    """The letter that the kernel shows for it: T once it is stopped, Z once it has ended."""
    return pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


def is_locked(path: pathlib.Path) -> bool:
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


class Program:
    def __init__(self, path: pathlib.Path):
        self.path = path

    def __call__(self, *words, **more) -> subprocess.CompletedProcess:
        """One run to its end, output captured as text; no run may hang."""
        settings = {"capture_output": True, "text": True, "timeout": PATIENCE, "env": ENVIRONMENT, "cwd": ROOT} | more
        return subprocess.run([str(self.path), *map(str, words)], **settings)

    def start(self, *words, **more) -> subprocess.Popen:
        settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ENVIRONMENT} | more
        return subprocess.Popen([str(self.path), *map(str, words)], **settings)

    def start_and_stop(self, folder: pathlib.Path, *words) -> subprocess.Popen:
        """A run that is stopped while it holds the folder's lock: that the lock's file is there does not say so yet."""
        process, lock = self.start(*words), folder / ".lock"
        end = time.monotonic() + PATIENCE
        while True:
            assert time.monotonic() < end and process.poll() is None, process.communicate()
            if lock.exists():
                process.send_signal(signal.SIGSTOP)
                while (state := state_of(process.pid)) not in "TZ":
                    time.sleep(0.001)
                if state == "T" and is_locked(lock):
                    return process
                process.send_signal(signal.SIGCONT)
            time.sleep(0.002)

    def shell(self, words, redirection: str) -> subprocess.CompletedProcess:
        """A run whose standard streams the shell redirects."""
        command = f'exec "$0" "$@" {redirection}'
        return subprocess.run(
            ["bash", "-c", command, str(self.path), *map(str, words)],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            env=ENVIRONMENT,
            cwd=ROOT,
        )

    def commands(self) -> dict[str, list[Option]]:
        """Every command that does something, as its words joined ("eval text"), with its options."""
        found = {}

        def visit(words: list[str]) -> None:
            options, below = parse_help(self(*words, "--help").stdout)
            for name in below:
                visit([*words, name])
            if words and (not below or len(options) > 1):  # a mere group has --help alone
                found[" ".join(words)] = [option for option in options if option.name != "--help"]

        visit([])
        return found


def make_text(path: pathlib.Path, documents: int = 150) -> pathlib.Path:
    words = random.Random(1)
    with path.open("w") as lines:
        for _ in range(documents):
            text = " ".join("".join(words.choices("abcdefghij", k=words.randint(1, 7))) for _ in range(300))
            lines.write(json.dumps({"text": text}) + "\n")
    return path


def make_model(folder: pathlib.Path, positions: int = 2048) -> pathlib.Path:
    """A random Qwen3 of two layers with the shipped tokenizer."""
    torch.manual_seed(1)
    config = transformers.Qwen3Config(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=72,
        vocab_size=4096,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
    )
    model = transformers.Qwen3ForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(0, 1.5 / weight.shape[1] ** 0.5)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    shutil.copy(SHIPPED / "tokenizer.json", folder)
    shutil.copy(SHIPPED / "tokenizer_config.json", folder)
    return folder


def distillation(model: pathlib.Path, text: pathlib.Path, out: pathlib.Path, *more) -> list[str]:
    words = ["distill", "--model", model, "--data", text, "--out", out, "--device", "cpu", "--threads", 1]
    words += ["--length", 448, "--sequences-per-step", 1, "--held-out-every", 20, "--held-out-sequences", 1]
    return [str(word) for word in [*words, *more]]


class Watch:
    """Whether a file was opened meanwhile (Linux's inotify)."""

    OPEN = 0x20

    def __init__(self, path: pathlib.Path):
        libc = ctypes.CDLL(None, use_errno=True)
        self.descriptor = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        added = libc.inotify_add_watch(self.descriptor, os.fsencode(path), self.OPEN)
        assert self.descriptor >= 0 and added >= 0, os.strerror(ctypes.get_errno())

    def opened(self) -> bool:
        """Since the last call."""
        try:
            return bool(os.read(self.descriptor, 64 * struct.calcsize("iIII")))
        except BlockingIOError:
            return False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self.descriptor)


def run_of(out: pathlib.Path) -> dict:
    """What a finished distillation leaves that does not tell the time."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"], line["tokens_per_second"]
    checkpoints = sorted(path.name for path in out.glob("checkpoint-*"))
    return {"metrics": lines, "weights": (out / "selector.safetensors").read_bytes(), "checkpoints": checkpoints}


def leftovers(out: pathlib.Path) -> list[str]:
    """Locks, probes and halves that no run may leave behind."""
    return [
        str(path)
        for path in out.rglob("*")
        if ".tmp" in path.name or path.name in (".lock", ".writable", "unfinished-checkpoint")
    ]
