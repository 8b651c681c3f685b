"""bench/scaling.py on the CPU: what it prints and writes is what its runs measured, the runs of one and of two processes and the one
that was killed have the same losses, and mistakes are named before anything runs."""

import json
import os
import re
import statistics
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytest.importorskip("transformers")
STEPS = 8


def run(build_folder, *words):
    environment = os.environ | {"SPOT_BUILD": str(build_folder), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, ROOT / "bench" / "scaling.py", *map(str, words)],
        capture_output=True,
        text=True,
        env=environment,
    )


@pytest.mark.timeout(600)
def test_runs_agree_and_rows_are_what_was_measured(build_folder, tiny_qwen3, tmp_path):
    shapes = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 32,
        "intermediate_size": 96,
        "max_window_layers": 2,
        "initializer_range": 0.3,
    }  # attention that differs from token to token
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").write_text(
        json.dumps(json.loads((tiny_qwen3 / "config.json").read_text()) | shapes)
    )
    out = tmp_path / "out"
    done = run(
        build_folder,
        "--config",
        tmp_path / "small",
        "--tokenizer",
        tiny_qwen3,
        "--data",
        ROOT / "docs" / "results" / "tiny-qwen3.md",
        "--out",
        out,
        "--length",
        700,
        "--sequences-per-step",
        2,
        "--steps",
        STEPS,
        "--json",
        out / "json" / "scaling.json",
    )
    assert done.returncode == 0, done.stderr
    runs = {
        name: [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("1", "2", "2-sharded", "killed")
    }
    losses = {name: [line["loss"] for line in lines] for name, lines in runs.items()}
    assert len(losses["1"]) == STEPS and min(losses["1"]) > 0
    for name in runs:
        assert losses[name] == pytest.approx(losses["1"], rel=1e-5), name

    data = json.loads((out / "json" / "scaling.json").read_text())
    assert [(row["gpus"], row["sharded"]) for row in data["rows"]] == [(1, False), (2, False), (2, True)]
    printed = re.findall(
        r"^(\d) processes(, backbone sharded)?: ([\d,]+) tokens/s, efficiency ([\d.]+), loss (\S+)$", done.stdout, re.M
    )
    assert len(printed) == 3
    for name, row, words in zip(runs, data["rows"], printed):
        speeds = [statistics.median(line["tokens_per_second"] for line in runs[key][2:]) for key in ("1", name)]
        assert row["tokens_per_second"] == speeds[1] and row["efficiency"] == pytest.approx(
            speeds[1] / speeds[0] / row["gpus"]
        )
        difference = max(abs(ours / one - 1) for ours, one in zip(losses[name], losses["1"]))
        assert row["loss_difference"] == pytest.approx(difference)
        assert words == (
            str(row["gpus"]),
            ", backbone sharded" if row["sharded"] else "",
            f"{speeds[1]:,.0f}",
            f"{row['efficiency']:.3f}",
            f"{difference:.1e}",
        )
    assert data["continued_loss_difference"] == pytest.approx(
        max(abs(ours / one - 1) for ours, one in zip(losses["killed"], losses["1"]))
    )

    killed = re.search(
        r"^one of 2 killed after step (\d+): statuses \[1, -9\], \['error: another process of this run has ended.*--resume",
        done.stdout,
        re.M,
    )
    assert killed and 3 <= int(killed[1]) < STEPS, done.stdout
    assert done.stdout.splitlines()[-1].startswith(f"continued by one process: {STEPS} steps, loss ")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--gpus", "0,2"], "0,2 does not list numbers of GPUs, as 1,2 does"),
        (["--steps", "3"], "--steps 3: at least 4 are needed"),
        (["--data", "no-such-text"], "no-such-text does not exist"),
        (["--config", "no-such-config"], "no-such-config/config.json does not exist"),
        (["--config", str(ROOT / "bench" / "configs" / "qwen3-8b")], "give --model, or --config and --tokenizer"),
    ],
)
def test_mistakes_are_named_before_anything_runs(build_folder, tmp_path, words, message):
    done = run(build_folder, "--data", ROOT / "LICENSE", "--out", tmp_path / "out", *words)
    assert done.returncode == 2 and done.stderr.count("error:") == 1, done.stderr
    assert message in done.stderr.splitlines()[-1] and not (tmp_path / "out").exists()


def test_a_run_that_fails_is_named(build_folder, tiny_qwen3, tmp_path):
    done = run(build_folder, "--model", tiny_qwen3, "--data", ROOT / "LICENSE", "--out", tmp_path, "--length", 1000000)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: the run of 1 processes ended with [1]: ['error: ")
