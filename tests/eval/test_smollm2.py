"""The main job on a real pretrained model, in small: distil, evaluate and generate with SmolLM2-135M-Instruct (docs/smollm2.md)."""

import json
import math
import subprocess

import pytest

from tests.conftest import ROOT


@pytest.mark.timeout(400)
def test_distil_evaluate_generate(build_folder, smollm2, tmp_path):
    def spot(*words):
        command = [build_folder / "spot", *words, "--model", smollm2, "--threads", "1"]
        return subprocess.run(list(map(str, command)), check=True, cwd=ROOT, capture_output=True, text=True).stdout

    text = tmp_path / "text.txt"
    text.write_text((ROOT / "LICENSE").read_text() + (ROOT / "README.md").read_text())
    selector = tmp_path / "selector"
    spot(
        "distill",
        "--data",
        text,
        "--out",
        selector,
        "--length",
        768,
        "--sequences-per-step",
        1,
        "--steps",
        6,
        "--lr",
        2e-3,
        "--loss",
        "dense",
        "--query-rows",
        64,
        "--held-out-every",
        0,
        "--no-calibrate",
    )
    losses = [json.loads(line)["loss"] for line in (selector / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 6 and losses[-1] < losses[0]

    spot(
        "eval",
        "text",
        "--selector",
        selector,
        "--text",
        text,
        "--length",
        1024,
        "--sequences",
        1,
        "--skip",
        640,
        "--methods",
        "spot:k=100%,spot:k=640,streaming:k=512,oracle:k=640",
        "--out",
        tmp_path / "report",
    )
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    dense = report["dense"]["perplexity"]
    assert math.isfinite(dense) and 1 < dense < 100
    methods = {m["name"]: m for m in report["methods"]}
    assert methods["spot:k=100%"]["perplexity"] == pytest.approx(dense, rel=1e-4)
    # With two thirds of the tokens even six steps are near dense, and nearer than a window of half.
    assert methods["spot:k=640"]["perplexity"] == pytest.approx(dense, rel=0.05)
    mass = {
        name: sum(layer["captured_mass"] for layer in m["layers"]) / len(m["layers"]) for name, m in methods.items()
    }
    assert mass["streaming:k=512"] < mass["spot:k=640"] < mass["oracle:k=640"]

    answer = spot("generate", "--selector", selector, "--prompt", "The capital of France is", "--max-new-tokens", 8)
    assert "Paris" in answer
