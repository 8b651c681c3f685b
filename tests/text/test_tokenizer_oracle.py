"""The tokenizer's ids and texts equal those of the Hugging Face `tokenizers` library."""

import json
import random
import re
import shutil
import subprocess

import corpus
import pytest
from tokenize_tool import Ours, added_tokens, assert_same_ids
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN35_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CATEGORIES_PATTERN = (
    r"\p{Lu}+|\p{Ll}+|[\p{Lt}\p{Lm}\p{Lo}]+|\p{M}+|\p{Nd}|\p{Nl}|\p{N}+|\p{Pc}+|\p{P}+|\p{S}+|\s+"
    r"|\P{L}\x{41}"
)


def split_then_bytes(pattern):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def digits_then_gpt2(individual=True):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=individual),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def train(text, pre_tokenizer, normalizer=None, vocab_size=3000, alphabet=None, **model):
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False, initial_alphabet=alphabet or pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return tokenizer


def make_qwen3(text):
    tokenizer = train(text, split_then_bytes(QWEN2_PATTERN), normalizers.NFC())
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>"])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "</think>", "<tool_call>")])
    return tokenizer


def make_qwen35(text):
    tokenizer = train(text, split_then_bytes(QWEN35_PATTERN), normalizers.Sequence([normalizers.NFC()]))
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    return tokenizer


