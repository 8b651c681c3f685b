"""Selector folders: selector.json and selector.safetensors, as `spot distill` writes them.

A selector is, for each full-attention layer of one backbone, three projections whose score estimates the layer's
attention (docs/method.md). Reading and writing need the package safetensors.
"""

import json
import math
import os
import pathlib
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from spotattention.rule import KEY_FORMATS, Method, SelectionRule, parse_method, shown

FORMAT = "spotattention-selector"
VERSION = 3  # the newest
WeightFormat = Literal["float32", "bfloat16", "int8", "int4"]
# With the first version that knows each, so that older programs ask for an upgrade only where they need it.
WEIGHT_FORMATS = {"float32": 1, "bfloat16": 1, "int8": 2, "int4": 3}
INT4_GROUP = 32  # numbers of a row that share a scale
BACKBONE_FACTS = ("architecture", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")


class LayerWeights(NamedTuple):
    """One layer's selector; float32, or query_key in the dtype that the backbone runs in."""

    query_key: Tensor  # [(4 + key_heads) * 128, hidden_size]: W_q above W_k
    mix: Tensor  # [groups * 4, hidden_size] float32
    norm_weight: Tensor | None  # [128] float32
    norm_bias: Tensor | None


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
    mass_table: list[list[float]] = field(default_factory=list, metadata={"row": 3})
    dense_layers: list[int] = field(default_factory=list)  # model layers without a selector


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
        for name in ("sinks", "recency", "floor"):
            require(getattr(chosen, name) >= 0, f"selection.{name}", getattr(chosen, name), "0 or more tokens")
        require(
            chosen.cap == 0 or chosen.cap >= max(chosen.floor, 1),
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


def _fill(target: Any, document: Any, source: str) -> None:
    """Sets the fields of a dataclass from a JSON object; unknown fields and wrong types are refused."""
    if not isinstance(document, dict):
        raise ValueError(f"{source} must be a JSON object, not {json.dumps(document)}")

    def is_number(v: Any) -> bool:
        return isinstance(v, float) or (isinstance(v, int) and not isinstance(v, bool) and abs(v) < 2**63)

    wanted = {
        bool: (lambda v: isinstance(v, bool), "true or false"),
        int: (lambda v: isinstance(v, int) and is_number(v), "an integer"),
        float: (is_number, "a number"),
        str: (lambda v: isinstance(v, str), "a string"),
        list: (lambda v: isinstance(v, list) and all(map(is_number, v)), "an array of numbers"),
        "row": (
            lambda v: (
                isinstance(v, list)
                and all(isinstance(row, list) and len(row) == 3 and all(map(is_number, row)) for row in v)
            ),
            "rows of three numbers: threshold, captured mass, share of the tokens",
        ),
    }
    for name, value in document.items():
        if name not in target.__dataclass_fields__:
            raise ValueError(f'{source} has the unknown field "{name}"; remove it or upgrade')
        current = getattr(target, name)
        if hasattr(current, "__dataclass_fields__"):
            _fill(current, value, f"{source}.{name}")
            continue
        fits, words = wanted["row" if "row" in target.__dataclass_fields__[name].metadata else type(current)]
        if not fits(value):
            raise ValueError(f"{source}.{name} must be {words}, not {json.dumps(value)}")
        setattr(target, name, type(current)(value))


@dataclass
class Selector:
    """A selector and what it was made for. `layers` are model layers, ascending; `weights` has an entry for each."""

    config: SelectorConfig
    backbone: dict[str, Any]  # BACKBONE_FACTS, and "fingerprint"
    layers: list[int]
    weights: dict[int, LayerWeights]
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def groups(self) -> int:
        """Block sets a row has: 1, or one a KV head."""
        return 1 if self.config.per == "layer" else self.backbone["num_kv_heads"]

    def fitted(self, layer: int, rule: SelectionRule) -> SelectionRule:
        """The rule with what was fitted for a model layer."""
        place, chosen = self.layers.index(layer), self.config.selection
        temperature = chosen.temperature[place] if chosen.temperature else 1.0
        return rule.fitted(temperature, chosen.residual_mass[place * self.groups : (place + 1) * self.groups])

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> "Selector":
        """A copy on a device, W_q and W_k in `dtype`; what is small and sensitive stays float32."""

        def fine(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device, torch.float32)

        moved = {
            layer: LayerWeights(
                w.query_key.to(device, dtype), w.mix.to(device, torch.float32), fine(w.norm_weight), fine(w.norm_bias)
            )
            for layer, w in self.weights.items()
        }
        return Selector(self.config, self.backbone, self.layers, moved, self.notes)

    @classmethod
    def load(cls, selector: str | os.PathLike, model_folder: str | os.PathLike = "") -> "Selector":
        """Reads a folder, or by a bare name MODEL_FOLDER/selectors/NAME, whole and in float32 on the CPU.

        Raises ValueError or FileNotFoundError, in one sentence, when a file is missing, misshapen, damaged, or of another
        run than the one beside it.
        """
        folder = resolve(selector, model_folder)
        source = str(folder / "selector.json")
        try:
            document = json.loads((folder / "selector.json").read_text())
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{source} does not exist; name the folder of a selector") from error
        except (ValueError, RecursionError) as error:  # no text, no JSON, numbers or nesting beyond Python
            raise ValueError(f"{source} is no JSON that can be read: {error}") from error
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ValueError(f'{source} is not a selector: its field "format" must be "{FORMAT}"')
        if document.get("version") not in range(1, VERSION + 1):
            raise ValueError(
                f"{source} has version {document.get('version')}, this package reads versions 1 to {VERSION}; upgrade it"
            )
        backbone = document.get("backbone")
        if not isinstance(backbone, dict) or any(name not in backbone for name in BACKBONE_FACTS):
            raise ValueError(f"{source}: the field backbone is missing or incomplete; the selector must be saved again")
        for name in BACKBONE_FACTS[1:]:
            if type(backbone[name]) is not int or backbone[name] < 1:
                raise ValueError(
                    f"{source}: backbone.{name} is {json.dumps(backbone[name])}; it must be a positive whole number"
                )
        config = SelectorConfig.from_json(document.get("config"), f"{source}: config")
        layers = document.get("layers")
        if not isinstance(layers, list) or not layers or any(type(i) is not int for i in layers):
            raise ValueError(f"{source}: layers must list the model layers that have a selector")
        if config.selection.temperature and len(config.selection.temperature) != len(layers):
            raise ValueError(
                f"{source}: selection.temperature has {len(config.selection.temperature)} values, but the selector has "
                f"{len(layers)} layers"
            )
        made = cls(config, backbone, layers, {}, document.get("notes", {}))
        masses, sets = len(config.selection.residual_mass), len(layers) * made.groups
        if masses not in (0, sets):
            raise ValueError(
                f"{source}: selection.residual_mass has {masses} values, but the selector has {len(layers)} layers of "
                f"{made.groups} sets"
            )
        made.weights = _read_weights(folder, made, document)
        return made

    def save(self, folder: str | os.PathLike, dtype: torch.dtype | WeightFormat = torch.float32) -> None:
        """Writes the folder, each file whole or not at all, weights first; W_q and W_k in `dtype`, a word or torch's type:
        float32, bfloat16, int8, which is rows of codes with a float32 scale each, or int4, groups of 32 codes of a row
        with a bfloat16 scale each (docs/distillation.md).
        """
        from safetensors.torch import save

        form = weight_format(dtype, self.backbone["hidden_size"], str(folder))
        self.config.validate("selector config")
        for name, tensor in self.named_tensors():
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"{folder}: not saved, the weight {name} holds values that are not finite")
        target = pathlib.Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        tensors, values = {}, {}
        for name, tensor in self.named_tensors():
            stored = tensor.float().contiguous()
            values[name] = stored
            if _is_matrix(name) and form in ("int8", "int4"):
                stored, scales = quantize_rows(stored, form)
                tensors[_scale_name(name)], values[name] = scales, row_values(stored, scales)
            elif _is_matrix(name):
                stored = stored.to(getattr(torch, form))
                values[name] = stored.float()
            tensors[name] = stored
        mark = weights_id(values)
        metadata = {"format": FORMAT, "weights_id": mark, "preset": self.config.preset}
        document = {
            "format": FORMAT,
            "version": WEIGHT_FORMATS[form],
            "weight_format": form,
            "config": self.config.to_json(),
            "backbone": self.backbone,
            "layers": self.layers,
            "weights_id": mark,
            "notes": self.notes,
        }
        _write_atomically(target / "selector.safetensors", save(tensors, metadata))
        _write_atomically(target / "selector.json", (json.dumps(document, indent=2, sort_keys=True) + "\n").encode())

    def named_tensors(self) -> list[tuple[str, Tensor]]:
        """The file's tensors in the order of the format, on the CPU."""
        rows = self.config.num_heads * self.config.head_dim
        named = []
        for layer in self.layers:
            w = self.weights[layer]
            parts = {
                "query.weight": w.query_key[:rows],
                "key.weight": w.query_key[rows:],
                "mix.weight": w.mix,
                "key_norm.weight": w.norm_weight,
                "key_norm.bias": w.norm_bias,
            }
            named += [(f"layers.{layer}.{k}", v.detach().cpu()) for k, v in parts.items() if v is not None]
        return named


def resolve(selector: str | os.PathLike, model_folder: str | os.PathLike = "") -> pathlib.Path:
    """The folder that `selector` means: a path, or a bare name under MODEL_FOLDER/selectors."""
    text = os.fspath(selector)
    path = pathlib.Path(text)
    bare = text not in ("", ".", "..") and os.sep not in text
    named = pathlib.Path(model_folder) / "selectors" / path if os.fspath(model_folder) else None
    if bare and named is not None and named.is_dir():
        return named
    if path.is_dir():
        return path
    if bare and named is not None:
        raise FileNotFoundError(
            f'there is no selector "{text}": neither {named} nor a folder of that name exists; train one with '
            "`spot distill` or spotattention.distill"
        )
    raise FileNotFoundError(f"the selector folder {text} does not exist")


def check_backbone(selector: Selector, facts: Mapping[str, Any]) -> str:
    """Raises ValueError when the selector was made for a backbone with other facts than these; "architecture" may be a
    tuple of names that one backbone has.

    Returns a sentence when it was distilled on other weights of the same architecture (fingerprints differ, neither is
    empty), which it may serve or not: a self-check tells. Else "".
    """
    for name in BACKBONE_FACTS:
        stored, actual = selector.backbone.get(name, ""), facts.get(name, "")
        same = stored in actual if isinstance(actual, tuple) else stored == actual
        if not same:
            shown = actual[0] if isinstance(actual, tuple) else actual
            raise ValueError(
                f"the selector was distilled for another backbone: its {name} is {json.dumps(stored)}, this model's is "
                f"{json.dumps(shown)}; use the model it was made for or distil a selector for this one"
            )
    stored, actual = selector.backbone.get("fingerprint", ""), facts.get("fingerprint", "")
    if not stored or not actual or stored == actual:
        return ""
    return (
        f"the selector was distilled on other weights of this architecture (fingerprint {stored}, this model's is "
        f"{actual}); it can serve close ones, such as a quantised copy, so its captured mass is measured on sampled steps"
    )


def weight_format(dtype: torch.dtype | str, hidden: int, where: str) -> str:
    """The word of a type of stored weights. Raises ValueError unless rows of `hidden` numbers can be stored so."""
    word = str(dtype).removeprefix("torch.")
    if word not in WEIGHT_FORMATS:
        raise ValueError(f"selectors are stored in float32, bfloat16, int8 or int4, not {dtype}")
    if word == "int4" and hidden % INT4_GROUP:
        raise ValueError(
            f"{where}: hidden_size is {hidden}; int4 stores a selector's rows in groups of {INT4_GROUP} numbers and needs a "
            "multiple of that; store it as int8"
        )
    return word


def quantize_rows(matrix: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """What a file holds of a float32 matrix [rows, columns]: codes, symmetric, and scales; 0 for a group of zeros.

    int8: codes int8 [rows, columns], scales float32 [rows], by which the largest magnitude of a row becomes 127. int4: codes
    uint8 [rows, columns / 2], code + 8 of the even column in the low four bits, and scales bfloat16 [rows, columns / 32]: of
    seven, from the one by which the largest magnitude becomes 7 down to 0.7 of it, that of the least squared error.
    """
    int4 = form == "int4"
    bottom, top = (-8, 7) if int4 else (-127, 127)
    numbers = matrix.view(len(matrix), -1, INT4_GROUP if int4 else matrix.shape[1])
    largest = numbers.abs().amax(2, True)
    codes, scales = torch.zeros_like(numbers), torch.zeros_like(largest)
    least = torch.full_like(largest, math.inf, dtype=torch.float64)
    for share in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7) if int4 else (1.0,):
        scale = largest * share / top
        if int4:
            scale = scale.bfloat16().float()
        code = (numbers / torch.where(scale > 0, scale, 1.0)).round().clamp(bottom, top)
        error = (code.double() * scale - numbers).square().sum(2, True)
        keep = error >= least  # not for NaN, which loading refuses
        codes, scales = torch.where(keep, codes, code), torch.where(keep, scales, scale)
        least = torch.where(keep, least, error)
    if not int4:
        return codes.flatten(1).to(torch.int8), scales.flatten()
    pairs = (codes + 8).to(torch.uint8).view(len(matrix), -1, 2)
    return pairs[..., 0] | pairs[..., 1] << 4, scales.flatten(1).bfloat16()


def row_values(codes: Tensor, scales: Tensor) -> Tensor:
    """What quantize_rows stored, float32 [rows, columns]: code * scale."""
    numbers = codes.float()
    if codes.dtype == torch.uint8:
        numbers = torch.stack([codes & 15, codes >> 4], 2).float() - 8
    return (numbers.view(len(codes), scales[0].numel(), -1) * scales.float().view(len(codes), -1, 1)).flatten(1)


def _is_matrix(name: str) -> bool:
    return name.endswith(("query.weight", "key.weight"))


def _scale_name(name: str) -> str:
    return name.removesuffix("weight") + "scale"


def weights_id(tensors: Mapping[str, Tensor]) -> str:
    """Ties the two files together: FNV-1a over names and a sample of the float32 values."""
    state = 0xCBF29CE484222325

    def add(data: bytes) -> None:
        nonlocal state
        for byte in data:
            state = ((state ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF

    for name, tensor in tensors.items():
        for byte in name.encode():
            add(struct.pack("<Q", byte))
        flat = tensor.reshape(-1)
        words = flat[:: max(1, flat.numel() // 1024)].contiguous().view(torch.int32).tolist()
        add(b"".join(struct.pack("<Q", word & 0xFFFFFFFF) for word in words))
    return f"{state:016x}"


def _read_weights(folder: pathlib.Path, selector: Selector, document: Mapping[str, Any]) -> dict[int, LayerWeights]:
    from safetensors import SafetensorError, safe_open

    path, mark = folder / "selector.safetensors", document.get("weights_id")
    config, hidden = selector.config, selector.backbone["hidden_size"]
    expected: dict[str, list[int]] = {}
    for layer in selector.layers:
        prefix = f"layers.{layer}."
        expected[prefix + "query.weight"] = [config.num_heads * config.head_dim, hidden]
        expected[prefix + "key.weight"] = [config.key_heads * config.head_dim, hidden]
        expected[prefix + "mix.weight"] = [selector.groups * config.num_heads, hidden]
        if config.key_norm != "none":
            expected[prefix + "key_norm.weight"] = [config.head_dim]
        if config.key_norm == "layernorm":
            expected[prefix + "key_norm.bias"] = [config.head_dim]
    types: dict[str, tuple[torch.dtype, ...]] = dict.fromkeys(expected, (torch.float32, torch.bfloat16))
    form = document.get("weight_format")
    matrices = [name for name in expected if _is_matrix(name)] if form in ("int8", "int4") else []
    if form == "int4":
        weight_format(form, hidden, str(folder / "selector.json"))
    for name in matrices:
        rows, columns = expected[name]
        if form == "int8":
            expected[_scale_name(name)], types[_scale_name(name)] = [rows], types[name]
            types[name] = (torch.int8,)
        else:
            expected[name], types[name] = [rows, columns // 2], (torch.uint8,)
            expected[_scale_name(name)], types[_scale_name(name)] = [rows, columns // INT4_GROUP], (torch.bfloat16,)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; the folder is no whole selector")
    try:
        with safe_open(path, "pt") as file:
            names, metadata = set(file.keys()), file.metadata() or {}
            read = {name: file.get_tensor(name) for name in expected if name in names}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); restore it or train again") from error
    if mark is None or metadata.get("weights_id") != mark:
        raise ValueError(
            f"{folder / 'selector.json'} and selector.safetensors beside it were not written together; restore both from "
            "the same run"
        )
    for name, shape in expected.items():
        if name not in read:
            raise ValueError(f"{path}: tensor {name} is missing; the config makes it {shape}")
        tensor = read[name]
        if list(tensor.shape) != shape:
            raise ValueError(f"{path}: tensor {name} is {list(tensor.shape)}; config and backbone make it {shape}")
        if tensor.dtype not in types[name]:
            words = " or ".join(str(dtype).removeprefix("torch.") for dtype in types[name])
            raise ValueError(f"{path}: tensor {name} is of {tensor.dtype}; selector.json makes it {words}")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{path}: tensor {name} holds values that are not finite; train the selector again")
    if names != set(expected):
        raise ValueError(f"{path} holds {len(names)} tensors, the config makes {len(expected)}")
    for name in matrices:
        read[name] = row_values(read[name], read.pop(_scale_name(name)))
        if not bool(read[name].isfinite().all()):  # a code times its scale may be beyond float32
            raise ValueError(f"{path}: tensor {name} holds values that are not finite; train the selector again")
    read = {name: tensor.float() for name, tensor in read.items()}
    if weights_id(read) != mark:
        raise ValueError(f"{path}: the weights are not those that were saved; restore the file or train again")
    weights = {}
    for layer in selector.layers:
        prefix = f"layers.{layer}."
        weights[layer] = LayerWeights(
            torch.cat([read[prefix + "query.weight"], read[prefix + "key.weight"]]),
            read[prefix + "mix.weight"],
            read.get(prefix + "key_norm.weight"),
            read.get(prefix + "key_norm.bias"),
        )
    return weights


def _write_atomically(path: pathlib.Path, data: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        pathlib.Path(name).unlink(missing_ok=True)
        raise
