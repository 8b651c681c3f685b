"""SpotAttention: learned sparse attention for frozen pretrained language models.

Importing loads the operators (torch.ops.spot.*, with fakes for torch.compile); spotattention.ops has them as typed
functions. `attach` and `distill` are for Hugging Face transformers, which only they import; `Engine` is the C++ engine.
The command `spot` distils a selector, generates with it and evaluates it.
"""

from typing import TYPE_CHECKING, Any

from spotattention import ops
from spotattention._library import __version__, built_for_cuda, built_for_torch
from spotattention.rule import Method, SelectionRule, parse_method
from spotattention.selector import Selector

if TYPE_CHECKING:
    from spotattention.engine import Answer, Engine, Event
    from spotattention.hf import attach, detach, distill

__all__ = [
    "Answer",
    "Engine",
    "Event",
    "Method",
    "SelectionRule",
    "Selector",
    "__version__",
    "attach",
    "built_for_cuda",
    "built_for_torch",
    "detach",
    "distill",
    "ops",
    "parse_method",
]

# Imported at their first use: transformers takes seconds, the engine's library is large.
_LAZY = {name: "spotattention.hf" for name in ("attach", "detach", "distill")} | {
    name: "spotattention.engine" for name in ("Answer", "Engine", "Event")
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'spotattention' has no attribute '{name}'")
    import importlib

    try:
        return getattr(importlib.import_module(_LAZY[name]), name)
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError(f"spotattention.{name} needs transformers 5.17 or newer; pip install transformers") from error
