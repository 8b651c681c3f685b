"""A frozen model from transformers whose decode steps show their exact attention.

The prefill is causal attention by torch's own kernels, so that no [length, length] matrix is ever held; a decode step's probabilities
are recomputed from q and k in float32 and handed to a watcher, layer by layer. What the watcher returns is what the step attends to.
"""

import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer

WATCHED = "watched"
watchers: list = []  # at most one; transformers looks attention functions up by name, so it cannot be an argument


def watched_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **_):
    """query [batch, heads, new, dim], key and value [batch, kv_heads, length, dim] -> [batch, new, heads, dim]."""
    new, length = query.shape[2], key.shape[2]
    if getattr(module, "sliding_window", None):
        raise ValueError("layers with a sliding window are not supported: they read all of a short past")
    if new > 1:
        if new != length:
            raise ValueError("a prompt must be read in one call")
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous(), None
    grouped = query.float().squeeze(2).unflatten(1, (key.shape[1], -1))  # [batch, kv_heads, group, dim]
    logits = torch.einsum("bkgd,bkld->bkgl", grouped, key.float()) * scaling
    probabilities = logits.softmax(-1).flatten(1, 2)  # [batch, heads, length]
    if watchers:
        probabilities = watchers[0](module.layer_idx, probabilities)
    weights = probabilities.unflatten(1, (key.shape[1], -1))
    out = torch.einsum("bkgl,bkld->bkgd", weights, value.float()).to(value.dtype)
    return out.flatten(1, 2).unsqueeze(1), None


AttentionInterface.register(WATCHED, watched_attention)


class Model:
    def __init__(self, folder: str, device: str):
        config = AutoConfig.from_pretrained(folder)
        self.config = config.get_text_config()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.device = torch.device(device)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=WATCHED)
        self.model = self.model.to(self.device).eval()
        self.kv_heads = self.config.num_key_value_heads
        self.ends = set()
        for end in (self.model.generation_config.eos_token_id, self.tokenizer.eos_token_id):
            self.ends |= set(end if isinstance(end, list) else [end])

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"

    @torch.inference_mode()
    def prefill(self, ids: list[int]):
        """The cache after a prompt, and the id that follows it greedily."""
        out = self.model(torch.tensor([ids], device=self.device), use_cache=True, logits_to_keep=1)
        return out.past_key_values, int(out.logits[0, -1].argmax())

    @torch.inference_mode()
    def step(self, tokens: list[int], cache) -> tuple[object, torch.Tensor]:
        """One decode step of a batch; its cache and [batch] greedy ids."""
        ids = torch.tensor(tokens, device=self.device).unsqueeze(1)
        out = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.past_key_values, out.logits[:, -1].argmax(-1)

    def watched_step(self, token: int, cache):
        """One decode step, dense; (cache, next id, probabilities [layers with attention, heads, length] float32)."""
        seen = []

        def watch(_, probabilities):
            seen.append(probabilities[0])
            return probabilities

        watchers.append(watch)
        try:
            cache, following = self.step([token], cache)
        finally:
            watchers.clear()
        return cache, int(following[0]), torch.stack(seen)
