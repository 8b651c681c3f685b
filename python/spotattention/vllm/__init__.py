"""SpotAttention inside vLLM: the entry point `vllm.general_plugins`, which does nothing until it is configured.

    python -m vllm.entrypoints.openai.api_server --model MODEL \\
        --additional-config '{"spot": {"selector": "MODEL/selectors/spot", "method": "spot:k=10%"}}'

A selector of `spot distill` then chooses what each decode step of a frozen model reads; prompts are read densely.
Selector keys live in vLLM's own pages, under its block tables, so that its prefix cache, its chunked prefill and its
preemption know of them. docs/vllm.md says what is supported and what has been run.
"""

import logging

OLDEST, NEWEST = (0, 32), (0, 33)

# Architectures that this plug-in takes over, and the class that stands in for vLLM's own.
MODELS = {
    "Qwen2ForCausalLM": "dense:SpotQwen2ForCausalLM",
    "Qwen3ForCausalLM": "dense:SpotQwen3ForCausalLM",
    "LlamaForCausalLM": "dense:SpotLlamaForCausalLM",
    "Qwen3_5ForCausalLM": "hybrid:SpotQwen3_5ForCausalLM",
}


def unsupported(version: str) -> str:
    """One sentence when this version of vLLM is not one that the plug-in was tested with, else nothing."""
    parts = version.split("+")[0].split(".")
    minor = tuple(int(part) if part.isdigit() else -1 for part in parts[:2])
    if OLDEST <= minor <= NEWEST:
        return ""
    return (
        f"spotattention's plug-in is for vLLM {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}, but vLLM {version} is "
        "installed; it stays out of the way, and every model attends densely"
    )


def register() -> None:
    """What vLLM calls in each of its processes. Model classes without a configuration are vLLM's own in all they do."""
    import vllm

    logger = logging.getLogger("vllm.spotattention")
    if sentence := unsupported(vllm.__version__):
        logger.warning(sentence)
        return
    from vllm import ModelRegistry
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    for name, backend in (("SPOT", "SpotBackend"), ("SPOT_KEYS", "SpotKeysBackend")):
        if name not in AttentionBackendEnum.__members__:
            register_backend(name, f"spotattention.vllm.backend.{backend}")
    for architecture, path in MODELS.items():
        ModelRegistry.register_model(architecture, f"spotattention.vllm.models.{path}")
    from spotattention.vllm.guard import watch_model_loaders

    watch_model_loaders(tuple(MODELS))


def statistics(worker: object = None) -> dict:
    """What this process's self-check has seen: {"checks", "captured_mass", "layers", "attended", "visible"}.

    captured_mass is the mean over rows and layers, `layers` the mean by layer; attended and visible count tokens. For all
    workers of an engine `llm.collective_rpc(spotattention.vllm.statistics)`; where they are processes of their own vLLM
    wants VLLM_ALLOW_INSECURE_SERIALIZATION=1 for that.
    """
    from spotattention.vllm.check import STATISTICS

    return STATISTICS.summary()
