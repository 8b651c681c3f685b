#!/usr/bin/env python3
"""Writes docs/api.md from the package's docstrings; --check says whether it is current.

SPOT_BUILD=build/cpu .venv/bin/python tools/api_reference.py [--check]
"""

import argparse
import dataclasses
import importlib
import inspect
import os
import pathlib
import re
import sys
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "api.md"

# Section, the module whose docstring begins it, and the names that it documents.
SECTIONS = [
    ("Hugging Face transformers", "spotattention.hf", ["attach", "detach", "Attached", "distill"]),
    ("The engine", "spotattention.engine", ["Engine", "Event", "Answer", "AttendedTokens"]),
    ("Selectors", "spotattention.selector", ["Selector"]),
    ("Settings of selectors", "spotattention.selector_config", ["SelectorConfig", "Selection", "Distillation"]),
    ("Methods", "spotattention.rule", ["parse_method", "Method", "SelectionRule"]),
    ("Self-check", "spotattention.self_check", ["SelfCheck", "captured_mass"]),
    ("Operators", "spotattention.ops", []),  # all of its functions
]


def load_package() -> None:
    build = pathlib.Path(os.environ.get("SPOT_BUILD", ROOT / "build" / "cpu"))
    os.environ.setdefault("SPOT_OPS_LIBRARY", str(build / "libspot_ops.so"))
    sys.path.insert(0, str(ROOT / "python"))


def signature(name: str, value: object) -> str:
    text = str(inspect.signature(value))
    text = re.sub(r"\b(?:torch|typing|collections\.abc|spotattention(?:\.\w+)*|pathlib|os)\.(?=[A-Z])", "", text)
    text = text.replace("torch.nn.modules.module.Module", "nn.Module")
    # Defaults without a short form of their own.
    text = text.replace("<factory>", "...").replace("'", '"')
    line = name + text
    if len(line) <= 100:
        return line
    inside, result = text[1:].rsplit(")", 1)
    parts = [part for part in split_arguments(inside) if part]
    return f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){result}"


def split_arguments(text: str) -> Iterator[str]:
    depth, start = 0, 0
    for at, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            yield text[start:at].strip()
            start = at + 1
    yield text[start:].strip()


def paragraphs(value: object) -> str:
    return inspect.cleandoc(value.__doc__ or "").strip()


def members(value: type) -> Iterator[tuple[str, object]]:
    """A class's own public methods and properties that say what they do, in the order of the source."""
    for name, member in vars(value).items():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if not name.startswith("_") and inspect.isfunction(function) and function.__doc__:
            yield name, member


def entry(name: str, value: object) -> Iterator[str]:
    yield f"### {name}\n"
    is_record = dataclasses.is_dataclass(value) or (inspect.isclass(value) and hasattr(value, "_fields"))
    if name != "Attached":  # made by attach alone
        yield f"```python\n{signature(name, value)}\n```\n"
    text = paragraphs(value)
    if text and not (is_record and text.startswith(f"{name}(")):
        yield text + "\n"
    if not inspect.isclass(value):
        return
    for member_name, member in members(value):
        if isinstance(member, property):
            yield f"**.{member_name}**: {paragraphs(member.fget)}\n"
        else:
            bound = getattr(member, "__func__", member)
            shown = signature(f".{member_name}", bound).replace("(self, ", "(").replace("(self)", "()")
            shown = shown.replace("(cls, ", "(").replace("    self,\n", "").replace("    cls,\n", "")
            yield (
                f"**`{shown}`**\n\n{paragraphs(bound)}\n"
                if "\n" not in shown
                else (f"```python\n{shown}\n```\n\n{paragraphs(bound)}\n")
            )


def reference() -> str:
    lines = [
        "# Python API\n",
        "Made from the docstrings of `python/spotattention` by `tools/api_reference.py`; do not edit. How to install and "
        "begin:\n[python.md](python.md).\n",
    ]
    for title, module_name, names in SECTIONS:
        module = importlib.import_module(module_name)
        lines += [f"## {title}\n", paragraphs(module) + "\n"]
        names = names or [n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module_name]
        for name in names:
            lines += entry(name, getattr(module, name))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 when docs/api.md is not current")
    options = parser.parse_args()
    load_package()
    text = reference()
    if not options.check:
        TARGET.write_text(text)
    elif not TARGET.is_file() or TARGET.read_text() != text:
        sys.exit("docs/api.md is not what the docstrings say; run tools/api_reference.py")


if __name__ == "__main__":
    main()
