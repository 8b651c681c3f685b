"""What several tests of the folder need."""

import inspect

import torch
from transformers.models.llama.modeling_llama import LlamaAttention

# What transformers calls a cache: past_key_values before 5.2x.
CACHE = "cache" if "cache" in inspect.signature(LlamaAttention.forward).parameters else "past_key_values"


def left_padded(rows, pad=0):
    """ids and mask [B, longest] of rows of unlike length."""
    longest = max(map(len, rows))
    ids, mask = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(2))
    for row, tokens in enumerate(rows):
        ids[row, longest - len(tokens) :] = tokens
        mask[row, longest - len(tokens) :] = 1
    return ids, mask
