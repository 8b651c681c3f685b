"""Where distillation begins: the selector as the best linear estimate of some of the backbone's own queries and keys.

The same fit as `spot distill --start backbone` (src/distill/initialize.h says why): a head's queries and keys, RoPE
undone, by ridge regression from the hidden states.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from spotattention.hf.loss import LayerParameters, layer_loss
from spotattention.hf.observe import Seen, observing, run
from spotattention.projection import rotate
from spotattention.selector_config import SelectorConfig


@dataclass
class _Target:
    """Regression targets: dims of one backbone head, and the rows of the selector's W_q or W_k that they become."""

    is_key: bool
    rows: Tensor
    backbone_head: int
    dims: Tensor


@dataclass
class _Sums:
    squares: Tensor | float = 0.0
    products: Tensor | float = 0.0
    energy: Tensor | float = 0.0
    tokens: int = 0
    targets: list[_Target] = field(default_factory=list)


def _dim_pairs(config: SelectorConfig, head_dim: int, rotary: int) -> tuple[list, list]:
    """(selector dim, backbone dim): rotated ones of equal frequency, and plain ones, the slowest turning first."""
    half = config.rope_dims // 2
    rotated = []
    for i in range(half):
        if rotary and i * rotary % config.rope_dims == 0:
            j = i * rotary // config.rope_dims
            rotated += [(i, j), (i + half, j + rotary // 2)]
    candidates = list(range(rotary, head_dim))
    for j in reversed(range(rotary // 2)):
        candidates += [j, j + rotary // 2]
    plain = list(zip(range(config.rope_dims, config.head_dim), candidates, strict=False))
    return rotated, plain


def _targets(config: SelectorConfig, seen: Seen, rotary: int) -> list[_Target]:
    heads, dim, kv_heads = seen.query.shape[1], seen.query.shape[2], seen.key.shape[1]
    group = heads // kv_heads
    rotated, plain = _dim_pairs(config, dim, rotary)
    list_ = []

    def add(is_key: bool, selector_head: int, backbone_head: int, pairs: list) -> None:
        if pairs:
            rows = torch.tensor([p[0] for p in pairs]) + selector_head * config.head_dim
            list_.append(_Target(is_key, rows, backbone_head, torch.tensor([p[1] for p in pairs])))

    for head in range(config.num_heads):
        own = 0 if config.key_heads == 1 else head
        turning, still = 2 * own % kv_heads, (2 * own + 1) % kv_heads
        if head < config.key_heads:
            add(True, head, turning, rotated)
            add(True, head, still, plain)
        add(False, head, turning * group + head % group, rotated)
        add(False, head, still * group + head % group, plain)
    return list_


def half_split(rotation: tuple[Tensor, Tensor] | None) -> bool:
    """Whether the backbone pairs dim i with dim i + rotary_dim / 2, as selectors do."""
    if rotation is None:
        return True
    cos = rotation[0]
    half = cos.shape[-1] // 2
    return cos.shape[-1] % 2 == 0 and torch.equal(cos[:, :half], cos[:, half:])


def start_from_backbone(
    model: nn.Module, modules: dict[int, nn.Module], layers: dict[int, LayerParameters], sequences: list[Tensor]
) -> bool:
    """Overwrites query, key and mixing weights. False, and nothing has changed, where the backbone's RoPE pairs
    neighbouring dims: then its queries and keys are no start.
    """
    sums: dict[int, _Sums] = {}
    fits = True

    def add(seen: Seen) -> None:
        nonlocal fits
        fits = fits and half_split(seen.rotation)
        if not fits:
            return
        query, key, rotary = seen.query.float(), seen.key.float(), 0
        if seen.rotation is not None:
            cos, sin = seen.rotation
            rotary = cos.shape[-1]
            half = rotary // 2
            query, key = (rotate(x, cos[:, :half], -sin[:, :half]) for x in (query, key))
        own = sums.setdefault(seen.layer, _Sums())
        own.targets = own.targets or _targets(layers[seen.layer].config, seen, rotary)
        hidden = seen.hidden.float()
        columns = [(key if t.is_key else query)[:, t.backbone_head, t.dims.to(key.device)] for t in own.targets]
        wanted = torch.cat([*columns, torch.ones_like(hidden[:, :1])], 1)
        own.squares = own.squares + hidden.T @ hidden
        own.products = own.products + hidden.T @ wanted
        own.energy = own.energy + wanted.square().sum(0)
        own.tokens += len(hidden)

    with observing(model, modules, add):
        for tokens in sequences:
            run(model, tokens)
    if not fits:
        return False
    for layer, own in sums.items():
        _solve(layers[layer], own, layer)

    def choose(seen: Seen) -> None:
        tokens = len(seen.hidden)
        count = min(tokens, 128)
        rows = (torch.arange(count, device=seen.hidden.device) + 1) * tokens // count - 1
        tried = {gain: layer_loss(layers[seen.layer], seen, rows, gain=gain)[0] for gain in _GAINS}
        layers[seen.layer].mix.data.mul_(min(tried, key=tried.get))

    with observing(model, modules, choose):
        run(model, sequences[0])
    return True


_GAINS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)


def _solve(layer: LayerParameters, sums: _Sums, index: int) -> None:
    system = sums.squares.double() / sums.tokens
    if not bool(system.isfinite().all() and sums.products.isfinite().all()):
        raise ValueError(
            f"layer {index}: a hidden state, query or key of the backbone is not finite; run it in float32 or bfloat16"
        )
    # A thousandth of the mean variance keeps directions that the text hardly uses from deciding anything.
    system.diagonal().add_(1e-3 * system.diagonal().mean())
    fitted = torch.linalg.solve(system, sums.products.double() / sums.tokens).T.float()
    column = 0
    with torch.no_grad():
        for target in sums.targets:
            count = len(target.rows)
            # Heads of unlike size become alike: a unit root mean square a dim.
            size = (sums.energy[column : column + count].mean() / sums.tokens).sqrt().clamp_min(1e-12)
            weight = layer.key if target.is_key else layer.query
            weight[target.rows.to(weight.device)] = fitted[column : column + count] / size
            column += count
        layer.mix.mul_(0.1).add_(fitted[column])
