"""Transformers models that decode sparsely under their own `generate`."""

import os
import pathlib
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from spotattention import arguments, ops
from spotattention.attention import attend
from spotattention.hf import backbone
from spotattention.hf.cache import PagedLayer, Rows
from spotattention.hf.graph import DecodeGraphs, StaticStep
from spotattention.projection import LayerProjection, Rotation
from spotattention.rope import RopeConfig, RopeTable
from spotattention.rule import Method
from spotattention.selector import Selector, check_backbone
from spotattention.self_check import FOREIGN_EVERY, SelfCheck

IMPLEMENTATION = "spot"


@dataclass
class Step:
    """A forward pass, as all of its layers see it."""

    key: tuple
    position_ids: Tensor | None
    slots: Tensor  # [B * T] int64, of the selector's keys
    rotation: Rotation | None  # of the selector's queries and keys
    rows: Rows | None  # where the step decodes


class Attached:
    """What `attach` did to a model, as `model.spot`; `detach` undoes it.

    `sparse_layers` are the layers that select. `captured_mass` is, by layer, the mean share of the exact attention
    that lay on the attended tokens of the decode steps that were sampled, `attended_share` the share of the visible
    tokens that were read in all decode steps.
    """

    def __init__(
        self, model: nn.Module, selector: Selector, method: Method, check: SelfCheck, most: int, graphs: bool
    ) -> None:
        config = backbone.text_config(model)
        modules = backbone.full_attention(model)
        foreign = check_backbone(selector, backbone.facts(model))
        missing = [layer for layer in selector.layers if layer not in modules]
        if missing:
            raise ValueError(
                f"the selector has layers {missing}, which do not attend to the whole context in this model (sliding "
                "windows, or another kind of attention); turn the windows off or distil a selector for this config"
            )
        if foreign:
            check.every = min(check.every, FOREIGN_EVERY)
            warnings.warn(foreign, RuntimeWarning, stacklevel=3)
        self.selector, self.method, self.check, self.max_decode_queries = selector, method, check, most
        self.sparse_layers = [layer for layer in selector.layers if layer >= method.dense_layers]
        if method.word == "dense":
            self.sparse_layers = []
        dims = selector.config.rope_dims
        self.rope = RopeTable(RopeConfig.of_model(config), dims) if dims else None
        self._step: Step | None = None
        self.static: StaticStep | None = None  # while a captured step runs
        self.totals = torch.zeros(2, dtype=torch.float64, device=model.device)  # of captured steps: attended, visible
        self._model = weakref.ref(model)
        self._previous = model.config._attn_implementation
        self._handles = []
        self._modules = [modules[layer] for layer in self.sparse_layers]
        self._mask: tuple[Tensor | None, list[int], bool] | None = None
        model.set_attn_implementation(IMPLEMENTATION)
        if config._attn_implementation != IMPLEMENTATION:
            raise ValueError(
                f"{type(model).__name__} does not take its attention from transformers' AttentionInterface, so that it "
                "cannot be attached to"
            )
        for layer, module in zip(self.sparse_layers, self._modules, strict=True):
            projection = LayerProjection(selector, layer, method.cache_format)
            module._spot = LayerAttention(self, projection)
            self._handles.append(module.register_forward_pre_hook(_before_attention, with_kwargs=True))
        self.graphs = DecodeGraphs(self, backbone.decoder_layers_owner(model), graphs)

    @property
    def captured_mass(self) -> dict[int, float]:
        return self.check.captured_mass

    @property
    def attended_share(self) -> float:
        """NaN before the first sparse decode step."""
        layers = [module._spot for module in self._modules]
        attended, visible = self.totals.tolist()
        visible += sum(int(layer.visible) for layer in layers)
        return (attended + sum(int(layer.attended) for layer in layers)) / visible if visible else float("nan")

    def count(self, rows: Rows) -> list["Seen"]:
        """Adds a captured step to the totals; a part of its graph. Returns what each layer saw."""
        seen = [module._spot.seen for module in self._modules]
        counts = torch.stack([s.counts for s in seen])  # [layers, rows, sets]
        if self.method.rule.recency > 0:
            cut = rows.cut * len(seen)
        else:
            cut = torch.stack([_cut_of_chosen(s.indices, rows) for s in seen]).sum()
        attended = counts.double().mean(2).sum() * ops.PAGE_TOKENS - cut
        self.totals += torch.stack([attended, (rows.visible * len(seen)).double()])
        return seen

    def judge(self, rows: Rows, seen: list["Seen"]) -> None:
        """The self-check of a step whose layers saw this."""
        for layer, s in zip(self.sparse_layers, seen, strict=True):
            self.check.step(layer, s.query, s.key_pool, rows.page_table, rows.lengths, s.scale, s.indices, s.counts)

    def detach(self) -> None:
        """Gives the model its attention back. Caches that were filled while attached cannot be used afterwards."""
        self.graphs.remove()
        for handle in self._handles:
            handle.remove()
        for module in self._modules:
            del module._spot
        self._handles, self._modules = [], []
        model = self._model()
        if model is not None:
            model.set_attn_implementation(self._previous)
            if getattr(model, "spot", None) is self:
                del model.spot

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Neither copied nor pickled: the copy's layers would go on reading the original's state."""
        raise TypeError(
            "a model with a selector attached cannot be copied or pickled; call spotattention.detach(model) first"
        )

    def _step_of(self, paged: PagedLayer, tokens: int, position_ids: Tensor | None, device: torch.device) -> "Step":
        """What the layers of a forward pass share, made by the first of them."""
        key = (paged.length, tokens, paged.capacity, tuple(paged.padding), paged.decoding, device)
        last = self._step
        if last is not None and last.key == key and position_ids is not None and last.position_ids is position_ids:
            return last
        if position_ids is None:
            column = torch.arange(paged.length, paged.length + tokens, device=device)
            positions = (column - torch.tensor(paged.padding, device=device)[:, None]).clamp_min(0)
        else:
            positions = position_ids[0] if position_ids.dim() == 3 else position_ids
            positions = positions.expand(paged.batch, tokens)
        positions = positions.flatten().long()
        most = paged.length + tokens
        if position_ids is not None and not positions.is_cuda:
            most = max(most, int(positions.max()) + 1)
        rotation = None
        if self.rope is not None:
            rotation = Rotation(*self.rope.at_least(most, device), positions)
        rows = paged.rows(tokens) if paged.decoding else None
        self._step = Step(key, position_ids, paged.slots(tokens), rotation, rows)
        return self._step

    def _padding_of(self, mask: Tensor | None, batch: int) -> tuple[list[int], bool]:
        """How many columns a mask [B or 1, 1, T, columns] leaves out at the left of each sequence, and whether it leaves
        out others that the last query could see. Read once a forward pass: its layers share the mask.
        """
        if self._mask is not None and self._mask[0] is mask and len(self._mask[1]) == batch:
            return self._mask[1], self._mask[2]
        padding, gaps = [0] * batch, False
        if mask is not None:
            if mask.dtype != torch.bool:
                mask_seen = mask >= 0
            else:
                mask_seen = mask
            last = mask_seen[:, 0, -1].expand(batch, -1)
            first = last.int().argmax(-1)
            gaps = bool((first + last.sum(-1) != last.shape[1]).any())
            padding = first.tolist()
        self._mask = (mask, padding, gaps)
        return padding, gaps


class Seen(NamedTuple):
    """What a layer's attention saw in a decode step of R rows."""

    query: Tensor  # [R, num_heads, head_dim]
    key_pool: Tensor
    scale: float
    indices: Tensor  # of select_blocks
    counts: Tensor


