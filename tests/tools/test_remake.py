"""tools/remake.mk: a model, its selector and its tables in one command at the smallest size; what is finished is kept."""

import os
import random
import subprocess
import sys

import pytest

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
from pretrain import pieces  # noqa: E402

SMALL = [
    "INIT=",
    "PRETRAIN=--seconds 2 --hidden 32 --layers 4 --mlp 48 --tokens 512 --eval-lengths 512 --device cpu",
    "PHASES_qwen3=256:1",
    "PHASES_qwen3_5=256:1",
    "WORKERS=0",
    "WALL=0",
    "EVAL_SECONDS=1",
    "DOCUMENTS=20",
    "LENGTH=1024",
    "LONGEST=1024",
    "STEPS_tiny-qwen3=1",
    "STEPS_tiny-qwen3.5=1",
    "DISTILL=--held-out-every 5 --held-out-sequences 1",
    "SAMPLES=1",
    "SEQUENCES=1",
    "JOBS=2",
    "SHARE=2",
    "RULES=k=512",
    "SIX=vt",
    "OTHER=cwe",
    "DTYPE=float32",
    "SMOLLM2=",
]


@pytest.fixture()
def remake(build_folder, tmp_path):
    def run(*words):
        return subprocess.run(
            ["make", "-f", "tools/remake.mk", "-j2", f"PYTHON={sys.executable}", f"OUT={tmp_path / 'out'}", *words],
            cwd=ROOT,
            env=os.environ
            | {"SPOT_BUILD": str(build_folder), "SPOT_GPUS": "cpu", "SPOT_GPU_LOCKS": str(tmp_path / "locks")},
            capture_output=True,
            text=True,
        )

    return run


@pytest.mark.timeout(900)
def test_models_selectors_and_tables_come_out(remake, tmp_path):
    rng = random.Random(3)
    words = sorted({pieces.pseudo_word(rng) for _ in range(600)})
    documents = [
        "\n".join(" ".join(rng.choice(words) for _ in range(30)).capitalize() + "." for _ in range(100))
        for _ in range(60)
    ]
    (tmp_path / "text").write_text("\x00".join(documents))
    command = [
        f"DATA={tmp_path / 'text'}",
        *SMALL,
        *(f"{tmp_path}/out/done/table-{table}" for table in ("tiny-qwen3-spot", "tiny-qwen3.5-text")),
    ]
    first = remake(*command)
    assert first.returncode == 0, first.stderr + first.stdout
    for part in (
        "text",
        "model-tiny-qwen3",
        "selector-tiny-qwen3-spot",
        "table-tiny-qwen3-spot",
        "model-tiny-qwen3.5",
        "selector-tiny-qwen3.5-spot",
        "table-tiny-qwen3.5-text",
    ):
        assert f"{part} is done" in first.stdout
    table = (tmp_path / "out" / "tables" / "tiny-qwen3" / "spot" / "accuracy.md").read_text()
    for method in ("spot:k=512,cache=int4", "spot:k=10%,cache=nvfp4", "quest:k=512", "twilight:p=0.95,k=75%"):
        assert f"| {method} |" in table
    assert (
        "| spot:p=0.9,cache=int4 |"
        in (tmp_path / "out" / "tables" / "tiny-qwen3.5" / "text" / "accuracy.md").read_text()
    )
    again = remake(*command)
    assert again.returncode == 0 and "is done" not in again.stdout


def test_a_failure_is_told_and_leaves_no_mark(remake, tmp_path):
    done = remake("DATA=/no/such/text", *SMALL, "models")
    log = tmp_path / "out" / "logs" / "text.log"
    assert done.returncode != 0 and f"error: text failed, see {log}" in done.stderr
    assert "/no/such/text does not exist" in log.read_text() and not (tmp_path / "out" / "done" / "text").exists()
    assert "DATA: give the text" in remake(*SMALL, "models").stderr


def test_every_table_is_asked_for_with_its_options(remake):
    lines = remake("-n", "DATA=text", "SMOLLM2=/models/smollm2").stdout.splitlines()
    tables = {line.split("/logs/")[1].split(".log")[0]: line for line in lines if "tools/accuracy.py" in line}
    assert len(tables) == 12
    options = "--lengths 2048,4096,8192 --sequences 4 --rules k=512,k=1024,k=2048,k=10%,k=25%,p=0.7,p=0.8,p=0.9 -- --threads 1 --dtype bfloat16"
    assert options in tables["table-smollm2-text"]
    assert (
        "cache=int4,prefill=sparse,tile=16; spot:p=0.7,cache=int4,prefill=sparse,tile=16"
        in tables["table-tiny-qwen3.5-sparse"]
    )
    assert all("--no-baselines" in line for name, line in tables.items() if name.endswith(("paper", "sparse")))


def test_presets_learn_by_their_own_loss_and_kept_models_are_not_trained(remake, tmp_path):
    lines = remake("-n", "DATA=text", "SMOLLM2=/models/smollm2", "KEEP=tiny-qwen3").stdout.splitlines()
    commands = {line.split("/logs/")[1].split(".log")[0]: line for line in lines if "/logs/" in line}
    assert (
        "--lr 3e-3 --calibration-length 32768 --dtype bfloat16 --loss dense" in commands["selector-tiny-qwen3.5-spot"]
    )
    assert (
        "--preset paper" in commands["selector-tiny-qwen3-paper"]
        and "--loss" not in commands["selector-tiny-qwen3-paper"]
    )
    assert "--length 4096 --length-mix 1024:1,2048:1,4096:1 --sequences-per-step 8" in commands["selector-smollm2-spot"]
    assert f"ln -sfn {ROOT}/models/tiny-qwen3 {tmp_path}/out/models/tiny-qwen3;" in commands["model-tiny-qwen3"]
    assert "pretrain_tiny.py" in commands["model-tiny-qwen3.5"]
