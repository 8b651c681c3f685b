"""SentencePiece vocabularies and every normalizer, pre-tokenizer and decoder that is read, alone and in random chains:
ids and texts equal those of the Hugging Face `tokenizers` library."""

import json
import random

import corpus
import pytest
from tokenize_tool import Ours, added_tokens, assert_same_ids
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

BEHAVIORS = ["isolated", "removed", "merged_with_previous", "merged_with_next", "contiguous"]
SPACE = "▁"


def byte_tokens(lacking=()):
    return [f"<0x{byte:02X}>" for byte in range(256) if byte not in lacking]


def sentencepiece(text, normalizer, pre_tokenizer, decoder, lacking=(), **model):
    """A vocabulary of characters and merges as a conversion from SentencePiece gives it."""
    tokenizer = Tokenizer(models.BPE(**(dict(unk_token="<unk>", fuse_unk=True, byte_fallback=True) | model)))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first")
    specials = ["<unk>", "<s>", "</s>", *byte_tokens(lacking)]
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=specials, limit_alphabet=300, show_progress=False)
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(state | {"pre_tokenizer": None}))
    if normalizer:
        tokenizer.normalizer = normalizer
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoder
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("naïve", normalized=True)])
    return tokenizer


def fused(*more):
    return decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *more])


def metaspace(scheme, split):
    return pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=split)


REPLACE = normalizers.Replace(" ", SPACE)
PREPEND = normalizers.Sequence([normalizers.Prepend(SPACE), REPLACE])
STRIP = decoders.Strip(" ", 1, 0)

SENTENCEPIECE = {
    "llama2": lambda text: sentencepiece(text, PREPEND, None, fused(STRIP)),
    "yi": lambda text: sentencepiece(text, REPLACE, None, fused()),
    "mistral-v3": lambda text: sentencepiece(text, None, metaspace("first", False), fused(STRIP)),
    "gemma": lambda text: sentencepiece(text, REPLACE, pre_tokenizers.Split(" ", "merged_with_previous"), fused()),
    "few-bytes": lambda text: sentencepiece(text, PREPEND, None, fused(STRIP), lacking=range(0x80, 0xD8)),
    "few-bytes-unfused": lambda text: sentencepiece(
        text, PREPEND, None, fused(STRIP), lacking=range(0x90, 0xE8), fuse_unk=False
    ),
    "no-fallback": lambda text: sentencepiece(text, PREPEND, None, fused(STRIP), byte_fallback=False),
    "whole-words": lambda text: sentencepiece(text, None, metaspace("always", True), fused(STRIP), ignore_merges=True),
    **{
        f"metaspace-{scheme}-{split}": (
            lambda text, scheme=scheme, split=split: sentencepiece(
                text,
                random.choice([None, normalizers.Strip(), normalizers.NFKC()]),
                metaspace(scheme, split),
                decoders.Metaspace(replacement=SPACE, prepend_scheme=scheme),
            )
        )
        for scheme in ("always", "first", "never")
        for split in (True, False)
    },
}


def random_split():
    pattern = random.choice([" ", "e", "!?", Regex(r"\s+"), Regex(r"[0-9]{1,3}"), Regex(r"\p{L}+"), Regex(r"x*")])
    return pre_tokenizers.Split(pattern, random.choice(BEHAVIORS), random.random() < 0.3)


def random_cut():
    return random.choice(
        [
            random_split,
            random_split,
            lambda: pre_tokenizers.Digits(random.random() < 0.5),
            lambda: pre_tokenizers.Punctuation(random.choice(BEHAVIORS)),
            pre_tokenizers.WhitespaceSplit,
        ]
    )()


def random_normalizer():
    parts = [
        normalizers.NFC,
        normalizers.NFD,
        normalizers.NFKC,
        normalizers.NFKD,
        normalizers.Lowercase,
        lambda: normalizers.Strip(random.random() < 0.7, random.random() < 0.7),
        lambda: normalizers.Prepend(random.choice(["_", "é ", " "])),
        lambda: normalizers.Replace(
            random.choice(["a", "``", Regex(" {2,}"), Regex(r"\s")]), random.choice(["", "▁", "bc"])
        ),
    ]
    return normalizers.Sequence([random.choice(parts)() for _ in range(random.randint(1, 3))])


def byte_level(text, before, after, normalizer=None, prefix=False, regex=False):
    tokenizer = Tokenizer(models.BPE())
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, bytes_, *after])
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.add_tokens([AddedToken("Cafe\u0301", normalized=True), AddedToken("ﬁ", normalized=True)])
    return tokenizer


