"""Means of recorded curves with bootstrap intervals over prompts, as Markdown and JSON."""

import json
import pathlib

import numpy

MASSES = (0.85, 0.90, 0.95)
READS = (0.03, 0.05, 0.10)
TODAY = "layer/16/128/256/count"  # the form of preset `spot` before docs/forms.md


def load(paths: list[pathlib.Path]) -> dict[str, list[dict]]:
    """Recorded prompts by model; of a prompt recorded twice the later one counts."""
    rows = {}
    for path in paths:
        for line in path.read_text().splitlines():
            row = json.loads(line)
            rows[(row["model"], row["kind"], row["name"])] = row
    models: dict[str, list[dict]] = {}
    for (model, _, _), row in rows.items():
        models.setdefault(model, []).append(row)
    return models


class Sample:
    """Prompts of one model by kind; a resample draws prompts within each kind, and every kind weighs the same."""

    def __init__(self, rows: list[dict], resamples: int = 1000, seed: int = 0):
        kinds = sorted({row["kind"] for row in rows})
        self.rows = [row for kind in kinds for row in rows if row["kind"] == kind]
        generator = numpy.random.default_rng(seed)
        weights = []
        for _ in range(resamples + 1):
            parts = []
            for kind in kinds:
                count = sum(row["kind"] == kind for row in self.rows)
                drawn = numpy.bincount(generator.integers(count, size=count), minlength=count)
                parts.append((drawn if weights else numpy.ones(count)) / count / len(kinds))
            weights.append(numpy.concatenate(parts))
        self.weights = numpy.array(weights)  # [1 + resamples, prompts]; the first row is the sample itself

    def curves(self, form: str) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Read and mass [1 + resamples, grid]."""
        read, mass = (numpy.array([row["forms"][form][name] for row in self.rows]) for name in ("read", "mass"))
        return self.weights @ read, self.weights @ mass


def cross(x: numpy.ndarray, y: numpy.ndarray, at: float) -> numpy.ndarray:
    """y of each row's curve where x is `at`; NaN outside it. Both grow along the grid."""
    return numpy.array([numpy.interp(at, a, b, left=numpy.nan, right=numpy.nan) for a, b in zip(x, y)])


def interval(values: numpy.ndarray) -> tuple[float, float, float]:
    """The sample's value and the 95% interval of the resamples; NaN where the sample's is."""
    if numpy.isnan(values[0]):
        return (numpy.nan,) * 3
    return values[0], *numpy.nanpercentile(values[1:], [2.5, 97.5])


def evaluate(rows: list[dict], forms: list[str] | None = None) -> dict:
    """{form: {"mass": {read: (value, low, high)}, "read": {mass: ...}, "ratio": {mass: read over today's form, paired}}}."""
    sample = Sample(rows)
    recorded = [form for form in sample.rows[0]["forms"] if all(form in row["forms"] for row in sample.rows)]
    forms = recorded if forms is None else forms
    today = {mass: cross(*sample.curves(TODAY)[::-1], mass) for mass in MASSES} if TODAY in recorded else {}
    results = {}
    for form in forms:
        read, mass = sample.curves(form)
        results[form] = {
            "mass": {at: interval(cross(read, mass, at)) for at in READS},
            "read": {at: interval(cross(mass, read, at)) for at in MASSES},
            "ratio": {at: interval(cross(mass, read, at) / today[at]) for at in MASSES if at in today},
        }
    return results


def percent(value: float, digits: int = 1) -> str:
    return "-" if numpy.isnan(value) else f"{100 * value:.{digits}f}"


def form_table(results: dict) -> list[str]:
    lines = [
        "| form | mass at 3 / 5 / 10% read | read for mass .85 / .90 / .95, % | interval at .90 | x today's read at .85 / .90 / .95 |",
        "|---|---|---|---|---|",
    ]
    for form, result in results.items():
        masses = " / ".join("-" if numpy.isnan(v[0]) else f"{v[0]:.3f}" for v in result["mass"].values())
        reads = " / ".join(percent(v[0]) for v in result["read"].values())
        _, low, high = result["read"][0.90]
        ratios = " / ".join("-" if numpy.isnan(v[0]) else f"{v[0]:.2f}" for v in result["ratio"].values())
        lines.append(f"| {form} | {masses} | {reads} | {percent(low)} to {percent(high)} | {ratios} |")
    return lines


