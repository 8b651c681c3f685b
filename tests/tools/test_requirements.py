"""What setup.sh installs is what the requirements name, each file by its hash."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(name):
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    found = [re.fullmatch(r"([\w.-]+)(?:==([\w.]+))?", line) for line in lines if line and not line.startswith("-")]
    assert all(found), name
    return {normal(match[1]): match[2] for match in found}


def test_the_lock_holds_the_pins_with_hashes():
    text = (ROOT / "requirements.lock").read_text()
    entries = re.findall(r"^([\w-]+)==([\w.]+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", text, re.MULTILINE)
    rest = re.sub(r"^[\w-]+==[\w.]+(?: \\\n    --hash=sha256:[0-9a-f]{64})+\n|^#.*\n", "", text, flags=re.MULTILINE)
    assert rest == "" and "torch" not in dict(entry[:2] for entry in entries)
    locked = {normal(name): version for name, version, _ in entries}
    assert len(locked) == len(entries)
    wanted = pins("constraints.txt")
    for name, version in pins("requirements.txt").items():
        assert name in locked and version in (None, locked[name]), name
    # torch brings along the others.
    assert locked.items() <= wanted.items() and set(wanted) - set(locked) <= {
        "networkx",
        "sympy",
        "mpmath",
        "setuptools",
    }
