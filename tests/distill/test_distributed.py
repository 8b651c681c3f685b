"""Distillation on several processes (gloo on the CPU): the same run as on one, and a clear end for every way to lose one."""

import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

transformers = pytest.importorskip("transformers")

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "tools" / "distill.py"
STEPS = 10
PATIENCE = 400  # seconds until a process counts as hanging, on a busy machine too
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}  # more threads than cores left make tiny models crawl


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, build_folder):
    """A small random hybrid model (linear and full attention), the shipped tokenizer, and a corpus."""
    folder = tmp_path_factory.mktemp("distributed")
    torch.manual_seed(1)
    config = transformers.Qwen3_5TextConfig(
        hidden_size=48,
        num_hidden_layers=4,
        layer_types=["linear_attention", "full_attention", "full_attention", "full_attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=72,
        vocab_size=4096,
        max_position_embeddings=2048,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        tie_word_embeddings=True,
    )
    model = transformers.Qwen3_5ForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(0, 1.5 / weight.shape[1] ** 0.5)  # attention that differs from token to token
    model.save_pretrained(folder / "model")
    shutil.copy(ROOT / "models/tiny-qwen3/tokenizer.json", folder / "model")
    words = random.Random(1)
    with (folder / "text.jsonl").open("w") as lines:
        for _ in range(150):
            text = " ".join("".join(words.choices("abcdefghij", k=words.randint(1, 7))) for _ in range(300))
            lines.write(json.dumps({"text": text}) + "\n")
    return folder


def arguments(workplace, output, *more, sequences=4):
    words = ["--model", workplace / "model", "--data", workplace / "text.jsonl", "--out", output, "--device", "cpu"]
    # Long enough for residual blocks, which calibration needs.
    words += ["--length", 700, "--steps", STEPS, "--sequences-per-step", sequences, "--held-out-every", 10]
    words += ["--held-out-sequences", 3, "--held-out-interval", 3, "--checkpoint-interval", 2, "--query-rows", 200]
    return [str(word) for word in [*words, *more]]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(count, words, timeout=PATIENCE / 2):
    """The processes of a run as a plain launcher starts them; their output goes into one pipe each."""
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        subprocess.Popen(
            [sys.executable, SCRIPT, "--timeout", str(timeout), *words],
            env=ENVIRONMENT | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def torchrun(count, words):
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(count),
        "--master-port",
        str(free_port()),
    ]
    return subprocess.run(
        [*launcher, SCRIPT, *words], env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE
    )


def finish(processes, seconds=PATIENCE):
    """Statuses, standard outputs and error lines of all processes; none may outlive `seconds`."""
    end = time.monotonic() + seconds
    try:
        texts = [process.communicate(timeout=max(1, end - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()
    errors = [line for _, error in texts for line in error.splitlines() if line.startswith("error:")]
    return [process.returncode for process in processes], [output for output, _ in texts], errors


def metrics(output):
    path = output / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_steps(processes, output, steps):
    end = time.monotonic() + PATIENCE
    while len(metrics(output)) < steps:
        assert time.monotonic() < end and all(p.poll() is None for p in processes), finish(processes, 1)
        time.sleep(0.01)


def check_same_run(output, reference):
    """All that is measured agrees to what sums in another order change, and later steps carry on."""
    ours, theirs = metrics(output), metrics(reference)
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
    for mine, other in zip(ours, theirs):
        assert mine.keys() == other.keys()
        for name in mine.keys() - {"seconds", "tokens_per_second"}:
            assert mine[name] == pytest.approx(other[name], rel=2e-3, abs=1e-4), (mine["step"], name)
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)


@pytest.fixture(scope="module")
def reference(workplace, build_folder):
    """The run of one process."""
    output = workplace / "one"
    command = [build_folder / "spot", "distill", *arguments(workplace, output)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return output


def test_metrics_are_flat_and_complete(reference):
    for line in metrics(reference):
        for name, value in line.items():
            numbers = value if isinstance(value, list) else [value]
            assert all(isinstance(number, (int, float)) for number in numbers), name
        assert line["loss"] == pytest.approx(sum(line["loss_per_layer"]) / 3)
        assert len(line["covered_0.1_per_layer"]) == len(line["covered_oracle_0.1_per_layer"]) == 3
    measured = [line for line in metrics(reference) if "held_out_loss" in line]
    assert [line["step"] for line in measured] == [1, 3, 6, 9, 10]
    for line in measured:
        captured = [line[f"held_out_captured_p{p}"] for p in ("0.5", "0.6", "0.7", "0.8", "0.9", "0.95")]
        assert captured == sorted(captured) and 0 < captured[0] and captured[-1] <= 1
        assert 0 < line["held_out_calibration_error"] < 1
    page = (reference / "loss.html").read_text()
    for title in (
        "Loss by layer",
        "Mass at budget 0.1 by layer",
        "Distance of captured mass",
        "Learning rate",
        "Speed",
    ):
        assert title in page


@pytest.mark.parametrize("count, more", [(4, []), (2, ["--shard-backbone"])])
def test_equals_one_process(workplace, reference, count, more):
    output = workplace / f"many-{count}"
    statuses, outputs, errors = finish(start(count, arguments(workplace, output, *more)))
    assert statuses == [0] * count and not errors, errors
    assert "selector:" in outputs[0] and not any(outputs[1:])
    check_same_run(output, reference)
    ours, theirs = (
        json.loads((folder / "selector.json").read_text())["config"]["selection"]["temperature"]
        for folder in (output, reference)
    )
    assert ours == pytest.approx(theirs, rel=0.05)


def test_lost_processes_and_other_counts(workplace, reference):
    """Interrupted on four processes, killed on two, finished by torchrun: the same run as on one."""
    output = workplace / "lost"
    processes = start(4, arguments(workplace, output))
    wait_for_steps(processes, output, 1)
    processes[2].send_signal(signal.SIGTERM)  # one alone: all must stop at the same step
    statuses, _, errors = finish(processes)
    assert statuses == [130] * 4 and not errors
    stopped = len(metrics(output))
    assert (output / f"checkpoint-{stopped:06}").is_dir() and stopped < STEPS

    processes = start(2, arguments(workplace, output, "--resume"))
    wait_for_steps(processes, output, stopped + 1)
    processes[1].kill()
    statuses, _, errors = finish(processes)
    assert statuses == [1, -signal.SIGKILL]
    assert len(errors) == 1 and "another process of this run has ended" in errors[0] and "--resume" in errors[0]

    done = torchrun(2, arguments(workplace, output, "--resume"))
    assert done.returncode == 0, done.stderr
    check_same_run(output, reference)


def test_a_silent_process_is_given_up(workplace):
    output = workplace / "silent"
    processes = start(2, arguments(workplace, output), timeout=15)
    wait_for_steps(processes, output, 1)
    processes[0].send_signal(signal.SIGSTOP)
    try:
        _, error = processes[1].communicate(timeout=PATIENCE)
        assert processes[1].returncode == 1
        assert "error: another process of this run has ended or does not answer" in error
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_mistakes_are_named_once(workplace, build_folder):
    def fails(command, **environment):
        done = subprocess.run(command, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 1 and done.stderr.count("error:") == 1, done.stderr
        return done.stderr

    words = arguments(workplace, workplace / "never")
    spot = [build_folder / "spot", "distill"]
    assert "WORLD_SIZE is 2" in fails([*spot, *words], WORLD_SIZE="2")
    assert "start tools/distill.py with torchrun" in fails([*spot, *words, "--shard-backbone"])
    assert "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set" in fails([sys.executable, SCRIPT, *words])

    # Both processes find these; under torchrun the first to end makes it stop the other.
    done = torchrun(2, arguments(workplace, workplace / "never", sequences=1))
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "2 processes cannot share a step of 1 sequences" in errors[0], done.stderr
    processes = start(2, arguments(workplace, workplace / "never", "--shard-backbone", sequences=3))
    statuses, _, errors = finish(processes)
    assert statuses == [1, 1] and len(errors) == 1 and "3 sequences a step do not divide evenly" in errors[0], errors
