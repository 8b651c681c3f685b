"""tools/chat_text.py: chats whose answers stand in their texts, source code, prose."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}"
TOKENS = 1024


def write(folder: Path, out: Path, *more: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        ROOT / "tools" / "chat_text.py",
        "--model",
        folder / "model",
        "--prose",
        folder / "prose.txt",
    ]
    command += ["--code", folder / "code", "--out", out, "--documents", "30", "--tokens", str(TOKENS), *more]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    (folder / "model").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(ROOT / "models" / "tiny-qwen3" / name, folder / "model")
    config = json.loads((folder / "model" / "tokenizer_config.json").read_text())
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    source = random.Random(3)
    words = [line for line in (ROOT / "docs" / "method.md").read_text().split() if line.isalpha()]
    paragraph = lambda: " ".join(source.choices(words, k=60)) + ". "
    read = "\n\n".join("".join(paragraph() for _ in range(4)) for _ in range(400))
    unread = "\n\n".join("unreadable " + paragraph() for _ in range(int(0.12 * 1600)))
    (folder / "prose.txt").write_text(read + "\n\n" + unread[: len(read) // 9])
    (folder / "code").mkdir()
    for index in range(9):
        (folder / "code" / f"module{index}.py").write_text(f"x{index} = 1\n" * 2000)
    return folder


def test_chats_hold_what_they_answer(folder, tmp_path):
    from transformers import AutoTokenizer

    ran = write(folder, tmp_path / "train.jsonl")
    assert ran.returncode == 0, ran.stderr
    texts = [json.loads(line)["text"] for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len(texts) == 30 and all(text.startswith("# module") for text in texts[::3])
    assert not any("unreadable" in text for text in texts)
    tokenizer, lengths = AutoTokenizer.from_pretrained(folder / "model"), []
    for text in texts[2::3]:
        turns = text.split("<user>")[1:]
        context = turns[0].split("</user>")[0].rsplit("\n\n", 1)[0]
        assert len(turns) >= 2
        for turn in turns:
            question, answer = turn.split("</user>\n<assistant>")
            values = answer.removesuffix("</assistant>\n").removesuffix(".").split(", ")
            for value in values:
                lines = [line for line in context.replace(". ", "\n").split("\n") if value in line]
                assert lines, (value, question)
                if "hold the value" not in question:  # a value stands beside a key that the question names
                    assert any(
                        key in question for line in lines for key in line.replace('"', " ").replace(":", " ").split()
                    )
        lengths.append(len(tokenizer(text)["input_ids"]))
    assert max(lengths) > TOKENS // 2 and sorted(lengths)[len(lengths) // 2] <= TOKENS
    assert write(folder, tmp_path / "again.jsonl").returncode == 0
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "train.jsonl").read_bytes()
    assert write(folder, tmp_path / "other.jsonl", "--seed", "2").returncode == 0
    assert (tmp_path / "other.jsonl").read_bytes() != (tmp_path / "train.jsonl").read_bytes()


def test_what_is_missing_is_named(folder, tmp_path):
    ran = write(folder, tmp_path / "train.jsonl", "--prose", str(tmp_path / "none.txt"))
    assert ran.returncode == 2 and "none.txt" in ran.stderr and not list(tmp_path.iterdir())
    (tmp_path / "empty").mkdir()
    ran = write(folder, tmp_path / "train.jsonl", "--code", str(tmp_path / "empty"))
    assert ran.returncode == 2 and "no Python sources" in ran.stderr
