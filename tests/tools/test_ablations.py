"""tools/ablations.py on the shipped model: the table holds what the reports hold, also of a run that was stopped; what is done is not
run again; runs of different settings do not mix; every variant is one that the program knows."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def ablations():
    spec = importlib.util.spec_from_file_location("ablations", ROOT / "tools" / "ablations.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments(model, out, *more):
    text = ROOT / "LICENSE"
    return [
        sys.executable,
        ROOT / "tools" / "ablations.py",
        "--model",
        model,
        "--train",
        text,
        "--heldout",
        text,
        "--out",
        out,
        "--device",
        "cpu",
        "--jobs",
        "2",
        "--length",
        "448",
        "--steps",
        "2",
        "--sequences-per-step",
        "1",
        "--query-rows",
        "32",
        "--multiples",
        "1,3",
        "--budget-multiple",
        "3",
        "--budgets",
        "10,20",
        "--measured-queries",
        "1",
        *more,
    ]


def run(build_folder, command, **options):
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "SPOT_BUILD": str(build_folder)}, **options
    )


@pytest.mark.timeout(600)
def test_table_holds_the_reports_and_goes_on(ablations, build_folder, tiny_qwen3, tmp_path):
    out = tmp_path / "out"
    first = run(build_folder, arguments(tiny_qwen3, out, "--only", "base"), check=True).stdout
    base = out / "base"
    reports = {step: json.loads((base / step / "report.json").read_text()) for step in ("budgets", "1x", "3x")}
    assert reports["budgets"]["length"] == 1344 and reports["1x"]["length"] == 448
    assert [method["name"] for method in reports["budgets"]["methods"]] == ["spot:k=10%", "spot:k=20%"]
    (row,) = json.loads((out / "ablations.json").read_text())["rows"]
    for budget, method in zip(("10%", "20%"), reports["budgets"]["methods"]):
        masses = [layer["captured_mass"] for layer in method["layers"]]
        assert row["mass"][budget] == pytest.approx(sum(masses) / len(masses))
    nucleus = reports["3x"]["methods"][1]
    assert row["lengths"]["3x"]["perplexity_p"] == pytest.approx(
        nucleus["perplexity"] / reports["3x"]["dense"]["perplexity"] - 1
    )
    captured = sorted(
        next(c["captured_residual_mass"] for c in layer["calibration"] if c["p"] == 0.9) for layer in nucleus["layers"]
    )
    assert row["lengths"]["3x"]["calibration"]["0.9"] == pytest.approx((captured[3] + captured[4]) / 2)  # of 8 layers
    assert row["lengths"]["1x"]["calibration"]["0.9"] is None  # below the floor nothing selects
    assert (out / "ablations.md").read_text() == first

    # Goes on: what is there stays, what is missing is made.
    old = (base / "3x" / "report.json").read_bytes()
    (base / "1x" / "report.json").unlink()
    (base / "3x" / "report.json").write_bytes(old.replace(b'"spot:p=0.7"', b'"kept"'))
    again = run(build_folder, arguments(tiny_qwen3, out, "--only", "base", "oracle"), check=True).stdout
    assert again.splitlines()[:3] == first.splitlines()
    assert "kept" in (base / "3x" / "report.json").read_text() and (base / "1x" / "report.json").is_file()
    oracle = json.loads((out / "ablations.json").read_text())["rows"][1]
    assert oracle["variant"] == "oracle" and not (out / "oracle" / "selector").exists()
    assert oracle["mass"]["10%"] > row["mass"]["10%"]

    refused = run(build_folder, arguments(tiny_qwen3, out, "--only", "base", "--lr", "1e-3"))
    assert refused.returncode != 0
    assert refused.stderr == f"error: {out} holds a run with lr 4e-3, not 1e-3; choose another --out\n"


def test_stopped_run_leaves_what_was_measured(build_folder, tiny_qwen3, tmp_path):
    done = run(build_folder, arguments(tiny_qwen3, tmp_path, "--only", "base", "no RoPE", "--seconds", "0"), check=True)
    assert "out of time; unfinished: base; no RoPE" in done.stdout
    assert json.loads((tmp_path / "ablations.json").read_text())["rows"] == []


def test_failed_variant_is_named_and_others_go_on(build_folder, tmp_path):
    done = run(build_folder, arguments(tmp_path / "no-model", tmp_path / "out", "--only", "base", "no RoPE"))
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 2
    for line, name in zip(lines, ("base", "no RoPE")):
        assert line.startswith(f"error: {name}: ") and "no-model" in line and "log.txt" in line


def test_every_variant_is_accepted(ablations, build_folder, tmp_path):
    """Options are checked before the model is read, so a missing model is what the program must complain about."""
    for name in ablations.VARIANTS:
        options = ablations.argparse.Namespace(
            out=tmp_path, length=256, lr="4e-3", steps=2, sequences_per_step=1, query_rows=32, train=ROOT / "LICENSE"
        )
        command = [build_folder / "spot", *ablations.distill_command(name, options), "--model", tmp_path / "no-model"]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        assert done.returncode != 0 and "no-model" in done.stderr, (name, done.stderr)
