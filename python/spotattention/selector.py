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
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from spotattention import _library, arguments  # noqa: F401  the checksums
from spotattention.rule import SelectionRule
from spotattention.selector_config import SelectorConfig

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
        run than the one beside it, or when the name is empty; TypeError where it is no path.
        """
        folder = resolve(selector, model_folder)
        source = str(folder / "selector.json")
        document = _read_document(folder / "selector.json")
        backbone = document.get("backbone")
        if not isinstance(backbone, dict) or any(name not in backbone for name in BACKBONE_FACTS):
            raise ValueError(f"{source}: the field backbone is missing or incomplete; the selector must be saved again")
        for name in BACKBONE_FACTS[1:]:
            if type(backbone[name]) is not int or backbone[name] < 1:
                raise ValueError(
                    f"{source}: backbone.{name} is {json.dumps(backbone[name])}; it must be a positive whole number"
                )
        if not isinstance(backbone.get("fingerprint", ""), str):
            raise ValueError(f'{source}: field "backbone.fingerprint" must be a string')
        config = SelectorConfig.from_json(document.get("config"), f"{source}: config")
        layers = document.get("layers")
        if not isinstance(layers, list) or not layers or any(type(i) is not int for i in layers):
            raise ValueError(f"{source}: layers must list the model layers that have a selector")
        dense = set(config.selection.dense_layers)
        if layers != sorted(set(layers) - dense) or not 0 <= layers[0] <= layers[-1] < backbone["num_layers"]:
            raise ValueError(
                f"{source}: layers is {layers}; it must list layers of the backbone's {backbone['num_layers']}, ascending and "
                "without those of dense_layers"
            )
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

        if not isinstance(folder, (str, os.PathLike)):
            raise arguments.wrong_type("folder", folder, "a path")
        if not os.fspath(folder):
            raise ValueError("the selector was not saved: name the folder that it is to be written to")
        form = weight_format(dtype, self.backbone["hidden_size"], str(folder))
        self.config.validate("selector config")
        for name, tensor in self.named_tensors():
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"{folder}: not saved, the weight {name} holds values that are not finite")
        try:
            json.dumps(self.notes, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder}: not saved, its notes are nothing that JSON can hold: {error}") from error
        target = pathlib.Path(folder)
        try:
            target.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise FileExistsError(
                f"{folder}: a file stands where the selector's folder would be; name another"
            ) from error
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
        weights = target / "selector.safetensors"
        _write_atomically(weights, save(tensors, metadata))
        document["tensors_checksum"] = torch.ops.spot.file_checksum(str(weights))
        _write_atomically(target / "selector.json", (torch.ops.spot.sealed(json.dumps(document)) + "\n").encode())

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
    text = arguments.path("selector", selector)
    path = pathlib.Path(text)
    bare = text not in (".", "..") and os.sep not in text
    if not isinstance(model_folder, (str, os.PathLike)):
        raise arguments.wrong_type("model_folder", model_folder, "a path")
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
    eight, from the one by which the largest magnitude becomes 7 down to 0.7 of it, that of the least squared error.
    """
    int4 = form == "int4"
    bottom, top = (-8, 7) if int4 else (-127, 127)
    numbers = matrix.view(len(matrix), -1, INT4_GROUP if int4 else matrix.shape[1])
    largest = numbers.abs().amax(2, True)
    codes, scales = torch.zeros_like(numbers), torch.zeros_like(largest)
    least = torch.full_like(largest, math.inf, dtype=torch.float64)
    for share in (1.0, 0.95, 0.9, 0.875, 0.85, 0.8, 0.75, 0.7) if int4 else (1.0,):
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


def _read_document(path: pathlib.Path) -> dict[str, Any]:
    """selector.json, of our format and a version that is known, and as its checksum says if it has one."""

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise ValueError(f"the number {number} is beyond float64")
        return value

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no number of JSON")

    try:
        text = path.read_text(encoding="utf-8")
        document = json.loads(text, parse_float=finite, parse_constant=refuse)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist; name the folder of a selector") from error
    except (ValueError, RecursionError) as error:  # no text, no JSON, numbers or nesting beyond Python
        raise ValueError(f"{path} is no JSON that can be read: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f'{path} is not a selector: its field "format" must be "{FORMAT}"')
    version = document.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        newer = type(version) is int and version > VERSION
        raise ValueError(
            f"{path} has version {json.dumps(version)}, this package reads versions 1 to {VERSION}; "
            + ("upgrade it" if newer else "restore the file")
        )
    if "checksum" in document:
        try:
            torch.ops.spot.check_sealed(text, str(path))
        except RuntimeError as error:
            raise ValueError(str(error)) from error
    return document


def _check_file(path: pathlib.Path, expected: Any) -> None:
    if expected is None:  # of an older selector
        return
    if torch.ops.spot.file_checksum(str(path)) != expected:
        raise ValueError(f"{path}: its checksum is not the one noted beside it; the file is damaged, restore it")


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
    _check_file(path, document.get("tensors_checksum"))
    for name, shape in expected.items():
        if name not in read:
            raise ValueError(f"{path}: tensor {name} is missing; the config makes it {shape}")
        tensor = read[name]
        if list(tensor.shape) != shape:
            raise ValueError(f"{path}: tensor {name} is {list(tensor.shape)}; config and backbone make it {shape}")
        if tensor.dtype not in types[name]:
            words = " or ".join(str(dtype).removeprefix("torch.") for dtype in types[name])
            raise ValueError(
                f"{path}: tensor {name} is of {str(tensor.dtype).removeprefix('torch.')}; selector.json makes it {words}"
            )
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
