"""Selector folders: what `spot distill` wrote is read whole, what Python writes `spot` reads, damage is named."""

import json
import pathlib
import shutil
import subprocess

import pytest
import torch


@pytest.fixture()
def folder(tiny_qwen3, tmp_path):
    return shutil.copytree(tiny_qwen3 / "selectors" / "spot", tmp_path / "selector")


def change(folder, **fields):
    path = folder / "selector.json"
    document = json.loads(path.read_text())
    for name, value in fields.items():
        target, *rest = name.split("__")
        where = document
        for part in [target, *rest][:-1]:
            where = where[part]
        where[[target, *rest][-1]] = value
    document.pop("checksum", None)
    path.write_text(json.dumps(document))


def test_a_shipped_selector_is_read_and_written_again(spotattention, folder, tmp_path):
    from safetensors.torch import load_file

    selector = spotattention.Selector.load(folder)
    stored = load_file(folder / "selector.safetensors")
    assert selector.layers == list(range(8)) and selector.groups == 1
    assert (
        selector.fitted(3, spotattention.SelectionRule()).temperature
        == json.loads((folder / "selector.json").read_text())["config"]["selection"]["temperature"][3]
    )
    w = selector.weights[5]
    assert torch.equal(w.query_key[:512], stored["layers.5.query.weight"].float())
    assert torch.equal(w.query_key[512:], stored["layers.5.key.weight"].float())
    selector.save(tmp_path / "again", torch.bfloat16)
    again = spotattention.Selector.load(tmp_path / "again")
    assert again.config == selector.config and again.backbone == selector.backbone and again.notes == selector.notes
    assert all(torch.equal(again.weights[i].mix, selector.weights[i].mix) for i in again.layers)


def test_int8_rows_are_numpys(spotattention, folder, tmp_path):
    """Codes and scales by numpy in float64, what is read their product, and no tensor beside the projections changed."""
    import numpy as np
    from safetensors.numpy import load_file

    selector = spotattention.Selector.load(folder)
    selector.weights[3].query_key[17] = 0  # a row of zeros
    selector.save(tmp_path / "rows", torch.int8)
    document = json.loads((tmp_path / "rows" / "selector.json").read_text())
    assert (document["version"], document["weight_format"]) == (2, "int8")
    stored = load_file(tmp_path / "rows" / "selector.safetensors")
    again = spotattention.Selector.load(tmp_path / "rows")
    for layer in selector.layers:
        before, after = selector.weights[layer], again.weights[layer]
        for part, rows in (("query", slice(0, 512)), ("key", slice(512, None))):
            want = before.query_key[rows].numpy().astype(np.float64)
            codes, scales = stored[f"layers.{layer}.{part}.weight"], stored[f"layers.{layer}.{part}.scale"]
            assert codes.dtype == np.int8 and np.abs(codes).max() == 127
            np.testing.assert_allclose(scales, np.abs(want).max(1) / 127, rtol=1e-6)
            assert np.all(np.abs(codes * scales[:, None].astype(np.float64) - want) <= 0.5001 * scales[:, None])
            assert np.array_equal(after.query_key[rows].numpy(), codes.astype(np.float32) * scales[:, None])
        for name in ("mix", "norm_weight", "norm_bias"):
            assert torch.equal(getattr(before, name), getattr(after, name))
    size = [(path / "selector.safetensors").stat().st_size for path in (tmp_path / "rows", folder)]
    assert size[0] < 0.6 * size[1]  # which is of bfloat16
    change(tmp_path / "rows", weight_format="bfloat16")
    with pytest.raises(ValueError, match="query.weight is of int8; selector.json makes it float32 or bfloat16"):
        spotattention.Selector.load(tmp_path / "rows")


