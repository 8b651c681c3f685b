"""tools/on_gpu.py: never more processes on a GPU than it has places, whole GPUs alone, and nobody waits for ever."""

import fcntl
import json
import os
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

SCRIPT = ROOT / "tools" / "on_gpu.py"
# Tells what it was given, and when it began and ended.
WITNESS = (
    "import json, os, sys, time; begin = time.monotonic(); time.sleep(float(sys.argv[2])); "
    "json.dump([os.environ.get('CUDA_VISIBLE_DEVICES'), begin, time.monotonic()], open(sys.argv[1], 'w'))"
)


@pytest.fixture()
def start(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"} | {
        "SPOT_GPU_LOCKS": str(tmp_path / "locks"),
        "SPOT_GPUS": "a,b,c",
        "PATH": os.environ["PATH"],
    }
    started = []

    def run(*options, seconds=0.5, **changes):
        report = tmp_path / f"report-{len(started)}"
        started.append(
            subprocess.Popen(
                [sys.executable, SCRIPT, *options, "--", sys.executable, "-c", WITNESS, report, str(seconds)],
                env=environment | changes,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        started[-1].report = report
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def outcome(process):
    assert process.wait(timeout=60) == 0, process.stderr.read()
    devices, begin, end = json.loads(process.report.read_text())
    return (devices.split(",") if devices else None), begin, end


def until_locked(file):
    """Waits until a process holds the lock."""
    for _ in range(600):
        time.sleep(0.05)
        if file.exists():
            with open(file) as opened:
                try:
                    fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return
    pytest.fail(f"nobody took {file}")


def most_at_once(intervals):
    return max(sum(begin <= at < end for begin, end in intervals) for at, _ in intervals)


def test_places_and_whole_gpus(start):
    shared = [start("--share", "2") for _ in range(9)]
    whole = [start("--gpus", "2") for _ in range(3)]
    shared = [outcome(process) for process in shared]
    whole = [outcome(process) for process in whole]
    assert all(len(devices) == 1 for devices, _, _ in shared) and all(len(set(devices)) == 2 for devices, _, _ in whole)
    for gpu in "abc":
        of_shared = [(begin, end) for devices, begin, end in shared if gpu in devices]
        of_whole = [(begin, end) for devices, begin, end in whole if gpu in devices]
        assert not of_shared or most_at_once(of_shared) <= 2
        assert not of_whole or most_at_once(of_whole) == 1
        assert not [1 for a in of_shared for b in of_whole if a[0] < b[1] and b[0] < a[1]]
    assert {gpu for devices, _, _ in shared for gpu in devices} == set("abc")


def test_who_waits_for_whole_gpus_comes_before_further_shares(start, tmp_path):
    first = start("--share", "1", seconds=8, SPOT_GPUS="a")
    until_locked(tmp_path / "locks" / "a.0")
    whole = start("--gpus", "1", SPOT_GPUS="a")
    until_locked(tmp_path / "locks" / "queue")
    later = start("--share", "1", SPOT_GPUS="a")
    ends = [outcome(process)[2] for process in (first, whole, later)]
    assert ends == sorted(ends)


def test_a_killed_command_frees_its_gpu(start, tmp_path):
    stuck = start("--gpus", "3", seconds=600)
    until_locked(tmp_path / "locks" / "c")
    stuck.kill()
    assert outcome(start("--gpus", "3"))[0] == ["a", "b", "c"]


def test_without_a_gpu_the_cpu_is_shared_and_the_environment_kept(start):
    cpu = [outcome(start("--share", "1", SPOT_GPUS="cpu")) for _ in range(2)]
    assert [devices for devices, _, _ in cpu] == [None, None]


def test_mistakes_are_told(start):
    for options, words in (
        (("--gpus", "4"), "this host has 3"),
        (("--share", "0"), "at least 1"),
        (("--gpus", "0"), "this host has 3"),
    ):
        process = start(*options)
        assert process.wait(timeout=60) == 2 and words in process.stderr.read()
    missing = subprocess.run(
        [sys.executable, SCRIPT, "--", "no-such-program"],
        env=os.environ | {"SPOT_GPUS": "a"},
        capture_output=True,
        text=True,
    )
    assert missing.returncode == 1 and "no-such-program cannot be started" in missing.stderr
