"""Any text, tokenised once: a training and a held-out part of each of two streams, and the words that keys are made of.

"text" keeps its lines; "essay" has every run of white space turned into one space. A document goes to one of the two.
"""

import collections
import gzip
import hashlib
import json
import pathlib
import random
import re
import time

import numpy as np
import tokenizers

STREAMS = ("text", "essay")
PIECE = 20_000  # characters that are tokenised at a time


def read_documents(path: pathlib.Path) -> list[str]:
    """The documents of a text file or .gz of one: separated by NUL, or else cut at blank lines every 50,000 characters."""
    raw = gzip.open(path).read() if path.suffix == ".gz" else path.read_bytes()
    text = raw.decode("utf-8", "replace")
    if "\x00" in text:
        return [document for document in text.split("\x00") if document.strip()]
    documents, begin = [], 0
    while begin < len(text):
        cut = text.find("\n\n", begin + 50_000)
        end = len(text) if cut < 0 else cut + 2
        documents.append(text[begin:end])
        begin = end
    return documents


def without_repeats(documents: list[str]) -> list[str]:
    """Drops paragraphs of 80 characters or more that occurred before, and what is left of documents below 500 characters."""
    seen, kept = set(), []
    for document in documents:
        paragraphs = []
        for paragraph in document.split("\n\n"):
            if len(paragraph) >= 80:
                mark = hash(paragraph.strip())
                if mark in seen:
                    continue
                seen.add(mark)
            paragraphs.append(paragraph)
        text = "\n\n".join(paragraphs)
        if len(text) >= 500:
            kept.append(text)
    return kept


def _share(document: str) -> float:
    """A number in [0, 1) that depends on the document alone."""
    return int.from_bytes(hashlib.blake2b(document[:4000].encode("utf-8", "replace"), digest_size=4).digest()) / 2**32


def _encode(tokenizer: tokenizers.Tokenizer, documents: list[str]) -> np.ndarray:
    pieces = [document[at : at + PIECE] for document in documents for at in range(0, len(document), PIECE)]
    ids = []
    for begin in range(0, len(pieces), 4096):
        ids += [np.array(piece.ids, np.uint16) for piece in tokenizer.encode_batch_fast(pieces[begin : begin + 4096])]
    return np.concatenate(ids) if ids else np.zeros(0, np.uint16)


def prepare(data: pathlib.Path, tokenizer_file: pathlib.Path, folder: pathlib.Path, held_out: float = 0.015) -> None:
    """Writes STREAM.npy, STREAM_held_out.npy (uint16) and words.json into `folder`; does nothing where they are already."""
    source = json.dumps(
        {
            "data": str(data.resolve()),
            "bytes": data.stat().st_size,
            "changed": data.stat().st_mtime_ns,
            "tokenizer": hashlib.md5(tokenizer_file.read_bytes()).hexdigest(),
        }
    )
    done = folder / "source.json"  # written last
    if done.is_file() and done.read_text() == source:
        return
    folder.mkdir(parents=True, exist_ok=True)
    done.unlink(missing_ok=True)
    start = time.time()
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    documents = without_repeats(read_documents(data))
    if len(documents) < 20:
        raise SystemExit(f"{data}: {len(documents)} documents of 500 characters or more; give a longer text")
    shares = [_share(document) for document in documents]
    limit = sorted(shares)[max(1, int(len(shares) * held_out)) - 1]  # at least one document is held out
    parts = collections.defaultdict(list)
    for document, share in zip(documents, shares):
        suffix = "_held_out" if share <= limit else ""
        essay = suffix or share * 7919 % 1 < 0.4
        if essay:
            parts["essay" + suffix].append(" ".join(document.split()) + " ")
        if suffix or not essay:
            parts["text" + suffix].append(document)
    for name in (*STREAMS, *(stream + "_held_out" for stream in STREAMS)):
        ids = _encode(tokenizer, parts[name])
        np.save(folder / f"{name}.npy", ids)
        print(
            f"prepare: {name} {len(ids):,} tokens of {len(parts[name])} documents, {time.time() - start:.1f} s",
            flush=True,
        )
    sample = " ".join(documents[:: max(1, len(documents) // 300)])[:20_000_000]
    counted = collections.Counter(re.findall(r"\b[a-z]{3,9}\b", sample))
    words = sorted(word for word, count in counted.most_common(8000) if count >= 8)
    random.Random(1).shuffle(words)
    if len(words) < 100:
        raise SystemExit(f"{data}: {len(words)} words occur 8 times or more; give a longer text")
    (folder / "words.json").write_text(json.dumps(words))
    done.write_text(source)
    print(f"prepare: {len(words)} words for keys, {time.time() - start:.1f} s", flush=True)
