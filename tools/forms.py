#!/usr/bin/env python3
"""What each form of choice must read: exact attention of a model's decode steps, and the share of K and V that sets, blocks, reserves
and rules need for a captured mass (tools/choice/forms.py says what the forms are; docs/forms.md has the results).

    forms.py prompts --out FILE --length N [--code FOLDER] [--prose FILE] [--needles MODEL] [--questions FILE] [--count N] [--seed N]
    forms.py record --model FOLDER --prompts FILE --length N --out FILE.jsonl      adds to FILE.jsonl, prompt by prompt
    forms.py answers --model FOLDER --prompts FILE --length N --curves FILE.jsonl --out FILE.jsonl
    forms.py report FILE.jsonl... [--answers FILE.jsonl...] --out FOLDER           forms.md and forms.json

Questions are what `spot eval ruler --write-prompts` writes. The first --calibrate prompts of each kind only fit what rules `fixed` and
`scaled` know in advance and enter no table. Prompts already in --out are not run again.
"""

import argparse
import json
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

from choice import texts  # noqa: E402


def write_prompts(options) -> None:
    characters = options.length * texts.CHARACTERS_A_TOKEN
    prompts = []
    if options.code:
        prompts += texts.code_prompts(options.code, characters, options.count, options.seed)
    if options.prose:
        prompts += texts.prose_prompts(texts.read_text(options.prose), characters, options.count, options.seed)
    if options.needles:
        from transformers import AutoTokenizer

        if not options.prose:
            raise ValueError("--needles hides its facts in the text of --prose")
        tokenizer = AutoTokenizer.from_pretrained(options.needles)
        prompts += texts.needle_prompts(
            texts.read_text(options.prose), tokenizer, options.length, options.count, options.seed
        )
    for path in options.questions:
        prompts += texts.question_prompts(path)
    if not prompts:
        raise ValueError("no prompts: give --code, --prose or --questions")
    options.out.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    print(f"{len(prompts)} prompts in {options.out}")


def load_prompts(path: pathlib.Path) -> list[dict]:
    prompts = [json.loads(line) for line in texts.read_text(path).splitlines()]
    for prompt in prompts:
        if not {"kind", "name"} <= prompt.keys() or not (
            {"text"} <= prompt.keys() or {"context", "question"} <= prompt.keys()
        ):
            raise ValueError(
                f"{path}: a prompt without kind, name and text or context; write them by `forms.py prompts`"
            )
    return prompts


def decode(model, prompt: dict, options, count: int):
    """`count` dense decode steps of a prompt: probabilities [layers, heads, length], one step at a time."""
    ids, follow = texts.token_ids(prompt, model.tokenizer, options.length, count, options.chat)
    cache, token = model.prefill(ids)
    for step in range(count):
        cache, following, probabilities = model.watched_step(follow[step] if follow else token, cache)
        token = following
        yield probabilities


