"""A layer of a transformers cache in pages, with a selector's keys beside keys and values."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from spotattention.ops import PAGE_TOKENS

MOST_SPARE = 8192  # columns that a store grows by at once, beyond what is needed


@dataclass
class Rows:
    """The queries of a step, each with its sequence's pages: B sequences of T tokens are B * T rows."""

    page_table: Tensor  # [B * T, pages] int32
    lengths: Tensor  # [B * T] int32, the row's own token included
    visible: Tensor  # their sum
    cut: Tensor  # the sum of what rows' last blocks lack

    @classmethod
    def of(cls, page_table: Tensor, lengths: Tensor) -> "Rows":
        return cls(page_table, lengths, lengths.sum(), (-lengths % PAGE_TOKENS).sum())


class PagedLayer(DynamicLayer):
    """Takes the place of a DynamicLayer in a cache of B sequences.

    Keys and values are [num_kv_heads, B, capacity, head_dim], which is also a pool of B * capacity / 16 pages, so that a
    step writes one token and copies none. Columns are the tokens of the cache as transformers counts them, padding
    included; a sequence's first real token lies at the start of a page, so that its blocks are those that it has alone.
    """

    def __init__(self, key_heads: int, page_bytes: int, owner: Any) -> None:
        self.key_store: Tensor | None = None
        self.value_store: Tensor | None = None
        self.key_bytes: Tensor | None = None  # [B, capacity / 16, key_heads, page_bytes] uint8: selector keys
        self.padding: list[int] = []  # a sequence's columns before its first token
        self.length = 0  # columns
        self.gaps = False  # whether the mask hid columns behind the first token
        self.drafted = False  # whether tokens were taken back: then several at once are drafts to verify
        self.decoding = False  # whether the current step reads pages, so that update() need not gather them
        self.key_heads, self.page_bytes, self.owner = key_heads, page_bytes, owner
        self._moved()
        super().__init__()

    def _moved(self) -> None:
        """The stores are elsewhere: what was captured of a step over them is void."""
        self.captured: Any = None  # of the cache's first layer: hf/graph.py
        self.eager_steps = 0

    # Keys and values as other layers have them, [B, num_kv_heads, columns, head_dim].
    @property
    def keys(self) -> Tensor | None:
        return self._columns(self.key_store)

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        if value is not None:
            raise AttributeError("a paged cache layer is written by update() alone")

    @property
    def values(self) -> Tensor | None:
        return self._columns(self.value_store)

    @values.setter
    def values(self, value: Tensor | None) -> None:
        if value is not None:
            raise AttributeError("a paged cache layer is written by update() alone")

    def _columns(self, store: Tensor | None) -> Tensor | None:
        if store is None:
            return None
        rows = store.transpose(0, 1)
        shifts = self._shifts()
        if not any(shifts):
            return rows[:, :, : self.length]
        parts = [row[:, shift : shift + self.length] for row, shift in zip(rows, shifts, strict=True)]
        return torch.stack(parts)

    def _shifts(self) -> list[int]:
        """Where a sequence's column 0 lies: what brings its first token to the start of a page."""
        return [-padding % PAGE_TOKENS for padding in self.padding]

    @property
    def batch(self) -> int:
        return len(self.padding)

    @property
    def capacity(self) -> int:
        return 0 if self.key_bytes is None else self.key_bytes.shape[1] * PAGE_TOKENS

    @property
    def key_pool(self) -> Tensor:
        return self.key_store.view(self.key_store.shape[0], -1, PAGE_TOKENS, self.key_store.shape[3])

    @property
    def value_pool(self) -> Tensor:
        return self.value_store.view(self.value_store.shape[0], -1, PAGE_TOKENS, self.value_store.shape[3])

    @property
    def selector_pool(self) -> Tensor:
        return self.key_bytes.view(-1, self.key_heads, self.page_bytes)

    def begin(self, padding: list[int], tokens: int, device: torch.device, gaps: bool) -> None:
        """Makes room for the next `tokens` columns. Raises ValueError when the padding is not what it was."""
        if self.length == 0:
            if self.padding != padding:  # a store of another batch, from before a crop to nothing
                self.reset()
            self.padding, self.gaps = padding, gaps
        elif self.batch != len(padding):
            raise ValueError(
                f"the cache holds {self.batch} sequences, the model was called with {len(padding)}; use "
                "batch_repeat_interleave or batch_select_indices on the cache, or a new one"
            )
        elif self.padding != padding:
            raise ValueError(
                f"the attention mask leaves out {padding} tokens at the left, but those of the cache were read with "
                f"{self.padding}; pass the same padding in every call"
            )
        self.gaps = self.gaps or gaps
        if not self.has_room(tokens):
            needed = self.length + tokens + (PAGE_TOKENS - 1)
            self._grow(needed + min(needed // 4, MOST_SPARE), device)

    def has_room(self, tokens: int) -> bool:
        return self.length + tokens + (PAGE_TOKENS - 1) <= self.capacity

    def _grow(self, columns: int, device: torch.device) -> None:
        self._moved()
        pages = -(-columns // PAGE_TOKENS)

        def grown(store: Tensor, dim: int, size: int) -> Tensor:
            shape = list(store.shape)
            shape[dim] = size
            larger = store.new_zeros(shape)
            larger.narrow(dim, 0, store.shape[dim]).copy_(store)
            return larger

        if self.key_bytes is None:
            self.key_bytes = torch.zeros(
                self.batch, pages, self.key_heads, self.page_bytes, dtype=torch.uint8, device=device
            )
        else:
            self.key_bytes = grown(self.key_bytes, 1, pages)
        if self.key_store is not None:
            self.key_store = grown(self.key_store, 2, pages * PAGE_TOKENS)
            self.value_store = grown(self.value_store, 2, pages * PAGE_TOKENS)

    def first_slots(self) -> Tensor:
        """[B] int64: the slots of column 0."""
        device = self.key_bytes.device
        return torch.arange(self.batch, device=device) * self.capacity + torch.tensor(self._shifts(), device=device)

    def slots(self, tokens: int) -> Tensor:
        """Slots [B * tokens] int64 of the next columns: page * 16 + offset; -1 for padding."""
        device = self.key_bytes.device
        column = torch.arange(self.length, self.length + tokens, device=device)
        slots = self.first_slots()[:, None] + column
        if self.length < max(self.padding):
            slots = slots.masked_fill(column < torch.tensor(self.padding, device=device)[:, None], -1)
        return slots.flatten()

    def rows(self, tokens: int) -> Rows:
        """The next `tokens` columns of every sequence as rows of the decode operators."""
        device = self.key_bytes.device
        table = self.page_table(-(-(self.length + tokens - min(self.padding)) // PAGE_TOKENS))
        column = torch.arange(self.length + 1, self.length + tokens + 1, device=device)
        lengths = (column - torch.tensor(self.padding, device=device)[:, None]).to(torch.int32)
        return Rows.of(table.repeat_interleave(tokens, 0), lengths.flatten())

    def page_table(self, pages: int) -> Tensor:
        """[B, pages] int32: the first pages of each sequence; those past its last are not to be read."""
        device, own = self.key_bytes.device, self.capacity // PAGE_TOKENS
        first = (torch.tensor(self.padding, device=device) + PAGE_TOKENS - 1) // PAGE_TOKENS
        place = (first[:, None] + torch.arange(pages, device=device)).clamp_max(own - 1)
        return (torch.arange(self.batch, device=device)[:, None] * own + place).to(torch.int32)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.device, self.dtype = key_states.device, key_states.dtype
        batch, heads, _, dim = key_states.shape
        shape = (heads, batch, self.capacity)
        self.key_store = key_states.new_zeros(*shape, dim)
        self.value_store = value_states.new_zeros(*shape, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Stores the next tokens of every sequence. Returns all columns, or while pages are read the new ones alone."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        step = self.owner.static
        if step is not None:  # no number of the host may enter a captured step
            for store, states in ((self.key_store, key_states), (self.value_store, value_states)):
                store.flatten(1, 2).index_copy_(1, step.slots, states[:, :, 0].transpose(0, 1))
            return key_states, value_states
        start, tokens, shifts = self.length, key_states.shape[2], self._shifts()
        for store, states in ((self.key_store, key_states), (self.value_store, value_states)):
            states = states.transpose(0, 1)  # [heads, B, tokens, dim]
            if not any(shifts):
                store[:, :, start : start + tokens].copy_(states)
                continue
            for row, shift in enumerate(shifts):
                store[:, row, start + shift : start + shift + tokens].copy_(states[:, row])
        self.length += tokens
        if start == 0 or self.decoding:
            return key_states, value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the last columns; as in transformers, the number is negative."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): a cache is cropped by a negative number, of tokens to drop from its end"
            )
        self.length = max(0, self.length + tokens_to_remove)
        self.drafted = True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.length > 0:
            self._take(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.length > 0:
            self._take(torch.arange(self.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.length > 0:
            self._take(torch.arange(self.batch)[torch.as_tensor(indices).cpu()])

    def _take(self, rows: Tensor) -> None:
        """Sequences by index: keys, values and selector keys together."""
        order = rows.tolist()
        if any(not 0 <= row < self.batch for row in order):
            raise IndexError(f"the cache holds {self.batch} sequences; {order} names others")
        self.padding = [self.padding[row] for row in order]
        if order == list(range(len(self.key_bytes))):
            return
        self._moved()
        index = rows.to(self.key_bytes.device)
        self.key_bytes = self.key_bytes.index_select(0, index)
        self.key_store = self.key_store.index_select(1, index)
        self.value_store = self.value_store.index_select(1, index)

    def reset(self) -> None:
        self._moved()
        self.key_store = self.value_store = self.key_bytes = None
        self.padding, self.length, self.gaps, self.drafted, self.is_initialized = [], 0, False, False, False

    def offload(self) -> None:
        raise ValueError("an offloaded cache has no room for a selector's keys; generate without offloading")

    prefetch = offload
