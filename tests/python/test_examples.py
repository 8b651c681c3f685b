"""The examples run as they stand, on the tiny model."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture()
def run(build_folder):
    def command(*words):
        environment = os.environ | {
            "PYTHONPATH": str(ROOT / "python"),
            "SPOT_OPS_LIBRARY": str(build_folder / "libspot_ops.so"),
            "SPOT_ENGINE_LIBRARY": str(build_folder / "libspot_engine.so"),
        }
        done = subprocess.run(
            [sys.executable, *map(str, words)], capture_output=True, text=True, cwd=ROOT, env=environment
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return command


def test_attach(run):
    lines = run(EXAMPLES / "attach.py", "--words", 700).splitlines()
    dense, sparse = (next(line for line in lines if line.startswith(kind)) for kind in ("dense", "sparse"))
    assert "7419263" in dense and "7419263" in sparse
    assert sum("of the exact attention captured" in line for line in lines) == 8


def test_engine(run):
    lines = run(EXAMPLES / "engine.py").splitlines()
    assert lines[0].startswith("spot:k=512: ") and lines[1].endswith("all of the tokens read")
    assert "prompt tokens were cached" in lines[3]


def test_distill(run, tmp_path, prose, tiny_qwen3):
    for number in range(16):
        (tmp_path / f"{number}.txt").write_text(prose[number * 2500 : (number + 1) * 2500])
    options = ("--steps", 2, "--length", 512, "--sequences", 1)
    texts = sorted(tmp_path.glob("*.txt"))
    out = run(EXAMPLES / "distill.py", tiny_qwen3, *texts, "--out", tmp_path / "selector", *options)
    assert "after 2 steps" in out
    assert json.loads((tmp_path / "selector" / "selector.json").read_text())["notes"]["steps"] == 2


def test_the_notebook(run, tmp_path):
    copy = EXAMPLES / "attach.ipynb"
    script = "import sys, json, pathlib; sys.path.insert(0, 'examples'); import run_notebook; "
    script += f"print(json.dumps(run_notebook.run(pathlib.Path({str(copy)!r}))))"
    cells = json.loads(run("-c", script))["cells"]
    printed = ["".join(o["text"]) for cell in cells if cell["cell_type"] == "code" for o in cell["outputs"]]
    assert "7419263" in printed[1] and "7419263" in printed[2]
    assert printed[3].count("layer") == 8 and printed[4].count("reading") == 3
