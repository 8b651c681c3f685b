"""The package from the source tree, over the library of the CMake build."""

import os
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def spotattention(build_folder):
    os.environ["SPOT_OPS_LIBRARY"] = str(build_folder / "libspot_ops.so")
    sys.path.insert(0, str(ROOT / "python"))
    import spotattention

    return spotattention