def falcon3(text):
    after = [pre_tokenizers.Digits(False), pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated")]
    return byte_level(text, [pre_tokenizers.Punctuation("contiguous")], after, regex=True)


def random_byte_level(text):
    before = [random_cut() for _ in range(random.randint(0, 2))]
    after = [random_cut() for _ in range(random.randint(0, 2))]
    normalizer = random_normalizer() if random.random() < 0.7 else None
    return byte_level(text, before, after, normalizer, random.random() < 0.3, random.random() < 0.5)


BYTE_LEVEL = {
    "falcon3": falcon3,
    **{
        f"punctuation-{behavior}": (lambda text, b=behavior: byte_level(text, [pre_tokenizers.Punctuation(b)], []))
        for behavior in BEHAVIORS
    },
    **{f"random-{number}": random_byte_level for number in range(12)},
}


def a_text(rng, tokenizer, size):
    return corpus.local_text(rng, size) + corpus.random_text(rng, size, added_tokens(tokenizer))


def check(tokenizer, build_folder, folder, rng):
    file = folder / "tokenizer.json"
    tokenizer.save(str(file))
    print(file.read_text(encoding="utf-8").split('"model"')[0])
    ours = Ours(build_folder, folder, file)
    text = a_text(rng, tokenizer, 20_000)
    ids = ours.encode(text)
    assert_same_ids(tokenizer, ids, text)
    known = list(tokenizer.get_vocab().values())
    mixed = [rng.choice(known) for _ in range(5_000)]
    # Also ids without a token, as rows that pad a vocabulary have, and texts that begin with a byte or a space.
    mixed[::97] = [max(known) + rng.randint(1, 500) for _ in mixed[::97]]
    for skip in (False, True):
        for some in (ids, mixed, ids[3:40], [rng.choice(known) for _ in range(3)]):
            decoded = tokenizer.decode(some, skip_special_tokens=skip)
            assert ours.decode(some, skip) == decoded
            assert ours.decode(some, skip, "stream") == decoded
    for short in ["", " ", "  ", "a", " a", SPACE, "a ", "\n", *(a_text(rng, tokenizer, 8) for _ in range(4))]:
        for special in (False, True):
            wanted = tokenizer.encode(short, add_special_tokens=special).ids
            assert ours.encode(short, special) == wanted, ascii(short)


@pytest.mark.parametrize("name", [*SENTENCEPIECE, *BYTE_LEVEL])
def test_ids_and_texts(name, build_folder, tmp_path, seed):
    rng = random.Random(seed)
    random.seed(seed)
    text = corpus.local_text(rng, 60_000) + corpus.random_text(rng, 20_000)
    check((SENTENCEPIECE | BYTE_LEVEL)[name](text), build_folder, tmp_path, rng)


@pytest.mark.parametrize("number", range(6))
def test_random_decoders(number, build_folder, tmp_path, seed):
    rng = random.Random(seed)
    random.seed(seed)
    steps = [
        lambda: decoders.Replace(SPACE, " "),
        lambda: decoders.Replace(random.choice(["e", "▁t", Regex("[aeiou]+")]), random.choice(["", "ß", "  "])),
        decoders.ByteFallback,
        lambda: decoders.Strip(random.choice(" ▁e"), random.randint(0, 3), 0),
        lambda: decoders.Metaspace(replacement=SPACE, prepend_scheme=random.choice(["always", "first", "never"])),
    ]
    chain = [random.choice(steps)() for _ in range(random.randint(1, 4))]
    if random.random() < 0.7:
        # Behind Fuse a token is the whole text; the end is stripped only there, for a short token would be overrun.
        chain += [decoders.Fuse(), decoders.Replace("n", "\u00f1"), decoders.Strip(" ", random.randint(0, 3), 2)]
    text = corpus.local_text(rng, 30_000) + corpus.random_text(rng, 10_000)
    tokenizer = sentencepiece(text, PREPEND, None, decoders.Sequence(chain))
    file = tmp_path / "tokenizer.json"
    tokenizer.save(str(file))
    ours = Ours(build_folder, tmp_path, file)
    known = list(tokenizer.get_vocab().values())
    for ids in (
        tokenizer.encode(text[:4000]).ids,
        *([rng.choice(known) for _ in range(rng.randint(20, 600))] for _ in range(3)),
    ):
        decoded = tokenizer.decode(ids, skip_special_tokens=False)
        assert ours.decode(ids) == decoded
        assert ours.decode(ids, mode="stream") == decoded


CODE_POINTS = {
    "nfd": (normalizers.NFD(), []),
    "nfkc": (normalizers.NFKC(), []),
    "nfkd": (normalizers.NFKD(), []),
    "lowercase": (normalizers.Lowercase(), []),
    "punctuation": (None, [pre_tokenizers.Punctuation("isolated")]),
    "digits": (None, [pre_tokenizers.Digits(True)]),
    "white-space": (None, [pre_tokenizers.WhitespaceSplit()]),
}


@pytest.mark.parametrize("name", CODE_POINTS)
def test_every_code_point(name, build_folder, tmp_path, seed):
    """One at a time between letters; merges of letters across a cut would show it."""
    normalizer, before = CODE_POINTS[name]
    tokenizer = byte_level("aa a\na aaa\n" * 50, before, [], normalizer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    limit = 0x33000
    some = sorted(random.Random(seed).sample(range(limit, 0x110000), 2000))
    code_points = [c for c in (*range(limit), *range(0xE0000, 0xE0200), *some) if not 0xD800 <= c < 0xE000]
    text = "".join(f"{chr(c)}a" for c in code_points)
    assert_same_ids(tokenizer, Ours(build_folder, tmp_path, tmp_path / "tokenizer.json").encode(text), text)
