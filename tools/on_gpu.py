#!/usr/bin/env python3
"""Runs a command on GPUs of this host that nobody else has taken through this script; waits until there are some.

    on_gpu.py [--gpus N | --share N] -- COMMAND...

--gpus N takes N whole GPUs (1), --share N one of N equal places on one: several small processes fill a GPU that one leaves idle.
Who waits for whole GPUs comes first: no further place is given out until then. Shared GPUs get CUDA's multi-process service where
its control program is installed (it stays; `nvidia-cuda-mps-control` ends it). The command sees what it was given as
CUDA_VISIBLE_DEVICES; its end, by whatever way, frees it.
Without a GPU the CPU counts as one. SPOT_GPUS=ID,... names GPUs instead of nvidia-smi, SPOT_GPU_LOCKS the folder of the locks.
"""

import argparse
import fcntl
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

LOCKS = pathlib.Path(os.environ.get("SPOT_GPU_LOCKS", pathlib.Path(tempfile.gettempdir()) / f"spot-gpus-{os.getuid()}"))
PAUSE = 0.2  # seconds between tries


def gpus() -> list[str]:
    if "SPOT_GPUS" in os.environ:
        return os.environ["SPOT_GPUS"].split(",")
    if shutil.which("nvidia-smi") is None:
        return ["cpu"]
    listed = subprocess.run(["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"], capture_output=True, text=True)
    return listed.stdout.split() if listed.returncode == 0 and listed.stdout.strip() else ["cpu"]


def lock(name: str, how: int) -> int | None:
    """A descriptor that holds the lock, also past exec; None where another holds it."""
    descriptor = os.open(LOCKS / name, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    os.set_inheritable(descriptor, True)
    return descriptor


def wait_for(name: str, how: int) -> int:
    while (descriptor := lock(name, how)) is None:
        time.sleep(PAUSE)
    return descriptor


def take_whole(known: list[str], count: int) -> list[str]:
    """`count` whole GPUs; one waits at a time, so that two cannot hold what the other needs."""
    queue = wait_for("queue", fcntl.LOCK_EX)
    taken: list[str] = []
    while True:
        for gpu in known:
            if gpu not in taken and lock(gpu, fcntl.LOCK_EX) is not None:
                taken.append(gpu)
            if len(taken) == count:
                os.close(queue)
                return taken
        time.sleep(PAUSE)


def take_place(known: list[str], places: int) -> str:
    while True:
        queue = wait_for("queue", fcntl.LOCK_SH)
        for place in range(places):  # spread over the GPUs before any is filled
            for gpu in known:
                if (whole := lock(gpu, fcntl.LOCK_SH)) is None:
                    continue
                if lock(f"{gpu}.{place}", fcntl.LOCK_EX) is not None:
                    os.close(queue)
                    return gpu
                os.close(whole)
        os.close(queue)
        time.sleep(PAUSE)


def start_service(gpu: str) -> None:
    """CUDA's multi-process service for this GPU alone; who finds it running goes on with that."""
    folder = LOCKS / f"service-{gpu}"
    folder.mkdir(exist_ok=True)
    os.environ |= {"CUDA_MPS_PIPE_DIRECTORY": str(folder), "CUDA_MPS_LOG_DIRECTORY": str(folder)}
    once = wait_for(f"{gpu}.service", fcntl.LOCK_EX)
    subprocess.run(["nvidia-cuda-mps-control", "-d"], capture_output=True, close_fds=True)
    os.close(once)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--gpus", type=int, default=1, metavar="N")
    amount.add_argument("--share", type=int, metavar="N")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    command = options.command[options.command[:1] == ["--"] :]
    known = gpus()
    if not command:
        parser.error("a command is needed")
    if not 1 <= options.gpus <= len(known):
        parser.error(f"--gpus {options.gpus}: this host has {len(known)}")
    if options.share is not None and options.share < 1:
        parser.error(f"--share {options.share}: at least 1")
    LOCKS.mkdir(parents=True, exist_ok=True)
    taken = [take_place(known, options.share)] if options.share else take_whole(known, options.gpus)
    if known != ["cpu"]:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(taken)
        if options.share and shutil.which("nvidia-cuda-mps-control"):
            start_service(taken[0])
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"error: {command[0]} cannot be started: {error.strerror}")


if __name__ == "__main__":
    main()
