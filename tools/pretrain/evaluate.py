"""Exact match on prompts laid out as those of `spot eval`, with keys, values and text that training never saw.

An answer counts when each of its tokens is the likeliest one after the right ones before it: what greedy decoding gives.
"""

import json
import pathlib
import time

import torch

from . import wordings
from .models import TinyModel
from .pieces import Pieces, Row
from .rows import Rows, TooLong

TOKENS = 65_536  # of a forward pass, or one prompt
HELD_OUT = wordings.SUITE_HELD_OUT + wordings.OWN_HELD_OUT
# Tasks that go round several wordings which training never saw, those written last in the last of them.
WORDINGS = {
    "multikey_held_out": HELD_OUT,
    "multikey_fresh": wordings.FRESH_HELD_OUT,
    "multikey_later": wordings.LATER_HELD_OUT,
}


class Prompts(Rows):
    """One prompt a call: exactly `length` tokens and the answer behind them."""

    def make(self, task: str, length: int, index: int) -> Row:
        if task in WORDINGS:
            return self._multikey(length, index, WORDINGS[task][index % len(WORDINGS[task])])
        return getattr(self, task)(length, index)

    def _needles(
        self,
        length: int,
        wording,
        keys: list[tuple],
        asked: list[int],
        value_kind: str,
        depth: float,
        haystack: str = "essay",
    ) -> Row:
        """keys: (key, number of values); asked: places of keys in it. The first needle lies at `depth`."""
        pieces, rng = self.pieces, self.rng
        lead, tail = (" ", "") if haystack == "essay" else ("", "\n")
        events, values_of = [], []
        for at, (key, number) in enumerate(keys):
            times = sorted(rng.random() for _ in range(number))
            if at == 0 and number == 1:
                times = [depth]
            values = [pieces.item(value_kind) if value_kind != "number" else pieces.number(7) for _ in range(number)]
            values_of.append(values)
            events += [
                (t, self.statement(wording, value_kind, key, value, lead, tail)) for t, value in zip(times, values)
            ]
        values = [value for at in asked for value in values_of[at]]
        several = int(len(values) > 1)
        intro = Row().add(pieces.fill(wording.intro[several].replace("{kind}", value_kind)), 0)
        closing = self.question(wording, value_kind, [keys[at][0] for at in asked], values, end="")
        row = self.assemble(length, intro, haystack, events, [closing])
        assert len(row) == length
        return row

    def _keys(self, kind: str, count: int) -> list[tuple]:
        keys: dict = {}
        while len(keys) < count:
            keys[self.pieces.item(kind)] = None
        return list(keys)

    def _multikey(self, length: int, index: int, wording) -> Row:
        """Needles of one wording in essay text, one for 256 tokens."""
        keys = [(key, 1) for key in self._keys("pair", max(9, length // 256 + 1))]
        return self._needles(length, wording, keys, [0], "number", (index % 10 + 0.5) / 10)

    def _glue(self, length: int, index: int, value_first: float) -> Row:
        """Among held-out words of any sense. At 1,024 tokens the wordiest do not fit: others are drawn."""
        while True:
            wording = wordings.draw_glue(
                self.rng, lambda count: self.rng.choices(self.pieces.words, k=count), value_first
            )
            try:
                return self._multikey(length, index, wording)
            except TooLong:
                continue

    def multikey_value_first(self, length: int, index: int) -> Row:
        return self._glue(length, index, 1)

    def multikey_key_first(self, length: int, index: int) -> Row:
        return self._glue(length, index, 0)

    def multikey_known(self, length: int, index: int) -> Row:
        return self._multikey(length, index, wordings.SUITE_TRAINED[0])

    def uuid_held_out(self, length: int, index: int) -> Row:
        """uuid keys and values, nothing but needles."""
        wording = HELD_OUT[index % len(HELD_OUT)]
        keys = [(key, 1) for key in self._keys("uuid", min(max(2, (length - 320) // 110), 1000))]
        return self._needles(length, wording, keys, [0], "uuid", (index % 10 + 0.5) / 10, "needles")

    def multivalue_held_out(self, length: int, index: int) -> Row:
        """All four values of one key among eight, in their order."""
        keys = [(key, 4) for key in self._keys("pair", 2 if length < 2048 else 8)]
        return self._needles(length, HELD_OUT[index % len(HELD_OUT)], keys, [0], "number", 0.5)

    def multiquery_held_out(self, length: int, index: int) -> Row:
        """The values of four keys among twelve."""
        keys = [(key, 1) for key in self._keys("pair", 6 if length < 1024 else 12)]
        return self._needles(length, HELD_OUT[index % len(HELD_OUT)], keys, [0, 1, 2, 3], "number", self.rng.random())

    def vt(self, length: int, index: int) -> Row:
        """Four chains of four hops in noise; all five variables of one value, in order."""
        taken, events, chains = set(), [], []
        for _ in range(4):
            value, names, lines = self.chain(4 if length > 700 else 1, taken)
            events += zip(sorted(self.rng.random() for _ in lines), lines)
            chains.append((value, names))
        intro = Row().add(self.pieces.fill(wordings.TRACK_INTRO), 0)
        closing = self.track_question(*wordings.TRACK_SUITE, *chains[0], end="")
        return self.assemble(length, intro, "noise", events, [closing])


def cells(lengths: list[int]) -> list[tuple[str, int, int]]:
    """(task, length, prompts), the most telling first."""
    out = []
    for length in sorted(length for length in lengths if length <= 32768):
        out += [
            ("multikey_held_out", length, 100),
            ("multikey_later", length, 60),
            ("multikey_fresh", length, 51),
            ("vt", length, 100),
        ]
        if length >= 1024:  # nine long needles
            out += [("multikey_value_first", length, 50), ("multikey_key_first", length, 50)]
        out += [("multivalue_held_out", length, 50), ("multikey_known", length, 50)]
    for length in sorted(length for length in lengths if length > 32768):
        out += [("multikey_held_out", length, 40 if length <= 65536 else 20)]
    for length in sorted(length for length in lengths if length <= 32768):
        out += [("uuid_held_out", length, 50), ("multiquery_held_out", length, 50)]
    return out


def markdown(results: dict) -> str:
    """Tables for a model's card: exact match by task and length (the prompts in brackets where few), and by held-out wording."""
    cells_of = {tuple(name.split("@")): cell for name, cell in results.items() if "@" in name}
    lengths = sorted({int(length) for _, length in cells_of})

    def line(first: str, numbers: list) -> str:
        return "| " + " | ".join([first, *numbers]) + " |"

    def rows(names, number) -> list[str]:
        return [line(name, [number(key, str(length)) for length in lengths]) for name, key in names]

    def exact(task: str, length: str) -> str:
        cell = cells_of.get((task, length))
        return "" if not cell else f"{cell['exact']:.2f}" + (f" ({cell['prompts']})" if cell["prompts"] < 50 else "")

    def of_wording(key: tuple[str, int], length: str) -> str:
        task, at = key
        return f"{cells_of[task, length]['by_wording'][at]:.2f}" if (task, length) in cells_of else ""

    head = ["| --- |" + " --- |" * len(lengths)]
    columns = [f"{length // 1024}K" if length >= 1024 else str(length) for length in lengths]
    by_wording = [(wording.needle, (task, at)) for task, known in WORDINGS.items() for at, wording in enumerate(known)]
    return (
        "\n".join(
            [
                line("exact match", columns),
                *head,
                *rows([(task, task) for task in dict.fromkeys(task for task, _ in cells_of)], exact),
                "",
                line("held-out wording", columns),
                *head,
                *rows(by_wording, of_wording),
            ]
        )
        + "\n"
    )


@torch.no_grad()
def evaluate(model: TinyModel, pieces: Pieces, lengths: list[int], seconds: float, file: pathlib.Path) -> dict:
    """Shares of exact answers by task and length, written to `file` after each cell; stops when the time is over.

    A cell also tells the share of right first tokens (of each of several answers) and the number of prompts."""
    start, results = time.time(), {}
    prompts = Prompts(pieces)
    for task, length, count in cells(lengths):
        pieces.rng.seed(f"{task}/{length}")
        exact, first = [], []
        size = max(1, TOKENS // length)
        for begin in range(0, count, size):
            if time.time() - start > seconds:
                break
            made = [prompts.make(task, length, index) for index in range(begin, min(count, begin + size))]
            labels = torch.tensor([row.labels for row in made])
            tokens = torch.tensor([row.ids for row in made])
            asked = labels >= 2  # the token before predicts each
            rows, at = asked.nonzero(as_tuple=True)
            logits = model.logits(tokens.to(model.device), (rows * length + at - 1).to(model.device))
            hits = torch.zeros_like(labels, dtype=torch.bool)
            hits[asked] = logits.argmax(-1).cpu() == tokens[asked]
            exact += (hits | ~asked).all(1).tolist()
            first += hits[asked & (labels % 2 == 1)].tolist()
        if exact:
            results[f"{task}@{length}"] = {
                "exact": round(sum(exact) / len(exact), 4),
                "first_tokens": round(sum(first) / len(first), 4),
                "prompts": len(exact),
            }
            cell = results[f"{task}@{length}"]
            kinds = len(WORDINGS.get(task, []))
            if kinds:
                cell["by_wording"] = [
                    round(sum(part) / max(1, len(part)), 3) for part in (exact[at::kinds] for at in range(kinds))
                ]
            print(
                f"evaluation {task}@{length}: exact {cell['exact']:.3f}, first tokens {cell['first_tokens']:.3f}, {len(exact)} prompts, "
                f"{time.time() - start:.0f} s",
                flush=True,
            )
            file.write_text(json.dumps(results, indent=1))
    return results


@torch.no_grad()
def text_loss(model: TinyModel, pieces: Pieces, length: int = 4096, tokens: int = 262_144) -> float:
    """Mean cross entropy of held-out text in nats a token."""
    total, count = 0.0, 0
    rows = max(1, min(16, TOKENS // length))
    pieces.rng.seed("text")
    while count < tokens:
        ids = torch.tensor([pieces.slice("text", length + 1).tolist() for _ in range(rows)], device=model.device)
        total += model.losses(ids[:, :-1], ids[:, 1:].reshape(-1), eager=True)[0].sum().item()
        count += rows * length
    return total / count
