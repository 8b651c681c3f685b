#!/usr/bin/env python3
"""Writes text to distil a chat model's selector on: chats about long texts, source code and prose, a third each.

    python tools/chat_text.py --model MODEL --code FOLDER --prose TEXT.gz --out train.jsonl [--documents 2000] [--tokens 4096]

A selector learns where the model looks, and a model looks for things only when something asks. So a chat holds a text with facts
strewn over it (keys and values in several wordings, chains of variables, lists of nothing but facts) and several turns that ask
for them, rendered by the model's own chat template with the right answers. Keys are pairs of words, as in RULER's prompts, but of
other words, and the last tenth of --prose stays unread: evaluate there.
"""

import argparse
import json
import pathlib
import random
import sys
import uuid

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

from choice import texts  # noqa: E402

# (a fact, what is asked of one key, what is asked of several)
WORDINGS = [
    ("The code for {key} is {value}.", "What is the code for {key}?", "What are the codes for {keys}?"),
    (
        "Remember that {key} was given the number {value}.",
        "Which number was {key} given?",
        "Which numbers were given to {keys}?",
    ),
    ("{value} is what was written down for {key}.", "What was written down for {key}?", "What was written for {keys}?"),
    ('{key} = "{value}"', "What is {key} set to?", "What are {keys} set to?"),
    ("Note: {key} -> {value}.", "Look up {key}.", "Look up {keys}."),
    (
        "One of the special magic values of {key} is: {value}.",
        "What are all the special magic values of {key} in the text?",
        "What are all the special magic values of {keys} in the text?",
    ),
]
INSTRUCTIONS = (
    "Read the following text. I will ask about details in it.",
    "Some facts are hidden in this text. Keep them in mind.",
    "Here is a document; answer the questions after it.",
    "",
)


def value(source: random.Random, kind: str) -> str:
    if kind == "uuid":
        return str(uuid.UUID(int=source.getrandbits(128)))
    if kind == "word":
        return source.choice(texts.WORDS)
    return str(source.randrange(10 ** source.randint(3, 6), 10**7))


def facts_and_turns(source: random.Random, room: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Facts of at most about `room` tokens in all, and questions about them with their answers."""
    fact, one, several = source.choice(WORDINGS)
    kind = source.choices(("number", "uuid", "word"), (6, 2, 2))[0]
    pairs = [f"{a}-{b}" for a in texts.WORDS for b in texts.WORDS if a != b]
    many = source.random() < 0.3
    count = min(max(4, int(room / (48 if kind == "uuid" else 24) / (2 if many else 1))), 400)
    held = {
        key: [value(source, kind) for _ in range(source.randint(2, 4) if many else 1)]
        for key in source.sample(pairs, count)
    }
    turns = []
    for _ in range(source.randint(3, 8)):
        keys = source.sample(sorted(held), 1 if many or source.random() < 0.6 else source.randint(2, 4))
        question = one.format(key=keys[0]) if len(keys) == 1 else several.format(keys=", ".join(keys))
        turns.append((question, ", ".join(v for key in keys for v in held[key]) + "."))
    return [fact.format(key=key, value=v) for key, values in held.items() for v in values], turns


def chains_and_turns(source: random.Random) -> tuple[list[str], list[tuple[str, str]]]:
    """Lines that hand values from variable to variable, and questions for all that hold one."""
    facts, turns = [], []
    for start in source.sample(range(10000, 100000), source.randint(2, 5)):
        names = ["".join(source.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5)) for _ in range(source.randint(3, 6))]
        facts.append(f"VAR {names[0]} = {start}")
        facts += [f"VAR {b} = VAR {a}" for a, b in zip(names, names[1:])]
        turns.append((f"Which variables hold the value {start}? Name all of them.", ", ".join(names) + "."))
    return facts, turns


def strewn(source: random.Random, facts: list[str], sentences: list[str], in_order: bool) -> str:
    places = sorted(source.sample(range(len(sentences) + len(facts)), len(facts)))
    order = facts if in_order else source.sample(facts, len(facts))
    text = list(sentences)
    for place, line in zip(places, order):
        text.insert(place, line)
    return " ".join(text)


def chat(source: random.Random, prose: str, tokenizer, tokens: int) -> str:
    """A chat of at most `tokens` tokens, facts and questions apart: its text is cut to what fits."""
    chained = source.random() < 0.2
    only = not chained and source.random() < 0.25  # nothing but facts
    facts, turns = (
        chains_and_turns(source)
        if chained
        else facts_and_turns(source, tokens * (0.85 if only else source.uniform(0.03, 0.3)))
    )
    sentences = [] if only else [s + "." for s in " ".join(prose.split()).split(". ") if s]

    def rendered(count: int) -> str:
        body = strewn(random.Random(f"{facts[0]} {count}"), facts, sentences[:count], chained)
        intro = INSTRUCTIONS[len(facts) % len(INSTRUCTIONS)]
        first = f"{intro}\n\n{body}\n\n{turns[0][0]}".lstrip()
        messages = [{"role": "user", "content": first}, {"role": "assistant", "content": turns[0][1]}]
        for question, answer in turns[1:]:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return tokenizer.apply_chat_template(messages, tokenize=False)

    low, high = 0, len(sentences)
    while low < high:
        middle = (low + high + 1) // 2
        fits = len(tokenizer(rendered(middle), add_special_tokens=False)["input_ids"]) <= tokens
        low, high = (middle, high) if fits else (low, middle - 1)
    return rendered(low)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder whose tokenizer and chat template are used")
    parser.add_argument("--code", type=pathlib.Path, required=True, help="folder of Python sources")
    parser.add_argument("--prose", type=pathlib.Path, required=True, help="text, or .gz of one")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="file to write, .jsonl")
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=4096, help="of a document, at least 1024")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.tokens < 1024 or options.documents < 3:
        parser.error(f"--tokens {options.tokens}, --documents {options.documents}: at least 1024 and 3 are needed")
    from tqdm import tqdm
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    count, characters = -(-options.documents // 3), options.tokens * texts.CHARACTERS_A_TOKEN
    try:
        whole = texts.read_text(options.prose)
        readable = whole[: len(whole) // 10 * 9]
        code = texts.code_prompts(options.code, characters, count, options.seed)
        prose = texts.prose_prompts(readable, characters, 2 * count, options.seed)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    source = random.Random(f"chats {options.seed}")
    partial = options.out.with_name(options.out.name + ".part")
    with open(partial, "w", encoding="utf-8") as file:
        for index in tqdm(range(options.documents), unit="document"):
            kind, at = index % 3, index // 3
            if kind == 2:
                # Sequences are cut out of joined documents: short chats are whole in most of them.
                text = chat(source, prose[count + at]["text"], tokenizer, options.tokens // source.choice((1, 2, 4)))
            else:
                text = (code, prose)[kind][at]["text"]
            file.write(json.dumps({"text": text}) + "\n")
    partial.replace(options.out)
    print(f"{options.documents} documents in {options.out}")


if __name__ == "__main__":
    main()
