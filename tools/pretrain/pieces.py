"""Rows are put together from parts that are tokenised once, at places where the tokenizer itself would cut."""

import functools
import json
import math
import pathlib
import random
import re

import numpy as np
import tokenizers

# Labels of tokens: what a token counts for when it is to be predicted.
IGNORED, TEXT = 0, 1
# Answers: 2 + 2 * slot, plus one for the first token that tells which of several answers it is. Variables by their hop.
SLOTS = ("needle", "multi", "words", "qa", "copy", "vt0", "vt1", "vt2", "vt3", "vt4", "vt5", "vt6")
NUM_LABELS = 2 + 2 * len(SLOTS)

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

Ids = list[int]
Item = tuple[
    tuple[int, ...], tuple[int, ...]
]  # tokens after a space, the space included; tokens at the start of a line


def uuid(rng: random.Random) -> str:
    text = f"{rng.getrandbits(128):032x}"
    return f"{text[:8]}-{text[8:12]}-4{text[13:16]}-{rng.choice('89ab')}{text[17:20]}-{text[20:]}"


def letters(rng: random.Random, count: int, alphabet: str = "ABCDEFGHIJKLMNOPQRSTUVWXYZ") -> str:
    return "".join(rng.choice(alphabet) for _ in range(count))


def pseudo_word(rng: random.Random) -> str:
    consonants, vowels = "bdfghjklmnprstvz", "aeiou"
    shape = rng.choice(("cvccvcv", "cvcvcvc", "vccvcvc"))
    return "".join(rng.choice(consonants if kind == "c" else vowels) for kind in shape)