def kind_table(rows: list[dict], forms: list[str]) -> list[str]:
    kinds = sorted({row["kind"] for row in rows})
    results = {kind: evaluate([row for row in rows if row["kind"] == kind], forms) for kind in kinds}
    lines = [f"| read for mass .90, % | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    for form in forms:
        cells = []
        for kind in kinds:
            value, low, high = results[kind][form]["read"][0.90]
            cells.append(f"{percent(value)} ({percent(low)} to {percent(high)})")
        lines.append(f"| {form} | {' | '.join(cells)} |")
    return lines


def layer_table(rows: list[dict]) -> list[str]:
    """Share read and mass by layer, of the forms whose layers were recorded, where their mean mass is .90."""
    sample = Sample(rows, resamples=1)
    forms = list(rows[0].get("layers", {}))
    if not forms:
        return []
    columns = []
    for form in forms:
        read, mass = sample.curves(form)
        at = int(numpy.abs(mass[0] - 0.90).argmin())
        pairs = []
        for name in ("read", "mass"):
            by_prompt = numpy.array([row["layers"][form][name] for row in sample.rows])  # [prompts, layers, grid]
            pairs.append(numpy.einsum("p,plg->lg", sample.weights[0], by_prompt)[:, at])
        columns.append(pairs)
    lines = [f"| layer | {' | '.join(form + ': read %, mass' for form in forms)} |", "|---" * (len(forms) + 1) + "|"]
    for layer in range(len(columns[0][0])):
        cells = " | ".join(f"{percent(read[layer])}, {mass[layer]:.3f}" for read, mass in columns)
        lines.append(f"| {layer} | {cells} |")
    return lines


def parameter_table(rows: list[dict], forms: list[str]) -> list[str]:
    """The rule's own number where the mean mass is .85, .90, .95, overall and for each kind."""
    import choice.forms

    kinds = sorted({row["kind"] for row in rows})
    groups = {"all": rows} | {kind: [row for row in rows if row["kind"] == kind] for kind in kinds}
    lines = [f"| parameter at mass .85 / .90 / .95 | {' | '.join(groups)} |", "|---" * (len(groups) + 1) + "|"]
    for form in forms:
        grid = numpy.log(choice.forms.Form.parse(form).grid)
        cells = []
        for group in groups.values():
            _, mass = Sample(group, resamples=0).curves(form)
            cells.append(" / ".join(f"{numpy.exp(numpy.interp(at, mass[0], grid)):.2g}" for at in MASSES))
        lines.append(f"| {form} | {' | '.join(cells)} |")
    return lines


def residency_table(rows: list[dict]) -> list[str]:
    """Mean over the prompts with consecutive steps."""
    having = [row for row in rows if row.get("residency")]
    if not having:
        return []
    lines = [
        f"{len(having)} prompts, {having[0]['consecutive']} consecutive steps each.",
        "",
        "| form | mass | read, % | chosen by the step before too, % | not in an LRU of 1x / 2x / 4x, % | the same, % of the length |",
        "|---|---|---|---|---|---|",
    ]
    for index, first in enumerate(having[0]["residency"]):
        cells = [row["residency"][index] for row in having]
        mean = lambda pick: float(numpy.mean([pick(cell) for cell in cells]))
        missed = [mean(lambda cell: cell["missed"][i]) for i in range(len(first["missed"]))]
        fetched = [mean(lambda cell: cell["missed"][i] * cell["read"]) for i in range(len(first["missed"]))]
        lines.append(
            f"| {first['form']} | {mean(lambda c: c['mass']):.3f} | {percent(mean(lambda c: c['read']))} | "
            f"{percent(mean(lambda c: c['repeated']), 0)} | {' / '.join(percent(m) for m in missed)} | "
            f"{' / '.join(percent(f, 2) for f in fetched)} |"
        )
    return lines


def answer_table(rows: list[dict]) -> list[str]:
    """Scores of answers written under each form, and their difference from dense on the same prompts."""
    names = [name for name in rows[0]["scores"] if all(name in row["scores"] for row in rows)]
    generator = numpy.random.default_rng(0)
    draws = generator.integers(len(rows), size=(2000, len(rows)))
    scores = {name: numpy.array([row["scores"][name] for row in rows]) for name in names}
    lines = ["| attended | score | difference from dense | mass | read, % |", "|---|---|---|---|---|"]
    for name in names:
        loss = scores[name] - scores["dense"]
        low, high = numpy.percentile(loss[draws].mean(1), [2.5, 97.5])
        mass, read = (numpy.mean([row[what].get(name, 1.0) for row in rows]) for what in ("mass", "read"))
        lines.append(
            f"| {name} | {100 * scores[name].mean():.1f} | {100 * loss.mean():+.1f} ({100 * low:+.1f} to {100 * high:+.1f}) | "
            f"{mass:.3f} | {percent(read)} |"
        )
    return lines
