"""SpotAttention: learned sparse attention for frozen pretrained language models.

Importing loads the operators (torch.ops.spot.*, with fakes for torch.compile); spotattention.ops has them as typed
functions. The command `spot` distils a selector, generates with it and evaluates it.
"""

from spotattention import ops
from spotattention._library import __version__, built_for_cuda, built_for_torch

__all__ = ["__version__", "built_for_cuda", "built_for_torch", "ops"]
