"""Models in which some layers have full attention and the others a recurrent state."""

from vllm.model_executor.models.qwen3_5 import Qwen3_5ForCausalLM

from spotattention.vllm.models.install import WithSelectors


class SpotQwen3_5ForCausalLM(WithSelectors, Qwen3_5ForCausalLM):
    pass
