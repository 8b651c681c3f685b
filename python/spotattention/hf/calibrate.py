"""Temperatures that make p mean captured mass, the residual mass of each layer, and which threshold captures which mass; the
fit of `spot distill` (src/distill/calibrate.h)."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from spotattention.hf.loss import LayerParameters
from spotattention.hf.observe import Seen, observing, run
from spotattention.ops import PAGE_TOKENS, select_blocks
from spotattention.progress import Progress
from spotattention.rule import SelectionRule
from spotattention.selector_config import SelectorConfig

SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
THRESHOLDS = tuple(2 ** (-half / 2) for half in range(12, 33))  # of the mass table: 2^-6 to 2^-16
_RUN = 16  # consecutive queries measured together
_RESIDUAL_BLOCKS = 16  # fewer are too few to tell temperatures apart
_QUERIES = 256  # of a sequence


def _first_queries(config: SelectorConfig, tokens: int) -> list[int]:
    """Where the measured runs begin: evenly spaced among queries with enough residual blocks."""
    least = (
        -(-config.selection.sinks // PAGE_TOKENS) * PAGE_TOKENS
        + config.selection.recency
        + _RESIDUAL_BLOCKS * PAGE_TOKENS
    )
    starts = tokens - _RUN - least + 1
    if starts <= 0:
        return []
    runs = min(_QUERIES // _RUN, -(-starts // _RUN))
    return [least + (r * (starts - 1) // (runs - 1) if runs > 1 else starts - 1) for r in range(runs)]


def block_scores_and_mass(layer: LayerParameters, seen: Seen, first: int) -> tuple[Tensor, Tensor]:
    """Of queries first .. first + 15: the selector's block scores and the head-averaged attention mass, [16, blocks]."""
    end = first + _RUN
    made = layer.project(seen.hidden[:end], seen.positions[:end])
    future = torch.arange(end, device=seen.hidden.device) > torch.arange(first, end, device=seen.hidden.device)[:, None]
    key = made.key.float().expand(-1, made.query.shape[1], -1)
    dots = torch.einsum("qhd,thd->hqt", made.query[first:].float(), key)
    scores = torch.einsum("hqt,qh->qt", dots.relu(), made.weight[first:, 0]).masked_fill(future, -torch.inf)
    heads, kv_heads = seen.query.shape[1], seen.key.shape[1]
    query = seen.query[first:end].float().unflatten(1, (kv_heads, heads // kv_heads))
    logits = torch.einsum("qhgd,thd->hgqt", query, seen.key[:end].float()) * seen.scale
    mass = logits.masked_fill(future, -torch.inf).softmax(-1).mean((0, 1))
    missing = -end % PAGE_TOKENS
    scores = nn.functional.pad(scores, (0, missing), value=-torch.inf).unflatten(1, (-1, PAGE_TOKENS)).amax(-1)
    return scores, nn.functional.pad(mass, (0, missing)).unflatten(1, (-1, PAGE_TOKENS)).sum(-1)


class Nucleus:
    """The residual blocks of some queries in descending score, and what they capture; temperature keeps their order."""

    def __init__(self, scores: Tensor, mass: Tensor, lengths: Tensor, config: SelectorConfig) -> None:
        block = torch.arange(scores.shape[1], device=scores.device)
        recent = (lengths - config.selection.recency).clamp_min(0)[:, None] // PAGE_TOKENS
        reserved = (block < -(-config.selection.sinks // PAGE_TOKENS)) | (block >= recent)
        residual = mass.double().masked_fill(reserved, 0)
        total = residual.sum(-1, keepdim=True)
        self.residual_mass = total[:, 0]  # [queries]
        self.counted = (total[:, 0] > 0).double()
        hidden = scores.double().masked_fill(reserved, -torch.inf)
        ordered, order = torch.sort(hidden, dim=-1, descending=True, stable=True)
        self.scores = ordered - ordered[:, :1]
        self.captured = (residual / total.clamp_min(1e-300)).gather(1, order).cumsum(-1)

    def shares(self, temperature: float) -> list[float]:
        """Mean captured share of the residual mass at each p."""
        cumulative = (self.scores / temperature).softmax(-1).cumsum(-1)
        means = []
        for p in SHARES:
            count = (cumulative < p).sum(-1, keepdim=True).clamp_max(self.scores.shape[1] - 1)
            share = self.captured.gather(1, count)[:, 0]
            means.append(float((share * self.counted).sum() / self.counted.sum().clamp_min(1)))
        return means

    def error(self, temperature: float) -> float:
        return sum(abs(share - p) for share, p in zip(self.shares(temperature), SHARES, strict=True)) / len(SHARES)


def fit_temperature(nucleus: Nucleus) -> float:
    """In 2^-5 .. 2^5, with the least error: a grid over its logarithm, then golden section around the best."""
    tried = {x / 4: nucleus.error(2 ** (x / 4)) for x in range(-20, 21)}
    best = min(tried, key=lambda x: (tried[x], abs(x)))
    low, high, ratio = best - 0.25, best + 0.25, (5**0.5 - 1) / 2
    for _ in range(12):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        tried[a], tried[b] = nucleus.error(2**a), nucleus.error(2**b)
        low, high = (low, b) if tried[a] < tried[b] else (a, high)
    return 2 ** min(tried, key=lambda x: (tried[x], abs(x)))


def captured(scores: Tensor, mass: Tensor, lengths: Tensor, rule: SelectionRule) -> tuple[float, float]:
    """The mass that a rule captures and the share of the visible tokens that it reads, means over queries.

    scores [queries, blocks] float32 and mass of the same shape: a query's block scores and attention; lengths [queries]: its
    visible tokens.
    """
    chosen = select_blocks(scores[:, None].float().contiguous(), lengths.int(), **rule.arguments())
    index = chosen.indices[:, 0].long()
    index = torch.where(index < 0, mass.shape[1], index)  # a column more takes what is not there
    total = nn.functional.pad(mass, (0, 1)).gather(1, index).sum(1)
    tokens = (chosen.counts[:, 0] * PAGE_TOKENS).minimum(lengths) / lengths
    return float(total.double().mean()), float(tokens.double().mean())


def calibrate(
    model: nn.Module,
    modules: dict[int, nn.Module],
    layers: dict[int, LayerParameters],
    sequences: list[Tensor],
    progress: bool,
) -> dict[str, Any] | None:
    """What selector.json keeps of the fit, with "temperature" and "residual_mass" by layer, "mass_table" (rows of threshold,
    captured mass, share of the tokens) and of what that was made, "mass_calibration"; None where all sequences are too short.
    """
    config = next(iter(layers.values())).config
    longest = max((len(s) for s in sequences), default=0)
    blocks = -(-longest // PAGE_TOKENS)
    measured: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {layer: [] for layer in layers}
    firsts: list[int] = []

    def look(seen: Seen) -> None:
        for first in firsts:
            scores, mass = block_scores_and_mass(layers[seen.layer], seen, first)
            missing = blocks - scores.shape[1]
            scores = nn.functional.pad(scores, (0, missing), value=-torch.inf)
            lengths = torch.arange(first + 1, first + _RUN + 1, device=scores.device)
            measured[seen.layer].append((scores, nn.functional.pad(mass, (0, missing)), lengths))

    with Progress("Calibrating", len(sequences), progress) as bar, observing(model, modules, look):
        for done, tokens in enumerate(sequences, 1):
            firsts = _first_queries(config, len(tokens))
            if firsts:
                run(model, tokens)
            bar.update(done)
    if not any(measured.values()):
        return None
    fitted: dict[str, Any] = {
        "definition": "share of the residual attention mass (outside sinks and recency) on the nucleus, mean over queries",
        "layers": list(layers),
        "p": list(SHARES),
        "temperature": [],
        "residual_mass": [],
        "captured_before": [],
        "captured_after": [],
        "error_before": [],
        "error_after": [],
    }
    table = [[threshold, 0.0, 0.0] for threshold in THRESHOLDS]
    long_enough = [len(s) for s in sequences if _first_queries(config, len(s))]
    longest_measured = max(long_enough)
    for layer in layers:
        scores, mass, lengths = (torch.cat(parts) for parts in zip(*measured[layer], strict=True))
        nucleus = Nucleus(scores, mass, lengths, config)
        temperature = fit_temperature(nucleus)
        # Decode stands at the end of a context: queries near its start see little more than what is always read.
        late = lengths * 4 > 3 * longest_measured
        late_scores, late_mass, late_lengths = scores[late], mass[late], lengths[late]
        residual_mass = float(nucleus.residual_mass[late].mean())
        late_queries = len(late_lengths)
        fitted["queries"] = len(scores)
        fitted["temperature"].append(temperature)
        fitted["residual_mass"].append(max(residual_mass, 1e-6))
        for when, t in (("before", 1.0), ("after", temperature)):
            fitted[f"captured_{when}"].append(nucleus.shares(t))
            fitted[f"error_{when}"].append(nucleus.error(t))
        for row in table:
            rule = replace(config.rule(), mode="threshold", threshold=row[0])
            rule = rule.fitted(temperature, fitted["residual_mass"][-1:])
            for column, value in enumerate(captured(late_scores, late_mass, late_lengths, rule), 1):
                row[column] += value / len(layers)
    # A lower threshold takes the same blocks and others; sums of float32 may say otherwise in their last bits.
    for index, row in enumerate(table):
        row[1:] = [min(max(new, old), 1.0) for new, old in zip(row[1:], table[max(index - 1, 0)][1:], strict=True)]
    fitted["mass_table"] = table
    fitted["mass_calibration"] = {"contexts": len(long_enough), "length": longest_measured, "queries": late_queries}
    return fitted
