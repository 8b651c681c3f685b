"""Training rows and evaluation prompts: needles, chains of variables, word lists, questions about documents, plain text.

Most rows are laid out as the prompts of `spot eval` are: introduction, haystack, question, answer prefix, answer. More
questions follow the first one, or stand in the haystack behind what they ask for, so that a row teaches more than once.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from . import wordings
from .binding import COLUMNS, FIRST_TOKENS
from .documents import document_row, word_list_row
from .pieces import SLOTS, TEXT, Item, Pieces, Row
from .wordings import Wording

# Shares of the rows. Documents and word lists need room: below their least length, needles take their place.
SHARES = {"needles": 0.6, "track": 0.14, "words": 0.03, "documents": 0.07, "copies": 0.05, "text": 0.11}
LEAST_LENGTH = {"words": 512, "documents": 1024}


class TooLong(Exception):
    """The parts of a row take more tokens than it may have."""


def bindings(row: Row, length: int) -> np.ndarray:
    """[n, COLUMNS] of the row's first `length` tokens; what is asked for has one value."""
    found = []
    for place, key, ids in row.bound:
        if place < length:
            query = row.asked.get(key, length)
            found.append([place, query if query < length else -1, *ids, *[-1] * (FIRST_TOKENS - len(ids))])
    return np.array(found, np.int64).reshape(-1, COLUMNS)


