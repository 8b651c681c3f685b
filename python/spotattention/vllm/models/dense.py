"""Models in which every layer has full attention."""

from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from spotattention.vllm.models.install import WithSelectors


class SpotQwen2ForCausalLM(WithSelectors, Qwen2ForCausalLM):
    pass


class SpotQwen3ForCausalLM(WithSelectors, Qwen3ForCausalLM):
    pass


class SpotLlamaForCausalLM(WithSelectors, LlamaForCausalLM):
    pass
