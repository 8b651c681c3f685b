"""Rotary tables of a selector: the backbone's theta and scaling over the selector's own dims."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_SUPPORTED = ("default", "mrope", "linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True)
class RopeConfig:
    """What a model's config says of its rotary embedding, as transformers reads it."""

    theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    original_positions: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0  # yarn; 0: 0.1 ln(factor) + 1
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    @classmethod
    def of_model(cls, config: Any) -> "RopeConfig":
        """Of a transformers config (its text config). Raises ValueError on a type that selectors do not know."""
        parameters = getattr(config, "rope_parameters", None) or {}
        nested = parameters.get("full_attention")  # one set a kind of layer
        if isinstance(nested, dict):
            parameters = nested
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind not in _SUPPORTED:
            raise ValueError(f"the model's rope type '{kind}' is not supported; {', '.join(_SUPPORTED)} are")
        theta = parameters.get("rope_theta", getattr(config, "rope_theta", None)) or 10000.0
        positions = int(getattr(config, "max_position_embeddings", 0) or 0)
        original = int(
            getattr(config, "original_max_position_embeddings", None)
            or parameters.get("original_max_position_embeddings")
            or positions
        )
        factor = parameters.get("factor") or (positions / original if kind in ("yarn", "llama3") else 1.0)
        attention_factor = parameters.get("attention_factor") or 0.0
        mscale, mscale_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
        if kind == "yarn" and not attention_factor and mscale and mscale_all:
            attention_factor = (0.1 * mscale * math.log(factor) + 1) / (0.1 * mscale_all * math.log(factor) + 1)
        return cls(
            theta=float(theta),
            rope_type=kind,
            factor=float(factor),
            original_positions=original,
            beta_fast=float(parameters.get("beta_fast") or 32.0),
            beta_slow=float(parameters.get("beta_slow") or 1.0),
            attention_factor=float(attention_factor),
            truncate=parameters.get("truncate", True),
            low_freq_factor=float(parameters.get("low_freq_factor") or 1.0),
            high_freq_factor=float(parameters.get("high_freq_factor") or 4.0),
        )


def frequencies(config: RopeConfig, dims: int) -> tuple[Tensor, float]:
    """[dims / 2] float32 on the CPU, and what cos and sin are multiplied by: transformers' formulas."""
    per_radian = torch.pow(config.theta, torch.arange(0, dims, 2, dtype=torch.float32, device="cpu") / dims)
    plain = torch.reciprocal(per_radian)
    if config.rope_type == "linear":
        return plain / config.factor, 1.0
    if config.rope_type == "yarn":
        return _yarn(config, per_radian, dims)
    if config.rope_type == "llama3":
        return _llama3(config, plain), 1.0
    return plain, 1.0


def _yarn(config: RopeConfig, per_radian: Tensor, dims: int) -> tuple[Tensor, float]:
    # Dims that turn more than beta_fast times over the original length keep their frequency, those that turn less than
    # beta_slow times are slowed by `factor`, a ramp joins the two (arXiv 2309.00071).
    def dim_that_turns(turns: float) -> float:
        return dims * math.log(config.original_positions / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = dim_that_turns(config.beta_fast), dim_that_turns(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    if low == high:
        high += 0.001
    keep = 1 - ((torch.arange(dims // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    mixed = torch.reciprocal(per_radian * config.factor) * (1 - keep) + torch.reciprocal(per_radian) * keep
    scale = config.attention_factor or (0.1 * math.log(config.factor) + 1.0 if config.factor > 1 else 1.0)
    return mixed, scale


def _llama3(config: RopeConfig, plain: Tensor) -> Tensor:
    # Long wavelengths are slowed by `factor`, short ones kept, those between interpolated.
    original, low, high = config.original_positions, config.low_freq_factor, config.high_freq_factor
    wavelength = torch.reciprocal(plain) * (2 * math.pi)
    smooth = (torch.reciprocal(wavelength) * original - low) / (high - low)
    between = (1 - smooth) * plain / config.factor + smooth * plain
    outer = torch.where(wavelength > original / low, plain / config.factor, plain)
    return torch.where((wavelength >= original / high) & (wavelength <= original / low), between, outer)


class RopeTable:
    """cos and sin [positions, dims / 2] float32 on a device, grown as positions are asked for."""

    def __init__(self, config: RopeConfig, dims: int) -> None:
        self.config, self.dims = config, dims
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def at_least(self, positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tables of at least so many positions: the same bits on every device, since the CPU computes them."""
        tables = self._tables.get(device)
        if tables is None or tables[0].shape[0] < positions:
            count = 4096
            while count < positions:
                count *= 2
            speed, scale = frequencies(self.config, self.dims)
            angles = torch.arange(count, dtype=torch.float32, device="cpu")[:, None] * speed
            tables = (angles.cos() * scale).to(device), (angles.sin() * scale).to(device)
            self._tables[device] = tables
        return tables
