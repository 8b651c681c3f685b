"""Rows about invented documents (questions in one step or two) and about lists of words (common and frequent ones).

The layouts are those of `spot eval` (src/eval/ruler_questions.cpp, ruler_chains.cpp); names and words are drawn anew.
"""

from .pieces import Pieces, Row, letters, pseudo_word

KINDS = ("Observatory", "Library", "Museum", "Academy", "Theatre", "Hospital", "Archive", "School")
INSTRUCTION = "Answer the question from the documents. Give nothing but the answer.\n\n"


class World:
    """People, institutions and towns with facts that no text knows."""

    def __init__(self, pieces: Pieces):
        self.pieces, self.rng = pieces, pieces.rng
        self.used: set[str] = set()

    def name(self) -> str:
        while True:
            word = pseudo_word(self.rng)
            if word not in self.used:
                self.used.add(word)
                return word.capitalize()

    def full_name(self) -> str:
        return f"{self.name()} {self.name()}"

    def institution_name(self) -> str:
        return f"{self.name()} {self.rng.choice(KINDS)}"

    def person(self) -> dict[str, str]:
        return {
            "kind": "person",
            "name": self.full_name(),
            "town": self.name(),
            "teacher": self.full_name(),
            "works_at": self.institution_name(),
        }

    def institution(self, name: str = "") -> dict[str, str]:
        return {
            "kind": "institution",
            "name": name or self.institution_name(),
            "town": self.name(),
            "founder": self.full_name(),
            "director": self.full_name(),
        }

    def town(self, name: str = "") -> dict[str, str]:
        return {"kind": "town", "name": name or self.name(), "river": self.name(), "mayor": self.full_name()}

    def document(self, subject: dict[str, str]) -> str:
        """Title line and a paragraph: the first fact opens it, the others stand among remarks."""
        rng, words, name = self.rng, self.pieces.words, subject["name"]
        thing = f"the {rng.choice(words)} {rng.choice(words)}"
        year, number = rng.randrange(1700, 1990), rng.randrange(3, 60)
        if subject["kind"] == "person":
            last = name.split()[1]
            title = name
            facts = [
                f"{name} was born in the town of {subject['town']} in {year}.",
                f"{last} learned the trade from {subject['teacher']}, whose workshop was known far beyond the region.",
                f"For {number} years {last} worked at the {subject['works_at']}.",
            ]
            remarks = [
                f"Friends remember that {last} kept {thing} on the desk.",
                f"{last} used to say that every {rng.choice(words)} counts.",
                f"Two letters of that time tell of a long journey with {thing}.",
                f"There is still {thing} that {last} once repaired.",
            ]
        elif subject["kind"] == "institution":
            title = f"The {name}"
            facts = [
                f"The {name} stands in the town of {subject['town']}.",
                f"It was founded in {year} by {subject['founder']}.",
                f"Its first director was {subject['director']}.",
            ]
            remarks = [
                f"Visitors come above all to see {thing} in the entrance hall.",
                f"Its emblem shows {thing}.",
                f"For {number} years the cellar held nothing but {thing}.",
                f"By the gate, {thing} reminds of its early days.",
            ]
        else:
            title = name
            facts = [
                f"{name} is a town on the river {subject['river']}.",
                f"The mayor of {name} is {subject['mayor']}.",
            ]
            remarks = [
                f"Around {year} some {number} thousand people lived here.",
                f"Its coat of arms shows {thing}.",
                f"Each autumn the town holds a fair for {thing}.",
                f"Guests are advised to see {thing} behind the market.",
            ]
        rest = facts[1:] + rng.sample(remarks, rng.randint(0, len(remarks)))
        rng.shuffle(rest)
        return title + "\n" + " ".join([facts[0], *rest])


def one_step(rng, subject: dict[str, str]) -> tuple[str, str]:
    """Question and answer about one document."""
    name = subject["name"]
    if subject["kind"] == "person":
        return rng.choice(
            [
                (f"In which town was {name} born?", subject["town"]),
                (f"From whom did {name} learn the trade?", subject["teacher"]),
                (f"At which institution did {name} work?", subject["works_at"]),
            ]
        )
    if subject["kind"] == "institution":
        return rng.choice(
            [
                (f"In which town does the {name} stand?", subject["town"]),
                (f"Who founded the {name}?", subject["founder"]),
                (f"Who was the first director of the {name}?", subject["director"]),
            ]
        )
    return rng.choice(
        [
            (f"On which river does the town of {name} lie?", subject["river"]),
            (f"Who is the mayor of {name}?", subject["mayor"]),
        ]
    )


def two_steps(rng, person: dict[str, str], second: dict[str, str]) -> tuple[str, str]:
    """Question and answer that join a person's document with that of the place of work or birth."""
    name = person["name"]
    if second["kind"] == "institution":
        return rng.choice(
            [
                (f"In which town does the institution stand where {name} worked?", second["town"]),
                (f"Who founded the institution where {name} worked?", second["founder"]),
                (f"Who was the first director of the institution where {name} worked?", second["director"]),
            ]
        )
    return rng.choice(
        [
            (f"On which river lies the town where {name} was born?", second["river"]),
            (f"Who is the mayor of the town where {name} was born?", second["mayor"]),
        ]
    )