class LayerAttention:
    """One layer's part of a forward pass: what the hook finds before the layer's attention, and the attention itself."""

    def __init__(self, owner: Attached, projection: LayerProjection) -> None:
        self.owner, self.projection = owner, projection
        self.layer = projection.layer
        self.cache: PagedLayer | None = None
        self.rows: Rows | None = None  # with `scores`: the step decodes
        self.scores: Tensor | None = None
        self.seen: Seen | None = None  # of the last decode step
        self.attended: int | Tensor = 0
        self.visible: int | Tensor = 0

    @torch.no_grad()
    def begin(self, hidden: Tensor, cache: Any, mask: Tensor | None, position_ids: Tensor | None) -> None:
        """Stores the selector's keys of the step's tokens and scores blocks for its queries, if they are to select."""
        self.cache = self.rows = self.scores = None
        if cache is None:  # nothing will be decoded
            return
        batch, tokens, size = hidden.shape
        if self.owner.static is not None:
            self.cache = cache.layers[self.layer]
            self._score(self.owner.static, hidden.reshape(batch, size))
            return
        padding, gaps = self.owner._padding_of(mask, batch)
        paged = self.paged_layer(cache)
        if mask is None and any(paged.padding) and paged.length and paged.batch == batch:
            raise ValueError(
                "the cache was filled with left padding, but this call has no attention_mask; pass it in every call"
            )
        paged.begin(padding, tokens, hidden.device, gaps)
        self.cache = paged
        paged.decoding = tokens == 1 or (paged.drafted and tokens <= self.owner.max_decode_queries)
        projection = self.projection
        projection.to(hidden.device, hidden.dtype)
        step = self.owner._step_of(paged, tokens, position_ids, hidden.device)
        flat = hidden.reshape(batch * tokens, size)
        if not paged.decoding:
            projection.append(paged.selector_pool, step.slots, flat, step.rotation)
            return
        if paged.gaps:
            raise ValueError(
                "the attention mask hides tokens between or behind others (right padding, packed texts); sparse decoding "
                "takes left padding alone"
            )
        self._score(step, flat)

    def _score(self, step: "Step | StaticStep", hidden: Tensor) -> None:
        """Of the rows of a decode step, whose keys it stores."""
        pool, rows = self.cache.selector_pool, step.rows
        query, weight = self.projection.prologue(pool, step.slots, hidden, step.rotation)
        self.scores = self.projection.scores(query, weight, pool, rows.page_table, rows.lengths)
        self.rows = rows

    def paged_layer(self, cache: Any) -> PagedLayer:
        """The layer's cache, which takes the place of the empty one that transformers made."""
        if getattr(cache, "offloading", False):
            raise ValueError("an offloaded cache has no room for a selector's keys; generate without offloading")
        layers = getattr(cache, "layers", None)
        if layers is None:
            raise ValueError(f"a cache of type {type(cache).__name__} has no layers; pass a DynamicCache or none")
        while cache.layer_class_to_replicate is not None and len(layers) <= self.layer:
            layers.append(cache.layer_class_to_replicate())
        layer = layers[self.layer]
        if isinstance(layer, PagedLayer):
            if layer.owner is not self.owner:
                raise ValueError("the cache was filled with another selector or before a detach; start from a new one")
            return layer
        if type(layer) is not DynamicLayer:
            raise ValueError(
                f"layer {self.layer} of the cache is a {type(layer).__name__}; sparse decoding keeps pages of its own, so "
                "generate with the default (dynamic) cache"
            )
        if layer.get_seq_length() > 0:
            raise ValueError(
                f"the cache holds {layer.get_seq_length()} tokens that were read before the selector was attached; start "
                "from a new cache"
            )
        projection = self.projection
        made = PagedLayer(projection.config.key_heads, projection.page_bytes, self.owner)
        layers[self.layer] = made
        return made

    def attend(self, query: Tensor, scale: float) -> Tensor:
        """Sparse attention of a decode step: query [B, num_heads, T, head_dim] -> [B, T, num_heads, head_dim]."""
        if torch.is_grad_enabled() and query.requires_grad:
            raise ValueError("sparse decode steps have no gradients; call the model under torch.no_grad()")
        batch, heads, tokens, dim = query.shape
        rows, cache, owner = self.rows, self.cache, self.owner
        flat = query.transpose(1, 2).reshape(batch * tokens, heads, dim)
        rule = self.projection.fitted(owner.method.rule).arguments()
        output, indices, counts = attend(
            self.scores, flat, cache.key_pool, cache.value_pool, rows.page_table, rows.lengths, scale, rule
        )
        self.scores = self.rows = None
        if owner.static is not None:
            self.seen = Seen(flat, cache.key_pool, scale, indices, counts)
            return output.view(batch, tokens, heads, dim)
        # The last block, which every selection with recent tokens holds, is cut at the row's length.
        cut = rows.cut if rule["recency"] > 0 else _cut_of_chosen(indices, rows)
        self.attended = self.attended + counts.float().mean(1).sum() * ops.PAGE_TOKENS - cut
        self.visible = self.visible + rows.visible
        owner.check.step(self.layer, flat, cache.key_pool, rows.page_table, rows.lengths, scale, indices, counts)
        return output.view(batch, tokens, heads, dim)


