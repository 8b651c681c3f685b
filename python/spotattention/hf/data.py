"""Training sequences out of documents: shuffled, tokenised, joined by end-of-text tokens and cut to one length."""

import gzip
import json
import os
import pathlib
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

Document = str | list[int] | Tensor
Data = str | os.PathLike | Iterable[Document | os.PathLike]

_ROWS = (".jsonl", ".ndjson")
_WINDOW = 8192  # documents that are shuffled together


def read_documents(path: pathlib.Path) -> Iterator[str]:
    """A text file is one document, each row of .jsonl or .ndjson one (field "text"); either may be .gz."""
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
    with opened as file:
        if plain.suffix not in _ROWS:
            yield file.read()
            return
        for number, row in enumerate(file, 1):
            if not row.strip():
                continue
            try:
                text = json.loads(row).get("text")
            except (json.JSONDecodeError, AttributeError) as error:
                raise ValueError(f"{path}:{number}: not a JSON object with a field text") from error
            if isinstance(text, str):
                yield text


def _documents(data: Data) -> Iterator[Document]:
    if isinstance(data, (str, os.PathLike)):
        path = pathlib.Path(data)
        if not path.exists():
            raise FileNotFoundError(
                f"{path} does not exist; data is a file or folder of text, or an iterable of documents"
            )
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            yield from read_documents(file)
        return
    for item in data:
        if isinstance(item, os.PathLike):
            yield from _documents(item)
        else:
            yield item


class TrainingData:
    """`data` without end: files, a folder of them, or documents (texts, or lists of token ids) that can be read again.

    Every held_out_every-th document is never trained on. Raises ValueError when there is nothing else.
    """

    def __init__(
        self,
        data: Data,
        encode: Callable[[str], list[int]] | None,
        end: int,
        length: int,
        held_out_every: int,
        seed: int,
    ) -> None:
        if iter_once(data):
            raise ValueError("data is an iterator that ends; pass a list, a dataset, or files, which can be read again")
        self.data, self.encode, self.end, self.length = data, encode, end, length
        self.held_out_every, self.seed, self.epoch = held_out_every, seed, 0
        self._tokens = self._endless()
        self._rest: list[int] = []

    def tokens_of(self, document: Document) -> list[int]:
        if isinstance(document, str):
            if self.encode is None:
                raise ValueError("data holds texts; pass the model's tokenizer, or documents of token ids")
            return self.encode(document)
        return [int(token) for token in document]

    def _is_held_out(self, index: int) -> bool:
        return self.held_out_every > 0 and index % self.held_out_every == self.held_out_every - 1

    def _endless(self) -> Iterator[list[int]]:
        while True:
            order, window, empty = random.Random(f"{self.seed} {self.epoch}"), [], True
            kept = (d for i, d in enumerate(_documents(self.data)) if not self._is_held_out(i))
            for document in kept:
                window.append(document)
                if len(window) == _WINDOW:
                    order.shuffle(window)
                    yield from map(self.tokens_of, window)
                    window, empty = [], False
            order.shuffle(window)
            made = [tokens for tokens in map(self.tokens_of, window) if tokens]
            if empty and not made:
                raise ValueError("the training data is empty: it holds no text beside held-out documents")
            yield from made
            self.epoch += 1

    def next(self) -> Tensor:
        """The next sequence, [length] int64."""
        while len(self._rest) < self.length:
            self._rest += [*next(self._tokens), self.end]
        taken, self._rest = self._rest[: self.length], self._rest[self.length :]
        return torch.tensor(taken)

    def held_out(self, count: int) -> list[Tensor]:
        """The first `count` sequences of the held-out documents; fewer when there are not enough for that."""
        sequences: list[Tensor] = []
        rest: list[int] = []
        if self.held_out_every == 0:
            return sequences
        for index, document in enumerate(_documents(self.data)):
            if len(sequences) >= count:
                break
            if self._is_held_out(index):
                rest += [*self.tokens_of(document), self.end]
            while len(rest) >= self.length and len(sequences) < count:
                sequences.append(torch.tensor(rest[: self.length]))
                rest = rest[self.length :]
        return sequences


def iter_once(data: Any) -> bool:
    return isinstance(data, Iterator)
