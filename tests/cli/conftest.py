"""Tiny models and the program."""

import pathlib
import shutil
import sys

import pytest

pytest.importorskip("transformers")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import program  # noqa: E402


@pytest.fixture(scope="session")
def spot(build_folder) -> program.Program:
    return program.Program(build_folder / "spot")


@pytest.fixture(scope="session")
def commands(spot) -> dict[str, list[program.Option]]:
    return spot.commands()


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> pathlib.Path:
    """model/ (random, two layers), text.jsonl and text.txt."""
    folder = tmp_path_factory.mktemp("cli")
    program.make_model(folder / "model")
    program.make_text(folder / "text.jsonl")
    (folder / "text.txt").write_text((program.ROOT / "LICENSE").read_text() * 4)
    return folder


@pytest.fixture(scope="session")
def unreadable(place, tmp_path_factory) -> pathlib.Path:
    """The model with a selector, whose weights nothing can be read from."""
    folder = tmp_path_factory.mktemp("unreadable") / "model"
    shutil.copytree(program.SHIPPED, folder)
    (folder / "model.safetensors").write_bytes(b"")
    return folder


@pytest.fixture()
def basics(place, tmp_path):
    """By command: words that make a small run, given a model; absent for commands that are not known here."""

    def words(model) -> dict[str, list]:
        text = ["--text", place / "text.txt"]
        return {
            "generate": ["--model", model, "--prompt", "Hi", "--max-new-tokens", 2],
            "distill": program.distillation(model, place / "text.jsonl", tmp_path / "out", "--steps", 2)[1:],
            "eval text": ["--model", model, *text, "--length", 512, "--skip", 100, "--sequences", 1, "--out", tmp_path / "e"],
            "eval needle": ["--model", model, *text, "--length", 600, "--distractors", 2, "--samples", 1, "--out", tmp_path / "e"],
            "eval ruler": ["--model", model, "--tasks", "vt", "--lengths", 1024, "--samples", 1, "--out", tmp_path / "e"],
            "bench": ["--model", model, "--context", 256, "--steps", 2],
            "bench decode": ["--device", "cpu", "--shapes", "qwen3.5-9b", "--lengths", 1024, "--batch", 1, "--rounds", 1, "--sets", 1],
            "bench prefill": ["--model", model, "--lengths", 128, "--chunk", 64, "--rounds", 1],
            "bench distill": ["--model", model, "--length", 448, "--steps", 1],
            "inspect": [model],
            "quantize": [model, "--out", tmp_path / "fp8"],
        }  # fmt: skip

    return words
