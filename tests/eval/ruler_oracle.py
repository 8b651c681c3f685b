"""Independent check of generated RULER prompts: solves each one from its text alone, and scores outputs by RULER's own rules.

    python ruler_oracle.py SAMPLES.json

SAMPLES.json: {"samples": [{task, wording, context, question, answer_prefix, references}, ...],
               "scores": [{task, output, references, score}, ...]}
Prints the first disagreement and exits with status 1, else prints how many were checked.
"""

import collections
import json
import re
import sys

UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
VALUE = rf"(?P<value>{UUID}|[1-9][0-9]{{6}})"
WORDS = "[A-Za-z]+(?:-[A-Za-z]+)+"
KEY = rf"(?P<key>{UUID}|{WORDS})"
KIND = "(?:number|uuid)"
NEEDLES = [
    rf"One of the special magic {KIND}s for {KEY} is: {VALUE}\.",
    rf"For the record: the {KIND} filed under the name {KEY} is {VALUE}\.",
    rf"Whoever asks you about {KEY} must get the {KIND} {VALUE} as a reply\.",
    rf"In the ledger, {VALUE} stands as the {KIND} beside the entry {KEY}\.",
]
# Needles in a prompt, those asked included; None: as many as fill it.
NEEDLE_COUNTS = {
    "niah_single_1": 1,
    "niah_single_2": 1,
    "niah_single_3": 1,
    "niah_multikey_1": 4,
    "niah_multikey_2": None,
    "niah_multikey_3": None,
    "niah_multivalue": 4,
    "niah_multiquery": 4,
}


def solve_niah(sample):
    needles = [(m["key"], m["value"]) for m in re.finditer(NEEDLES[sample["wording"]], sample["context"])]
    expected = NEEDLE_COUNTS[sample["task"]]
    assert len(needles) == expected if expected else len(needles) > 2, f"{len(needles)} needles"
    values = [value for _, value in needles]
    assert len(set(values)) == len(values), "a value occurs twice"
    keys = {key for key, _ in needles}
    assert len(keys) == (1 if sample["task"] == "niah_multivalue" else len(needles)), f"{len(keys)} keys"
    uuid_key, uuid_value = sample["task"] == "niah_multikey_3", sample["task"] in ("niah_single_3", "niah_multikey_3")
    for key, value in needles:
        assert bool(re.fullmatch(UUID, key)) == uuid_key and bool(re.fullmatch(UUID, value)) == uuid_value, (key, value)
    asked = [m[0] for m in re.finditer(rf"{UUID}|{WORDS}", sample["question"]) if m[0] in keys]
    # The prefix repeats what is asked.
    assert all(key in sample["answer_prefix"] for key in asked), sample["answer_prefix"]
    plural = len(asked) > 1 or sample["task"] == "niah_multivalue"
    assert bool(re.search(r"(numbers|uuids)\b", sample["question"])) == plural, sample["question"]
    return [value for key, value in needles if key in asked]


def solve_vt(sample):
    task = sample["context"].split("\n\n")[-1]
    value = re.search(r"value (\d{5}) ", sample["question"])[1]
    variables = {}
    for name, source in re.findall(r"^VAR ([A-Z]{5}) = (?:VAR )?([A-Z]{5}|\d{5})$", task, re.M):
        variables[name] = variables.get(source, source)
    found = [name for name, root in variables.items() if root == value]
    assert f" {len(found)} variables" in sample["answer_prefix"], sample["answer_prefix"]
    # The worked example is right, and about another value.
    example = sample["context"].split("they are:")
    assert len(example) == 2 and value not in example[0]
    known = {}
    for name, source in re.findall(r"^VAR ([A-Z]{3}) = (?:VAR )?([A-Z]{3}|\d{5})$", example[0], re.M):
        known[name] = known.get(source, source)
    assert example[1].split("\n\n")[0].split() == list(known) and len(set(known.values())) == 1
    return found


def numbered(text):
    entries = re.findall(r"(\d+)\. (\S+)", text)
    assert [int(n) for n, _ in entries] == list(range(1, len(entries) + 1)), "the list is not numbered 1, 2, ..."
    return [word for _, word in entries]


def most_common(words, count):
    ranked = collections.Counter(words).most_common()
    assert ranked[count - 1][1] > ranked[count][1], f"rank {count} is not clear: {ranked[count - 1 : count + 1]}"
    return ranked


def solve_cwe(sample):
    example, task = sample["context"].strip("\n").split("\n\n")
    words, answer = example.split("\nQuestion: ")
    shown = {word for word, _ in most_common(numbered(words.split("\n", 1)[1]), 10)[:10]}
    assert shown == set(numbered(answer.split("are: ", 1)[1])), "the worked example is wrong"
    ranked = most_common(numbered(task.split("\n", 1)[1]), 10)
    assert len({n for _, n in ranked[:10]}) == 1 and len({n for _, n in ranked[10:]}) == 1, "two frequencies only"
    assert not shown & {word for word, _ in ranked}, "example and task share words"
    return [word for word, _ in ranked[:10]]


