"""tools/accuracy.py on the shipped model: what it writes adds up, a finished run is not run again, and logs of runs side by side
are put together only when they fit."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.timeout(600)
def test_tables_add_up_and_finished_steps_are_kept(build_folder, tiny_qwen3, tmp_path):
    text = ROOT / "LICENSE"
    threads = ["--threads", "1"]
    selectors = [tmp_path / "first", tmp_path / "second"]
    for seed, selector in enumerate(selectors):
        subprocess.run(
            [
                build_folder / "spot",
                "distill",
                "--model",
                tiny_qwen3,
                "--data",
                text,
                "--out",
                selector,
                "--length",
                "448",
                "--steps",
                "1",
                "--warmup-steps",
                "0",
                "--sequences-per-step",
                "1",
                "--seed",
                str(seed),
                *threads,
            ],
            check=True,
        )
    command = [
        sys.executable,
        ROOT / "tools" / "accuracy.py",
        "--model",
        tiny_qwen3,
        "--text",
        text,
        "--out",
        tmp_path / "out",
        "--selector",
        selectors[0],
        "--selector",
        selectors[1],
        "--lengths",
        "1024",
        "--tasks",
        "vt",
        "--samples",
        "2",
        "--sequences",
        "1",
        "--text-methods",
        "4",
        "--rules",
        "k=512,k=4096",
        "--twilight",
        "p=0.9,k=50%",
        "--needle-options",
        "--distractors 8",
        "--launch",
        f"{ROOT}/tools/on_gpu.py --share 1 --",
        "--",
        *threads,
    ]
    locks = tmp_path / "locks"
    first = subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"SPOT_GPUS": "cpu", "SPOT_GPU_LOCKS": str(locks)},
    ).stdout
    assert locks.is_dir()  # what was to start the programs did
    assert first.count("$ ") == 9  # three steps for each selector and the baselines
    data = json.loads((tmp_path / "out" / "accuracy.json").read_text())
    tables = {table["title"]: table for table in data["tables"]}
    markdown = (tmp_path / "out" / "accuracy.md").read_text()
    page = (tmp_path / "out" / "accuracy.html").read_text()
    for title in tables:
        assert title in markdown and title in page
    learned = [f"{name}:k=512,cache={form}" for name in ("first", "second") for form in ("bf16", "int4")]
    baselines = ["oracle:k=512", "quest:k=512", "streaming:k=512", "twilight:p=0.9,k=50%"]  # k=4096 holds every prompt
    for title in (
        "RULER at 1024 tokens (prompts of version 2)",
        "Multi-key needles at 1024 tokens",
        "Running text at 1024 tokens",
    ):
        names = [row[0] for row in tables[title]["rows"]]
        assert names[0] == "dense" and sorted(names[1:]) == sorted(learned + baselines), title

    def nll(name: str, method: str) -> float:
        report = json.loads((tmp_path / "out" / "text-1024" / name / "0" / "report.json").read_text())
        return next(m["nll"] for m in [report["dense"], *report["methods"]] if m["name"] == method)

    for name in ("first", "second"):
        parts = [loss["mean"] for loss in data["losses"] if loss["measure"] == "text" and loss["selector"] == name]
        assert len(parts) == 3
        assert sum(parts) == pytest.approx(nll(name, "spot:k=512,cache=int4") - nll(name, "dense"))
    for loss in data["losses"]:
        if loss["measure"] == "ruler":
            assert loss["low"] <= loss["mean"] <= loss["high"]

    again = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert again.count("$ ") == 0
    assert json.loads((tmp_path / "out" / "accuracy.json").read_text()) == data


@pytest.fixture(scope="module")
def accuracy():
    spec = importlib.util.spec_from_file_location("accuracy", ROOT / "tools" / "accuracy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tasks_are_those_of_the_program(accuracy, build_folder, tiny_qwen3):
    run = subprocess.run(
        [build_folder / "spot", "eval", "ruler", "--model", tiny_qwen3, "--tasks", "no_such_task"],
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert run.stderr.strip().endswith("choose among " + ", ".join(accuracy.RULER_TASKS))


def options_of(accuracy, monkeypatch, out, *words):
    monkeypatch.setattr(
        sys, "argv", ["accuracy.py", "--model", "m", "--text", "t", "--out", str(out), *words, "--", "--threads", "1"]
    )
    return accuracy.parse_arguments()


def test_without_baselines_selectors_are_run_alone(accuracy, tmp_path, monkeypatch):
    words = ["--rules", "k=10%,p=0.7", "--steps", "ruler", "--no-baselines"]
    steps = accuracy.list_steps(options_of(accuracy, monkeypatch, tmp_path, "--selector", "one", *words))
    assert steps[0].command[steps[0].command.index("--methods") + 1] == ",".join(
        f"spot:{rule},cache={form}" for rule in ("k=10%", "p=0.7") for form in ("bf16", "int4")
    )
    with pytest.raises(SystemExit):
        options_of(accuracy, monkeypatch, tmp_path, *words)
    with pytest.raises(SystemExit):
        options_of(accuracy, monkeypatch, tmp_path, "--selector", "one", "--more", "quest:k=5%", *words)


def test_losses_are_told_once_a_selector(accuracy, tmp_path, monkeypatch):
    options = options_of(accuracy, monkeypatch, tmp_path, "--selector", "one", "--rules", "k=10%,p=0.7")
    # Running text in two parts a selector, then the baselines.
    shown = [name for _, _, name, _ in accuracy.losses(options, ["one", "one", "two", "two", ""])]
    assert shown == ["one:k=10%", "one:p=0.7", "two:k=10%", "two:p=0.7"]
    assert [name for _, _, name, _ in accuracy.losses(options, [""])] == ["oracle:k=10%", "oracle:p=0.7"]


def test_parts_hold_every_prompt_once(accuracy, tmp_path, monkeypatch):
    options = options_of(
        accuracy,
        monkeypatch,
        tmp_path,
        "--selector",
        "one",
        "--selector",
        "two",
        "--lengths",
        "4096,8192",
        "--tasks",
        "vt,qa_1",
        "--samples",
        "12",
        "--rules",
        "k=10%",
        "--steps",
        "ruler,text",
        "--more",
        "spot:k=10%,cache=mxfp4;oracle:k=5%",
    )
    steps = accuracy.list_steps(options)
    parts = accuracy.list_parts(options, steps)
    assert parts[0].length >= parts[-1].length and len({part.folder for part in parts}) == len(parts)
    prompts = []
    for part in parts:
        value = {option: part.command[part.command.index(option) + 1] for option in ("--methods", "--out")}
        assert (
            value["--out"] == str(part.folder)
            and part.command[-4:-2] == ["--out", str(part.folder)]
            or part.step.kind == "text"
        )
        if part.step.kind == "ruler":
            value |= {
                option: part.command[part.command.index(option) + 1]
                for option in ("--tasks", "--lengths", "--samples", "--first-sample")
            }
            prompts += [
                (part.step.name, value["--tasks"], value["--lengths"], int(value["--first-sample"]) + i)
                for i in range(int(value["--samples"]))
            ]
        # Selectors have the further methods of spot, the baselines the others; running text has neither.
        assert ("cache=mxfp4" in value["--methods"]) == (part.step.kind == "ruler" and part.step.name != "")
        assert ("oracle:k=5%" in value["--methods"]) == (part.step.kind == "ruler" and part.step.name == "")
    assert sorted(prompts) == [
        (name, task, length, sample)
        for name in ("", "one", "two")
        for task in ("qa_1", "vt")
        for length in ("4096", "8192")
        for sample in range(12)
    ]


def test_logs_are_merged(accuracy, tmp_path):
    logs = [tmp_path / name for name in ("whole", "first", "second")]
    logs[0].write_text("settings\none\n")
    logs[1].write_text("settings\none\ntwo\n")
    logs[2].write_text("settings\nthree\nhalf of a li")  # interrupted
    accuracy.merge_logs(logs[0], logs)
    assert logs[0].read_text() == "settings\none\ntwo\nthree\n"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["first", "second", "whole"]


def test_logs_of_other_settings_are_refused(accuracy, tmp_path):
    logs = [tmp_path / "whole", tmp_path / "other"]
    logs[0].write_text("settings\none\n")
    logs[1].write_text("other settings\ntwo\n")
    with pytest.raises(SystemExit, match="other.*delete the one that is out of date"):
        accuracy.merge_logs(logs[0], logs)
    assert logs[0].read_text() == "settings\none\n"
