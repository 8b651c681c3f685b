"""Forms of choice: which blocks of the past a decode step reads, and the attention mass that it then has.

Everything here takes the exact attention of one decode step, probabilities [layers, heads, length] float32 (softmax over the past,
one row a query head; heads of one KV group stand together), and asks of a form what must be read for which mass.

    sets    layer   one set of blocks a layer, by the mean over all query heads; every KV head reads it
            group   one set a KV head, by the mean over the query heads that share it
            head    one set a query head; its KV head reads the union of its query heads' sets
    block   tokens a block; a block's score is the sum of its tokens' probabilities, or the largest one (score="max")
    sinks, recent   tokens always read at both ends, in whole blocks as kernels/select_rules.h counts them
    rule    what the grid of parameters means
            count      so many tokens in all, as a share of the length, the same in every layer
            top_p      the fewest blocks whose mass reaches p of the residual mass
            threshold  every block whose score is at least tau, one tau for all layers and steps
            share      the same on score / residual mass: needs nothing that is comparable between layers
            scaled     the same on score / residual mass x the mean residual mass of that layer and set, known in advance
            relative   every block whose score is at least r x the largest residual score of the set
            fixed      a count for each layer and set, known in advance
            step       one tau a step, such that a share of all layers' tokens is read: a bound, it needs every layer at once
    prune   within the chosen blocks, reserved ones among them, V is read only where a token's probability (mean over the KV head's query heads) is at least
            prune x the smallest chosen score / block; K is read whole. 0: V is read whole

"In advance" is Calibration, filled from other prompts. Read is the share of the length's K and V rows that a KV head fetches, mean
over layers and KV heads, reserved ones included; K and V count half each. Mass is the mean over layers and query heads.
"""

import dataclasses
import functools
import math

import torch

SHARES = torch.logspace(-2.4, -0.05, 36, dtype=torch.float64).tolist()
PROBABILITIES = (1 - torch.logspace(-0.01, -2.5, 32, dtype=torch.float64)).tolist()
THRESHOLDS = torch.logspace(-1, -7.5, 53, dtype=torch.float64).tolist()
RELATIVES = torch.logspace(0, -6.5, 53, dtype=torch.float64).tolist()
SETS = ("layer", "group", "head")
RULES = {
    "count": SHARES,
    "top_p": PROBABILITIES,
    "threshold": THRESHOLDS,
    "share": THRESHOLDS,
    "scaled": THRESHOLDS,
    "relative": RELATIVES,
    "fixed": THRESHOLDS,
    "step": SHARES,
}


@dataclasses.dataclass(frozen=True)
class Form:
    sets: str
    block: int
    sinks: int
    recent: int
    rule: str
    score: str = "sum"
    prune: float = 0.0

    @property
    def label(self) -> str:
        tail = (f"/{self.score}" if self.score != "sum" else "") + (f"/prune{self.prune:g}" if self.prune else "")
        return f"{self.sets}/{self.block}/{self.sinks}/{self.recent}/{self.rule}{tail}"

    @staticmethod
    def parse(label: str) -> "Form":
        """The inverse of `label`; ValueError with one sentence where it names no form."""
        words = label.split("/")
        try:
            sets, block, sinks, recent, rule, *rest = words
            form = Form(sets, int(block), int(sinks), int(recent), rule)
            for word in rest:
                if word.startswith("prune"):
                    form = dataclasses.replace(form, prune=float(word[5:]))
                else:
                    form = dataclasses.replace(form, score=word)
        except ValueError:
            raise ValueError(
                f"{label!r} is no form: SETS/BLOCK/SINKS/RECENT/RULE[/max][/pruneC] is, such as group/16/16/64/threshold"
            ) from None
        if (
            sets not in SETS
            or rule not in RULES
            or form.score not in ("sum", "max")
            or form.block < 1
            or min(form.sinks, form.recent) < 0
        ):
            raise ValueError(f"{label!r}: sets are {', '.join(SETS)}; rules are {', '.join(RULES)}; blocks are >= 1")
        return form

    @property
    def grid(self) -> list[float]:
        return RULES[self.rule]

    @property
    def key(self) -> tuple:
        """What a ranking, and what is known in advance, depend on."""
        return (self.sets, self.block, self.sinks, self.recent, self.score)