def test_int4_rows_are_numpys(spotattention, folder, tmp_path):
    """Of eight scales a group the best by numpy in float64, its codes, and what is read."""
    import numpy as np
    from safetensors.torch import load_file

    selector = spotattention.Selector.load(folder)
    for w in selector.weights.values():
        w.query_key.normal_()
    selector.weights[3].query_key[17] = 0  # a row of zeros
    selector.save(tmp_path / "rows", "int4")
    document = json.loads((tmp_path / "rows" / "selector.json").read_text())
    assert (document["version"], document["weight_format"]) == (3, "int4")
    stored = load_file(tmp_path / "rows" / "selector.safetensors")
    again = spotattention.Selector.load(tmp_path / "rows")
    shares = np.array([1.0, 0.95, 0.9, 0.875, 0.85, 0.8, 0.75, 0.7], np.float32)
    for layer in selector.layers:
        before, after = selector.weights[layer], again.weights[layer]
        for part, rows in (("query", slice(0, 512)), ("key", slice(512, None))):
            x = before.query_key[rows].reshape(-1, 32).numpy()
            made = torch.from_numpy(np.abs(x).max(1, keepdims=True) * shares / np.float32(7)).bfloat16().float().numpy()
            step = np.where(made > 0, made, np.float32(1))[:, :, None]
            wanted = np.clip(np.rint(x[:, None] / step), -8, 7)  # [groups, 7, 32]
            errors = ((wanted.astype(np.float64) * made[:, :, None] - x[:, None]) ** 2).sum(2)
            best = errors.argmin(1)[:, None]
            scale = np.take_along_axis(made, best, 1)
            code = np.take_along_axis(wanted, best[:, :, None], 1)[:, 0]
            scales, codes = stored[f"layers.{layer}.{part}.scale"], stored[f"layers.{layer}.{part}.weight"]
            assert scales.dtype == torch.bfloat16 and codes.dtype == torch.uint8
            assert list(scales.shape) == [len(x) * 32 // 256, 8] and list(codes.shape) == [len(x) * 32 // 256, 128]
            assert np.array_equal(scales.float().reshape(-1, 1).numpy(), scale)
            pairs = (code + 8).astype(np.uint8).reshape(len(x), 16, 2)
            assert np.array_equal(codes.reshape(-1, 16).numpy(), pairs[:, :, 0] + 16 * pairs[:, :, 1])
            read = after.query_key[rows].reshape(-1, 32).numpy()
            assert np.array_equal(read, code * scale)
            inside = (x >= -8.5 * scale) & (x <= 7.5 * scale)
            assert np.all((np.abs(read - x) <= 0.5001 * scale) | ~inside) and not inside.all()
        change = (after.query_key - before.query_key).norm(dim=1)
        assert torch.all(change <= 0.2 * before.query_key.norm(dim=1))
        for name in ("mix", "norm_weight", "norm_bias"):
            assert torch.equal(getattr(before, name), getattr(after, name))


@pytest.mark.parametrize("name", ["tiny-qwen3", "tiny-qwen3.5"])
@pytest.mark.parametrize("form", ["bfloat16", "int8", "int4"])
def test_both_languages_write_the_same_tensors(spotattention, build_folder, tiny_qwen3, tmp_path, name, form):
    """And each reads the other's files."""
    from safetensors.torch import load_file

    model = tiny_qwen3.parent / name

    def convert(selector, out, store):
        command = [build_folder / "spot", "convert", "--model", model, "--selector", selector, "--out", out]
        done = subprocess.run([*command, "--store", store], capture_output=True, text=True)
        assert done.returncode == 0, done
        return load_file(out / "selector.safetensors")

    theirs = convert("spot", tmp_path / "theirs", form)
    spotattention.Selector.load("spot", model).save(tmp_path / "ours", form)
    ours = load_file(tmp_path / "ours" / "selector.safetensors")
    assert theirs.keys() == ours.keys()
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype and torch.equal(tensor, theirs[key]), key
    documents = [json.loads((tmp_path / who / "selector.json").read_text()) for who in ("ours", "theirs")]
    for each in ("version", "weight_format", "weights_id"):
        assert documents[0][each] == documents[1][each]
    read = dict(spotattention.Selector.load(tmp_path / "theirs").named_tensors())
    wide = convert(tmp_path / "ours", tmp_path / "wide", "float32")
    assert all(torch.equal(wide[key], tensor) for key, tensor in read.items())


def test_int4_rows_that_do_not_fit_are_refused(spotattention, folder, tmp_path):
    from safetensors.torch import load_file, save_file

    selector = spotattention.Selector.load(folder)
    with pytest.raises(ValueError, match="in float32, bfloat16, int8 or int4, not torch.float16"):
        selector.save(tmp_path / "rows", torch.float16)
    selector.backbone["hidden_size"] = 240
    with pytest.raises(ValueError, match="rows: hidden_size is 240; int4 stores a selector's rows in groups of 32"):
        selector.save(tmp_path / "rows", "int4")
    assert not (tmp_path / "rows").exists()
    selector.backbone["hidden_size"] = 256
    selector.save(tmp_path / "rows", "int4")
    path = tmp_path / "rows" / "selector.safetensors"
    whole = load_file(path)
    mark = json.loads((tmp_path / "rows" / "selector.json").read_text())["weights_id"]
    change(tmp_path / "rows", tensors_checksum=None)
    codes, scales = "layers.2.key.weight", "layers.2.key.scale"
    for key, changed, sentence in [
        (scales, whole[scales][:, :4].contiguous(), r"key.scale is \[128, 4\]; config and backbone make it \[128, 8\]"),
        (scales, whole[scales].float(), "key.scale is of float32; selector.json makes it bfloat16"),
        (scales, whole[scales] / 0, "key.scale holds values that are not finite"),
        (codes, whole[codes].to(torch.int8), "key.weight is of int8; selector.json makes it uint8"),
        (
            codes,
            whole[codes][:, :64].contiguous(),
            r"key.weight is \[128, 64\]; config and backbone make it \[128, 128\]",
        ),
        (codes, whole[codes] ^ 1, "are not those that were saved"),
    ]:
        save_file(whole | {key: changed}, path, {"weights_id": mark})
        with pytest.raises(ValueError, match=sentence):
            spotattention.Selector.load(tmp_path / "rows")
    change(tmp_path / "rows", backbone__hidden_size=240)
    with pytest.raises(ValueError, match="selector.json: hidden_size is 240; int4 stores"):
        spotattention.Selector.load(tmp_path / "rows")


def test_presets_are_the_programs(spotattention):
    from spotattention.selector_config import SelectorConfig

    paper = SelectorConfig.from_preset("paper")
    assert (paper.key_heads, paper.cache_format, paper.distillation.start) == (4, "bf16", "random")
    assert SelectorConfig.from_json({"preset": "paper", "key_heads": 1}, "x").cache_format == "bf16"
    with pytest.raises(ValueError, match='no selector preset "mine"'):
        SelectorConfig.from_preset("mine")


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"format": "other"}, 'is not a selector: its field "format" must be'),
        ({"version": 4}, "has version 4, this package reads versions 1 to 3; upgrade it"),
        ({"version": 0}, "has version 0, this package reads versions 1 to 3; restore the file"),
        ({"weight_format": "int4"}, r"query.weight is \[512, 256\]; config and backbone make it \[512, 128\]"),
        ({"weight_format": "int8"}, "query.weight is of bfloat16; selector.json makes it int8"),
        ({"backbone": 5}, "the field backbone is missing"),
        ({"layers": []}, "layers must list"),
        ({"weights_id": "0123"}, "were not written together"),
        ({"config__key_heads": 2}, r"key_heads is 2; it must be 1 \(shared\) or num_heads"),
        ({"config__key_norm": "batch"}, 'config.key_norm is "batch"; it must be one of none, layernorm, rmsnorm'),
        ({"config__selection__p": 0}, "selection.p is 0.0; it must be above 0"),
        ({"config__selection__floor": 1.5}, "config.selection.floor must be an integer, not 1.5"),
        ({"config__extra": 1}, 'has the unknown field "extra"; remove it or upgrade'),
        ({"config__selection__mass_table": 3}, "mass_table must be rows of three numbers: threshold, captured mass"),
        ({"config__selection__mass_table": [[0.1, 0.5]]}, "mass_table must be rows of three numbers"),
        ({"config__selection__mass_table": [[0.1, 0.5, True]]}, "mass_table must be rows of three numbers"),
        ({"config__selection__mass_table": [[0.1, 0.5, 0.1]]}, "mass_table has one row"),
        (
            {"config__selection__mass_table": [[0.1, 0.5, 0.1], [0.1, 0.6, 0.2]]},
            "the row 0.1, 0.6, 0.2; thresholds must",
        ),
        ({"config__selection__mass_table": [[0.1, 0.5, 0.1], [0.01, 0.4, 0.2]]}, "thresholds must fall from row to"),
        ({"config__selection__mass_table": [[0.1, 0.5, 0.2], [0.01, 0.6, 0.1]]}, "thresholds must fall from row to"),
        ({"config__selection__mass_table": [[0.1, 0, 0.2], [0.01, 0.6, 0.3]]}, "thresholds must fall from row to"),
        ({"config__selection__mass_table": [[2, 0.5, 0.2], [0.01, 0.6, 0.3]]}, "the row 2, 0.5, 0.2; thresholds must"),
        ({"config__selection__residual_mass": []}, "mass_table stands without selection.residual_mass"),
        ({"config__selection__temperature": [1.0]}, "has 1 values, but the selector has 8 layers"),
        ({"config__key_heads": 4}, r"key.weight is \[128, 256\]; config and backbone make it \[512, 256\]"),
        ({"config__key_norm": "rmsnorm"}, "holds 40 tensors, the config makes 32"),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(spotattention, folder, fields, sentence):
    change(folder, **fields)
    with pytest.raises(ValueError, match=sentence):
        spotattention.Selector.load(folder)


