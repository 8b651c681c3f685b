"""Accuracy may not sink unnoticed: needles at 4K tokens with the shipped model, against numbers that were measured."""

import json
import subprocess

import pytest

from tests.conftest import ROOT

SAMPLES = 6
# Fewest right answers of SAMPLES, one below what was measured: another CPU may round another way.
FEWEST_RIGHT = {
    "dense": 4,
    "oracle:k=512": 4,
    "quest:k=1024": 3,
    "twilight:p=0.95,k=25%": 3,
}
# The learned selector, where the model ships one: what it must reach to be shipped, quantised keys included.
FEWEST_RIGHT_LEARNED = {
    "spot:p=0.7,cache=bf16": 4,
    "spot:p=0.7,cache=int4": 4,
}
# Sinks and a window do not hold the needle: what shows that the prompts need a selection.
CONTROL, MOST_RIGHT = "streaming:k=512", 2


@pytest.mark.timeout(300)
def test_methods_find_the_needle(build_folder, tiny_qwen3, tmp_path):
    fewest = dict(FEWEST_RIGHT)
    selector = tiny_qwen3 / "selectors" / "spot"
    if selector.is_dir():
        fewest |= FEWEST_RIGHT_LEARNED
    command = [build_folder / "spot", "eval", "needle", "--model", tiny_qwen3, "--text", ROOT / "LICENSE", "--length", "4096",
               "--samples", str(SAMPLES), "--distractors", "32", "--threads", "1", "--methods", ",".join([*fewest, CONTROL]), "--out", tmp_path]
    if selector.is_dir():
        command += ["--selector", "spot"]
    subprocess.run(command, check=True, cwd=ROOT)
    methods = {m["name"]: m for m in json.loads((tmp_path / "report.json").read_text())["lengths"][0]["methods"]}
    assert methods.keys() == {*fewest, CONTROL}
    right = {name: method["exact_match"] for name, method in methods.items()}
    assert {name: right[name] for name, least in fewest.items() if right[name] < least} == {}
    assert right[CONTROL] <= MOST_RIGHT
    # Twilight reads less than the quarter that Quest proposes, and loses little of its mass.
    assert methods["twilight:p=0.95,k=25%"]["attended_share"] < 0.5 * methods["quest:k=1024"]["attended_share"]
    assert methods["twilight:p=0.95,k=25%"]["captured_mass"] > 0.9 * methods["quest:k=1024"]["captured_mass"]
