"""The settings of a selector: the field `config` of its selector.json (docs/method.md)."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from spotattention.rule import KEY_FORMATS, MOST_TOKENS, Method, SelectionRule, parse_method, shown


@dataclass
class Distillation:
    """How a selector was distilled: docs/method.md."""

    start: str = "backbone"
    loss: str = "sparse"
    k_train: int = 8192
    teacher: str = "token"
    teacher_scope: str = "residual"
    rest_bucket: bool = False


@dataclass
class Selection:
    """What a selection uses unless the caller asks for something else."""

    sinks: int = 128
    recency: int = 256
    floor: int = 512
    cap: int = 0
    p: float = 0.9
    temperature: list[float] = field(default_factory=list)  # one a selector layer; empty: 1
    residual_mass: list[float] = field(default_factory=list)  # one a layer and set; empty: 1
    # Rows of a threshold, the mass that it captured on held-out text and the share of the tokens that it read there, means over
    # layers; thresholds falling. Empty: unknown.
    mass_table: list[list[float]] = field(default_factory=list, metadata={"rows": True})
    dense_layers: list[int] = field(default_factory=list, metadata={"whole": True})  # model layers without a selector


@dataclass
class SelectorConfig:
    """Every field of selector.json's `config`; the defaults are the preset spot."""

    preset: str = "spot"
    num_heads: int = 4
    head_dim: int = 128
    key_heads: int = 1
    rope_dims: int = 64
    key_norm: str = "layernorm"
    norm_eps: float = 1e-6
    per: str = "layer"
    block_size: int = 16
    cache_format: str = "int4"
    selection: Selection = field(default_factory=Selection)
    distillation: Distillation = field(default_factory=Distillation)

    @classmethod
    def from_preset(cls, name: str) -> "SelectorConfig":
        """The presets of `spot distill`: "spot", "custom" or "paper"."""
        if name == "paper":
            config = cls(preset=name, key_heads=4, cache_format="bf16")
            config.distillation = Distillation(start="random", teacher_scope="all")
            return config
        if name not in ("spot", "custom"):
            raise ValueError(f'there is no selector preset "{name}"; use paper, spot or custom')
        return cls(preset=name)

    @classmethod
    def from_json(cls, document: Any, source: str) -> "SelectorConfig":
        """Absent fields take the preset's value. Raises ValueError naming the field of `source` that is wrong."""
        if not isinstance(document, dict):
            raise ValueError(f"{source} must be a JSON object, not {json.dumps(document)}")
        config = cls.from_preset(document.get("preset", "spot"))
        _fill(config, document, source)
        config.validate(source)
        return config

    def to_json(self) -> dict[str, Any]:
        made = asdict(self)
        for name in ("residual_mass", "mass_table"):
            if not made["selection"][name]:  # unknown: programs from before it read such a file
                del made["selection"][name]
        return made

    def validate(self, source: str) -> None:
        """Raises ValueError naming the first impossible value."""

        def require(holds: bool, name: str, value: Any, wanted: str) -> None:
            if not holds:
                raise ValueError(f"{source}: {name} is {value}; it must be {wanted}")

        def one_of(name: str, value: str, *words: str) -> None:
            if value not in words:
                raise ValueError(f'{source}.{name} is "{value}"; it must be one of {", ".join(words)}')

        one_of("key_norm", self.key_norm, "none", "layernorm", "rmsnorm")
        one_of("per", self.per, "layer", "kv_group")
        one_of("cache_format", self.cache_format, *KEY_FORMATS)
        require(self.num_heads == 4, "num_heads", self.num_heads, "4, what the scoring kernels are built for")
        require(self.head_dim == 128, "head_dim", self.head_dim, "128, what the key formats are built for")
        require(self.key_heads in (1, self.num_heads), "key_heads", self.key_heads, "1 (shared) or num_heads")
        require(
            0 <= self.rope_dims <= self.head_dim and self.rope_dims % 2 == 0,
            "rope_dims",
            self.rope_dims,
            "even and at most head_dim",
        )
        require(0 < self.norm_eps < 1, "norm_eps", self.norm_eps, "between 0 and 1")
        require(self.block_size == 16, "block_size", self.block_size, "16, the page size of the caches")
        chosen, learned = self.selection, self.distillation
        for name in ("sinks", "recency", "floor", "cap"):
            tokens = getattr(chosen, name)
            require(0 <= tokens <= MOST_TOKENS, f"selection.{name}", tokens, f"0 to {MOST_TOKENS} tokens")
        require(
            chosen.cap == 0 or chosen.cap >= chosen.floor,
            "selection.cap",
            chosen.cap,
            "0 (no cap) or at least selection.floor",
        )
        require(0 < chosen.p <= 1, "selection.p", chosen.p, "above 0 and at most 1")
        for temperature in chosen.temperature:
            require(0 < temperature < math.inf, "selection.temperature", temperature, "positive for every layer")
        for mass in chosen.residual_mass:
            require(0 < mass <= 1, "selection.residual_mass", mass, "above 0 and at most 1 for every set")
        self._check_mass_table(source)
        for index, layer in enumerate(chosen.dense_layers):
            require(layer >= 0, "selection.dense_layers", layer, "a list of layer indices from 0")
            require(layer not in chosen.dense_layers[:index], "selection.dense_layers", layer, "listed once")
        one_of("distillation.start", learned.start, "random", "backbone")
        one_of("distillation.loss", learned.loss, "dense", "sparse")
        one_of("distillation.teacher", learned.teacher, "token", "block_max")
        one_of("distillation.teacher_scope", learned.teacher_scope, "all", "residual")
        require(learned.k_train >= 1, "distillation.k_train", learned.k_train, "1 or more tokens")

    def _check_mass_table(self, source: str) -> None:
        table = self.selection.mass_table
        if not table:
            return
        if len(table) < 2:
            raise ValueError(f"{source}: selection.mass_table has one row; it must have at least two")
        if not self.selection.residual_mass:
            raise ValueError(
                f"{source}: selection.mass_table stands without selection.residual_mass, with which it was fitted"
            )
        for index, (threshold, mass, tokens) in enumerate(table):
            before = table[index - 1] if index else [math.inf, 0, 0]
            ordered = threshold < before[0] and mass >= before[1] and tokens >= before[2]
            if not ordered or not all(0 < x <= 1 for x in (threshold, mass, tokens)):
                raise ValueError(
                    f"{source}: selection.mass_table has the row {shown(threshold)}, {shown(mass)}, {shown(tokens)}; thresholds "
                    "must fall from row to row, masses and shares of the tokens must not, and all lie above 0 and at most at 1"
                )

    def method(self, text: str) -> Method:
        """The method that a text asks for with this selector: parse_method with its rule and its mass table."""
        return parse_method(text, self.rule(), self.selection.mass_table)

    def rule(self) -> SelectionRule:
        """Top-p, as the selector wants to be used."""
        s = self.selection
        return SelectionRule(sinks=s.sinks, recency=s.recency, floor=s.floor, cap=s.cap, p=s.p)


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or _is_whole(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_list(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(fits, value))


# What a field takes, by its type or its mark, and the words for that.
_WANTED: dict[Any, tuple[Callable[[Any], bool], str]] = {
    bool: (lambda v: isinstance(v, bool), "true or false"),
    int: (_is_whole, "an integer"),
    float: (_is_number, "a number"),
    str: (lambda v: isinstance(v, str), "a string"),
    list: (lambda v: _is_list(v, _is_number), "an array of numbers"),
    "whole": (lambda v: _is_list(v, _is_whole), "an array of integers"),
    "rows": (
        lambda v: _is_list(v, lambda row: _is_list(row, _is_number) and len(row) == 3),
        "rows of three numbers: threshold, captured mass, share of the tokens",
    ),
}


def _fill(target: Any, document: Any, source: str) -> None:
    """Sets the fields of a dataclass from a JSON object; unknown fields and wrong types are refused."""
    if not isinstance(document, dict):
        raise ValueError(f"{source} must be a JSON object, not {json.dumps(document)}")
    for name, value in document.items():
        if name not in target.__dataclass_fields__:
            raise ValueError(f'{source} has the unknown field "{name}"; remove it or upgrade')
        current = getattr(target, name)
        if hasattr(current, "__dataclass_fields__"):
            _fill(current, value, f"{source}.{name}")
            continue
        kind = next(iter(target.__dataclass_fields__[name].metadata), type(current))
        fits, words = _WANTED[kind]
        if not fits(value):
            raise ValueError(f"{source}.{name} must be {words}, not {json.dumps(value)}")
        setattr(target, name, type(current)(value))
