"""Two auxiliary losses for needles whose value stands before the key, which a model can only read from the key's place.

Nothing behind such a key says its value again, so the key's last token has to take it along: before the middle attention layer, the value's
first tokens are predicted from there. And the middle layer has to look there when the value is asked for: at least one of its heads, at the
token before the answer. Only training has these losses and the few weights they need.
"""

import random

import numpy as np
import torch
import torch.nn.functional as F

FIRST_TOKENS = 3  # of a value; the rest of it can be copied once they are known
COLUMNS = (
    2 + FIRST_TOKENS
)  # of a row's bindings: place of the key's last token, place that the answer follows, the value's first tokens; -1: none
MOST_TOLD = 1024  # bindings of a step
MOST_SEEN = 128


def queries_of_a_row(rows: int) -> int:
    return max(1, MOST_SEEN // rows)


def choose(rng: random.Random, bindings: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Of the bindings [n, COLUMNS] of each row, those that a step learns: (row, key's place, value's tokens) and
    (row, number in the row, key's place, query's place)."""
    told = [(row, binding[0], *binding[2:]) for row, found in enumerate(bindings) for binding in found]
    seen = []
    for row, found in enumerate(bindings):
        asked = [binding for binding in found if binding[1] >= 0]
        chosen = rng.sample(asked, min(len(asked), queries_of_a_row(len(bindings))))
        seen += [(row, at, *binding[:2]) for at, binding in enumerate(chosen)]
    told = rng.sample(told, min(len(told), MOST_TOLD))
    return np.array(told, np.int64).reshape(-1, 2 + FIRST_TOKENS), np.array(seen, np.int64).reshape(-1, 4)


class Binding:
    """The losses' weights: a matrix for each of a value's first tokens, from the hidden state to the embedding that it should have."""

    def __init__(self, hidden_size: int, device: torch.device):
        self.matrices = torch.empty(FIRST_TOKENS, hidden_size, hidden_size, device=device).requires_grad_()
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        self.matrices.copy_(torch.eye(self.matrices.shape[1]) * 0.1)

    def watcher(self, told: torch.Tensor, seen: torch.Tensor, embedding: torch.Tensor, losses: list[torch.Tensor]):
        """What TinyModel.losses may call as `watch`: appends both losses."""

        def watch(x: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> None:
            losses.extend((self.told(told, x, q.shape[2], embedding), self.seen(seen, q, k)))

        return watch

    def told(self, told: torch.Tensor, x: torch.Tensor, length: int, embedding: torch.Tensor) -> torch.Tensor:
        """Mean loss in nats of the values' tokens; x [rows * length, hidden] before the layer."""
        states = F.rms_norm(x[told[:, 0] * length + told[:, 1]], (x.shape[1],))
        logits = torch.einsum("nh,jhg->njg", states, self.matrices) @ embedding.detach().t()
        wanted = told[:, 2:]
        losses = F.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), wanted.reshape(-1), ignore_index=-1, reduction="sum"
        )
        return losses / (wanted >= 0).sum().clamp(min=1)

    @staticmethod
    def seen(seen: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Mean of -log(that some head looks at the key); q [rows, heads, length, dim] and k [rows, kv_heads, length, dim] of the attention."""
        rows, heads, length, dim = q.shape
        room = queries_of_a_row(rows)
        row, at, key, query = seen.unbind(1)
        queries = q.new_zeros(rows, room, heads, dim).index_put((row, at), q[row, :, query])
        until = query.new_zeros(rows, room).index_put((row, at), query)
        logits = torch.einsum("rmgsd,rgld->rmgsl", queries.view(rows, room, k.shape[1], -1, dim), k).float() * dim**-0.5
        later = torch.arange(length, device=q.device) > until[:, :, None]
        looked = logits.masked_fill(later[:, :, None, None], -torch.inf).log_softmax(-1)[row, at, :, :, key].flatten(1)
        missed = torch.log1p(-looked.exp().clamp(max=1 - 1e-6)).sum(1)  # by every head
        return -(-torch.expm1(missed) + 1e-9).log().sum() / max(1, len(seen))
