"""Drives the program of tokenize_tool.cpp, and compares with the `tokenizers` library."""

import subprocess

import pytest
from patience import SLOWER


class Ours:
    def __init__(self, build_folder, folder, tokenizer_file):
        self.program, self.folder, self.file = build_folder / "src" / "text" / "tokenize_tool", folder, tokenizer_file
        assert self.program.is_file(), f"{self.program} is not built"

    def run(self, mode, data, *flags):
        (self.folder / "in").write_bytes(data)
        command = [self.program, mode, self.file, self.folder / "in", self.folder / "out", *flags]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120 * SLOWER)
        assert result.returncode == 0, result.stderr
        return (self.folder / "out").read_bytes()

    def encode(self, text, special=False):
        return [int(i) for i in self.run("encode", text.encode(), *["special"] * special).split()]

    def decode(self, ids, skip=False, mode="decode"):
        return self.run(mode, "\n".join(map(str, ids)).encode(), *["skip"] * skip).decode()


def added_tokens(tokenizer):
    return [token.content for token in tokenizer.get_added_tokens_decoder().values()]


def assert_same_ids(theirs, ours, text):
    """Equal ids, or a message that shows the text around the first difference."""
    encoding = theirs.encode(text, add_special_tokens=False)
    if encoding.ids == ours:
        return
    at = next((i for i, (a, b) in enumerate(zip(encoding.ids, ours)) if a != b), min(len(encoding.ids), len(ours)))
    position = encoding.offsets[min(at, len(encoding.ids) - 1)][0]
    pytest.fail(
        f"token {at}: {encoding.ids[at : at + 4]} against {ours[at : at + 4]} "
        f"near {text[max(0, position - 12) : position + 12]!a}"
    )
