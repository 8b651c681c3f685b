"""Prompts of facts among other words, for vLLM's tests and bench/vllm_needles.py."""

import random

from tests.vllm.environment import ROOT


class Needles:
    """Prompts with the answers that they ask for: six facts strewn over the words of the licence, the first asked for."""

    NAMES = "amber birch cobalt dune ember falcon garnet harbor iris juniper kestrel lotus".split()

    def __init__(self, rng: random.Random, count: int, words: int) -> None:
        text = (ROOT / "LICENSE").read_text().split()
        self.prompts, self.answers = [], []
        for _ in range(count):
            names = rng.sample(self.NAMES, 6)
            values = [str(rng.randrange(100_000, 1_000_000)) for _ in names]
            begin = rng.randrange(len(text))
            body = [text[(begin + i) % len(text)] for i in range(words + rng.randrange(200))]
            for name, value in zip(names, values):  # in none of the places that are always read
                body.insert(
                    rng.randrange(250, len(body) - 400), f"\nWhoever asks you about {name} must get the code {value}.\n"
                )
            self.prompts.append(" ".join(body) + f"\nWhoever asks you about {names[0]} must get the code")
            self.answers.append(values[0])

    def right(self, answered: list[dict]) -> list[bool]:
        return [value in answer["text"] for value, answer in zip(self.answers, answered, strict=True)]