def document_row(pieces: Pieces, count: int) -> Row:
    """Instruction, numbered documents, questions with answers: `count` tokens or more, the last answer is cut."""
    rng, world = pieces.rng, World(pieces)
    share = rng.uniform(0.1, 0.4) if count < 5000 else rng.uniform(0.02, 0.2)
    documents, cases, used = [], [], 0
    while used < count * (1 - share):
        if rng.random() < 0.35:
            person = world.person()
            second = world.institution(person["works_at"]) if rng.random() < 0.5 else world.town(person["town"])
            subjects = [person, second]
            cases.append(two_steps(rng, person, second))
        else:
            subjects = [rng.choice((world.person, world.institution, world.town))()]
        cases += [one_step(rng, subject) for subject in subjects]
        new = [_encode(pieces, world.document(subject) + "\n\n") for subject in subjects]
        documents += new
        used += sum(map(len, new)) + 8 * len(new)
    rng.shuffle(documents)
    rng.shuffle(cases)
    row = Row().add(_encode(pieces, INSTRUCTION), 0)
    for at, document in enumerate(documents, 1):
        row.add(_encode(pieces, f"Document {at}:\n") + document, 0)
    at = 0
    while len(row) < count:
        question, answer = cases[at % len(cases)]
        at += 1
        row.add(_encode(pieces, f"{INSTRUCTION}Question: {question} Answer:"), 0)
        row.answer(_encode(pieces, " " + answer), "qa").add(_encode(pieces, "\n\n"))
    return row


def _encode(pieces: Pieces, text: str) -> list[int]:
    return pieces.tokenizer.encode(text).ids


def word_list_row(pieces: Pieces, count: int) -> Row:
    """One or more lists, then text where no further one fits: `count` tokens."""
    rng, row = pieces.rng, Row()
    make = common_words if rng.random() < 0.5 else frequent_words
    while True:
        room = count - len(row)
        part = make(pieces, min(room, rng.choice((500, 1500, 6000, 70_000))))
        if part is None:
            return row.add(pieces.slice("text", room).tolist())
        row.extend(part)


def common_words(pieces: Pieces, room: int) -> Row | None:
    """A numbered list in which some words stand more often than the others; the answer has them as they first occur."""
    rng = pieces.rng
    asked = rng.choice((3, 5, 10)) if room < 2000 else 10
    question = (
        f"\nQuestion: Which {asked} words are the most common ones in the list above? Answer: The top {asked} words that appear "
        "most often in the list are:"
    )
    many, few = rng.choice(((3, 1), (6, 1), (10, 3), (30, 3)))
    budget = 0.93 * (room - 120 - 7 * asked)
    pool = list(
        dict.fromkeys(
            rng.choice(pieces.words) if rng.random() < 0.7 else pseudo_word(rng)
            for _ in range(asked + room // 8 // few)
        )
    )
    sizes = [len(encoding.ids) for encoding in pieces.tokenizer.encode_batch([" " + word for word in pool])]
    digits = len(str(room // 8))
    listed, used = [], 0
    for at, (word, size) in enumerate(zip(pool, sizes)):
        times = many if at < asked else few
        used += times * (size + digits + 2)
        if used > budget:
            break
        listed += [word] * times
    if len(listed) < asked * many + 3 * few:
        return None
    rng.shuffle(listed)
    text = (
        "Here is a numbered list of words. Some of the words stand in it more often than the others. Memorise those.\n"
        + " ".join(f"{at}. {word}" for at, word in enumerate(listed, 1))
        + question
    )
    row = Row().add(_encode(pieces, text), 0)
    common = set(pool[:asked])
    for at, word in enumerate((word for word in dict.fromkeys(listed) if word in common), 1):
        row.add(_encode(pieces, f" {at}.")).answer(_encode(pieces, " " + word), "words")
    row.add(_encode(pieces, "\n\n"))
    return row if len(row) <= room else None


def frequent_words(pieces: Pieces, room: int) -> Row | None:
    """Coded words with frequencies as 1 / rank squared, the first rank written as dots; the next three are the answer."""
    rng = pieces.rng
    size = int((room - 130) / 2.8)
    if size < 100:
        return None
    coded = list(dict.fromkeys(letters(rng, 6, "abcdefghijklmnopqrstuvwxyz") for _ in range(max(room // 50, 8))))
    listed = []
    for rank, word in enumerate(coded, 1):
        listed += ["..." if rank == 1 else word] * int(size / (rank * rank * 1.6449))
    rng.shuffle(listed)
    text = (
        "Read the coded text below and count how often each coded word occurs in it. Find the three words that occur most often.\n"
        + " ".join(listed)
        + "\nQuestion: Explain nothing and leave the dots '...' out of account. Which three words occur most often "
        "in the coded text above? Answer: According to the coded text above, the three most frequently appeared words are:"
    )
    row = Row().add(_encode(pieces, text), 0)
    for word in coded[1:4]:
        row.answer(_encode(pieces, " " + word), "words")
    row.add(_encode(pieces, "\n\n"))
    return row if len(row) <= room else None