def _cut_of_chosen(indices: Tensor, rows: Rows) -> Tensor:
    """Tokens that chosen last blocks lack, mean over groups."""
    blocks = -(-rows.lengths // ops.PAGE_TOKENS)
    chosen = (indices == blocks[:, None, None] - 1).any(-1)
    return (chosen * (blocks * ops.PAGE_TOKENS - rows.lengths)[:, None]).float().mean(1).sum()


def _before_attention(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    hidden = backbone.hidden_of(args, kwargs)
    cache = kwargs.get("cache")
    if cache is None:
        cache = kwargs.get("past_key_values")
    module._spot.begin(hidden, cache, kwargs.get("attention_mask"), kwargs.get("position_ids"))


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function behind attn_implementation="spot": sparse where the step decodes, else transformers' sdpa."""
    backbone.refuse_other_scores(module, kwargs)
    layer = getattr(module, "_spot", None)
    if layer is None or layer.scores is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return layer.attend(query, scale), None


# Without a mask function of the same name transformers gives no mask at all, and padding would be attended to.
AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def attach(
    model: nn.Module,
    selector: str | os.PathLike | Selector,
    policy: str | Method = "spot",
    *,
    self_check: int = 64,
    least_captured: float = 0.5,
    callback: Callable[[int, float, int], None] | None = None,
    max_decode_queries: int = 32,
    graphs: bool = True,
) -> Attached:
    """Makes a transformers model decode sparsely under its unchanged `generate`; prompts are read densely.

    model: a decoder-only model with standard softmax attention over the whole context in the layers that the selector
    covers (Llama, Qwen2, Qwen3, Mistral, Qwen3.5 and others of AttentionInterface); other layers stay as they are.
    selector: a folder that `spot distill` or `spotattention.distill` wrote, a bare name under the model's own folder
    selectors/, or a Selector. policy: "spot" with settings, such as "spot:p=0.9", "spot:m=0.9" or "spot:k=10%,dense=2", or
    "dense".

    Greedy, sampled and beam search, left-padded batches, and assisted decoding where the model's cache can be cropped
    all work; behind a cache that was cropped, up to max_decode_queries tokens in one call are drafts to verify, each of
    which selects for itself; otherwise several tokens are a prompt, or a part of one. A cache that was filled while
    attached holds the selector's keys and follows reorder_cache, crop, batch_repeat_interleave and
    batch_select_indices. Static, quantised and offloaded caches are refused.

    graphs: on a GPU, steps of one token a sequence are captured in a CUDA graph after the first two of a cache, where every
    layer of the model selects; other steps, and those of beam search, whose cache moves, run kernel by kernel.

    Self-check: one decode step of every `self_check` (0: none) of a layer is compared with exact attention;
    `callback(layer, mass, tokens)` gets its captured mass, `model.spot.captured_mass` keeps the means, and a layer whose
    mean falls below `least_captured` is warned about once. A selector that was distilled on other weights of the same
    architecture is warned of, and checked at least every 8 steps (unless self_check is 0).

    Returns what it also sets as `model.spot`. Raises ValueError in one sentence when the selector was made for another
    model, when the model's attention is of another kind, or when the policy is not one of these, TypeError on an
    argument of another type.
    """
    backbone.text_config(model)
    if hasattr(model, "spot"):
        raise ValueError("the model has a selector attached already; call model.spot.detach() first")
    if not isinstance(selector, Selector):
        folder = pathlib.Path(getattr(model.config, "_name_or_path", "") or ".")
        selector = Selector.load(selector, folder if folder.is_dir() else "")
    if not isinstance(policy, Method):
        policy = arguments.text("policy", policy, 'a Method or a text such as "spot:p=0.9"')
    method = policy if isinstance(policy, Method) else selector.config.method(policy)
    if method.word not in ("spot", "dense"):
        raise ValueError(
            f"policy '{method.name}': attached models run spot and dense; the engine (spotattention.Engine, `spot`) has the "
            "other methods"
        )
    if method.prefill != "dense":
        raise ValueError(
            f"policy '{method.name}': attached models read prompts densely; leave out prefill={method.prefill}"
        )
    self_check = arguments.whole("self_check", self_check)
    max_decode_queries = arguments.whole("max_decode_queries", max_decode_queries)
    least_captured = arguments.number("least_captured", least_captured)
    graphs = arguments.flag("graphs", graphs)
    if callback is not None and not callable(callback):
        raise arguments.wrong_type("callback", callback, "a function")
    if self_check < 0 or max_decode_queries < 1:
        raise ValueError("self_check must be 0 or more, and max_decode_queries 1 or more")
    check = SelfCheck(every=self_check, least=least_captured, callback=callback)
    previous = model.config._attn_implementation
    try:
        attached = Attached(model, selector, method, check, max_decode_queries, graphs)
    except BaseException:
        if model.config._attn_implementation != previous:
            model.set_attn_implementation(previous)
        raise
    if method.dense_layers and not attached.sparse_layers:
        warnings.warn(f"policy '{method.name}' leaves no layer that selects; decoding is dense", stacklevel=2)
    model.spot = attached
    return attached


def detach(model: nn.Module) -> None:
    """Undoes `attach`. Raises ValueError when nothing is attached."""
    attached = getattr(model, "spot", None)
    if not isinstance(attached, Attached):
        raise ValueError("the model has no selector attached")
    attached.detach()
