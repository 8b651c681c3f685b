"""The distillation loss of one layer, by the operators that `spot distill` uses, and the selector that learns from it."""

import torch
from torch import Tensor, nn

from spotattention import ops
from spotattention.hf.observe import Seen
from spotattention.ops import PAGE_TOKENS
from spotattention.rope import RopeTable
from spotattention.selector import LayerWeights
from spotattention.selector_config import SelectorConfig


class LayerParameters(nn.Module):
    """One layer's selector while it learns, float32: uniform weights of variance 1 / hidden_size."""

    def __init__(self, config: SelectorConfig, hidden_size: int, rope: RopeTable | None, generator: torch.Generator):
        super().__init__()
        self.config, self.rope = config, rope
        bound = (3 / hidden_size) ** 0.5

        def fresh(rows: int) -> nn.Parameter:
            weight = torch.empty(rows, hidden_size)
            return nn.Parameter(weight.uniform_(-bound, bound, generator=generator))

        self.query = fresh(config.num_heads * config.head_dim)
        self.key = fresh(config.key_heads * config.head_dim)
        self.mix = fresh(config.num_heads)
        has_norm, has_bias = config.key_norm != "none", config.key_norm == "layernorm"
        self.norm_weight = nn.Parameter(torch.ones(config.head_dim)) if has_norm else None
        self.norm_bias = nn.Parameter(torch.zeros(config.head_dim)) if has_bias else None

    def project(self, hidden: Tensor, positions: Tensor) -> ops.Projection:
        cos, sin = self.rope.at_least(int(positions.max()) + 1, hidden.device) if self.rope else (None, None)
        return ops.selector_project(
            hidden,
            self.query.to(hidden.dtype),
            self.key.to(hidden.dtype),
            self.mix,
            positions,
            self.config.key_norm,
            self.norm_weight,
            self.norm_bias,
            self.config.norm_eps,
            cos,
            sin,
            (self.config.num_heads * self.config.head_dim) ** -0.5,
        )

    def weights(self) -> LayerWeights:
        def fixed(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.detach().cpu().clone()

        matrix = torch.cat([self.query.detach(), self.key.detach()]).cpu()
        return LayerWeights(matrix, fixed(self.mix), fixed(self.norm_weight), fixed(self.norm_bias))


def active_range(config: SelectorConfig, row: Tensor) -> tuple[Tensor, Tensor]:
    """First and behind-last token, of those that queries at positions `row` are trained on: docs/method.md."""
    if config.distillation.teacher_scope == "all":
        return torch.zeros_like(row), row + 1
    low = -(-config.selection.sinks // PAGE_TOKENS) * PAGE_TOKENS
    return torch.full_like(row, low), (row + 1 - config.selection.recency).clamp_min(0) // PAGE_TOKENS * PAGE_TOKENS


def logsumexp(seen: Seen, rows: Tensor, chunk_bytes: int = 1 << 25) -> Tensor:
    """log sum e^(scale q . k) over what each of some queries sees, as [num_heads, T] float32; other columns hold 0."""
    tokens, heads, _ = seen.query.shape
    out = torch.zeros(heads, tokens, device=seen.query.device)
    group = heads // seen.key.shape[1]
    keys = seen.key.permute(1, 2, 0)  # [kv_heads, dim, T]
    column = torch.arange(tokens, device=seen.query.device)
    step = max(16, chunk_bytes // (4 * heads * tokens))
    for first in range(0, len(rows), step):
        part = rows[first : first + step]
        end = int(part[-1]) + 1
        query = seen.query[part].transpose(0, 1).unflatten(0, (-1, group)).flatten(1, 2)  # [kv_heads, group * R, dim]
        logits = (query @ keys[:, :, :end]).float().mul_(seen.scale).view(heads, len(part), end)
        out[:, part] = logits.masked_fill_(column[:end] > part[:, None], -torch.inf).logsumexp(-1)
    return out


def layer_loss(
    layer: LayerParameters,
    seen: Seen,
    rows: Tensor | None = None,
    gradient_weight: float = 0.0,
    gain: float = 1.0,
    strip_bytes: int = 1 << 25,
) -> tuple[float, float, int]:
    """KL(teacher || student), mean over the counted queries, the teacher's entropy (nats), and how many those are.

    rows [R] int64 ascending: the queries it is taken on; None: all. With a gradient_weight that multiple of the mean's
    gradient is added to the layer's parameters. gain multiplies the mixing weights.
    """
    config = layer.config
    tokens = len(seen.hidden)
    if rows is None:
        rows = torch.arange(tokens, device=seen.hidden.device)
    low, high = active_range(config, rows)
    counted = high > low
    rows, low, high = rows[counted], low[counted], high[counted]
    if len(rows) == 0:
        return 0.0, 0.0, 0
    with torch.set_grad_enabled(gradient_weight != 0):
        made = layer.project(seen.hidden.detach(), seen.positions)
    query, key, weight = made.query.detach(), made.key.detach(), made.weight.detach()[:, 0] * gain
    sums = logsumexp(seen, rows)
    learns = gradient_weight != 0
    grad_query, grad_weight = torch.zeros_like(query, dtype=torch.float32), torch.zeros_like(weight)
    grad_key = torch.zeros(key.shape[1], tokens, key.shape[2], device=key.device) if learns else None
    k_train = config.distillation.k_train if config.distillation.loss == "sparse" else 0
    restricted = (high - low > k_train) if k_train else torch.zeros_like(counted[counted])
    loss = entropy = 0.0
    for these, k in ((~restricted, 0), (restricted, k_train)):
        own, first_low, last = rows[these], low[these], high[these] - 1
        start = 0
        while start < len(own):
            first_key = int(first_low[start])
            count = max(1, min(16, strip_bytes // (16 * (tokens - first_key)) // 128)) * 128
            part = slice(start, start + count)
            start += count
            strip = [x[part].to(torch.int32) for x in (own, first_low, last)]
            width = -(-(int(strip[2][-1]) + 1 - first_key) // 8) * 8
            mass, total = ops.teacher_mass(seen.query, seen.key, sums, *strip, first_key, width, seen.scale)
            kl = ops.selector_kl(
                mass[:, 0].contiguous(), total[:, 0], query, key, weight, *strip, first_key, k, grad_key
            )
            loss += float(kl.loss.sum(dtype=torch.float64))
            entropy += float(kl.entropy.sum(dtype=torch.float64))
            if learns:
                grad_query[own[part]] = kl.grad_query.float()
                grad_weight[own[part]] = kl.grad_weight.float()
    if learns:
        factor = gradient_weight / len(rows)
        torch.autograd.backward(
            [made.query, made.key, made.weight],
            [
                (grad_query * factor).to(made.query.dtype),
                (grad_key.transpose(0, 1) * factor).to(made.key.dtype),
                (grad_weight * (factor * gain))[:, None],
            ],
        )
    return loss / len(rows), entropy / len(rows), len(rows)