def small_selector(settings):
    """Random, for two layers of a backbone of 24 numbers."""
    from spotattention.selector import LayerWeights, Selector

    facts = ("architecture", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
    backbone = dict(zip(facts, ("Qwen3ForCausalLM", 24, 2, 4, 2, 16))) | {"fingerprint": "abc"}
    weights = {
        layer: LayerWeights(torch.randn(5 * 128, 24), torch.randn(4, 24), torch.ones(128), torch.zeros(128))
        for layer in (0, 1)
    }
    return Selector(settings, backbone, [0, 1], weights)


def test_both_languages_take_and_refuse_the_same_settings(spotattention, tmp_path):
    """tests/selector/test_damage.cpp reads the same list."""
    from spotattention.selector_config import SelectorConfig

    small_selector(SelectorConfig()).save(tmp_path)
    whole = json.loads((tmp_path / "selector.json").read_text())
    settings = json.loads((pathlib.Path(__file__).parents[1] / "selector" / "settings.json").read_text())
    for verdict, cases in settings.items():
        for pointer, value in cases:
            document = json.loads(json.dumps(whole))
            del document["checksum"]
            *path, last = pointer.split("/")[1:]
            place = document
            for name in path:
                place = place[name]
            place[last] = "HERE"
            (tmp_path / "selector.json").write_text(json.dumps(document).replace('"HERE"', value))
            try:
                spotattention.Selector.load(tmp_path)
                error = ""
            except ValueError as raised:
                error = str(raised)
            assert (error == "") == (verdict == "taken"), f"{pointer} {value}: {error}"


def test_checksums_are_the_programs(spotattention, build_folder, tmp_path):
    """What Python saves has them, and a change that parses is noticed by both languages."""
    from spotattention.selector_config import SelectorConfig

    small_selector(SelectorConfig()).save(tmp_path)
    path = tmp_path / "selector.json"
    document = json.loads(path.read_text())
    assert len(document["checksum"]) == len(document["tensors_checksum"]) == 16
    path.write_text(path.read_text().replace('"sinks": 128', '"sinks": 129'))
    with pytest.raises(ValueError, match="contents are not those that its checksum was made of"):
        spotattention.Selector.load(tmp_path)
    small_selector(SelectorConfig()).save(tmp_path)
    weights = tmp_path / "selector.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2000] ^= 1  # of a number that weights_id does not sample
    weights.write_bytes(data)
    with pytest.raises(ValueError, match="its checksum is not the one noted beside it"):
        spotattention.Selector.load(tmp_path)


def test_a_selector_is_saved_where_it_was_told(spotattention, tmp_path, monkeypatch):
    from spotattention.selector_config import SelectorConfig

    monkeypatch.chdir(tmp_path)
    selector = small_selector(SelectorConfig())
    with pytest.raises(ValueError, match="name the folder"):
        selector.save("")
    (tmp_path / "file").write_text("kept")
    for name in ("file", "file/below"):
        with pytest.raises(FileExistsError, match="a file stands where"):
            selector.save(name)
    selector.notes["loss"] = float("nan")
    with pytest.raises(ValueError, match="its notes are nothing that JSON can hold"):
        selector.save("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


def test_rows_stored_again_stay(spotattention, folder, tmp_path):
    """Also those with a code of -8, whose largest magnitude is not 7 steps."""
    selector = spotattention.Selector.load(folder)
    for form in ("int8", "int4"):
        selector.save(tmp_path / "once", form)
        once = spotattention.Selector.load(tmp_path / "once")
        once.save(tmp_path / "twice", form)
        twice = spotattention.Selector.load(tmp_path / "twice")
        for layer in once.layers:
            assert torch.equal(once.weights[layer].query_key, twice.weights[layer].query_key), form


def test_damaged_weights_are_found(spotattention, folder):
    path = folder / "selector.safetensors"
    data = bytearray(path.read_bytes())
    for at in range(len(data) - 400000, len(data), 997):
        data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="its checksum is not the one noted beside it"):
        spotattention.Selector.load(folder)
    path.write_bytes(data[:5000])
    with pytest.raises(ValueError, match="is damaged"):
        spotattention.Selector.load(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="is no whole selector"):
        spotattention.Selector.load(folder)


def test_rotary_tables_are_transformers(spotattention):
    """The backbone's theta and scaling over 64 dims, for every kind of scaling."""
    import transformers
    from spotattention.rope import RopeConfig, RopeTable, frequencies
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kinds = [
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
        {"rope_type": "yarn", "factor": 2.5, "beta_fast": 24.0, "beta_slow": 2.0, "original_max_position_embeddings": 512},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 1024},
    ]  # fmt: skip
    for kind in kinds:
        parameters = {"rope_theta": 500000.0} | kind
        config = transformers.LlamaConfig(
            hidden_size=256,
            num_attention_heads=4,
            head_dim=64,
            max_position_embeddings=8192,
            rope_parameters=parameters,
        )
        want, scale = ROPE_INIT_FUNCTIONS[kind["rope_type"]](config, "cpu")
        ours = RopeConfig.of_model(config)
        got, own_scale = frequencies(ours, 64)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
        assert own_scale == pytest.approx(scale)
        cos, _ = RopeTable(ours, 64).at_least(5000, torch.device("cpu"))
        torch.testing.assert_close(cos[4321], (4321 * want).cos() * scale, rtol=1e-4, atol=1e-4)


