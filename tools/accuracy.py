#!/usr/bin/env python3
"""Accuracy tables of one model: dense, learned selectors and baselines at the same budgets, on the same prompts.

Runs `spot eval ruler`, `spot eval needle` and `spot eval text` for every method, and writes accuracy.md, accuracy.json and
accuracy.html into --out. Losses are told apart, each as a difference on the same prompts:

    dense -> oracle      what the budget costs: the best blocks under the same rule
    oracle -> selector   what the selector's estimate costs, its keys unquantised (the first of --formats)
    selector -> FORMAT   what quantising its keys costs

Baselines and every selector run by themselves, so that a further selector costs no more than its own run. What is finished is not
run again: a RULER run that was interrupted goes on at the next prompt, the other steps at the next step. --jobs N runs N processes at a time
(RULER by task, length and a few prompts; their logs are then put together): small models leave a GPU, and many cores, idle otherwise.

usage: accuracy.py --model MODEL --text FILE --out DIR [--selector NAME]... [options] [-- options of every spot eval]
"""

import argparse
import concurrent.futures
import dataclasses
import html
import json
import os
import pathlib
import shlex
import subprocess
import sys

import numpy

ROOT = pathlib.Path(__file__).resolve().parent.parent
SPOT = pathlib.Path(os.environ.get("SPOT_BUILD", ROOT / "build" / "cpu")) / "spot"


RULER_TASKS = [
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
    "qa_1",
    "qa_2",
]
PART_SAMPLES = 5  # prompts that one process of several answers: enough to be worth its start


def comma_list(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def methods_list(text: str) -> list[str]:
    return [method.strip() for method in text.split(";") if method.strip()]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--selector", action="append", default=[], help="name or folder; may be given several times")
    parser.add_argument(
        "--text", nargs="+", required=True, help="running text: haystack of the needles, and what perplexity is of"
    )
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=comma_list, default=["ruler", "needle", "text"])
    parser.add_argument("--lengths", type=comma_list, default=["4096", "16384"])
    parser.add_argument("--tasks", default="all", help="of RULER")
    parser.add_argument(
        "--samples", type=int, default=20, help="prompts for each RULER task and length, and for each needle length"
    )
    parser.add_argument("--sequences", type=int, default=2, help="of running text, at each length")
    parser.add_argument(
        "--text-methods",
        type=int,
        default=8,
        help="methods a run of running text: each has a KV cache of its own, on a GPU too",
    )
    parser.add_argument(
        "--rules",
        type=comma_list,
        default=["k=512", "k=1024", "k=2048", "k=4096", "k=25%", "k=50%", "k=75%", "p=0.7", "p=0.8", "p=0.9"],
        help="budgets of selector, oracle, Quest and window; those that hold every length are left out",
    )
    parser.add_argument(
        "--twilight",
        type=methods_list,
        default=["p=0.95,k=25%", "p=0.95,k=50%", "p=0.95,k=75%"],
        help="Twilight's settings, separated by semicolons",
    )
    parser.add_argument(
        "--more",
        type=methods_list,
        default=[],
        help="further methods of RULER, in `spot eval`'s words, separated by semicolons: "
        "spot:k=10%%,cache=mxfp4;spot:k=10%%,prefill=sparse. Those of spot are run with every selector",
    )
    parser.add_argument("--no-baselines", action="store_true", help="selectors and dense attention alone")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument(
        "--launch",
        type=shlex.split,
        default=[],
        help="what starts every spot eval, such as 'tools/on_gpu.py --share 16 --' on several GPUs",
    )
    parser.add_argument(
        "--formats", type=comma_list, default=["bf16", "int4"], help="selector keys; the first is taken as exact"
    )
    for step in ("ruler", "needle", "text"):
        parser.add_argument(
            f"--{step}-options", type=shlex.split, default=[], help=f"more options of `spot eval {step}`, quoted as one"
        )
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options = parser.parse_args(sys.argv[1:split])
    options.extra = sys.argv[split + 1 :]
    if options.no_baselines and not options.selector:
        parser.error("--no-baselines without --selector leaves nothing to run")
    if options.no_baselines and any(not method.startswith("spot") for method in options.more):
        parser.error("--more names a baseline, which --no-baselines leaves out")
    longest = max(map(int, options.lengths))
    options.rules = [
        rule for rule in options.rules if not rule.startswith("k=") or rule.endswith("%") or int(rule[2:]) < longest
    ]
    names = [pathlib.Path(selector).name for selector in options.selector]
    if len(set(names)) < len(names):
        sys.exit(f"error: two selectors have the same name ({', '.join(names)}); rename one folder")
    return options


