#!/usr/bin/env python3
"""`spot distill` on several processes, one a GPU (or, without GPUs, several on the CPU):

    torchrun --nproc-per-node 4 tools/distill.py --model MODEL --data text/ --out MODEL/selectors/spot

Any launcher that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT does. All options are those of `spot distill`,
and one more: --timeout SECONDS (600), after which a process that waits for another gives up.

Everything happens in C++ (libspot.so beside the spot program); this script only lets torch build the process group, because the
installed torch packages lack the headers for that.
"""

import argparse
import ctypes
import datetime
import os
import pathlib
import signal
import sys

import torch
import torch.distributed

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def load_program() -> ctypes.CDLL:
    """libspot.so of SPOT_BUILD, else of the first build folder that has one and suits this machine."""
    names = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    folders = [os.environ["SPOT_BUILD"]] if "SPOT_BUILD" in os.environ else [ROOT / "build" / name for name in names]
    for folder in folders:
        library = pathlib.Path(folder) / "libspot.so"
        if library.exists():
            return ctypes.CDLL(str(library))
    sys.exit(f"error: {pathlib.Path(folders[-1]) / 'libspot.so'} does not exist; run `make build`, or set SPOT_BUILD")


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--timeout", type=float, default=600)
    own, rest = parser.parse_known_args()
    missing = [name for name in LAUNCHER if name not in os.environ]
    if missing:
        sys.exit(
            f"error: {', '.join(missing)} not set; start this through torchrun, or run the spot program for one process"
        )
    program = load_program()
    cuda = torch.cuda.is_available() and torch.distributed.is_nccl_available()
    # NCCL reports a lost peer to the waiting thread only under this setting; else a watchdog ends the process as a crash.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    try:
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=datetime.timedelta(seconds=own.timeout)
        )
    except (RuntimeError, ValueError) as error:
        sys.exit(
            f"error: the process group of {os.environ['WORLD_SIZE']} could not be formed: {str(error).splitlines()[0]}"
        )
    # Collectives run on the current device; where GPUs are too few, the program says so (or runs on the CPU).
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if cuda and local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)
    # Python would note Ctrl-C and act on it only after the call below.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    words = [b"spot", b"distill", *(os.fsencode(word) for word in rest)]
    arguments = (ctypes.c_char_p * len(words))(*words)
    group = torch.distributed.group.WORLD.group_name
    status = program.spot_run(len(words), arguments, group.encode())
    if status == 0:
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # After a failure an orderly end would wait for processes that are gone.
    os._exit(status)


if __name__ == "__main__":
    main()
