"""Writes the word lists of the PyPI package wonderwords, RULER's own, as C++ strings: ruler_words.py OUTPUT.

Entries of several words, and the two with other characters than letters and hyphens, are left out: prompts number and count
what stands between spaces.
"""

import hashlib
import importlib.util
import pathlib
import re
import sys

VERSION = "3.0.1"
# Other lists would give other prompts under the same name.
LISTS = {
    "adjective": "66814d46b7e292c83e839d12fe2fa083c8f66779b14b294e1be4e1342c5d4131",
    "noun": "8d88b3ebc2e2969ed92ebe49cdb0c8a87c2ad3b27493d7afdff608f2e51c5bc9",
    "verb": "9fbf5e4e69b8869aebd88e6d545312ff9f878a747327ede5f6dbbba5c27b08ad",
}


def main() -> None:
    found = importlib.util.find_spec("wonderwords")
    if found is None or found.origin is None:
        sys.exit(
            f"{sys.executable} has no package wonderwords: run scripts/setup.sh, or pip install wonderwords=={VERSION}"
        )
    lines = []
    for name, wanted in LISTS.items():
        path = pathlib.Path(found.origin).parent / "assets" / f"{name}list.txt"
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != wanted:
            sys.exit(f"{path} is not that of wonderwords {VERSION}: pip install wonderwords=={VERSION}")
        words = [word.strip() for word in data.decode().splitlines()]
        words = sorted({word for word in words if re.fullmatch("[A-Za-z]+(-[A-Za-z]+)*", word)})
        lines.append(f"constexpr std::string_view k{name.capitalize()}List =")
        lines += [f'    "{" ".join(words[i : i + 12])} "' for i in range(0, len(words), 12)]
        lines[-1] += ";"
    pathlib.Path(sys.argv[1]).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
