"""Hugging Face transformers: `attach` a selector to a model, `distill` one for it."""

from spotattention.hf.attach import Attached, attach, detach

__all__ = ["Attached", "attach", "detach"]