def all_forms() -> list[Form]:
    """The forms of docs/forms.md."""
    forms = []
    for sets in ("layer", "group"):
        for block in (16, 8, 4, 1):
            for sinks, recent in ((128, 256), (16, 64), (4, 16)):
                forms += [Form(sets, block, sinks, recent, rule) for rule in ("count", "top_p", "threshold")]
        for block, sinks, recent in ((16, 128, 256), (16, 16, 64), (8, 16, 64)):
            forms += [
                Form(sets, block, sinks, recent, rule) for rule in ("share", "scaled", "relative", "fixed", "step")
            ]
        forms += [Form(sets, block, 16, 64, rule, "max") for block in (16, 8) for rule in ("count", "threshold")]
    for form in (
        "layer/16/128/256/count",
        "layer/16/16/64/threshold",
        "group/16/16/64/threshold",
        "group/8/16/64/threshold",
    ):
        forms += [dataclasses.replace(Form.parse(form), prune=prune) for prune in (0.25, 1, 2)]
    forms += [Form("head", block, 16, 64, rule) for block in (16, 1) for rule in ("count", "threshold")]
    forms += [Form("head", 16, 128, 256, rule) for rule in ("count", "threshold")]
    return forms


def block_scores(probabilities: torch.Tensor, block: int, score: str = "sum") -> torch.Tensor:
    """[..., length] -> [..., ceil(length / block)]."""
    length = probabilities.shape[-1]
    if block == 1:
        return probabilities
    blocks = torch.nn.functional.pad(probabilities, (0, -length % block)).unflatten(-1, (-1, block))
    return blocks.sum(-1) if score == "sum" else blocks.amax(-1)


