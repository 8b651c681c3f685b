"""Loads the shared library of the operators, which was built against one minor version of torch."""

import os
import pathlib
import warnings

import torch

try:
    from spotattention import _build
except ImportError:  # a source tree beside a CMake build (SPOT_OPS_LIBRARY)
    _build = None

__version__: str = _build.VERSION if _build else "0+source"
built_for_torch: str = _build.TORCH if _build else torch.__version__
built_for_cuda: str = _build.CUDA if _build else ""


def minor(version: str) -> tuple[str, ...]:
    return tuple(version.split("+")[0].split(".")[:2])


def mismatch() -> str:
    """One sentence when torch's minor version is another than the one built for, else nothing."""
    if minor(torch.__version__) == minor(built_for_torch):
        return ""
    return (
        f"spotattention {__version__} was built for torch {built_for_torch}, but torch {torch.__version__} is installed; "
        f"install torch {'.'.join(minor(built_for_torch))} or build spotattention against this one"
    )


def load() -> None:
    """Registers torch.ops.spot.*. Raises ImportError in one sentence when that cannot be."""
    path = pathlib.Path(os.environ.get("SPOT_OPS_LIBRARY", pathlib.Path(__file__).parent / "lib" / "libspot_ops.so"))
    if not path.is_file():
        raise ImportError(f"{path} does not exist; install spotattention, or name the library in SPOT_OPS_LIBRARY")
    sentence = mismatch()
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(sentence or f"{path} could not be loaded: {error}") from error
    if sentence:
        warnings.warn(sentence, stacklevel=3)


load()
