"""docs/api.md is what the docstrings say."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_the_reference_is_current(build_folder):
    tool = [sys.executable, str(ROOT / "tools" / "api_reference.py"), "--check"]
    environment = os.environ | {"SPOT_BUILD": str(build_folder)}
    done = subprocess.run(tool, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_everything_public_is_in_it(spotattention):
    text = (ROOT / "docs" / "api.md").read_text()
    for name in spotattention.__all__:
        if name not in ("__version__", "built_for_cuda", "built_for_torch", "ops"):
            assert f"### {name}\n" in text
            assert getattr(spotattention, name).__doc__
