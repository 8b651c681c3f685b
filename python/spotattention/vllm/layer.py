"""A layer's selector inside vLLM: its weights, its keys in vLLM's pages, and the operator that runs it.

The operator stands before the layer's own projections. It stores the keys of every scheduled token, prompts included, so
that what the prefix cache holds is whole, and scores the blocks of decode rows; the attention behind it chooses and reads.
"""

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import KVCacheSpec, MLAAttentionSpec, SparseCacheRole

from spotattention import ops
from spotattention.projection import GLOBAL_SCALE
from spotattention.rope import RopeTable
from spotattention.vllm.pages import PAGE_TOKENS, Pages, selector_key_pool
from spotattention.vllm.settings import Settings

OPERATOR = "spot_select"


def local_groups(total: int, groups: int) -> slice:
    """Which block sets this rank's KV heads use, of a selector with one set (shared) or `total`, one a KV head."""
    if groups == 1:
        return slice(0, 1)
    size, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
    first = rank * total // size
    return slice(first, first + max(1, total // size))


class SelectorLayer(nn.Module, AttentionLayerBase):
    """One layer's selector. To vLLM a layer with a cache of its own, one vector of bytes a token, under the same tables.

    Its tensors are no parameters: vLLM loads the model's weights and knows nothing of these.
    """

    def __init__(
        self,
        settings: Settings,
        layer: int,
        rope: RopeTable | None,
        prefix: str,
        backend: type[AttentionBackend],
        config: VllmConfig,
        alignment: int | None,
    ) -> None:
        super().__init__()
        chosen, weights = settings.selector.config, settings.selector.weights[layer]
        device, dtype = torch.get_default_device(), config.model_config.dtype
        rows = chosen.num_heads * chosen.head_dim
        sets = local_groups(settings.selector.backbone["num_kv_heads"], settings.selector.groups)
        mix = weights.mix.view(-1, chosen.num_heads, weights.mix.shape[1])[sets].flatten(0, 1)
        self.layer, self.layer_name = layer, prefix
        self.key_heads = chosen.key_heads
        self.format, self.global_scale = settings.key_format, GLOBAL_SCALE.get(settings.key_format, 1.0)
        rule = settings.selector.fitted(layer, settings.method.rule)
        self.rule = rule.arguments() | {"thresholds": rule.thresholds[sets]}
        self.query_key_weight = weights.query_key.to(device, dtype)
        self.key_weight = self.query_key_weight[rows:]
        self.mix_weight = mix.to(device, torch.float32)
        self.cos, sin = (None, None) if rope is None else rope.at_least(config.model_config.max_model_len, device)
        self.preparation = {
            "norm": chosen.key_norm,
            "norm_weight": None if weights.norm_weight is None else weights.norm_weight.to(device),
            "norm_bias": None if weights.norm_bias is None else weights.norm_bias.to(device),
            "norm_eps": chosen.norm_eps,
            "cos": self.cos,
            "sin": sin,
        }
        self.check_every, self.check_bound = settings.options.check_every, settings.options.check_bound
        self.in_graphs = device.type == "cuda" and config.compilation_config.cudagraph_mode.has_full_cudagraphs()
        self.backend, self.alignment = backend, alignment
        self.pool, self.pages = torch.empty(0, dtype=torch.uint8), Pages(1, 1)
        self.scores: Tensor | None = None  # of this step's decode rows
        self.kv_cache = torch.tensor([])
        context = config.compilation_config.static_forward_context
        if prefix in context:
            raise ValueError(f"Duplicate layer name: {prefix}")
        context[prefix] = self

    @property
    def page_head_bytes(self) -> int:
        return ops.page_head_bytes(self.format)

    def get_attn_backend(self) -> type[AttentionBackend]:
        return self.backend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return MLAAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=self.key_heads * self.page_head_bytes // PAGE_TOKENS,
            dtype=torch.uint8,
            cache_role=SparseCacheRole.INDEXER,
            block_stride_alignment=self.alignment,
        )

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        self.kv_cache = kv_cache
        self.pool, self.pages = selector_key_pool(kv_cache, self.key_heads, self.page_head_bytes)

    def run(self, hidden: Tensor, positions: Tensor) -> None:
        """Stores the keys of hidden [T, hidden_size], scores the blocks of the decode rows, which stand first."""
        metadata = get_forward_context().attn_metadata
        self.scores = None
        if not isinstance(metadata, dict):  # vLLM measures memory: there are no pages yet
            return
        step = metadata[self.layer_name]
        tokens, rows = step.num_tokens, step.num_decodes
        positions = (positions[0] if positions.dim() == 2 else positions)[:tokens]
        if self.cos is None:
            positions = None
        if rows < tokens:
            self._store(hidden[rows:tokens], step.slots[rows:], None if positions is None else positions[rows:])
        if rows == 0:
            return
        hidden = hidden[:rows]
        made = ops.selector_prologue(
            self.pool,
            step.slots[:rows],
            torch.nn.functional.linear(hidden, self.query_key_weight),
            hidden,
            self.mix_weight,
            self.format,
            self.global_scale,
            mix_scale=512**-0.5,
            positions=None if positions is None else positions[:rows],
            **self.preparation,
        )
        self.scores = ops.score_blocks(
            made.query,
            made.weight,
            self.pool,
            step.page_table[:rows],
            step.lengths[:rows],
            self.format,
            self.global_scale,
        )

    def _store(self, hidden: Tensor, slots: Tensor, positions: Tensor | None) -> None:
        """The keys of prompts' tokens, whose queries select nothing."""
        keys = torch.nn.functional.linear(hidden, self.key_weight).view(len(hidden), self.key_heads, -1)
        ops.selector_key_append(
            self.pool, slots, keys, self.format, self.global_scale, positions=positions, **self.preparation
        )


def spot_select(hidden_states: Tensor, positions: Tensor, layer_name: str) -> None:
    get_forward_context().no_compile_layers[layer_name].run(hidden_states, positions)


def spot_select_fake(hidden_states: Tensor, positions: Tensor, layer_name: str) -> None:
    return None


# Nothing writes hidden_states. To a compiler a mutation keeps the operator, before the projections that read it.
direct_register_custom_op(OPERATOR, spot_select, mutates_args=["hidden_states"], fake_impl=spot_select_fake)