def residual_range(length: int, form: Form) -> tuple[int, int]:
    """Residual blocks are [begin, end); the others are reserved, as kernels/select_rules.h has it."""
    begin = min(-(-form.sinks // form.block), -(-length // form.block))
    return begin, max(begin, (length - form.recent) // form.block if length > form.recent else 0)


def mean_over_sets(probabilities: torch.Tensor, kv_heads: int, sets: str) -> torch.Tensor:
    """[layers, heads, length] -> [layers, sets, length]."""
    if sets == "layer":
        return probabilities.mean(1, keepdim=True)
    if sets == "group":
        return probabilities.unflatten(1, (kv_heads, -1)).mean(2)
    return probabilities


class Calibration:
    """What rules `scaled` and `fixed` know in advance: mean sorted residual scores and mean residual mass, by layer and set."""

    def __init__(self):
        self.sums: dict[tuple, list] = {}

    def add(self, key: tuple, ranking: "Ranking") -> None:
        scores, total = ranking.scores.double(), ranking.total.double()
        if key not in self.sums:
            self.sums[key] = [scores, total, 1]
            return
        have = self.sums[key]
        width = max(have[0].shape[-1], scores.shape[-1])
        widen = lambda x: torch.nn.functional.pad(x, (0, width - x.shape[-1]))
        self.sums[key] = [widen(have[0]) + widen(scores), have[1] + total, have[2] + 1]

    def mean_scores(self, key: tuple) -> torch.Tensor:
        return (self.sums[key][0] / self.sums[key][2]).float()

    def mean_total(self, key: tuple) -> torch.Tensor:
        return (self.sums[key][1] / self.sums[key][2]).float()


class Ranking:
    """The residual blocks of every layer and set in descending score: scores [layers, sets, residual], mass [.., residual + 1]
    captured by the first n of them, total [layers, sets] residual mass; reserved mass and tokens beside them."""

    def __init__(self, tokens: torch.Tensor, form: Form):
        """tokens [layers, sets, length]."""
        self.length = tokens.shape[-1]
        self.begin, self.end = residual_range(self.length, form)
        self.num_reserved = -(-self.length // form.block) - (self.end - self.begin)  # blocks
        self.reserved_tokens = self.length - (self.end - self.begin) * form.block
        sums = block_scores(tokens, form.block)
        self.reserved_mass = sums[..., : self.begin].sum(-1) + sums[..., self.end :].sum(-1)
        residual = sums[..., self.begin : self.end]
        scores = residual
        if form.score != "sum":
            scores = block_scores(tokens, form.block, form.score)[..., self.begin : self.end]
        self.scores, self.order = scores.sort(-1, descending=True)
        gathered = self.scores if form.score == "sum" else residual.gather(-1, self.order)
        self.mass = torch.nn.functional.pad(gathered.double().cumsum(-1), (1, 0)).float()
        self.total = self.mass[..., -1]

    def chosen(self, taken: torch.Tensor, reserved: bool = False) -> torch.Tensor:
        """[layers, sets, blocks] bool: the first `taken` [layers, sets] of each ranking, and the reserved ones if wanted."""
        ranks = torch.arange(self.order.shape[-1], device=self.order.device).expand(self.order.shape)
        inside = torch.zeros_like(self.order, dtype=torch.bool).scatter_(-1, self.order, ranks < taken.unsqueeze(-1))
        after = self.num_reserved - self.begin
        return torch.nn.functional.pad(inside, (self.begin, after), value=reserved)


@functools.lru_cache
def grid_of(rule: str, device: torch.device) -> torch.Tensor:
    return torch.tensor(RULES[rule], device=device, dtype=torch.float64)


def at_least(descending: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """How many of descending [layers, sets, n] are >= bounds [layers, sets, grid]."""
    return torch.searchsorted(-descending, (-bounds).contiguous(), right=True)


def counts(form: Form, ranking: Ranking, known: Calibration | None = None) -> torch.Tensor:
    """[layers, sets, grid] blocks taken of each ranking beside the reserved ones."""
    layers, sets, residual = ranking.scores.shape
    grid = grid_of(form.rule, ranking.scores.device)
    rows = grid.float().expand(layers, sets, -1)
    total = ranking.total.unsqueeze(-1)
    if form.rule == "count":
        wanted = torch.ceil(grid * ranking.length / form.block) - ranking.num_reserved
        taken = wanted.clamp(min=0).long().expand(layers, sets, -1)
    elif form.rule == "top_p":
        taken = torch.searchsorted(ranking.mass[..., 1:].contiguous(), (rows * total).contiguous()) + 1
    elif form.rule == "threshold":
        taken = at_least(ranking.scores, rows)
    elif form.rule == "share":
        taken = at_least(ranking.scores, rows * total)
    elif form.rule == "scaled":
        taken = at_least(ranking.scores, rows * total / known.mean_total(form.key).unsqueeze(-1))
    elif form.rule == "relative":
        taken = at_least(ranking.scores, rows * ranking.scores[..., :1])
    elif form.rule == "fixed":
        taken = at_least(known.mean_scores(form.key), rows)
    else:  # step
        every = ranking.scores.flatten().sort(descending=True).values
        wanted = (grid * ranking.length / form.block - ranking.num_reserved).clamp(min=0)
        place = (wanted * layers * sets).long().clamp(max=every.numel() - 1)
        taken = at_least(ranking.scores, every[place].expand(layers, sets, -1))
    return taken.clamp(max=residual)


def pruned_curve(form, ranking, taken, probabilities, kv_heads):
    """[layers, grid] rows read, K and V half each, and mass, with V read by its token's weight."""
    tokens = mean_over_sets(probabilities, kv_heads, "group")  # V belongs to a KV head
    smallest = torch.nn.functional.pad(ranking.scores, (1, 0), value=1.0).gather(-1, taken)  # [layers, sets, grid]
    if form.rule == "threshold":
        smallest = grid_of(form.rule, tokens.device).float().expand_as(smallest)
    read, mass = [], []
    for step in range(taken.shape[-1]):
        chosen = ranking.chosen(taken[..., step], reserved=True).repeat_interleave(form.block, -1)[
            ..., : ranking.length
        ]
        heavy = chosen & (tokens >= form.prune * smallest[..., step : step + 1] / form.block)
        read.append((chosen.float().mean((1, 2)) + heavy.float().mean((1, 2))) / 2)
        mass.append((tokens * heavy).sum(-1).mean(1))
    return torch.stack(read, -1), torch.stack(mass, -1)


def union_curve(form, ranking, taken, kv_heads):
    """[layers, grid] read and mass of sets a query head: its KV head reads the union of its query heads' sets."""
    read = []
    for step in range(taken.shape[-1]):
        union = ranking.chosen(taken[..., step]).unflatten(1, (kv_heads, -1)).any(2)
        read.append((union.sum(-1).float() * form.block + ranking.reserved_tokens).mean(1) / ranking.length)
    mass = (ranking.reserved_mass.unsqueeze(-1) + ranking.mass.gather(-1, taken)).mean(1)
    return torch.stack(read, -1).clamp(max=1), mass


class Step:
    """One decode step's attention; rankings are shared by the forms that need the same one."""

    def __init__(self, probabilities: torch.Tensor, kv_heads: int):
        """probabilities [layers, heads, length] float32."""
        self.probabilities, self.kv_heads = probabilities, kv_heads
        self.tokens: dict[str, torch.Tensor] = {}
        self.rankings: dict[tuple, Ranking] = {}

    def ranking(self, form: Form) -> Ranking:
        if form.sets not in self.tokens:
            self.tokens[form.sets] = mean_over_sets(self.probabilities, self.kv_heads, form.sets)
        if form.key not in self.rankings:
            self.rankings[form.key] = Ranking(self.tokens[form.sets], form)
        return self.rankings[form.key]

    def curve(self, form: Form, known: Calibration | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Read and mass, [layers, grid] each."""
        ranking = self.ranking(form)
        taken = counts(form, ranking, known)
        if form.sets == "head":
            return union_curve(form, ranking, taken, self.kv_heads)
        if form.prune:
            return pruned_curve(form, ranking, taken, self.probabilities, self.kv_heads)
        read = (taken * form.block + ranking.reserved_tokens).float().mean(1) / ranking.length
        mass = (ranking.reserved_mass.unsqueeze(-1) + ranking.mass.gather(-1, taken)).mean(1)
        return read.clamp(max=1), mass


def kept_tokens(form: Form, probabilities: torch.Tensor, kv_heads: int, parameter: float) -> torch.Tensor:
    """[heads, length] bool: what each query head of one layer attends to under a form, written out plainly. Rules that need other
    layers or prompts (scaled, fixed, step) and sets a query head are not among them. probabilities [heads, length]."""
    heads, length = probabilities.shape
    begin, end = residual_range(length, form)
    tokens = mean_over_sets(probabilities[None], kv_heads, form.sets)[0]
    scores = block_scores(tokens, form.block, form.score)
    reserved = torch.ones(scores.shape[-1], dtype=torch.bool, device=scores.device)
    reserved[begin:end] = False
    scores = scores.masked_fill(reserved, -1.0)
    if form.rule == "count":
        wanted = math.ceil(parameter * length / form.block) - (len(reserved) - (end - begin))
        wanted = min(max(wanted, 0), end - begin)
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(wanted, -1).indices, True)
    elif form.rule == "top_p":
        order = scores.clamp(min=0).sort(-1, descending=True)
        before = order.values.cumsum(-1) - order.values
        inside = before < parameter * order.values.sum(-1, keepdim=True)
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order.indices, inside)
    elif form.rule == "threshold":
        kept = scores >= parameter
    elif form.rule == "share":
        kept = scores >= parameter * scores.clamp(min=0).sum(-1, keepdim=True)
    elif form.rule == "relative":
        kept = scores >= parameter * scores.amax(-1, keepdim=True)
    else:
        raise ValueError(f"rule {form.rule} cannot be applied to one layer by itself")
    smallest = scores.masked_fill(~kept, 1.0).amin(-1, keepdim=True)
    if form.rule == "threshold":
        smallest = torch.full_like(smallest, parameter)
    kept = (kept | reserved).repeat_interleave(form.block, -1)[:, :length]
    if form.prune:
        weights = mean_over_sets(probabilities[None], kv_heads, "group")[0]
        kept = kept.expand(kv_heads, -1) & (weights >= form.prune * smallest / form.block)
    return kept.repeat_interleave(heads // kept.shape[0], 0)