def record(options) -> None:
    import torch
    from choice import decode as decoding
    from choice.blocks_kept import residency
    from choice.forms import Calibration, Form, Step, all_forms

    model = decoding.Model(options.model, options.device)
    prompts = load_prompts(options.prompts)
    forms = [Form.parse(label) for label in options.forms] if options.forms else all_forms()
    done = set()
    if options.out.exists():
        done = {(row["kind"], row["name"]) for row in map(json.loads, options.out.read_text().splitlines())}
    kinds: dict[str, list[dict]] = {}
    for prompt in prompts:
        kinds.setdefault(prompt["kind"], []).append(prompt)
    advance = [form for form in forms if form.rule in ("fixed", "scaled")]
    known = Calibration()
    for prompt in [p for group in kinds.values() for p in group[: options.calibrate]] if advance else []:
        for index, probabilities in enumerate(decode(model, prompt, options, options.steps * options.every)):
            if index % options.every == options.every - 1:
                step = Step(probabilities, model.kv_heads)
                for form in {form.key: form for form in advance}.values():
                    known.add(form.key, step.ranking(form))
    if advance and not known.sums:
        raise ValueError("rules fixed and scaled need --calibrate of at least 1")

    part, parts = map(int, options.part.split("/"))
    name = options.name or pathlib.Path(options.model).resolve().name
    for kind, group in kinds.items():
        for index, prompt in enumerate(group[options.calibrate :]):
            if (kind, prompt["name"]) in done or index % parts != part:
                continue
            began = time.time()
            consecutive = options.consecutive if index < options.consecutive_prompts else 0
            sums, layers, kept, recorded = {}, {}, [], 0
            for at, probabilities in enumerate(
                decode(model, prompt, options, max(options.steps * options.every, consecutive))
            ):
                step = Step(probabilities, model.kv_heads)
                if at < consecutive:
                    kept.append(step)
                if at % options.every != options.every - 1 or recorded == options.steps:
                    continue
                recorded += 1
                for form in forms:
                    curve = torch.stack(step.curve(form, known)).double()  # [2, layers, grid]
                    sums[form.label] = sums.get(form.label, 0) + curve.mean(1)
                    if form.label in options.layers:
                        layers[form.label] = layers.get(form.label, 0) + curve
            as_lists = lambda curve: dict(zip(("read", "mass"), (curve / recorded).tolist()))
            row = {
                "model": name,
                "device": model.device_name,
                "kind": kind,
                "name": prompt["name"],
                "length": step.probabilities.shape[-1],
                "steps": recorded,
                "forms": {label: as_lists(curve) for label, curve in sums.items()},
                "layers": {label: as_lists(curve) for label, curve in layers.items()},
            }
            if consecutive:
                row |= {"consecutive": consecutive, "residency": residency(kept, consecutive // 3)}
            text = json.dumps(row, default=float)
            with open(options.out, "a") as out:
                out.write(text + "\n")
            print(f"{name} {kind} {prompt['name']}: {row['length']} tokens, {time.time() - began:.1f} s", flush=True)


def report(options) -> None:
    from choice import tables

    models = tables.load(options.recorded)
    answers = tables.load(options.answers)
    lines, results = ["# Forms of choice", ""], {}
    for model, rows in models.items():
        result = tables.evaluate(rows)
        results[model] = result
        kinds = ", ".join(f"{sum(r['kind'] == k for r in rows)} {k}" for k in sorted({r["kind"] for r in rows}))
        lines += [f"## {model}", ""]
        lines += [
            f"{len(rows)} prompts ({kinds}), {min(r['length'] for r in rows):,} to {max(r['length'] for r in rows):,} tokens, "
            f"{sum(r['steps'] for r in rows)} decode steps, {rows[0]['device']}.",
            "",
        ]
        shown = [form for form in options.show if form in result] or list(result)[:8]
        parts = {
            "": tables.form_table(result),
            "By text": tables.kind_table(rows, shown),
            "The rule's number": tables.parameter_table(rows, shown),
            "By layer": tables.layer_table(rows),
            "Blocks kept from step to step": tables.residency_table(rows),
            "Answers": tables.answer_table(answers[model]) if model in answers else [],
        }
        for title, table in parts.items():
            if table:
                lines += ([f"### {title}", ""] if title else []) + table + [""]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "forms.md").write_text("\n".join(lines))
    (options.out / "forms.json").write_text(json.dumps(results, indent=1))
    print(f"{options.out / 'forms.md'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("prompts")
    made.add_argument("--length", type=int, required=True, help="tokens that the text must last for")
    made.add_argument("--code", type=pathlib.Path, help="folder of Python sources, such as a standard library")
    made.add_argument("--prose", type=pathlib.Path, help="text file, .gz too")
    made.add_argument(
        "--needles", metavar="MODEL", help="questions in RULER's manner, counted by this model's tokenizer"
    )
    made.add_argument(
        "--questions", type=pathlib.Path, nargs="*", default=[], help="files of `spot eval ruler --write-prompts`"
    )
    made.add_argument("--count", type=int, default=12, help="prompts of code and of prose")
    made.add_argument("--seed", type=int, default=0)
    run = commands.add_parser("record")
    ask = commands.add_parser("answers")
    for command in (run, ask):
        command.add_argument("--model", required=True)
        command.add_argument("--name", help="the model's name in tables (its folder's)")
        command.add_argument("--prompts", type=pathlib.Path, required=True)
        command.add_argument(
            "--length", type=int, required=True, help="context of running text; the most of a question"
        )
        command.add_argument("--device", default="cpu")
        command.add_argument("--chat", action="store_true", help="questions go through the model's chat template")
    run.add_argument("--calibrate", type=int, default=2, metavar="N")
    run.add_argument(
        "--part",
        default="0/1",
        metavar="I/N",
        help="records every N-th prompt from the I-th on, so that N can run at once",
    )
    run.add_argument("--steps", type=int, default=7, help="decode steps recorded a prompt")
    run.add_argument("--every", type=int, default=2, help="of how many decode steps one is recorded")
    run.add_argument("--consecutive", type=int, default=64, help="consecutive steps whose blocks are followed")
    run.add_argument(
        "--consecutive-prompts", type=int, default=2, metavar="N", help="the first N of each kind have them"
    )
    run.add_argument("--forms", nargs="*", help="labels; without them all forms")
    run.add_argument("--layers", nargs="*", default=["layer/16/128/256/count", "group/16/16/64/threshold"])
    ask.add_argument(
        "--curves", type=pathlib.Path, nargs="+", required=True, help="recordings that say what a parameter reads"
    )
    ask.add_argument(
        "--forms", nargs="+", required=True, help="labels with the share to read, such as group/16/16/64/threshold@0.1"
    )
    ask.add_argument("--tokens", type=int, default=48, help="the longest answer")
    shown = commands.add_parser("report")
    shown.add_argument("recorded", type=pathlib.Path, nargs="+")
    shown.add_argument("--answers", type=pathlib.Path, nargs="*", default=[])
    shown.add_argument("--show", nargs="*", default=[], help="forms of the tables by text and of parameters")
    for command in (made, run, ask, shown):
        command.add_argument("--out", type=pathlib.Path, required=True)
    options = parser.parse_args()
    try:
        if options.command == "answers":
            from choice.answers import answers

            answers(options, load_prompts(options.prompts))
        else:
            {"prompts": write_prompts, "record": record, "report": report}[options.command](options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
