"""Hugging Face transformers: `attach` a selector to a model, `distill` one for it."""

import transformers

if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 17):
    raise ImportError(f"spotattention needs transformers 5.17 or newer, {transformers.__version__} is installed")

from spotattention.hf.attach import Attached, attach, detach  # noqa: E402
from spotattention.hf.distill import distill  # noqa: E402

__all__ = ["Attached", "attach", "detach", "distill"]
