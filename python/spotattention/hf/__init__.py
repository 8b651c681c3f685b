"""Hugging Face transformers: `attach` a selector to a model, `distill` one for it."""

from spotattention.hf.attach import Attached, attach, detach
from spotattention.hf.distill import distill

__all__ = ["Attached", "attach", "detach", "distill"]
