"""The plug-in's configuration, `additional_config["spot"]`, and what it cannot be combined with."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from spotattention.fingerprint import folder_fingerprint
from spotattention.rule import Method
from spotattention.selector import Selector, check_backbone

logger = logging.getLogger("vllm.spotattention")

# Of vLLM's names for forms of quantised weights. A selector reads hidden states, so that no form concerns it but as other weights
# than it was distilled on.
QUANTISATIONS = ("fp8", "awq", "auto_awq")
# Of vLLM's names for KV caches in 8 bits.
E4M3_CACHES = ("fp8", "fp8_e4m3")
FOREIGN_EVERY = 32  # decode steps between two self-checks where the selector was distilled on other weights


@dataclass(frozen=True)
class Options:
    """`--additional-config '{"spot": {...}}'`; docs/vllm.md has the fields for users."""

    selector: str = ""  # a folder, or the name of one under MODEL/selectors
    method: str = "spot"
    check_every: int = 256  # decode steps between two self-checks; 0: none
    check_bound: float = 0.5  # captured mass below which a warning is logged

    @classmethod
    def read(cls, document: Any) -> "Options":
        """Raises ValueError naming the field that is wrong."""
        if not isinstance(document, Mapping):
            raise ValueError(f'additional_config["spot"] must be an object, not {json.dumps(document)}')
        known = cls.__dataclass_fields__
        for name, value in document.items():
            if name not in known:
                raise ValueError(f'additional_config["spot"] has no field "{name}"; it has {", ".join(known)}')
            wanted = {"selector": str, "method": str, "check_every": int}.get(name, (int, float))
            if not isinstance(value, wanted) or isinstance(value, bool):
                raise ValueError(f'additional_config["spot"]: {name} is {json.dumps(value)}, of the wrong type')
        options = cls(**document)
        if not options.selector:
            raise ValueError('additional_config["spot"] names no selector; give {"selector": FOLDER}')
        if options.check_every < 0:
            raise ValueError(f'additional_config["spot"]: check_every is {options.check_every}; give 0 (none) or more')
        if not 0 <= options.check_bound <= 1:
            raise ValueError(f'additional_config["spot"]: check_bound is {options.check_bound}; give a share of 0 to 1')
        return options


@dataclass(frozen=True)
class Settings:
    options: Options
    selector: Selector
    method: Method
    key_format: str

    def covers(self, layer: int) -> bool:
        return layer in self.selector.weights and layer >= self.method.dense_layers


def refusal(config: Any) -> str:
    """One sentence when a vLLM configuration has what the plug-in was not tested with, else nothing."""
    parallel, cache = config.parallel_config, config.cache_config
    text = config.model_config.hf_text_config
    speculative = getattr(config, "speculative_config", None)
    quantisation = config.quant_config.get_name() if config.quant_config is not None else None
    context = getattr(parallel, "prefill_context_parallel_size", 1) * parallel.decode_context_parallel_size
    reasons = {
        "a KV connector (kv_transfer_config), which would leave selector keys behind": config.kv_transfer_config
        is not None,
        f"a KV cache of {cache.cache_dtype}; give --kv-cache-dtype auto or fp8 (which is e4m3)": cache.cache_dtype
        not in ("auto", str(config.model_config.dtype).removeprefix("torch."), *E4M3_CACHES),
        "KV caches of several dtypes (kv_cache_dtype_skip_layers)": bool(
            getattr(cache, "kv_cache_dtype_skip_layers", None)
        ),
        "speculative decoding": speculative is not None,
        "LoRA adapters, which change what a selector was distilled on": config.lora_config is not None,
        f"weights quantised as {quantisation}, only as FP8 (block scales) or AWQ": quantisation
        not in (None, *QUANTISATIONS),
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "context parallelism": context > 1,
        "dual batch overlap": bool(getattr(parallel, "enable_dbo", False)),
        "sequence parallelism": bool(getattr(config.compilation_config.pass_config, "enable_sp", False)),
        "sliding windows": bool(cache.sliding_window),
        "dual chunk attention": bool(getattr(text, "dual_chunk_attention_config", None)),
        "attention that is not causal": not getattr(text, "is_causal", True),
    }
    found = [reason for reason, holds in reasons.items() if holds]
    return (
        f"spotattention's plug-in was not tested with {found[0]}; use it without, or leave out the selector"
        if found
        else ""
    )


def _number_of(config: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def load(config: Any) -> Settings | None:
    """The settings of a vLLM configuration; None where it names no selector.

    Raises ValueError or FileNotFoundError in one sentence on what cannot work.
    """
    document = (config.additional_config or {}).get("spot") if isinstance(config.additional_config, Mapping) else None
    if document is None:
        return None
    options = Options.read(document)
    if sentence := refusal(config):
        raise ValueError(sentence)
    model = config.model_config
    selector = Selector.load(options.selector, model.model)
    text = model.hf_text_config
    heads = text.num_attention_heads
    foreign = check_backbone(
        selector,
        {
            "architecture": tuple(model.hf_config.architectures),
            "hidden_size": text.hidden_size,
            "num_layers": text.num_hidden_layers,
            "num_heads": heads,
            "num_kv_heads": _number_of(text, "num_key_value_heads") or heads,
            "head_dim": _number_of(text, "head_dim") or text.hidden_size // heads,
            "fingerprint": folder_fingerprint(model.model),
        },
    )
    if not foreign and config.quant_config is not None:  # of which no fingerprint is taken
        foreign = (
            f"the weights are quantised ({config.quant_config.get_name()}), others than the selector was distilled on; it can "
            "serve close ones, so its captured mass is measured on sampled steps"
        )
    if foreign:
        logger.warning("spot: %s", foreign)
        options = replace(options, check_every=min(options.check_every, FOREIGN_EVERY))
    method = selector.config.method(options.method)
    if method.word != "spot":
        raise ValueError(f"method '{options.method}': vLLM has the method spot only; for dense leave out the selector")
    if method.prefill != "dense":
        raise ValueError(
            f"method '{options.method}': inside vLLM prompts are read densely; leave out prefill={method.prefill}"
        )
    rope = selector.config.rope_dims
    if rope not in (0, 64):
        raise ValueError(f"the selector turns {rope} dims; the operators that write its keys turn 0 or 64")
    return Settings(options, selector, method, method.cache_format or selector.config.cache_format)