def solve_fwe(sample):
    words = sample["context"].strip("\n").split("\n", 1)[1].split(" ")
    ranked = most_common(words, 4)
    assert ranked[0][0] == "...", ranked[0]
    assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked[1:]), "coded words have six letters"
    # Zipf with exponent 2: the counts of ranks 2, 3 and 4 are 1/4, 1/9 and 1/16 of rank 1's, rounded down.
    for rank in (2, 3, 4):
        assert abs(ranked[rank - 1][1] - ranked[0][1] / rank**2) <= 1, ranked[:4]
    return [word for word, _ in ranked[1:4]]


QUESTIONS = [  # question -> the facts to follow, each a pattern with the last answer (or the one asked for) put in
    (r"In which town was (.+) born\?", [r"{} was born in the town of (\w+) in"]),
    (r"From whom did \w+ (\w+) learn the trade\?", [r"{} learned the trade from (\w+ \w+),"]),
    (r"At which institution did \w+ (\w+) work\?", [r"years {} worked at the (\w+ \w+)\."]),
    (r"In which town does the (\w+ \w+) stand\?", [r"The {} stands in the town of (\w+)\."]),
    (r"Who founded the (\w+ [A-Z]\w+)\?", [r"The {} stands[^\n]* founded in \d+ by (\w+ \w+)\."]),
    (r"Who was the first director of the (\w+ [A-Z]\w+)\?", [r"The {} stands[^\n]* first director was (\w+ \w+)\."]),
    (r"On which river does the town of (\w+) lie\?", [r"{} is a town on the river (\w+)\."]),
    (r"Who is the mayor of ([A-Z]\w+)\?", [r"The mayor of {} is (\w+ \w+)\."]),
    (
        r"In which town does the institution stand where \w+ (\w+) worked\?",
        [r"years {} worked at the (\w+ \w+)\.", r"The {} stands in the town of (\w+)\."],
    ),
    (
        r"Who founded the institution where \w+ (\w+) worked\?",
        [r"years {} worked at the (\w+ \w+)\.", r"The {} stands[^\n]* founded in \d+ by (\w+ \w+)\."],
    ),
    (
        r"Who was the first director of the institution where \w+ (\w+) worked\?",
        [r"years {} worked at the (\w+ \w+)\.", r"The {} stands[^\n]* first director was (\w+ \w+)\."],
    ),
    (
        r"On which river lies the town where (.+) was born\?",
        [r"{} was born in the town of (\w+) in", r"{} is a town on the river (\w+)\."],
    ),
    (
        r"Who is the mayor of the town where (.+) was born\?",
        [r"{} was born in the town of (\w+) in", r"The mayor of {} is (\w+ \w+)\."],
    ),
]


def solve_qa(sample):
    documents = re.split(r"Document (\d+):\n", sample["context"])
    assert [int(n) for n in documents[1::2]] == list(range(1, len(documents) // 2 + 1)), "documents are not numbered"
    question = sample["question"].split("Question: ")[1]
    for pattern, hops in QUESTIONS:
        match = re.fullmatch(pattern, question)
        if match:
            assert len(hops) == (1 if sample["task"] == "qa_1" else 2), question
            answer, used = match[1], []
            for hop in hops:
                found = [(i, m[1]) for i, text in enumerate(documents) for m in re.finditer(hop.format(answer), text)]
                assert len(found) == 1, f"{question}: {hop.format(answer)} matches {found}"
                used.append(found[0][0])
                answer = found[0][1]
            assert len(set(used)) == len(hops), "the hops lie in different documents"
            assert sample["context"].count(answer) == 1, f"{answer} occurs elsewhere too"
            return [answer]
    raise AssertionError(f"a question of no known form: {question}")


def solve(sample):
    task = sample["task"]
    if task.startswith("niah"):
        return solve_niah(sample)
    if task.startswith("qa"):
        return solve_qa(sample)
    return {"vt": solve_vt, "cwe": solve_cwe, "fwe": solve_fwe}[task](sample)


def score(task, output, references):
    output = re.sub("[\x00-\x1f]", "\n", output).strip()
    found = [1.0 if r.lower() in output.lower() else 0.0 for r in references]
    return max(found) if task.startswith("qa") else sum(found) / len(found)


def main():
    with open(sys.argv[1], encoding="utf-8") as file:
        data = json.load(file)
    for sample in data["samples"]:
        try:
            answers = solve(sample)
        except AssertionError as e:
            sys.exit(f"{sample['task']}, wording {sample['wording']}: {e}")
        if sorted(answers) != sorted(sample["references"]):
            sys.exit(
                f"{sample['task']}, wording {sample['wording']}: solved {answers}, references {sample['references']}"
            )
    for case in data["scores"]:
        expected = score(case["task"], case["output"], case["references"])
        if abs(expected - case["score"]) > 1e-12:
            sys.exit(f"score {case['score']}, {expected} expected, of {case}")
    print(f"{len(data['samples'])} prompts solved, {len(data['scores'])} scores checked")


if __name__ == "__main__":
    main()
