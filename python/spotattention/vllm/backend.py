"""vLLM's attention backend of a layer with a selector: decode rows read what the selector chose, prompts everything."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from spotattention import ops
from spotattention.vllm.check import SelfCheck
from spotattention.vllm.layer import SelectorLayer
from spotattention.vllm.pages import PAGE_TOKENS, Pages, key_value_pools
from spotattention.vllm.settings import E4M3_CACHES


def dense_attention() -> Any:
    """The module that reads prompts on this platform."""
    if current_platform.is_cpu():
        from spotattention.vllm import dense_cpu as module
    elif current_platform.is_cuda():
        from spotattention.vllm import dense_cuda as module
    else:
        raise ValueError(
            f"spotattention's plug-in runs on CPUs and on CUDA, not on {current_platform.device_name}; "
            "leave out the selector"
        )
    return module


@dataclass
class SpotMetadata:
    """A step, for all layers of a KV cache group. Decode rows stand first, one token each."""

    num_tokens: int
    num_decodes: int
    lengths: Tensor  # [rows] int32, tokens of each row, its own included
    page_table: Tensor  # [rows, pages] int32
    slots: Tensor  # [tokens] int64: the operators' slots, or vLLM's where a layer's own dense attention writes
    pages: Pages
    prefill: Any = None  # of the module that reads prompts


class SpotMetadataBuilder(AttentionMetadataBuilder[SpotMetadata]):
    # Rows of one token only: widths come from the page table and the counts stay on the device.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    reorder_batch_threshold: int = 1
    reads_prompts = True

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        context = vllm_config.compilation_config.static_forward_context
        self.layers = [context[name] for name in layer_names]
        # A captured graph reads these where they are: they are refilled in place.
        self._table: Tensor | None = None
        self._slots: Tensor | None = None
        self.dense = dense_attention() if self.reads_prompts else None
        self.check = SelfCheck([layer.impl for layer in self.layers]) if self.reads_prompts else None

    def pages(self) -> Pages:
        return self.layers[0].impl.pools(self.layers[0].kv_cache)[2]

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> SpotMetadata:
        m = common_attn_metadata
        if m.is_prefilling is not None and len(m.is_prefilling) < m.num_reqs:  # rows that fill up a captured graph
            filled = m.num_reqs - len(m.is_prefilling)
            m = m.replace(is_prefilling=torch.nn.functional.pad(m.is_prefilling, (0, filled)))
        # A prompt's last chunk may have one token: it is read as the rest of the prompt is.
        rows, _, tokens, _ = split_decodes_and_prefills(m, 1, treat_short_extends_as_decodes=m.is_prefilling is None)
        made = self._step(m, rows)
        if self.dense is not None and rows < m.num_reqs:
            made.prefill = self.dense.prefill(m, rows, tokens)
        if self.check is not None:
            self.check.next_step(rows, made.page_table)
        return made

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> SpotMetadata:
        # Every row decodes, and any may grow to the longest sequence: the whole table, which operators take as it is, while a
        # narrower one of several rows would be copied in every layer.
        m = common_attn_metadata
        width = m.block_table_tensor.shape[1] * self.pages().per_block
        return self._step(m.replace(max_seq_len=width * PAGE_TOKENS), m.num_reqs)

    def _step(self, m: CommonAttentionMetadata, rows: int) -> SpotMetadata:
        pages = self.pages()
        width = -(-m.max_seq_len // PAGE_TOKENS)
        return SpotMetadata(
            m.num_actual_tokens,
            rows,
            m.seq_lens,
            self._page_table(m.block_table_tensor, pages, width)[:, :width],
            self._slots_of(m.slot_mapping[: m.num_actual_tokens], pages),
            pages,
        )

    def _page_table(self, block_table: Tensor, pages: Pages, width: int) -> Tensor:
        if pages.identity:
            return block_table
        rows, blocks = block_table.shape
        if self._table is None or self._table.shape[0] < rows or self._table.shape[1] < blocks * pages.per_block:
            most = max(rows, self.vllm_config.scheduler_config.max_num_seqs)
            most = max(most, self.vllm_config.compilation_config.max_cudagraph_capture_size or 0)
            self._table = block_table.new_zeros(most, blocks * pages.per_block)
        needed = min(blocks, -(-width // pages.per_block))
        self._table[:rows, : needed * pages.per_block].copy_(pages.table(block_table[:, :needed]))
        return self._table[:rows]

    def _slots_of(self, slot_mapping: Tensor, pages: Pages) -> Tensor:
        return slot_mapping


class SpotKeysMetadataBuilder(SpotMetadataBuilder):
    """Of the selector's keys, whose pages lie elsewhere in a block than those of keys and values."""

    reads_prompts = False

    def pages(self) -> Pages:
        return self.layers[0].pages

    def _slots_of(self, slot_mapping: Tensor, pages: Pages) -> Tensor:
        moved = pages.slots(slot_mapping)
        if moved is slot_mapping:
            return slot_mapping
        if self._slots is None or self._slots.shape[0] < moved.shape[0]:
            most = max(moved.shape[0], self.vllm_config.scheduler_config.max_num_batched_tokens)
            self._slots = moved.new_empty(most)
        return self._slots[: moved.shape[0]].copy_(moved)