def selector_methods(options: argparse.Namespace) -> list[str]:
    return [f"spot:{rule},cache={form}" for rule in options.rules for form in options.formats]


def baseline_methods(options: argparse.Namespace) -> list[str]:
    budgets = [rule for rule in options.rules if rule.startswith("k=")]
    # A window has a number of tokens; p is of no use to Quest, whose scores are bounds and no estimate of mass.
    return (
        [f"oracle:{rule}" for rule in options.rules]
        + [f"quest:{rule}" for rule in budgets]
        + [f"streaming:{rule}" for rule in budgets if not rule.endswith("%")]
        + [f"twilight:{setting}" for setting in options.twilight]
    )


@dataclasses.dataclass
class Step:
    """One `spot eval` with its report in `folder`."""

    kind: str  # ruler, needle or text
    table: str  # what the report belongs to: ruler, needle, text-LENGTH
    name: str  # the selector's
    folder: pathlib.Path
    command: list[str]
    selector: pathlib.Path | None
    launch: list[str]

    def record(self) -> str:
        """What the report depends on: a selector that was distilled anew under its old name is another one."""
        files = sorted(self.selector.glob("*")) if self.selector else []
        return json.dumps([self.command, [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]])

    def done(self) -> bool:
        file = self.folder / "command.json"
        return (self.folder / "report.json").exists() and file.exists() and file.read_text() == self.record()

    def finish(self) -> dict:
        """Runs what is left to run, in sight; the report."""
        if not self.done():
            print("$ " + " ".join(self.command), flush=True)
            code = subprocess.run(self.launch + self.command).returncode
            if code:
                sys.exit(
                    f"error: the command above failed with status {code}; after mending it, run this one again to go on"
                )
            (self.folder / "command.json").write_text(self.record())
        return json.loads((self.folder / "report.json").read_text())


