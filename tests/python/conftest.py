"""The package from the source tree, over the libraries of the CMake build."""

import os
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def spotattention(build_folder):
    os.environ["SPOT_OPS_LIBRARY"] = str(build_folder / "libspot_ops.so")
    os.environ["SPOT_ENGINE_LIBRARY"] = str(build_folder / "libspot_engine.so")
    sys.path.insert(0, str(ROOT / "python"))
    import spotattention

    return spotattention


@pytest.fixture(scope="session")
def prose() -> str:
    """Some ten thousand words that no selector was trained on."""
    return "\n\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
