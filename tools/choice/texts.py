"""Prompts whose decode steps are recorded: running text that the model continues word for word, or questions that it answers.

A prompt is a dict. Running text: kind, name, text (longer than the context; what follows the context is fed as if the model had said
it). A question: kind, name, context, question, answer_prefix, references, as `spot eval ruler --write-prompts` writes them.
"""

import gzip
import json
import pathlib
import random
import zlib

CHARACTERS_A_TOKEN = 6  # more than any text here has, so that a prompt never falls short of its length


def read_text(path: pathlib.Path) -> str:
    raw = path.read_bytes()
    if path.suffix == ".gz":
        raw = gzip.decompress(raw)
    return raw.decode("utf-8", errors="replace")


def code_prompts(folder: pathlib.Path, characters: int, count: int, seed: int) -> list[dict]:
    """Source files of a folder, package by package in a random order, each under a line with its name."""
    left_out = {"site-packages", "idlelib", "test", "tests"}
    files = sorted(p for p in folder.rglob("*.py") if not left_out & set(p.relative_to(folder).parts))
    packages: dict[pathlib.Path, list[pathlib.Path]] = {}
    for path in files:
        packages.setdefault(path.parent, []).append(path)
    # Modules that lie directly in the folder are packages of their own.
    groups = [group for parent, group in packages.items() if parent != folder] + [[p] for p in packages.get(folder, [])]
    if not groups:
        raise ValueError(f"{folder}: no Python sources in it")
    prompts = []
    for index in range(count):
        chosen = random.Random(f"code {seed} {index}").sample(groups, len(groups))
        text, names = "", []
        for group in chosen:
            if len(text) >= characters:
                break
            names.append(group[0].parent.name if len(group) > 1 else group[0].name)
            for path in group:
                text += f"# {path.relative_to(folder)}\n{read_text(path)}\n"
        prompts.append({"kind": "code", "name": f"code-{seed}-{index}", "of": names, "text": text[:characters]})
    return prompts


def is_prose(text: str) -> bool:
    """Mostly words, and not one form filled in again and again."""
    words = sum(c.isalpha() or c == " " for c in text)
    return words >= 0.87 * len(text) and len(zlib.compress(text.encode())) >= 0.26 * len(text.encode())