def test_weights_that_are_not_finite_are_not_saved(spotattention, folder, tmp_path):
    selector = spotattention.Selector.load(folder)
    selector.weights[2].query_key[5, 7] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.2\.query\.weight holds values that are not finite"):
        selector.save(tmp_path / "out", "int4")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("hidden_size", "256"), ("hidden_size", None), ("num_kv_heads", None), ("num_layers", 0), ("head_dim", [64])],
)
def test_a_backbone_without_sizes_is_named(spotattention, folder, name, value):
    document = json.loads((folder / "selector.json").read_text())
    document["backbone"][name] = value
    del document["checksum"]
    (folder / "selector.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=f"backbone.{name} is "):
        spotattention.Selector.load(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": ' + "9" * 6000 + "}"])
def test_json_that_python_cannot_read_is_named(spotattention, folder, text):
    (folder / "selector.json").write_text(text)
    with pytest.raises(ValueError, match=r"selector\.json is no JSON that can be read"):
        spotattention.Selector.load(folder)


def test_numbers_beyond_float64_are_named(spotattention, folder):
    change(folder, config__norm_eps=10**400)
    with pytest.raises(ValueError, match=r"config\.norm_eps must be a number"):
        spotattention.Selector.load(folder)


def test_no_folder_is_not_the_current_one(spotattention, tiny_qwen3, monkeypatch):
    folder = tiny_qwen3 / "selectors" / "spot"
    monkeypatch.chdir(folder)
    load = spotattention.Selector.load
    for model in ("", tiny_qwen3):
        with pytest.raises(ValueError, match=r"^selector is empty; it must name a folder \(\. is the current one\)$"):
            load("", model)
    selector = load(".")
    for wrong in (None, 5, b"spot"):
        with pytest.raises(TypeError, match="^selector is .*; it must be a path$"):
            load(wrong)
        with pytest.raises(TypeError, match="^folder is .*; it must be a path$"):
            selector.save(wrong)
    with pytest.raises(TypeError, match="^model_folder is None; it must be a path$"):
        load("spot", None)
