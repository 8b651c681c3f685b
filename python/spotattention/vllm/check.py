"""Self-check: how much of the exact attention the chosen blocks hold, sampled, counted and warned about.

A second cache that is stale or wrong shows in nothing but worse answers. Every so many steps one decode row of the step
is remembered in each layer: its query, its choice, its pages. Before the next step, when its keys are still as they were,
exact attention is computed over them; if its request has ended, vLLM may have used its pages again, and the row is dropped.
Nothing of this is inside a captured graph but the copies of one row.
"""

import functools
import logging
import time
from typing import Any

import torch
from torch import Tensor

from spotattention.self_check import Captured, captured_mass
from spotattention.vllm.pages import PAGE_TOKENS

logger = logging.getLogger("vllm.spotattention")

WARN_SECONDS = 60.0


@functools.cache
def metrics() -> tuple[Any, Any, Any]:
    """Of the process: captured mass by layer, attended and visible tokens."""
    from prometheus_client import Counter, Summary

    return (
        Summary("spot:captured_mass", "Share of the exact attention on the chosen blocks, sampled", ["layer"]),
        Counter("spot:attended_tokens", "Tokens that sampled decode rows attended to"),
        Counter("spot:visible_tokens", "Tokens that sampled decode rows could attend to"),
    )


class Statistics:
    """Sums over the process, and the same as metrics where prometheus_client exports them."""

    def __init__(self) -> None:
        self.checks, self.attended, self.visible = 0, 0, 0
        self.sums: dict[int, list[float]] = {}

    def add(self, layer: int, seen: Captured) -> None:
        entry = self.sums.setdefault(layer, [0.0, 0.0])
        entry[0] += seen.mass
        entry[1] += 1
        self.attended += seen.attended
        self.visible += seen.visible
        mass, attended, visible = metrics()
        mass.labels(str(layer)).observe(seen.mass)
        attended.inc(seen.attended)
        visible.inc(seen.visible)

    def summary(self) -> dict:
        layers = {layer: total / count for layer, (total, count) in sorted(self.sums.items())}
        rows = sum(count for _, count in self.sums.values())
        mass = sum(total for total, _ in self.sums.values()) / rows if rows else None
        return {
            "checks": self.checks,
            "captured_mass": mass,
            "layers": layers,
            "attended": self.attended,
            "visible": self.visible,
        }


STATISTICS = Statistics()


class Record:
    """One layer's remembered row. Its tensors only grow: a captured graph, whose steps are the widest, writes to them."""

    def __init__(self, check: "SelfCheck") -> None:
        self.check = check
        self.parts: list[Tensor] | None = None

    def take(self, query: Tensor, attended: Any, table: Tensor, lengths: Tensor) -> None:
        if not (self.check.due or self.check.always):
            return
        fresh = [x.index_select(0, self.check.row) for x in (query, attended.indices, attended.counts, table, lengths)]
        if self.parts is None:
            self.parts = fresh
            return
        for i, new in enumerate(fresh):
            if self.parts[i].shape[-1] < new.shape[-1]:
                self.parts[i] = new
            else:
                self.parts[i][..., : new.shape[-1]].copy_(new)  # counts and lengths say how much of it holds


class SelfCheck:
    """Of the layers of one KV cache group; told before each step."""

    def __init__(self, impls: list[Any]) -> None:
        self.impls = impls
        self.every, self.bound = impls[0].spot.check_every, impls[0].spot.check_bound
        self.always = impls[0].spot.in_graphs  # steps may be replayed: what is taken is decided at capture
        self.due, self.steps, self.warned = False, 0, -WARN_SECONDS
        self.row = torch.zeros(1, dtype=torch.int64, device=impls[0].spot.mix_weight.device)
        if self.every > 0:
            # In a graph each record costs launches: four layers stand for all.
            step = max(1, len(impls) // 4) if self.always else 1
            for impl in impls[::step]:
                impl.record = Record(self)

    def next_step(self, rows: int, page_table: Tensor) -> None:
        """Before a step with `rows` decode rows: the row of the step before is judged, and one of this step chosen."""
        if self.every == 0:
            return
        if self.due:
            self.due = False
            self._judge(page_table)
        if rows == 0:
            return
        self.steps += 1
        if self.steps % self.every == 0:
            self.due = True
            self.row.fill_(self.steps // self.every % rows)  # the same on every rank

    def _judge(self, page_table: Tensor) -> None:
        """page_table [rows, pages] of the step to come."""
        seen: dict[int, Captured] = {}
        for impl in self.impls:
            parts = impl.record.parts if impl.record is not None else None
            if parts is None or impl._pools is None:
                continue
            query, indices, counts, table, lengths = parts
            length = int(lengths[0])
            last = -(-length // PAGE_TOKENS) - 1
            if length <= impl.spot.rule["floor"]:  # everything is read
                continue
            if last >= page_table.shape[1] or not bool(
                (page_table[:, : last + 1] == table[0, : last + 1]).all(1).any()
            ):
                continue
            seen[impl.spot.layer] = captured_mass(
                query[0], impl._pools[1][0], table[0], length, indices[0], counts[0], impl.scale, impl.key_scale
            )
        if not seen:
            return
        STATISTICS.checks += 1
        for layer, captured in seen.items():
            STATISTICS.add(layer, captured)
        mean = sum(c.mass for c in seen.values()) / len(seen)
        worst = min(seen, key=lambda layer: seen[layer].mass)
        share = sum(c.attended for c in seen.values()) / sum(c.visible for c in seen.values())
        text = (
            f"captured mass {mean:.3f} (least {seen[worst].mass:.3f}, layer {worst}), "
            f"{100 * share:.1f}% of {seen[worst].visible} tokens read"
        )
        if mean < self.bound and time.monotonic() - self.warned > WARN_SECONDS:
            self.warned = time.monotonic()
            logger.warning(
                "spot self-check: %s; that is below check_bound %g: does the selector fit this model, and the budget "
                "this text?",
                text,
                self.bound,
            )
        else:
            logger.info("spot self-check: %s", text)
