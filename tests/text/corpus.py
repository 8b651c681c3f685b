"""Text that is hard on tokenizers, from what any machine with Python has and from a random generator."""

import pathlib
import sysconfig
import unicodedata

WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2000\u2003\u200a\u2028\u2029\u202f\u205f\u3000"
NEARLY_WHITE_SPACE = "\u180e\u200b\u200c\u200d\u2060\ufeff\x1c\x1d\x1e\x1f\x00\x07\x7f"
CONTRACTIONS = ["'s", "'S", "'t", "'RE", "'ve", "'m", "'LL", "'d", "\u2019s", "'\u017f", "'\u017ft", "s's't"]
EMOJI = [
    "\U0001f469\u200d\U0001f680",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",
    "\U0001f44d\U0001f3fd",
    "\U0001f1eb\U0001f1f7",
    "\u2764\ufe0f\u200d\U0001f525",
    "1\ufe0f\u20e3",
    "\U0001fae0",
    "\u2603",
]
DIGITS = [
    "0123456789",
    "\u0660\u0661\u0662\u0663\u0664",
    "\u096a\u096b",
    "\u00bd\u00b2\u2460",
    "\u2168\u3007",
    "\U0001d7ce\U0001d7d7",
    "\U00011de0\U00011de5\U00016ff4",
]
SCRIPTS = [
    (0x61, 0x7A),
    (0x41, 0x5A),
    (0xC0, 0x24F),
    (0x370, 0x3FF),
    (0x400, 0x4FF),
    (0x5D0, 0x5EA),
    (0x620, 0x64A),
    (0x900, 0x97F),
    (0xB80, 0xBFF),
    (0xE01, 0xE3A),
    (0x1100, 0x11FF),
    (0x1E00, 0x1EFF),
    (0x3041, 0x30FF),
    (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3),
    (0xFF01, 0xFF5E),
    (0x1D400, 0x1D7FF),
    (0x20000, 0x2A6DF),
    (0x31350, 0x323AF),
    (0x105C0, 0x105F3),
    (0x11380, 0x113E2),
]
MARKS = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000 and unicodedata.category(chr(c))[0] == "M"]
DECOMPOSED = [
    unicodedata.normalize("NFD", chr(c))
    for c in range(0x30000)
    if not 0xD800 <= c < 0xE000 and not unicodedata.is_normalized("NFD", chr(c))
]
PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~«»“”—…、。！？·"


def random_code_point(rng, limit=0x110000):
    while True:
        code_point = rng.randrange(limit)
        if not 0xD800 <= code_point < 0xE000:
            return chr(code_point)


def random_piece(rng, added_tokens):
    """A few characters of one of many kinds."""
    kind = rng.randrange(16)
    few = rng.randint(1, 6)
    if kind <= 3:
        low, high = rng.choice(SCRIPTS if kind else SCRIPTS[:2])
        return "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 12)))
    if kind == 4:
        return "".join(rng.choice(WHITE_SPACE) for _ in range(few))
    if kind == 5:
        return rng.choice(["\n", "\r\n", "\r", "\n\n", " \n", "\n ", "\t\n\t", " "]) * rng.choice([1, 1, 2, 7])
    if kind == 6:
        return "".join(rng.choice("".join(DIGITS)) for _ in range(few))
    if kind == 7:
        return str(rng.randrange(10 ** rng.randint(1, 14)))
    if kind == 8:
        return rng.choice(CONTRACTIONS)
    if kind == 9:
        return rng.choice(EMOJI)
    if kind == 10:
        return rng.choice("aeiouyAEn\u3042\u0915\u1100") + "".join(rng.choice(MARKS) for _ in range(few))
    if kind == 11:
        return "".join(rng.choice(DECOMPOSED) for _ in range(few))
    if kind == 12:
        return "".join(random_code_point(rng, rng.choice([0x300, 0x3000, 0x10000, 0x110000])) for _ in range(few))
    if kind == 13:
        return "".join(rng.choice(NEARLY_WHITE_SPACE + WHITE_SPACE) for _ in range(few))
    if kind == 14:
        return "".join(rng.choice(PUNCTUATION) for _ in range(few))
    return rng.choice(added_tokens) if added_tokens else " "


def random_text(rng, size, added_tokens=()):
    """About `size` bytes of UTF-8."""
    pieces, length = [], 0
    while length < size:
        piece = random_piece(rng, added_tokens)
        if rng.random() < 0.4:
            piece = " " + piece
        pieces.append(piece)
        length += len(piece.encode())
    return "".join(pieces)


def local_text(rng, size):
    """About `size` bytes of prose and program text: licences, package notes and Python's own library."""
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = [
        *library.glob("*.py"),
        *library.glob("*/*.py"),
        *pathlib.Path("/usr/share/common-licenses").glob("*"),
        *pathlib.Path("/usr/share/doc").glob("*/copyright"),
    ]
    files = sorted(f for f in files if f.is_file())
    assert len(files) > 100, "no local text found"
    rng.shuffle(files)
    texts, length = [], 0
    for file in files:
        text = file.read_text(encoding="utf-8", errors="ignore")[:60_000]
        texts.append(text)
        length += len(text.encode())
        if length >= size:
            return "\n".join(texts)
    return "\n".join(texts)
