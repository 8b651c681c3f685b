"""Selection rules, and the grammar in which methods are written: "spot:p=0.9,k=10%,dense=2".

The grammar and its errors are those of `spot generate --attention` and `spot eval --methods`; docs/method.md says what
the numbers mean. Lengths are tokens.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from spotattention import arguments

Mode = Literal["top_p", "top_k", "threshold"]
Prefill = Literal["dense", "sparse", "auto"]
Scope = Literal["layer", "kv_group"]
MassTable = Sequence[Sequence[float]]  # SelectorConfig.selection.mass_table

WORDS = ("dense", "spot", "streaming", "oracle", "quest", "twilight")
GRAMMAR = (
    "p=SHARE, t=THRESHOLD, m=MASS, k=TOKENS, k=PERCENT%, sinks=, recency=, floor=, cap=TOKENS, temperature=NUMBER, "
    "dense=LAYERS, cache=FORMAT, prefill=sparse, dense or auto, tile=QUERIES, per=layer or kv_group"
)
MOST_TOKENS = 2**31 - 1  # what the kernels count in 32 bits
KEY_FORMATS = ("f32", "bf16", "int8", "int4", "mxfp4", "nvfp4")


def shown(number: float) -> str:
    """A number as the program prints it: 0, not 0.0."""
    return repr(number).removesuffix(".0")


def one_of(words: tuple[str, ...]) -> str:
    """The words as a sentence has them: "a, b or c"."""
    return ", ".join(words[:-1]) + " or " + words[-1]


@dataclass(frozen=True)
class SelectionRule:
    """How block scores become a set of blocks: the arguments of `spotattention.ops.select_blocks`."""

    mode: Mode = "top_p"
    sinks: int = 128
    recency: int = 256
    floor: int = 512
    cap: int = 0
    budget: int = 2048
    budget_fraction: float = 0.0
    p: float = 0.9
    threshold: float = 1e-3
    temperature: float = 1.0
    thresholds: tuple[float, ...] = ()  # one a set, in place of threshold

    def __post_init__(self) -> None:
        def require(holds: bool, name: str, wanted: str) -> None:
            if not holds:
                raise ValueError(f"selection rule: {name} is {shown(getattr(self, name))}; it must be {wanted}")

        for name in ("sinks", "recency", "floor", "cap", "budget"):
            arguments.whole(f"selection rule: {name}", getattr(self, name))
        for name in ("budget_fraction", "p", "threshold", "temperature"):
            if not isinstance(getattr(self, name), float):  # nan and inf are refused below
                arguments.number(f"selection rule: {name}", getattr(self, name))
        given = arguments.items("selection rule: thresholds", self.thresholds, "a list of numbers")
        numbers = tuple(arguments.number(f"selection rule: thresholds[{i}]", t) for i, t in enumerate(given))
        object.__setattr__(self, "thresholds", numbers)  # which is frozen
        require(self.mode in ("top_p", "top_k", "threshold"), "mode", "top_p, top_k or threshold")
        for name in ("budget", "sinks", "recency", "floor", "cap"):
            require(getattr(self, name) <= MOST_TOKENS, name, f"at most {MOST_TOKENS} tokens")
        require(self.budget >= 0, "budget", "0 or more tokens")
        require(0 <= self.budget_fraction <= 1, "budget_fraction", "0 (unused) to 1")
        require(0 < self.p <= 1, "p", "above 0 and at most 1")
        require(0 < self.threshold <= 1, "threshold", "above 0 and at most 1")
        for name in ("sinks", "recency", "floor"):
            require(getattr(self, name) >= 0, name, "0 or more tokens")
        require(self.cap == 0 or self.cap >= max(self.floor, 0), "cap", "0 (none) or at least the floor")
        require(0 < self.temperature < math.inf, "temperature", "positive")
        require(all(t > 0 for t in self.thresholds), "thresholds", "positive")

    def fitted(self, temperature: float, residual_mass: Sequence[float]) -> "SelectionRule":
        """The rule for a layer: its temperature times the fitted one, and a threshold on all attention, which is one on the
        residual of each set for the kernels."""
        thresholds = tuple(self.threshold / mass for mass in residual_mass) if self.mode == "threshold" else ()
        return replace(self, temperature=self.temperature * temperature, thresholds=thresholds)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of select_blocks and select_and_attend."""
        return dict(vars(self))

    def describe(self) -> str:
        """ "top-p 0.9", "top-k 25%"."""
        most = f", at most {self.cap}" if self.cap > 0 else ""
        if self.mode == "top_p":
            return f"top-p {self.p:g}{most}"
        if self.mode == "threshold":
            return f"threshold {self.threshold:g}{most}"
        return f"top-k {100 * self.budget_fraction:g}%" if self.budget_fraction > 0 else f"top-k {self.budget}"