def prose_prompts(whole: str, characters: int, count: int, seed: int) -> list[dict]:
    """Stretches of a text, from random paragraphs on, that read like prose throughout."""
    source = random.Random(f"prose {seed}")
    prompts = []
    for _ in range(20000):
        at = whole.find("\n\n", source.randrange(max(1, len(whole) - characters))) + 2
        text = whole[at : at + characters]
        if len(text) == characters and all(
            is_prose(text[i : i + characters // 4]) for i in range(0, characters, characters // 4)
        ):
            prompts.append({"kind": "prose", "name": f"prose-{seed}-{len(prompts)}", "at": at, "text": text})
        if len(prompts) == count:
            return prompts
    raise ValueError(f"the prose: {len(prompts)} of {count} stretches of {characters} characters read like prose")


QUESTION_TASKS = ("multikey", "multivalue", "multiquery", "lines", "chain")


def needle_prompt(task: str, sentences: list[str], source: random.Random, fits) -> dict:
    """One question in RULER's manner, its facts strewn over `sentences`. fits(context) says whether a context is short enough; as many
    sentences stay as fit. multikey: one of 4 keys asked; multivalue: 4 values of one key; multiquery: 4 keys; lines: one of a list of
    nothing but keys and values; chain: the 5 variables that hold one value."""
    words = lambda n: [f"{a}-{b}" for a, b in source.sample([(a, b) for a in WORDS for b in WORDS if a != b], n)]
    numbers = lambda n: [str(source.randrange(10**6, 10**7)) for _ in range(n)]
    fact = lambda key, value: f"One of the special magic numbers for {key} is: {value}."
    prefix = ""
    if task == "chain":
        names = ["".join(source.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5)) for _ in range(10)]
        values = source.sample(range(10000, 100000), 2)
        facts = []
        for start, value in zip((0, 5), values):
            facts += [f"VAR {names[start]} = {value}"]
            facts += [f"VAR {b} = VAR {a}" for a, b in zip(names[start : start + 4], names[start + 1 : start + 5])]
        question = f"Which variables are assigned the value {values[0]}, directly or through others? Name all of them."
        references = names[:5]
    elif task == "lines":
        keys, values = words(4000), numbers(4000)
        sentences = [fact(key, value) for key, value in zip(keys, values)]
        facts, asked, references = [], keys[0], [values[0]]
        question = f"What is the special magic number for {asked} mentioned above?"
    else:
        count = 1 if task == "multivalue" else 4
        keys, values = words(count), numbers(4)
        facts = [fact(keys[i % count], value) for i, value in enumerate(values)]
        references = values[:1] if task == "multikey" else values
        asked = ", ".join(keys[:1] if task != "multiquery" else keys)
        question = f"What are all the special magic numbers for {asked} mentioned above?"
    if task != "chain":
        prefix = f"The special magic numbers for {asked} mentioned in the text are"

    def context(count: int) -> str:
        placed = random.Random(f"{facts} {count}")
        text = sentences[:count]
        if task == "lines":  # the line asked for stands anywhere
            at = placed.randrange(count)
            text = text[1 : at + 1] + text[:1] + text[at + 1 :]
        places = sorted(placed.sample(range(len(text)), len(facts)), reverse=True)
        order = facts[::-1] if task == "chain" else placed.sample(facts, len(facts))
        for place, line in zip(places, order):
            text.insert(place, line)
        return "Some facts are hidden in the following text. Remember them.\n" + " ".join(text) + "\n"

    low, high = len(facts) + 1, len(sentences)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(context(middle) + question + prefix) else (low, middle - 1)
    return {"context": context(low), "question": question, "answer_prefix": prefix, "references": references}


def needle_prompts(prose: str, tokenizer, length: int, count: int, seed: int, room: int = 128) -> list[dict]:
    """Questions of every task in turn over running text; `room` tokens stay free for a chat template and the answer."""
    prompts = []
    fits = lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= length - room
    texts = prose_prompts(prose, length * CHARACTERS_A_TOKEN, count, seed + 1000)
    for index, text in enumerate(texts):
        task = QUESTION_TASKS[index % len(QUESTION_TASKS)]
        sentences = [sentence for sentence in " ".join(text["text"].split()).split(". ") if sentence]
        sentences = [sentence + "." for sentence in sentences]
        prompt = needle_prompt(task, sentences, random.Random(f"needles {seed} {index}"), fits)
        prompts.append({"kind": "needles", "name": f"{task}-{seed}-{index}", "task": task, **prompt})
    return prompts


WORDS = (
    "amber anchor apple arrow autumn badger bamboo barley basket beacon birch blanket bottle branch breeze bridge bronze butter candle "
    "canyon carpet castle cedar cherry circle clover cobalt comet copper coral cotton cradle cricket crystal dagger daisy desert diamond "
    "dolphin dragon eagle ember engine falcon feather fennel ferry forest fossil fountain garden garlic ginger glacier granite hammer "
    "harbor hazel helmet hollow honey island ivory jacket jasmine jungle kettle ladder lantern lemon lizard magnet maple marble meadow "
    "mirror mosaic mountain needle nutmeg oasis olive orchard otter oyster paddle palace paper parrot pebble pepper pillow planet "
    "pocket pollen prairie puzzle quartz quiver rabbit raven ribbon river rocket saddle saffron salmon sandal shadow silver sparrow "
    "spiral summit sunset tablet temple thunder timber tulip tunnel turtle valley velvet violet walnut willow window winter zephyr"
).split()


def question_prompts(path: pathlib.Path, kind: str = "needles") -> list[dict]:
    """What `spot eval ruler --write-prompts` wrote."""
    prompts = []
    for index, line in enumerate(read_text(path).splitlines()):
        prompt = json.loads(line)
        prompts.append({"kind": kind, "name": f"{prompt['task']}-{prompt.get('sample', index)}", **prompt})
    return prompts


def token_ids(prompt: dict, tokenizer, length: int, extra: int, chat: bool) -> tuple[list[int], list[int] | None]:
    """The context's ids and, for running text, the `extra` ids that follow it; None where the model is to answer."""
    if "text" in prompt:
        ids = tokenizer(prompt["text"], add_special_tokens=False)["input_ids"]
        if len(ids) < length + extra:
            raise ValueError(f"{prompt['name']}: {len(ids)} tokens, {length + extra} are needed; make it longer")
        return ids[:length], ids[length : length + extra]
    text = prompt["context"] + prompt["question"]
    if chat:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
    ids = tokenizer(text + prompt["answer_prefix"], add_special_tokens=False)["input_ids"]
    if len(ids) > length:
        raise ValueError(f"{prompt['name']}: {len(ids)} tokens, more than --length {length}")
    return ids, None