class Rows:
    """Draws rows; everything random comes from `pieces.rng`."""

    def __init__(self, pieces: Pieces, shares: dict[str, float] = SHARES):
        self.pieces, self.rng, self.shares = pieces, pieces.rng, shares

    def row(self, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens (uint16) and labels (uint8) of length + 1 tokens: what is read and, one further, what is predicted; bindings for
        binding.py."""
        count = length + 1
        while True:
            kind = self.rng.choices(list(self.shares), list(self.shares.values()))[0]
            if length < LEAST_LENGTH.get(kind, 0):
                kind = "needles"
            try:
                row = getattr(self, kind)(count)
            except TooLong:
                continue
            assert len(row.ids) == len(row.labels)
            if len(row) >= count:
                return (
                    np.array(row.ids[:count], np.uint16),
                    np.array(row.labels[:count], np.uint8),
                    bindings(row, length),
                )

    # --- text

    def text(self, count: int) -> Row:
        return Row().add(self.pieces.slice("text" if self.rng.random() < 0.6 else "essay", count).tolist())

    def copies(self, count: int) -> Row:
        """Text some spans of which occur again; their first tokens cannot be foreseen, the others can."""
        row = self.text(count)
        for _ in range(max(1, count // 1024)):
            size = self.rng.randrange(24, min(160, count // 4))
            source = self.rng.randrange(0, count - 2 * size)
            target = self.rng.randrange(source + size, count - size + 1)
            row.ids[target : target + size] = row.ids[source : source + size]
            row.labels[target : target + 12] = [0] * 12
            row.labels[target + 12 : target + size] = [2 + 2 * SLOTS.index("copy")] * (size - 12)
        return row

    def words(self, count: int) -> Row:
        return word_list_row(self.pieces, count)

    def documents(self, count: int) -> Row:
        return document_row(self.pieces, count)

    # --- needles

    def draw_wording(self) -> Wording:
        choice = self.rng.random()
        if choice < 0.12:
            return wordings.SUITE_TRAINED[0]
        if choice < 0.55:
            return wordings.draw_glue(self.rng, self.word_source())
        return wordings.draw_wording(self.rng)

    def word_source(self) -> Callable[[int], list[str]]:
        """Gives so many words at a call: of the list, or of running text, one after another until it ends."""
        if self.rng.random() < 0.4:
            return lambda count: self.rng.choices(self.pieces.words, k=count)
        text = self.pieces.tokenizer.decode(self.pieces.slice("essay", 160).tolist()).split()
        words = (word for word in text[1:] if not set("{}") & set(word))  # the first may be cut
        return lambda count: list(itertools.islice(words, count))

    def statement(self, wording: Wording, kind: str, key: Item, value: Item, lead: str, tail: str) -> Row:
        """A needle. Its key and value cannot be foreseen and carry no loss; nor does the rest, which soon repeats itself."""
        pattern, ends = lead + wording.needle.replace("{kind}", kind) + tail, {}
        row = Row().add(self.pieces.fill(pattern, ends, key=key, value=value), 0)
        if ends["value"] < ends["key"]:
            first = self.telling(value[0])
            row.bound = [(ends["key"] - 1, key, list(value[0][first : first + FIRST_TOKENS]))]
        return row

    def telling(self, ids: Sequence[int]) -> int:
        """Which token of an item after a space tells what it is: of a number or code, whose space is a token of its own, the second."""
        return int(list(ids[: len(self.pieces.space)]) == self.pieces.space and len(ids) > 1)

    def question(
        self, wording: Wording, kind: str, keys: list[Item], values: list[Item], lead: str = "", end: str = ".\n"
    ) -> Row:
        pieces, several = self.pieces, int(len(values) > 1)
        pattern = lead + (wording.question[several] + wording.prefix[several]).replace("{kind}", kind)
        row = Row().add(pieces.fill(pattern, query=pieces.joined(keys)), 0)
        slot = "multi" if several else "needle"
        if not several:
            row.asked = {keys[0]: len(row) - 1 + self.telling(values[0][0])}
        for separator, ids in pieces.enumerate(values):
            row.answer([*separator, *ids], slot, len(separator) + self.telling(ids))
        return row.add(pieces.fill(end)) if end else row

    def needles(self, count: int) -> Row:
        rng, pieces = self.rng, self.pieces
        same = rng.random() < 0.75  # one wording and one kind of keys and values, as in a prompt of the suite
        haystack = rng.choices(("essay", "text", "noise", "repeated", "needles"), (38, 12, 8, 6, 36))[0]
        if haystack == "essay":
            lead, tail = " ", ""
        else:
            lead, tail = "", "\n"

        def kinds() -> tuple[str, str]:
            small = count <= 512
            key = rng.choices(("pair", "word", "number", "uuid", "code"), (54, 10, 8, 4 if small else 16, 12))[0]
            value = rng.choices(("number", "uuid", "word", "code", "pair"), (60, 4 if small else 16, 10, 9, 5))[0]
            return key, value

        wording, (key_kind, value_kind) = self.draw_wording(), kinds()
        name = (
            rng.choice(wordings.KIND_WORDS.get(value_kind, ["word", "name"]))
            if rng.random() < 0.5
            else value_kind.replace("pair", "word")
        )
        intro = Row().add(pieces.fill(wording.intro[0].replace("{kind}", name)), 0) if wording.intro[0] else Row()

        # What may be filled with statements, and with questions.
        asked = (
            count * rng.uniform(0.15, 0.5)
            if count <= 1100
            else count * math.exp(rng.uniform(math.log(0.03), math.log(0.4)))
        )
        if haystack == "needles":
            stated = count - asked
        else:
            stated = count * math.exp(rng.uniform(math.log(min(0.3, 50 / count)), math.log(0.5)))
        multi_value = rng.random() < 0.2
        group = rng.choice((2, 3, 4)) if not multi_value and rng.random() < 0.2 else 1

        facts, events, used, keys = [], [], len(intro), set()
        while True:
            if not same:
                wording, (key_kind, value_kind) = self.draw_wording(), kinds()
                name = value_kind.replace("pair", "word")
            key = pieces.item(key_kind)
            if key in keys:
                if rng.random() < 0.05:
                    break
                continue
            keys.add(key)
            number = rng.choice((2, 3, 4)) if multi_value and rng.random() < 0.7 else 1
            times = sorted(rng.random() for _ in range(number))
            values = [pieces.item(value_kind) for _ in range(number)]
            new = [self.statement(wording, name, key, value, lead, tail) for value in values]
            size = sum(map(len, new))
            if facts and used + size > stated:
                break
            facts.append((key, values, times, wording, name))
            events += zip(times, new)
            used += size

        # Questions at the end, or anywhere behind what they ask for.
        spread = group == 1 and haystack != "needles" and rng.random() < 0.4
        rng.shuffle(facts)
        closing, asked_tokens, at = [], 0, 0
        while True:
            chosen = [facts[(at + i) % len(facts)] for i in range(min(group, len(facts)))]
            at += len(chosen)
            _, _, times, wording, name = chosen[0]
            values = [value for fact in chosen for value in fact[1]]
            here = spread and len(values) == 1
            ask = self.question(
                wording, name, [fact[0] for fact in chosen], values, "\n" if here and haystack == "essay" else ""
            )
            if asked_tokens and (asked_tokens + len(ask) > asked or at > 3 * len(facts) or at > 400):
                break
            asked_tokens += len(ask)
            if here:
                events.append((times[-1] + (1 - times[-1]) * rng.random(), ask))
            else:
                closing.append(ask)
        return self.assemble(
            count, intro, haystack, events, closing, strew=haystack in ("essay", "text") and rng.random() < 0.5
        )

    def assemble(
        self,
        count: int,
        intro: Row,
        haystack: str,
        events: list[tuple[float, Row]],
        closing: list[Row],
        strew: bool = False,
    ) -> Row:
        """intro, haystack with the events at their times in [0, 1), line break, closing questions: exactly `count` tokens.

        strew: numbers in the haystack that nobody asks for and that cannot be foreseen."""
        pieces = self.pieces
        close = Row()
        for ask in closing:
            close.extend(ask)
        gap = pieces.fill("\n") if haystack == "essay" and closing else []
        room = count - len(intro) - len(close) - len(gap) - sum(len(row) for _, row in events)
        if room < 0:
            raise TooLong
        kind = "text" if haystack == "needles" else haystack
        if haystack == "needles":  # what is left over comes first: less than a needle
            room_ids, places = pieces.haystack("text", room)[0], [room]
        else:
            room_ids, places = pieces.haystack(kind, room, strew)
            places = places or [room]
        label = 0 if kind in ("noise", "repeated") else TEXT
        row, last = Row().extend(intro), 0
        for time, event in sorted(events, key=lambda event: event[0]):
            place = places[int(time * len(places))]
            if place > last:
                row.add(room_ids[last:place], label)
                last = place
            row.extend(event)
        row.add(room_ids[last:], label)
        if strew:
            row.labels = [
                0 if known == TEXT and token in pieces.digits else known for token, known in zip(row.ids, row.labels)
            ]
        return row.add(gap, 0).extend(close)

    # --- variable tracking

    def chain(self, hops: int, taken: set[Item]) -> tuple[Item, list[Item], list[Row]]:
        """Value, names in order and the lines "VAR A = 12345", "VAR B = VAR A", ..."""
        pieces, names, lines = self.pieces, [], []
        value = pieces.number(5)
        while value in taken:
            value = pieces.number(5)
        taken.add(value)
        while len(names) <= hops:
            name = pieces.name()
            if name not in taken:
                taken.add(name)
                names.append(name)
        for at, name in enumerate(names):
            pattern = "VAR {key} = {value}\n" if at == 0 else "VAR {key} = VAR {value}\n"
            lines.append(Row().add(pieces.fill(pattern, key=name, value=names[at - 1] if at else value), 0))
        return value, names, lines

    def track_question(self, question: str, prefix: str, value: Item, names: list[Item], end: str = "\n") -> Row:
        pieces = self.pieces
        count = tuple(pieces.fill(" " + str(len(names))))
        row = Row().add(pieces.fill(question + prefix, value=value, count=(count, count[len(pieces.space) :])), 0)
        for hop, (spaced, _) in enumerate(names):
            row.answer(list(spaced), f"vt{min(hop, 6)}")
        return row.add(pieces.fill(end)) if end else row

    def track(self, count: int) -> Row:
        rng = self.rng
        intro_text, question, prefix = wordings.draw_tracking(rng)
        haystack = rng.choices(("noise", "text", "repeated", "needles"), (40, 20, 10, 30))[0]
        taken: set[Item] = set()
        intro = Row().add(self.pieces.fill(intro_text), 0) if intro_text else Row()
        if (
            intro_text == wordings.TRACK_INTRO and count > 700 and rng.random() < 0.6
        ):  # a worked example, as in the suite
            value, names, lines = self.chain(4, taken)
            for line in lines:
                intro.extend(line).add(self.pieces.noise * rng.randint(0, 2), 0)
            intro.extend(self.track_question(question, prefix, value, names, "\n\n"))
            intro.add(self.pieces.fill(intro_text), 0)
        room = count - len(intro)
        most = (
            room * 0.55
            if haystack == "needles"
            else room * math.exp(rng.uniform(math.log(min(0.3, 200 / room)), math.log(0.5)))
        )
        one = count > 500 and rng.random() < 0.08
        low, high = (
            rng.choice(((1, 2), (1, 4), (1, 6), (4, 4), (3, 6)))
            if count > 500
            else rng.choice(((1, 1), (1, 2), (1, 3)))
        )
        chains, events, closing, used, size = [], [], [], 0, 0
        while len(chains) < (1 if one else 4) or (not one and used < most):
            hops = rng.randint(low, high)
            value, names, lines = self.chain(hops, taken)
            events += zip(sorted(rng.random() for _ in lines), lines)
            used += sum(map(len, lines))
            chains.append((value, names))
            if used > room:
                raise TooLong
        rng.shuffle(chains)
        for value, names in chains[:100]:
            ask = self.track_question(question, prefix, value, names)
            if closing and used + size + len(ask) > room * 0.98:
                break
            if closing and haystack != "needles" and size > 0.35 * room:
                break
            closing.append(ask)
            size += len(ask)
        return self.assemble(count, intro, haystack, events, closing)