@dataclass(frozen=True)
class Method:
    """An attention method and everything that it is run with."""

    name: str = "dense"  # as it was written
    word: str = "dense"
    rule: SelectionRule = field(default_factory=SelectionRule)
    dense_layers: int = 0  # the first so many layers attend densely
    prefill: Prefill = "dense"  # how prompts are read; auto: sparsely where they are long
    tile: int | None = None  # queries that share a set there; None: as suits the device
    cache_format: str | None = None  # of the selector's keys; None: the selector's own
    scope: Scope | None = None  # of the oracle's block sets; None: as the selector's


def _number(text: str) -> float | None:
    """A number, or with '%' at its end a hundredth of one; nothing else."""
    unit = 0.01 if text.endswith("%") else 1.0
    text = text.removesuffix("%")
    if not re.fullmatch(r"-?((\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|inf|infinity|nan)", text, re.IGNORECASE | re.ASCII):
        return None
    return float(text) * unit


# The key of the grammar, the setting it sets, and whether that is a whole number.
_OPTIONS = {
    "p": ("p", False),
    "t": ("threshold", False),
    "m": ("mass", False),
    "k": ("budget", True),
    "sinks": ("sinks", True),
    "recency": ("recency", True),
    "floor": ("floor", True),
    "cap": ("cap", True),
    "temperature": ("temperature", False),
    "dense": ("dense_layers", True),
    "tile": ("tile", True),
}

_RULE = {"p", "t", "k", "k%", "sinks", "recency", "floor", "cap", "temperature", "dense", "prefill", "tile"}
# The keys that each word's method reads; "k%" is a share of the context.
_READ = {
    "dense": set(),
    "spot": _RULE | {"m", "cache"},
    "streaming": {"k", "sinks", "dense", "prefill", "tile"},
    "oracle": _RULE | {"per"},
    "quest": _RULE,
    "twilight": {"p", "k", "k%", "sinks", "recency", "floor", "dense", "prefill", "tile"},
}
_MOST_LAYERS = 10_000


def _set_option(settings: dict[str, Any], key: str, value: str) -> bool:
    """Sets one KEY=VALUE; False when it is not one of the grammar's."""
    if key == "cache":
        settings["cache_format"] = value
        return True
    if key == "prefill":
        settings["prefill"] = value
        return value in ("sparse", "dense", "auto")
    if key == "per":
        settings["scope"] = value
        return value in ("layer", "kv_group")
    number = _number(value)
    if number is None or key not in _OPTIONS:
        return False
    if value.endswith("%"):
        settings["budget_fraction"] = number
        return key == "k"
    name, whole = _OPTIONS[key]
    if whole and not (abs(number) <= 1e9 and number == math.floor(number)):
        return False
    settings[name] = int(number) if whole else number
    return True


def threshold_for(mass: float, mass_table: MassTable) -> float:
    """The largest threshold (a share of all attention) that captured the mass on the text of the table's fit, log threshold
    taken as linear in mass between rows.

    mass_table: selection.mass_table of a selector.json: rows of threshold, captured mass and share of the tokens, thresholds
    falling. Raises ValueError where it is empty or the mass lies outside it.
    """
    if not mass_table:
        raise ValueError(
            f"a captured mass of {shown(mass)} was asked for, but the selector does not say which threshold gives it; fit "
            "that with `spot calibrate`, or give a threshold"
        )
    least, most = mass_table[0][1], mass_table[-1][1]
    if not least <= mass <= most:
        raise ValueError(
            f"a captured mass of {shown(mass)} is outside what was fitted for the selector, {least:.4f} to {most:.4f}; ask for "
            "one in that range, give a threshold, or fit it on other text with `spot calibrate`"
        )
    above = next(i for i, row in enumerate(mass_table) if row[1] >= mass)
    high, high_mass = mass_table[above][:2]
    if above == 0:
        return high
    low, low_mass = mass_table[above - 1][:2]  # of less mass than asked for, so that nothing is divided by 0
    return low * (high / low) ** ((mass - low_mass) / (high_mass - low_mass))