class Pieces:
    """Tokenised patterns, keys, values and haystacks. `held_out` picks the words, codes and documents kept from training."""

    def __init__(
        self, folder: pathlib.Path, tokenizer_file: pathlib.Path, seed: int, held_out: bool = False, pool: int = 8000
    ):
        self.rng = random.Random(seed)
        self.tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))
        suffix = "_held_out" if held_out else ""
        self.streams = {name: np.load(folder / f"{name}{suffix}.npy", mmap_mode="r") for name in ("text", "essay")}
        words = json.loads((folder / "words.json").read_text())
        cut = int(len(words) * 0.9)
        self.words = words[cut:] if held_out else words[:cut]
        vocabulary = [
            self.tokenizer.decode([i], skip_special_tokens=False) for i in range(self.tokenizer.get_vocab_size())
        ]
        self.ends_sentence = np.array([bool(re.search(r"[.!?]$", token)) for token in vocabulary])
        self.starts_word = np.array([token.startswith(" ") and len(token) > 1 for token in vocabulary])
        self.ends_line = np.array([token.endswith("\n") for token in vocabulary])
        self.space = self.tokenizer.encode(" ").ids
        self.digits = [self.tokenizer.encode(str(digit)).ids[0] for digit in range(10)]
        self.noise = self.tokenizer.encode(NOISE + "\n").ids
        self.word_items = self._items(self.words)
        self.hyphened = [
            tuple(encoding.ids) for encoding in self.tokenizer.encode_batch(["-" + word for word in self.words])
        ]
        # Codes and names are told apart by their first letter or digit: a third of them is held out.
        self.held_out = held_out
        self.pools = {
            "uuid": self._items([uuid(self.rng) for _ in range(pool)]),
            "code": self._items(self._codes(pool)),
            "name": self._items(self._names(pool)),
        }

    def _items(self, texts: list[str]) -> list[Item]:
        spaced = self.tokenizer.encode_batch([" " + text for text in texts])
        bare = self.tokenizer.encode_batch(texts)
        return [(tuple(a.ids), tuple(b.ids)) for a, b in zip(spaced, bare)]

    def _is_mine(self, text: str) -> bool:
        return (sum(text.encode()) % 3 == 0) == self.held_out

    def _codes(self, count: int) -> list[str]:
        found = set()
        while len(found) < count:
            shape = self.rng.random()
            if shape < 0.4:
                code = f"{self.rng.getrandbits(32):08x}"
            elif shape < 0.7:
                code = letters(self.rng, 3) + str(self.rng.randrange(100, 1000))
            else:
                code = letters(self.rng, self.rng.choice((4, 5, 6)))
            if self._is_mine(code):
                found.add(code)
        return sorted(found)

    def _names(self, count: int) -> list[str]:
        found = set()
        while len(found) < count:
            name = letters(self.rng, self.rng.choices((3, 4, 5, 6), (2, 1, 6, 1))[0])
            if self._is_mine(name):
                found.add(name)
        return sorted(found)

    def number(self, num_digits: int) -> Item:
        bare = [self.digits[self.rng.randrange(1, 10)]] + [
            self.digits[self.rng.randrange(10)] for _ in range(num_digits - 1)
        ]
        return (*self.space, *bare), tuple(bare)

    def item(self, kind: str) -> Item:
        """A random key or value."""
        rng = self.rng
        if kind == "pair":
            spaced, bare = rng.choice(self.word_items)
            tail = rng.choice(self.hyphened)
            return spaced + tail, bare + tail
        if kind == "word":
            return rng.choice(self.word_items)
        if kind == "number":
            return self.number(7 if rng.random() < 0.6 else rng.randint(2, 8))
        return rng.choice(self.pools[kind])

    def name(self) -> Item:
        return self.rng.choice(self.pools["name"])

    @functools.lru_cache(maxsize=20_000)
    def parsed(self, pattern: str) -> tuple:
        """Tokens and (placeholder, after a space) in turn."""
        parts = []
        pieces = re.split(r"( ?)\{(key|value|query|count)\}", pattern)
        for at in range(0, len(pieces), 3):
            if pieces[at]:
                parts.append(self.tokenizer.encode(pieces[at]).ids)
            if at + 2 < len(pieces):
                parts.append((pieces[at + 2], bool(pieces[at + 1])))
        return tuple(parts)

    def fill(self, pattern: str, ends: dict[str, int] | None = None, **values: Item) -> Ids:
        """Tokens of a pattern; `ends` gets where each placeholder's tokens end."""
        ids = []
        for part in self.parsed(pattern):
            ids += part if isinstance(part, list) else values[part[0]][0 if part[1] else 1]
            if ends is not None and not isinstance(part, list):
                ends[part[0]] = len(ids)
        return ids

    def enumerate(self, items: list[Item]) -> list[tuple[Ids, Ids]]:
        """The separators and the tokens of "a, b, and c", to stand after a space."""
        out = []
        for at, (spaced, _) in enumerate(items):
            text = "" if at == 0 else "," if at + 1 < len(items) else ", and" if len(items) > 2 else " and"
            out.append((self.parsed(text)[0] if text else [], list(spaced)))
        return out

    def joined(self, items: list[Item]) -> Item:
        """An enumeration as one item, to stand after a space."""
        ids = tuple(token for separator, tokens in self.enumerate(items) for token in (*separator, *tokens))
        return ids, ids

    def slice(self, stream: str, count: int) -> np.ndarray:
        tokens = self.streams[stream]
        if count > len(tokens):
            return np.resize(np.asarray(tokens), count)
        begin = self.rng.randrange(len(tokens) - count + 1)
        return np.asarray(tokens[begin : begin + count])

    def strewn(self, ids: np.ndarray) -> np.ndarray:
        """The tokens with numbers before some of their words, cut to as many tokens as there were.

        In long texts there are hundreds of numbers that are no needle's; rows of a few thousand tokens know them from here."""
        share = math.exp(self.rng.uniform(math.log(1 / 40), math.log(1 / 4)))  # of the words
        out: Ids = []
        for token, starts_word in zip(ids.tolist(), self.starts_word[ids]):
            if starts_word and self.rng.random() < share:
                out += self.number(self.rng.randint(1, 8))[0]
            out.append(token)
        return np.array(out[: len(ids)], ids.dtype)

    def haystack(self, kind: str, count: int, strew: bool = False) -> tuple[Ids, list[int]]:
        """`count` tokens and where a needle may stand: essay after sentences, text and noise after lines. strew: numbers among them."""
        if kind == "noise":
            ids = (self.noise * (count // len(self.noise) + 1))[:count]
            return ids, list(range(0, count + 1, len(self.noise)))
        if kind == "repeated":  # a sentence of the text over and over
            line = [
                token for token in self.slice("essay", self.rng.randint(8, 24)).tolist() if not self.ends_line[token]
            ]
            line += self.parsed("\n")[0]
            ids = (line * (count // len(line) + 1))[:count]
            return ids, list(range(0, count + 1, len(line)))
        ids = self.slice(kind, count)
        if strew:
            ids = self.strewn(ids)
        ends = self.ends_sentence if kind == "essay" else self.ends_line
        places = np.flatnonzero(ends[ids]) + 1
        if len(places) < count // 160:  # tables and the like: before any word
            places = np.flatnonzero(self.starts_word[ids])
        return ids.tolist(), [0] + places.tolist()


class Row:
    """Tokens and their labels, appended part by part.

    bound: (place of a key's last token, key, first tokens of the value that stood before it); asked: where an answer follows, by its key."""

    def __init__(self):
        self.ids: Ids = []
        self.labels: list[int] = []
        self.bound: list[tuple[int, Item, Ids]] = []
        self.asked: dict[Item, int] = {}

    def add(self, ids, label: int = TEXT) -> "Row":
        self.ids += ids
        self.labels += [label] * len(ids)
        return self

    def answer(self, ids: Ids, slot: str, skip: int = 0) -> "Row":
        """An answer; its `skip`-th token is the one that tells which."""
        label = 2 + 2 * SLOTS.index(slot)
        self.ids += ids
        self.labels += [label] * len(ids)
        self.labels[len(self.labels) - len(ids) + min(skip, len(ids) - 1)] = label + 1
        return self

    def extend(self, other: "Row") -> "Row":
        self.bound += [(len(self) + place, key, ids) for place, key, ids in other.bound]
        for key, place in other.asked.items():
            self.asked.setdefault(key, len(self) + place)
        self.ids += other.ids
        self.labels += other.labels
        return self

    def __len__(self) -> int:
        return len(self.ids)
