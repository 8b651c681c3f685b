"""Shared fixtures: where the built programs and the shipped models are."""

import os
import pathlib
import random

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


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


@pytest.fixture()
def seed() -> int:
    """A fresh seed each run; pytest prints it on failure, SPOT_SEED repeats it."""
    value = int(os.environ.get("SPOT_SEED", random.SystemRandom().randrange(2**31)))
    print(f"SPOT_SEED={value}")
    return value