def parse_method(text: str, defaults: SelectionRule | None = None, mass_table: MassTable = ()) -> Method:
    """A method as users write it: WORD or WORD:KEY=VALUE,KEY=VALUE...

    What it does not say is as in `defaults`, a selector's rule; m= needs its mass_table, too (SelectorConfig.method gives
    both). Raises ValueError naming the part that is wrong, TypeError where it is no text.
    """
    text = arguments.text("method", text, 'a text such as "spot:p=0.9"')
    if defaults is not None and not isinstance(defaults, SelectionRule):
        raise arguments.wrong_type("defaults", defaults, "a SelectionRule")
    word, _, rest = text.partition(":")
    settings: dict[str, Any] = {}
    given = set()
    parts = rest.split(",")
    for option in parts[:-1] if parts[-1] == "" else parts:
        key, equals, value = option.partition("=")
        if not equals or not value or not _set_option(settings, key, value):
            raise ValueError(f"method '{text}': '{option}' is not one of {GRAMMAR}")
        name = "k%" if key == "k" and value.endswith("%") else key
        if name in given:
            raise ValueError(f"method '{text}': {key}= is given twice; give it once")
        given.add(name)
    if word not in WORDS:
        raise ValueError(f"attention '{word}' is unknown; choose {one_of(WORDS)}")
    method = make_method(word, settings, defaults, text, mass_table)
    for key in sorted(given):
        if key not in _READ[word]:
            why = f"attention '{word}' does not read it"
        elif key in ("cap", "temperature") and method.rule.mode == "top_k":
            why = "a fixed budget does not read it"
        elif key == "tile" and method.prefill == "dense":
            why = "prompts are read densely"
        else:
            continue
        raise ValueError(f"method '{text}': {key.rstrip('%')}= has no effect, {why}; leave it out")
    return method


def make_method(
    word: str,
    settings: dict[str, Any],
    defaults: SelectionRule | None = None,
    name: str | None = None,
    mass_table: MassTable = (),
) -> Method:
    """A method of settings by their names: fields of SelectionRule, mass, dense_layers, prefill, tile, cache_format, scope.

    Raises ValueError when settings are out of range or do not go together.
    """
    twilight = word == "twilight"
    given = settings.get
    p, threshold, budget, share = given("p"), given("threshold"), given("budget"), given("budget_fraction")
    fixed = budget is not None or share is not None
    if budget is not None and share is not None:
        raise ValueError(
            f"a fixed budget is given in tokens ({budget}) and as a share ({shown(share)}); give one of them"
        )
    if not twilight and p is not None and fixed:
        raise ValueError(f"attention '{word}' takes top-p ({shown(p)}) or a fixed budget, not both; give one of them")
    if threshold is not None and (p is not None or fixed):
        raise ValueError(
            f"attention '{word}' takes a threshold ({shown(threshold)}) or another rule, not both; give one of them"
        )
    if threshold is not None and twilight:
        raise ValueError(
            f"attention '{word}' prunes what a fixed budget proposes; leave out the threshold ({shown(threshold)})"
        )
    # It is fitted for the selector's scores: what a method with others does not read.
    mass = given("mass") if "m" in _READ[word] else None
    if mass is not None and (threshold is not None or p is not None or fixed):
        raise ValueError(
            f"attention '{word}' takes a captured mass ({shown(mass)}) or another rule, not both; give one of them"
        )
    if budget is not None and budget < 1:
        raise ValueError(f"the budget is {budget} tokens; it must be at least 1")
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"the budget's share of the context is {shown(share)}; it must be above 0 and at most 1")
    dense_layers = given("dense_layers", 0)
    if not 0 <= dense_layers <= _MOST_LAYERS:
        raise ValueError(f"{dense_layers} dense layers were asked for; give 0 to {_MOST_LAYERS}")
    cache_format = given("cache_format")
    if cache_format is not None and cache_format not in KEY_FORMATS:
        raise ValueError(
            f'the selector\'s cache format is "{cache_format}"; it must be one of {", ".join(KEY_FORMATS)}'
        )
    tile = given("tile")
    if tile is not None and tile not in (16, 32, 64):
        raise ValueError(f"tiles of {tile} queries were asked for; give 16, 32 or 64")
    fields = {k: v for k, v in settings.items() if k in SelectionRule.__dataclass_fields__}
    if p is not None:
        fields["mode"] = "top_p"
    if threshold is not None:
        fields["mode"] = "threshold"
    if mass is not None:
        fields |= {"mode": "threshold", "threshold": threshold_for(mass, mass_table)}
    if fixed:
        fields["mode"] = "top_k"
    if twilight:  # its paper's: Quest proposes a quarter of the context, and 95% of its weight is kept
        fields["mode"] = "top_k"
        fields["p"] = 0.95 if p is None else p
        if not fixed:
            fields["budget_fraction"] = 0.25
    return Method(
        name=name or word,
        word=word,
        rule=replace(defaults or SelectionRule(), **fields),
        dense_layers=dense_layers,
        prefill=given("prefill", "dense"),
        tile=tile,
        cache_format=cache_format,
        scope=given("scope"),
    )