def list_steps(options: argparse.Namespace) -> list[Step]:
    """Every run: each selector's, then the baselines'."""
    step_options = {
        "ruler": [
            "--lengths",
            ",".join(options.lengths),
            "--tasks",
            options.tasks,
            "--samples",
            str(options.samples),
            *options.ruler_options,
        ],
        "needle": ["--length", ",".join(options.lengths), "--samples", str(options.samples), *options.needle_options],
    }
    steps = []
    for selector in options.selector + ([] if options.no_baselines else [None]):
        name = pathlib.Path(selector).name if selector else ""
        methods = selector_methods(options) if selector else baseline_methods(options)
        located = selector and next(
            (
                folder
                for folder in (pathlib.Path(selector), pathlib.Path(options.model) / "selectors" / selector)
                if folder.is_dir()
            ),
            None,
        )
        base = [
            "--model",
            options.model,
            *(["--selector", selector] if selector else []),
            "--text",
            *options.text,
            *options.extra,
        ]

        further = [method for method in options.more if method.startswith("spot") == bool(selector)]

        def add(kind: str, table: str, part: str, methods: list[str], *more: str) -> None:
            out = options.out / table / (name or "baselines") / part
            command = [str(SPOT), "eval", kind, *base, "--methods", ",".join(methods), *more, "--out", str(out)]
            steps.append(Step(kind, table, name, out, command, located, options.launch))

        for kind in options.steps:
            if kind != "text":
                add(kind, kind, "", methods + (further if kind == "ruler" else []), *step_options[kind])
                continue
            for length in options.lengths:
                for first in range(0, len(methods), options.text_methods):
                    add(
                        "text",
                        f"text-{length}",
                        str(first // options.text_methods),
                        methods[first : first + options.text_methods],
                        "--length",
                        length,
                        "--sequences",
                        str(options.sequences),
                        "--skip",
                        str(int(length) // 4),
                        *options.text_options,
                    )
    return steps


@dataclasses.dataclass
class Part:
    """What one process runs of a step, into `folder`."""

    length: int
    step: Step
    command: list[str]
    folder: pathlib.Path


def list_parts(options: argparse.Namespace, steps: list[Step]) -> list[Part]:
    """What is left of the steps, in parts that can run side by side, the longest first: RULER by task, length and PART_SAMPLES prompts."""
    tasks = RULER_TASKS if options.tasks == "all" else comma_list(options.tasks)
    parts: list[Part] = []
    for step in steps:
        if step.done():
            continue
        if step.kind != "ruler":
            parts.append(Part(2 * max(map(int, options.lengths)), step, step.command, step.folder))
            continue
        for first in range(0, options.samples, PART_SAMPLES):
            for task in tasks:
                for length in options.lengths:
                    folder = step.folder / "parts" / f"{task}-{length}-{first}"
                    command = step.command[:-1] + [str(folder), "--first-sample", str(first)]
                    for option, value in (
                        ("--lengths", length),
                        ("--tasks", task),
                        ("--samples", str(min(PART_SAMPLES, options.samples - first))),
                    ):
                        command[command.index(option) + 1] = value
                    parts.append(Part(int(length), step, command, folder))
    return sorted(parts, key=lambda part: -part.length)


def run_part(part: Part) -> int:
    part.folder.mkdir(parents=True, exist_ok=True)
    with open(part.folder / "run.log", "w") as log:
        code = subprocess.run(part.step.launch + part.command, stdout=log, stderr=subprocess.STDOUT).returncode
    if code == 0 and part.step.kind != "ruler":
        (part.folder / "command.json").write_text(part.step.record())
    return code


def run_ahead(options: argparse.Namespace, steps: list[Step]) -> None:
    """Runs the steps' parts side by side, each with a log file."""
    parts = list_parts(options, steps)
    pool = concurrent.futures.ThreadPoolExecutor(options.jobs)
    runs = {pool.submit(run_part, part): part.folder for part in parts}
    try:
        for number, finished in enumerate(concurrent.futures.as_completed(runs), 1):
            folder = runs[finished]
            print(
                f"{number}/{len(runs)} {folder.relative_to(options.out)}"
                + (f" failed with status {finished.result()}, see {folder}/run.log" if finished.result() else ""),
                flush=True,
            )
    finally:  # an interrupt ends the running ones; no further one may start
        pool.shutdown(cancel_futures=True)
    for step in steps:
        own = [part.folder / "ruler.jsonl" for part in parts if part.step is step]
        if step.kind == "ruler" and own:
            merge_logs(
                step.folder / "ruler.jsonl", [log for log in [step.folder / "ruler.jsonl", *own] if log.exists()]
            )


def merge_logs(target: pathlib.Path, logs: list[pathlib.Path]) -> None:
    """Puts RULER logs of equal settings (their first lines) together, a prompt that is in several once."""
    lines: dict[str, None] = {}
    for log in logs:
        whole = log.read_text().split("\n")[:-1]  # an interrupted run's last line may be cut
        if whole and lines and whole[0] != next(iter(lines)):
            sys.exit(
                f"error: {log} holds results of other settings than {logs[0]}; delete the one that is out of date and run again"
            )
        lines |= dict.fromkeys(whole)
    partial = target.with_suffix(".part")
    partial.write_text("".join(line + "\n" for line in lines))
    partial.replace(target)


def run_all(options: argparse.Namespace) -> tuple[dict[str, list[tuple[str, dict]]], list[str]]:
    """By table: (selector's name, "" for the baselines; report) of each run. And the reports' pages."""
    steps = list_steps(options)
    if options.jobs > 1:
        run_ahead(options, steps)
    reports: dict[str, list[tuple[str, dict]]] = {}
    for step in steps:
        reports.setdefault(step.table, []).append((step.name, step.finish()))
    return reports, [(step.folder / "report.html").relative_to(options.out).as_posix() for step in steps]


@dataclasses.dataclass
class Table:
    title: str
    header: list[str] = dataclasses.field(default_factory=list)
    rows: list[list[str]] = dataclasses.field(default_factory=list)

    def markdown(self) -> str:
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return f"### {self.title}\n\n" + "".join("| " + " | ".join(line) + " |\n" for line in lines)

    def as_html(self) -> str:
        def line(cells: list[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>\n"

        return (
            f"<h2>{html.escape(self.title)}</h2>\n<table>\n"
            + line(self.header, "th")
            + "".join(line(row, "td") for row in self.rows)
            + "</table>\n"
        )


def label(selector: str, method: str) -> str:
    """A method's name in the tables; learned selectors by their own names."""
    return method.replace("spot:", f"{selector}:", 1) if selector and method.startswith("spot:") else method


def interval(values_by_task: list[numpy.ndarray], resamples: int = 1000) -> dict[str, float]:
    """Mean over tasks with its 95% percentile bootstrap, resampled within each task (as `spot eval ruler` does)."""
    random = numpy.random.default_rng(42)
    means = numpy.zeros(resamples)
    for values in values_by_task:
        means += values[random.integers(len(values), size=(resamples, len(values)))].mean(1) / len(values_by_task)
    low, high = numpy.percentile(means, [2.5, 97.5])
    return {
        "mean": float(numpy.mean([values.mean() for values in values_by_task])),
        "low": float(low),
        "high": float(high),
    }


def losses(options: argparse.Namespace, names: list[str]) -> list[tuple[str, str, str, list[tuple[str, str, str]]]]:
    """(selector, rule, shown name, steps): each step a title and two methods, the loss lying between them."""
    rows = []
    for selector in dict.fromkeys(filter(None, names)) or [""]:  # running text has several runs of one selector
        for rule in options.rules:
            exact = label(selector, f"spot:{rule},cache={options.formats[0]}")
            steps = (
                [("dense → selector", "dense", exact)]
                if options.no_baselines
                else [("dense → oracle", "dense", f"oracle:{rule}")]
            )
            if selector:
                if not options.no_baselines:
                    steps.append(("oracle → selector", f"oracle:{rule}", exact))
                steps += [
                    (f"selector → {form}", exact, label(selector, f"spot:{rule},cache={form}"))
                    for form in options.formats[1:]
                ]
            rows.append((selector, rule, f"{selector or 'oracle'}:{rule}", steps))
    return rows


def shown(numbers: dict[str, float], form: str) -> str:
    return f"{numbers['mean']:{form}} [{numbers['low']:{form}}, {numbers['high']:{form}}]"


def ruler_tables(options: argparse.Namespace, runs: list[tuple[str, dict]], data: dict) -> list[Table]:
    # {length: {method: {(task, sample): score}}}, every run's prompts being the same ones.
    scores: dict[int, dict[str, dict]] = {}
    references: dict[tuple, list[str]] = {}
    tables = []
    version = f" (prompts of version {runs[0][1]['settings']['prompts']})"
    for selector, report in runs:
        for prompt in report["prompts"]:
            key = (prompt["task"], prompt["sample"])
            if references.setdefault((prompt["length"], *key), prompt["references"]) != prompt["references"]:
                sys.exit("error: two RULER runs have different prompts; delete their folders under --out and run again")
            for method, outcome in zip(report["methods"], prompt["outcomes"]):
                scores.setdefault(prompt["length"], {}).setdefault(label(selector, method), {})[key] = (
                    100 * outcome["score"]
                )
    for length, by_method in scores.items():
        table = Table(
            f"RULER at {length} tokens{version}",
            ["attention", "score", "vs dense", "tokens attended", "share", "captured mass"],
        )
        for index, (selector, report) in enumerate(runs):
            for measure in report["measures"]:
                if measure["length"] != length or (index > 0 and measure["method"] == "dense"):
                    continue
                dense, mass = measure["method"] == "dense", measure["captured_mass"]
                table.rows.append(
                    [
                        label(selector, measure["method"]),
                        shown(measure["score"], ".1f"),
                        "" if dense else shown(measure["difference_to_first"], "+.1f"),
                        "all" if dense else f"{measure['attended_tokens']:.0f}",
                        f"{100 * measure['attended_share']:.1f}%",
                        "" if mass is None else f"{mass:.3f}",
                    ]
                )
        tasks = list(dict.fromkeys(task for task, _ in by_method["dense"]))
        by_task = Table(f"RULER at {length} tokens, by task", ["attention", *tasks])
        for method, values in by_method.items():
            by_task.rows.append(
                [method] + [f"{numpy.mean([v for (t, _), v in values.items() if t == task]):.1f}" for task in tasks]
            )
        apart = Table(f"Where points are lost, RULER at {length} tokens")
        for selector, rule, name, steps in losses(options, [selector for selector, _ in runs]):
            apart.header = ["rule", *(title for title, _, _ in steps)]
            apart.rows.append([name])
            for title, before, after in steps:
                pairs = [
                    numpy.array(
                        [by_method[after][key] - value for key, value in by_method[before].items() if key[0] == task]
                    )
                    for task in tasks
                ]
                difference = interval(pairs)
                apart.rows[-1].append(shown(difference, "+.1f"))
                data["losses"].append(
                    {
                        "measure": "ruler",
                        "length": length,
                        "selector": selector,
                        "rule": rule,
                        "loss": title,
                        **difference,
                    }
                )
        tables += [table, *([apart] if apart.rows else []), by_task]
    return tables


def needle_tables(options: argparse.Namespace, runs: list[tuple[str, dict]]) -> list[Table]:
    tables = []
    for position, length in enumerate(options.lengths):
        table = Table(
            f"Multi-key needles at {length} tokens",
            ["attention", "exact match", "95% interval", "tokens attended", "share", "captured mass"],
        )
        for index, (selector, report) in enumerate(runs):
            result = report["lengths"][position]
            for method in result["methods"][min(index, 1) :]:  # dense is first, and once is enough
                low, high = method["interval"]
                table.rows.append(
                    [
                        label(selector, method["name"]),
                        f"{method['exact_match']}/{result['samples']}",
                        f"[{low:.2f}, {high:.2f}]",
                        f"{method['attended_tokens']:.0f}" if method["attended_tokens"] else "all",
                        f"{100 * method['attended_share']:.1f}%",
                        f"{method['captured_mass']:.3f}",
                    ]
                )
        tables.append(table)
    return tables


def text_tables(options: argparse.Namespace, length: str, runs: list[tuple[str, dict]], data: dict) -> list[Table]:
    methods = {"dense": runs[0][1]["dense"]}
    for selector, report in runs:
        methods |= {label(selector, method["name"]): method for method in report["methods"]}
    table = Table(
        f"Running text at {length} tokens",
        ["attention", "perplexity", "vs dense", "KL (nats)", "same argmax", "share attended", "captured mass"],
    )
    for name, method in methods.items():
        layers = method.get("layers", [])
        mass = numpy.mean([layer["captured_mass"] for layer in layers]) if layers else 1
        table.rows.append(
            [
                name,
                f"{method['perplexity']:.4f}",
                "" if name == "dense" else f"{100 * (method['perplexity'] / methods['dense']['perplexity'] - 1):+.2f}%",
                f"{method['kl_from_dense']:.4f}",
                f"{100 * method['argmax_agreement']:.1f}%",
                f"{100 * method['attended_share']:.1f}%",
                f"{mass:.3f}",
            ]
        )
    apart = Table(f"Where likelihood is lost, running text at {length} tokens (nats a token)")
    for selector, rule, name, steps in losses(options, [selector for selector, _ in runs]):
        apart.header = ["rule", *(title for title, _, _ in steps)]
        apart.rows.append([name])
        for title, before, after in steps:
            difference = methods[after]["nll"] - methods[before]["nll"]
            apart.rows[-1].append(f"{difference:+.4f}")
            data["losses"].append(
                {
                    "measure": "text",
                    "length": int(length),
                    "selector": selector,
                    "rule": rule,
                    "loss": title,
                    "mean": difference,
                }
            )
    return [table, *([apart] if apart.rows else [])]


NOTES = (
    "Every method answers the same prompts. RULER and needles: the context is prefilled densely once; in question and "
    "answer every token selects for itself; qa_1 and qa_2 are over invented documents, not RULER's SQuAD and HotpotQA. Scores are percent of the references found; their intervals are 95% percentile "
    "bootstraps, resampled within each task, and so are those of differences on the same prompts. Needles have Wilson's 95% "
    "intervals. Running text: every query selects for itself, and its numbers have no interval. Tokens attended and captured "
    "mass (true attention on what is attended) are means over the layers that select and the decode steps."
)

STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:1100px;margin:2em auto;padding:0 1em}table{border-collapse:collapse;"
    "font-variant-numeric:tabular-nums}td,th{padding:.2em .7em;text-align:right;border-bottom:1px solid #8884}"
    "td:first-child,th:first-child{text-align:left}:root{color-scheme:light dark}"
)


def main() -> None:
    options = parse_arguments()
    reports, pages = run_all(options)
    data: dict = {"model": options.model, "selectors": options.selector, "notes": NOTES, "losses": []}
    tables: list[Table] = []
    for folder, runs in reports.items():
        if folder == "ruler":
            tables += ruler_tables(options, runs, data)
        elif folder == "needle":
            tables += needle_tables(options, runs)
        else:
            tables += text_tables(options, folder.removeprefix("text-"), runs, data)
    data["tables"] = [dataclasses.asdict(table) for table in tables]
    title = f"Accuracy of {pathlib.Path(options.model).name}"
    (options.out / "accuracy.json").write_text(json.dumps(data, indent=1) + "\n")
    (options.out / "accuracy.md").write_text(
        "\n".join([f"## {title}\n", NOTES + "\n", *(table.markdown() for table in tables)])
    )
    (options.out / "accuracy.html").write_text(
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title><style>{STYLE}</style>"
        f"</head><body>\n<h1>{html.escape(title)}</h1>\n<p>{NOTES}</p>\n<p>Charts: "
        + ", ".join(
            f"<a href='{html.escape(link)}'>{html.escape(link.removesuffix('/report.html'))}</a>" for link in pages
        )
        + "</p>\n"
        + "".join(table.as_html() for table in tables)
        + "</body></html>\n"
    )
    print((options.out / "accuracy.md").read_text())
    print(f"written: {options.out}/accuracy.md, accuracy.json, accuracy.html")


if __name__ == "__main__":
    main()