def make_smollm2(text):
    """Like the published one, the vocabulary lacks some bytes, and those vanish."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    lacking = random.Random(len(text)).sample([c for c in alphabet if ord(c) >= 0x100], 12)
    text = re.sub("[\x00-\x08\x0e-\x1f]", "", text)
    tokenizer = train(text, digits_then_gpt2(), alphabet=[c for c in alphabet if c not in lacking])
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<jupyter_code>"])
    return tokenizer


def make_llama3(text):
    tokenizer = train(text, split_then_bytes(LLAMA3_PATTERN), ignore_merges=True)
    # Tokens that no merge makes: ignore_merges finds them all the same.
    state = json.loads(tokenizer.to_str())
    size = len(state["model"]["vocab"])
    for number, word in enumerate(["Ġzyzzyva", "QQQ", "ĠĠĠĊĊ", "999", "æĹ¥æľ¬èªŀ"]):
        state["model"]["vocab"].setdefault(word, size + number)
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_special_tokens(
        [
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|eot_id|>",
            "<|start_header_id|>",
            *(f"<|reserved_special_token_{i}|>" for i in range(20)),
        ]
    )
    bos = tokenizer.token_to_id("<|begin_of_text|>")
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|begin_of_text|> $A",
                pair="<|begin_of_text|> $A <|begin_of_text|> $B",
                special_tokens=[("<|begin_of_text|>", bos)],
            ),
        ]
    )
    return tokenizer


def make_gpt2(text):
    """A prefix space, an unknown token and every flag an added token can have."""
    alphabet = [c for c in sorted(pre_tokenizers.ByteLevel.alphabet()) if c not in "ÐÑãÿ"]
    tokenizer = train(text, pre_tokenizers.ByteLevel(add_prefix_space=True), normalizers.NFC(), alphabet=alphabet)
    state = json.loads(tokenizer.to_str())
    state["model"]["vocab"]["<unk>"] = len(state["model"]["vocab"])
    state["model"]["unk_token"] = "<unk>"
    state["model"]["fuse_unk"] = bool(random.getrandbits(1))
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_special_tokens(
        [
            AddedToken("<mask>", lstrip=True),
            AddedToken("<sep>", rstrip=True),
            AddedToken("<both>", lstrip=True, rstrip=True),
            AddedToken("<|", special=True),
            AddedToken("<|longer|>", special=True),
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken("word", single_word=True),
            AddedToken("caf\u0065\u0301", normalized=True),
            AddedToken("日本", normalized=True, single_word=True),
            AddedToken("raw\u0301", normalized=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel()
    return tokenizer


def make_categories(text):
    return train(text, split_then_bytes(CATEGORIES_PATTERN), vocab_size=600)


MAKERS = {
    "qwen3": make_qwen3,
    "qwen35": make_qwen35,
    "smollm2": make_smollm2,
    "llama3": make_llama3,
    "gpt2": make_gpt2,
    "categories": make_categories,
}
NAMES = ["tiny-qwen3", *MAKERS]


@pytest.fixture(scope="session")
def tokenizer_files(tmp_path_factory, tiny_qwen3):
    """Name -> tokenizer.json; trained once, in both spellings of merges."""
    folder = tmp_path_factory.mktemp("tokenizers")
    rng = random.Random()
    text = corpus.local_text(rng, 250_000) + corpus.random_text(rng, 100_000)
    files = {"tiny-qwen3": tiny_qwen3 / "tokenizer.json"}
    for name, make in MAKERS.items():
        state = json.loads(make(text).to_str())
        if rng.random() < 0.5:
            state["model"]["merges"] = [" ".join(pair) for pair in state["model"]["merges"]]
        files[name] = folder / f"{name}.json"
        files[name].write_text(json.dumps(state, ensure_ascii=rng.random() < 0.5), encoding="utf-8")
    return files


@pytest.fixture(params=NAMES)
def pair(request, tokenizer_files, build_folder, tmp_path):
    file = tokenizer_files[request.param]
    return Tokenizer.from_file(str(file)), Ours(build_folder, tmp_path, file)


@pytest.fixture(scope="session")
def megabyte(tokenizer_files):
    """Half prose and program text, half random text with all added tokens in it."""
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed of the text: {seed}")
    rng = random.Random(seed)
    added = {token for file in tokenizer_files.values() for token in added_tokens(Tokenizer.from_file(str(file)))}
    return corpus.local_text(rng, 450_000) + corpus.random_text(rng, 600_000, sorted(added))


def test_ids_and_text_of_a_megabyte(pair, megabyte, request):
    theirs, ours = pair
    assert len(megabyte.encode()) > 1_000_000
    # The whole for the published families, the random end of it for the others.
    name = request.node.callspec.params["pair"]
    text = megabyte if name in ("tiny-qwen3", "qwen3", "smollm2", "llama3") else megabyte[-80_000:]
    ids = ours.encode(text)
    assert_same_ids(theirs, ids, text)
    for skip in (False, True):
        decoded = theirs.decode(ids, skip_special_tokens=skip)
        assert ours.decode(ids, skip) == decoded
        assert ours.decode(ids, skip, "stream") == decoded


def test_short_texts(pair, seed):
    """The beginning and end of a text are cases of their own."""
    theirs, ours = pair
    rng = random.Random(seed)
    texts = [corpus.random_text(rng, rng.randint(1, 30), added_tokens(theirs)) for _ in range(8)]
    for text in ["", " ", "\n", "a", *texts]:
        for special in (False, True):
            assert ours.encode(text, special) == theirs.encode(text, add_special_tokens=special).ids, ascii(text)


def test_random_ids_decode_alike(pair, seed):
    """Random ids cut characters apart everywhere."""
    theirs, ours = pair
    rng = random.Random(seed)
    known = list(theirs.get_vocab().values())
    ids = [rng.choice(known) for _ in range(50_000)]
    for mode in ("decode", "stream"):
        assert ours.decode(ids, mode=mode) == theirs.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("name", ["qwen35", "smollm2", "categories"])
def test_every_code_point(tokenizer_files, build_folder, tmp_path, name, seed):
    """Each is a letter, number, mark or space to both, and normalizes alike."""
    theirs = Tokenizer.from_file(str(tokenizer_files[name]))
    ours = Ours(build_folder, tmp_path, tokenizer_files[name])
    # Planes 4 to 13 are empty and 15 and 16 private: a few of theirs stand for all.
    limit = 0x33000
    some = sorted(random.Random(seed).sample(range(limit, 0x110000), 3000))
    code_points = [c for c in (*range(limit), *range(0xE0000, 0xE0200), *some) if not 0xD800 <= c < 0xE000]
    text = "".join(f"a{chr(c)}" for c in code_points)
    assert_same_ids(theirs, ours.encode(text), text)


def test_marks_in_any_order_normalize_alike(tokenizer_files, build_folder, tmp_path, seed):
    rng = random.Random(seed)
    bases = [
        "a",
        "q",
        "\u1100",
        "\u0915",
        "\u3042",
        "\u0308",
        *corpus.DECOMPOSED,
        *map(chr, range(0x11380, 0x113D0)),
        "\U00011935",
        "\U00016d67",
        "\U000105d2",
    ]
    marks = [*corpus.MARKS, "\u1161", "\u11a8", "\U00011930", "\U00016d67", "\U000113c9"]
    text = "".join(rng.choice(bases) + "".join(rng.choices(marks, k=rng.randint(1, 5))) for _ in range(60_000))
    theirs = Tokenizer.from_file(str(tokenizer_files["qwen35"]))
    assert_same_ids(theirs, Ours(build_folder, tmp_path, tokenizer_files["qwen35"]).encode(text), text)


def test_llama3_template_begins_with_bos(tokenizer_files, build_folder, tmp_path):
    ours = Ours(build_folder, tmp_path, tokenizer_files["llama3"])
    bos = Tokenizer.from_file(str(tokenizer_files["llama3"])).token_to_id("<|begin_of_text|>")
    assert ours.encode("hello", special=True) == [bos, *ours.encode("hello")]


@pytest.mark.skipif(shutil.which("timeout") is None, reason="needs coreutils")
@pytest.mark.parametrize("name", ["qwen3", "smollm2"])
def test_long_runs_take_linear_time(tokenizer_files, build_folder, tmp_path, name):
    """A megabyte without a split point. Quadratic time would be hours; the limit of 60 s is no benchmark."""
    for unit in ("a", " ", "\n", "ab", "é", "日", "!", "\u0301\u0316", " \n", "1", "<|", "'"):
        text = unit * (1_000_000 // len(unit.encode()))
        (tmp_path / "in").write_text(text, encoding="utf-8", newline="")
        command = [
            "timeout",
            "60",
            build_folder / "src" / "text" / "tokenize_tool",
            "encode",
            tokenizer_files[name],
            tmp_path / "in",
            tmp_path / "out",
        ]
        assert subprocess.run(command).returncode == 0, ascii(unit)
