"""A configured selector and a model class without one: refused, where decoding would be dense and nothing would say so."""

import functools
from collections.abc import Mapping
from typing import Any

from torch import nn
from vllm.model_executor.model_loader.base_loader import BaseModelLoader


def require_selectors(config: Any, model: nn.Module, known: tuple[str, ...]) -> None:
    """Raises ValueError when a vLLM configuration names a selector and no part of the model can carry one."""
    from spotattention.vllm.models.install import WithSelectors

    additional = config.additional_config
    if not isinstance(additional, Mapping) or additional.get("spot") is None:
        return
    if any(isinstance(module, WithSelectors) for module in model.modules()):
        return
    raise ValueError(
        f'additional_config["spot"] names a selector, but {type(model).__name__} cannot carry one and would attend densely; '
        f'leave "spot" out, or serve one of {", ".join(known)}'
    )


def watch_model_loaders(known: tuple[str, ...]) -> None:
    """Makes vLLM's loaders ask require_selectors of each model that they have loaded. Once a process."""
    load = BaseModelLoader.load_model
    if hasattr(load, "asks_for_selectors"):
        return

    @functools.wraps(load)
    def load_model(self: BaseModelLoader, vllm_config: Any, *args: Any, **kwargs: Any) -> nn.Module:
        model = load(self, vllm_config, *args, **kwargs)
        require_selectors(vllm_config, model, known)
        return model

    load_model.asks_for_selectors = True
    BaseModelLoader.load_model = load_model