class SpotImpl(AttentionImpl[SpotMetadata]):
    """Exact attention over the blocks that the layer's selector chose; `spot_layer` is that selector."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        *,
        spot_layer: SelectorLayer,
    ) -> None:
        for name, value in (
            ("ALiBi", alibi_slopes),
            ("a sliding window", sliding_window),
            ("capped logits", logits_soft_cap),
            ("shared keys and values", kv_sharing_target_layer_name),
        ):
            if value:
                raise ValueError(f"{spot_layer.layer_name}: a selector does not know {name}; leave it out")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        if current_platform.is_cuda():
            self._check_cuda(spot_layer, head_size)
        self.head_size, self.scale, self.kv_cache_dtype = head_size, float(scale), kv_cache_dtype
        self.codes = kv_cache_dtype in E4M3_CACHES  # keys and values are E4M3 codes, in vLLM's view bytes
        self.key_scale: Tensor | None = None  # of codes, of the last step
        self.spot = spot_layer
        self.dense = dense_attention().Dense(self)
        self.record: Any = None  # of the self-check
        self._pools: tuple[tuple, tuple[Tensor, Tensor, Pages]] | None = None

    def _check_cuda(self, spot_layer: SelectorLayer, head_size: int) -> None:
        """What the kernels of sparse decode are not built for."""
        refusal = ops.device_refusal(spot_layer.query_key_weight.device)
        if refusal:
            raise ValueError(refusal)
        group = self.num_heads // self.num_kv_heads
        if head_size not in (64, 128, 256) or group > 16:
            raise ValueError(
                f"{spot_layer.layer_name}: heads of {head_size}, {group} to a KV head; on CUDA a selector takes heads of 64, "
                "128 or 256, at most 16 to a KV head"
            )
        if spot_layer.format == "f32" or spot_layer.query_key_weight.dtype == torch.float32:
            raise ValueError("on CUDA a selector takes bfloat16 or float16 models and any key format but f32")

    def pools(self, kv_cache: Tensor) -> tuple[Tensor, Tensor, Pages]:
        where = (kv_cache.data_ptr(), kv_cache.shape, kv_cache.stride())
        if self._pools is None or self._pools[0] != where:
            view = kv_cache.view(torch.float8_e4m3fn) if self.codes else kv_cache
            self._pools = where, key_value_pools(view, self.head_size)
        return self._pools[1]

    def do_kv_cache_update(
        self, layer: torch.nn.Module, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        self.dense.store(layer, key, value, kv_cache, slot_mapping)

    def forward(
        self,
        layer: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: SpotMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query [T, num_heads, head_size], output the same, written; kv_cache [blocks, kv_heads, tokens, 2 head_size],
        uint8 where it holds E4M3 codes, whose scales are the layer's.
        """
        if attn_metadata is None:
            return output.zero_()
        step, rows = attn_metadata, attn_metadata.num_decodes
        if rows > 0:
            self._decode(layer, step, query[:rows], kv_cache, output[:rows])
        if step.prefill is not None:
            self.dense.attend(layer, query, key, value, kv_cache, step.prefill, output)
        return output

    def _decode(
        self, layer: torch.nn.Module, step: SpotMetadata, query: Tensor, kv_cache: Tensor, output: Tensor
    ) -> None:
        keys, values, pages = self.pools(kv_cache)
        scores, rows = self.spot.scores, query.shape[0]
        if scores is None or scores.shape[0] != rows or pages != step.pages:
            raise RuntimeError(
                f"{self.spot.layer_name}: vLLM ran the attention in another step than the selector; "
                "use its own splitting_ops"
            )
        table, lengths = step.page_table[:rows], step.lengths[:rows]
        self.key_scale, value_scale = (layer._k_scale, layer._v_scale) if self.codes else (None, None)
        attended = ops.select_and_attend(
            scores,
            query,
            keys,
            values,
            table,
            lengths,
            self.scale,
            with_mass=False,
            key_scale=self.key_scale,
            value_scale=value_scale,
            **self.spot.rule,
        )
        output.copy_(attended.output)
        if self.record is not None:
            self.record.take(query, attended, table, lengths)


class SpotBackend(AttentionBackend):
    # Keys and values are written by an operator of their own, so that a compiler sees it.
    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16", "float32", *E4M3_CACHES]
    layouts: ClassVar[tuple[KVCacheLayout, ...]] = (KVCacheLayout.LBHNC, KVCacheLayout.LBNHC)

    @staticmethod
    def get_name() -> str:
        return "SPOT"

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        return SpotImpl

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder]:
        return SpotMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(PAGE_TOKENS)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return cls.layouts

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        return True


class SpotHybridBackend(SpotBackend):
    """Beside recurrent layers, whose pages are larger: vLLM packs all layers of a block together."""

    layouts = (KVCacheLayout.BLHNC,)


class SpotKeysBackend(SpotBackend):
    @staticmethod
    def get_name() -> str:
        return "SPOT_KEYS"

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder]:
        return SpotKeysMetadataBuilder


class SpotHybridKeysBackend(SpotKeysBackend):
    layouts = SpotHybridBackend.layouts
