"""Decode steps of attached models as CUDA graphs: transformers' Python launches about a thousand kernels a step, which takes
longer than they run. A step is captured once and replayed while its cache keeps its place in memory.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from spotattention.hf.cache import PagedLayer, Rows
from spotattention.ops import PAGE_TOKENS
from spotattention.projection import Rotation
from spotattention.rope import RopeTable

EAGER_STEPS = 2  # of a cache, before its step is captured: short answers are not worth it
CACHE_NAMES = ("cache", "past_key_values")  # transformers' old and new word
# What transformers' callers pass beside the step's own arguments, and what it must be for a captured step.
HARMLESS = {"use_cache": (True, None), "output_attentions": (False, None), "output_hidden_states": (False, None)}


class StaticStep:
    """A decode step of B sequences, one token each, at fixed addresses. Only the token, its position and `column` change."""

    def __init__(self, paged: PagedLayer, input_ids: Tensor, position_ids: Tensor, rope: RopeTable | None) -> None:
        device = input_ids.device
        self.padding = torch.tensor(paged.padding, device=device)
        self.first_slots = paged.first_slots()
        self.page_table = paged.page_table(paged.capacity // PAGE_TOKENS)
        self.tables = None if rope is None else rope.at_least(paged.capacity, device)
        self.column = torch.zeros((), dtype=torch.int64, device=device)
        self.input_ids, self.position_ids = torch.empty_like(input_ids), torch.empty_like(position_ids)
        # Ready-made and 4-dimensional: the model passes it on as it is, and sparse layers look at lengths instead.
        self.mask = torch.ones(len(input_ids), 1, 1, 1, dtype=torch.bool, device=device)
        self.set(paged.length, input_ids, position_ids)

    def set(self, column: int, input_ids: Tensor, position_ids: Tensor) -> None:
        self.column.fill_(column)
        self.input_ids.copy_(input_ids)
        self.position_ids.copy_(position_ids)

    def begin(self) -> None:
        """What all layers share; a part of the graph."""
        batch = len(self.input_ids)
        self.slots = self.first_slots + self.column
        self.rows = Rows.of(self.page_table, (self.column + 1 - self.padding).to(torch.int32))
        self.rotation = None
        if self.tables is not None:
            self.rotation = Rotation(*self.tables, self.position_ids.expand(batch, 1).flatten())


class Captured:
    """A step of one cache. `seen` is, by sparse layer, what its attention saw: tensors that each replay fills."""

    def __init__(self, step: StaticStep, run: Callable[[], tuple[ModelOutput, list]]) -> None:
        self.step = step
        self._graph: torch.cuda.CUDAGraph | None = None
        self._run = None if step.column.is_cuda else run  # on the CPU each replay is a run
        if step.column.is_cuda:
            # The first run also makes what operators keep from call to call; they keep it by stream.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run()
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self._keep(*run())

    def _keep(self, made: ModelOutput, seen: list) -> None:
        # Not the cache, which holds this: its memory shall go with its last user.
        self._kind, self.seen = type(made), seen
        self._made = {name: value if isinstance(value, Tensor) else None for name, value in made.items()}

    def replay(self, cache: Any) -> ModelOutput:
        if self._graph is None:
            self._keep(*self._run())
        else:
            self._graph.replay()
        # Clones are the caller's own: the next replay overwrites what this one made.
        return self._kind(**{k: cache if made is None else made.clone() for k, made in self._made.items()})


class DecodeGraphs:
    """Stands before the forward of a model's decoder. Steps that it cannot capture run as they are."""

    def __init__(self, owner: Any, decoder: nn.Module, wanted: bool) -> None:
        self.owner, self.decoder, self.wanted = owner, decoder, wanted
        self.everywhere = False  # static steps on the CPU too, where nothing is captured
        self.captured = 0  # steps, for those who want to know
        self.forward, self._replaced = decoder.forward, decoder.__dict__.get("forward")
        config = decoder.config
        kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        layers = getattr(decoder, "layers", ())
        devices = {parameter.device for parameter in decoder.parameters()}
        # Every layer must read pages by lengths on the device, and its RoPE must not look at positions on the host.
        self.possible = (
            wanted
            and len(owner.sparse_layers) == len(layers)
            and len(devices) == 1
            and kind not in ("dynamic", "longrope")
        )
        if self.possible:
            decoder.forward = self

    def remove(self) -> None:
        if self.decoder.__dict__.get("forward") is self:
            del self.decoder.forward
            if self._replaced is not None:
                self.decoder.forward = self._replaced

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        name = next((name for name in CACHE_NAMES if kwargs.get(name) is not None), "")
        cache, ids = kwargs.get(name), kwargs.get("input_ids")
        if args or not self._decodes(ids, cache, kwargs, name):
            return self.forward(*args, **kwargs)
        first: PagedLayer = cache.layers[0]
        if first.captured is None:
            if first.eager_steps < EAGER_STEPS:
                first.eager_steps += 1
                return self.forward(**kwargs)
            first.captured = self._capture(cache, kwargs, name)
        else:
            first.captured.step.set(first.length, ids, self._positions(first, kwargs))
        made = first.captured.replay(cache)
        for layer in cache.layers:
            layer.length += 1
        self.owner.judge(first.captured.step.rows, first.captured.seen)
        return made

    def _decodes(self, ids: Any, cache: Any, kwargs: dict[str, Any], name: str) -> bool:
        if torch.is_grad_enabled() or self.decoder.training or not isinstance(ids, Tensor) or ids.shape[1:] != (1,):
            return False
        if not (ids.is_cuda or self.everywhere) or getattr(cache, "offloading", False):
            return False
        layers = getattr(cache, "layers", ())
        if len(layers) != len(self.owner.sparse_layers):
            return False
        first = layers[0]
        for layer in layers:
            if not isinstance(layer, PagedLayer) or layer.owner is not self.owner or layer.length != first.length:
                return False
        if first.length == 0 or first.gaps or first.batch != len(ids) or not first.has_room(1):
            return False
        for word, value in kwargs.items():
            if word in ("input_ids", "attention_mask", "position_ids", "cache_position", name) or value is None:
                continue
            if word not in HARMLESS or value not in HARMLESS[word]:
                return False
        config = self.decoder.config
        if getattr(config, "output_attentions", False) or getattr(config, "output_hidden_states", False):
            return False
        position_ids = kwargs.get("position_ids")
        if position_ids is not None and (position_ids.dim() != 2 or position_ids.shape[1] != 1):
            return False
        return self._padded_alike(kwargs.get("attention_mask"), first)

    @staticmethod
    def _padded_alike(mask: Tensor | None, paged: PagedLayer) -> bool:
        """Whether a mask [B, columns] hides what the cache's hid and nothing else."""
        if mask is None:
            return not any(paged.padding)
        if mask.shape != (paged.batch, paged.length + 1):
            return False
        seen = mask.bool()
        if any(paged.padding):
            columns = torch.arange(mask.shape[1], device=mask.device)
            seen = seen == (columns >= torch.tensor(paged.padding, device=mask.device)[:, None])
        return bool(seen.all())

    @staticmethod
    def _positions(paged: PagedLayer, kwargs: dict[str, Any]) -> Tensor:
        position_ids, ids = kwargs.get("position_ids"), kwargs["input_ids"]
        return torch.full((1, 1), paged.length, device=ids.device) if position_ids is None else position_ids

    def _capture(self, cache: Any, kwargs: dict[str, Any], name: str) -> Captured:
        first: PagedLayer = cache.layers[0]
        step = StaticStep(first, kwargs["input_ids"], self._positions(first, kwargs), self.owner.rope)
        own = {"input_ids": step.input_ids, "attention_mask": step.mask, "position_ids": step.position_ids}
        arguments = {k: v for k, v in kwargs.items() if k != "cache_position"} | own

        def run() -> tuple[ModelOutput, list]:
            self.owner.static = step
            try:
                step.begin()
                made = self.forward(**arguments)
                return made, self.owner.count(step.rows)
            finally:
                self.owner.static = None

        before = self.owner.totals.clone()
        captured = Captured(step, run)
        self.owner.totals.copy_(before)  # the step is counted when it is replayed
        self.captured += 1
        return captured
