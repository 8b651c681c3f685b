"""Answers that a model writes while each decode step attends only to what a form chooses by the step's exact attention: the bound of
every selector under that form. One prefill a prompt; dense and all forms then decode together, a row of the batch each."""

import json
import math
import pathlib
import time

import numpy
import torch

from choice import decode, tables, texts
from choice.forms import Form, kept_tokens


def parameter_for(rows: list[dict], form: Form, read: float) -> float:
    """The rule's number that reads this share on average over recorded prompts."""
    reads, _ = tables.Sample(rows, resamples=0).curves(form.label)
    if not reads[0][0] <= read <= reads[0][-1]:
        raise ValueError(f"{form.label}: reads {reads[0][0]:.3f} to {reads[0][-1]:.3f} of the length, not {read}")
    return math.exp(numpy.interp(math.log(read), numpy.log(reads[0]), numpy.log(form.grid)))


def score(text: str, references: list[str]) -> float:
    """RULER's: the share of references that stand in the answer."""
    return sum(reference.lower() in text.lower() for reference in references) / len(references)


class Chooser:
    """Masks each batch row's attention by its own form; row 0 stays dense."""

    def __init__(self, chosen: list[tuple[Form, float]], kv_heads: int):
        self.chosen, self.kv_heads = chosen, kv_heads
        self.mass, self.read, self.seen = [0.0] * len(chosen), [0.0] * len(chosen), 0

    def __call__(self, _, probabilities: torch.Tensor) -> torch.Tensor:
        """[rows, heads, length] -> the same, what is not chosen zero."""
        out = [probabilities[0]]
        self.seen += 1
        for index, (form, parameter) in enumerate(self.chosen):
            row = probabilities[1 + index]
            kept = row * kept_tokens(form, row, self.kv_heads, parameter)
            mass = kept.sum(-1, keepdim=True)
            out.append(kept / mass)
            self.mass[index] = self.mass[index] + mass.mean()
            self.read[index] = self.read[index] + (kept > 0).unflatten(0, (self.kv_heads, -1)).any(1).float().mean()
        return torch.stack(out)


def answers(options, prompts: list[dict]) -> None:
    chosen = []
    for word in options.forms:
        label, _, read = word.partition("@")
        chosen.append((Form.parse(label), float(read)))
    model = decode.Model(options.model, options.device)
    name = options.name or pathlib.Path(options.model).resolve().name
    curves = [row for row in tables.load(options.curves).get(name, []) if row["kind"] == "needles"]
    if not curves:
        raise ValueError(f"{', '.join(map(str, options.curves))}: no recorded needles of {name}")
    parameters = [(form, parameter_for(curves, form, read)) for form, read in chosen]
    done = set()
    if options.out.exists():
        done = {(row["kind"], row["name"]) for row in map(json.loads, options.out.read_text().splitlines())}
    for prompt in prompts:
        if "references" not in prompt or (prompt["kind"], prompt["name"]) in done:
            continue
        began = time.time()
        ids, _ = texts.token_ids(prompt, model.tokenizer, options.length, 0, options.chat)
        cache, token = model.prefill(ids)
        cache.batch_repeat_interleave(1 + len(chosen))
        chooser = Chooser(parameters, model.kv_heads)
        tokens = [token] * (1 + len(chosen))
        written: list[list[int]] = [[] for _ in tokens]
        ended = [False] * len(tokens)
        limit = min(options.tokens, prompt.get("max_new_tokens", options.tokens))
        decode.watchers.append(chooser)
        try:
            for _ in range(limit):
                for row, token in enumerate(tokens):
                    ended[row] = ended[row] or token in model.ends
                    if not ended[row]:
                        written[row].append(token)
                if all(ended):
                    break
                cache, following = model.step(tokens, cache)
                tokens = following.tolist()
        finally:
            decode.watchers.clear()
        names = ["dense", *options.forms]
        said = [model.tokenizer.decode(ids) for ids in written]
        per_step = max(1, chooser.seen)
        row = {
            "model": name,
            "device": model.device_name,
            "kind": prompt["kind"],
            "name": prompt["name"],
            "task": prompt.get("task"),
            "scores": {form: score(text, prompt["references"]) for form, text in zip(names, said)},
            "mass": {form: float(mass) / per_step for form, mass in zip(options.forms, chooser.mass)},
            "read": {form: float(read) / per_step for form, read in zip(options.forms, chooser.read)},
            "said": dict(zip(names, said)),
        }
        with open(options.out, "a") as out:
            out.write(json.dumps(row) + "\n")
        print(f"{name} {prompt['name']}: {row['scores']}, {time.time() - began:.1f} s", flush=True)
