"""spot convert: rows hold what numpy makes of the weights, all readers take them, and nothing is overwritten."""

import json

import numpy as np
import pytest
from program import ROOT, SHIPPED
from safetensors.torch import load_file

MODELS = ["tiny-qwen3", "tiny-qwen3.5"]


def convert(spot, model, selector, out, *more):
    return spot("convert", "--model", model, "--selector", selector, "--out", out, *more)


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_numpys(spot, tmp_path, name):
    model = ROOT / "models" / name
    done = convert(spot, model, "spot", tmp_path / "rows")
    assert done.returncode == 0 and "moved by at most" in done.stdout, done
    before = load_file(model / "selectors" / "spot" / "selector.safetensors")
    after = load_file(tmp_path / "rows" / "selector.safetensors")
    matrices = [key for key in before if key.endswith(("query.weight", "key.weight"))]
    assert len(after) == len(before) + len(matrices) and len(matrices) >= 2
    for key, tensor in before.items():
        want = tensor.float().numpy()
        if key not in matrices:
            assert np.array_equal(after[key].numpy(), want)
            continue
        codes, scales = after[key].numpy(), after[key.removesuffix("weight") + "scale"].numpy()
        assert codes.dtype == np.int8
        assert np.array_equal(scales, np.abs(want).max(1) / np.float32(127))
        assert np.array_equal(codes, np.rint(want / scales[:, None]).astype(np.int8))
    documents = [
        json.loads((f / "selector.json").read_text()) for f in (model / "selectors" / "spot", tmp_path / "rows")
    ]
    for field in ("config", "backbone", "layers", "notes"):
        assert documents[0][field] == documents[1][field]
    assert "## Stored as int8" in (tmp_path / "rows" / "README.md").read_text()


def test_rows_of_four_bits_run_and_convert_to_all_others(spot, tmp_path):
    done = convert(spot, SHIPPED, "spot", tmp_path / "int4", "--store", "int4")
    assert done.returncode == 0 and "moved by at most" in done.stdout, done
    assert "## Stored as int4" in (tmp_path / "int4" / "README.md").read_text()
    sizes = [(f / "selector.safetensors").stat().st_size for f in (tmp_path / "int4", SHIPPED / "selectors" / "spot")]
    assert sizes[0] < 0.32 * sizes[1]  # which is of bfloat16
    run = ["--prompt", "Once upon a time", "--max-new-tokens", 4, "--selector", tmp_path / "int4"]
    assert spot("generate", "--model", SHIPPED, *run).returncode == 0
    rows, stored = load_file(tmp_path / "int4" / "selector.safetensors"), {}
    for form in ("float32", "bfloat16", "int8", "int4"):
        done = convert(spot, SHIPPED, tmp_path / "int4", tmp_path / form / "again", "--store", form)
        assert done.returncode == 0, done
        stored[form] = load_file(tmp_path / form / "again" / "selector.safetensors")
    for key, scales in rows.items():
        if not key.endswith("scale"):
            continue
        key = key.removesuffix("scale") + "weight"
        codes = np.stack([rows[key].numpy() & 15, rows[key].numpy() >> 4], 2).reshape(len(scales), -1, 32) - np.float32(
            8
        )
        want = (codes * scales.float().numpy()[:, :, None]).reshape(len(scales), -1)
        assert np.array_equal(stored["float32"][key].numpy(), want)
        np.testing.assert_allclose(stored["bfloat16"][key].float().numpy(), want, rtol=2**-8)


def test_the_rows_run_and_convert_back(spot, tmp_path):
    convert(spot, SHIPPED, "spot", tmp_path / "rows")
    run = ["--prompt", "Once upon a time", "--max-new-tokens", 4, "--selector", tmp_path / "rows"]
    assert spot("generate", "--model", SHIPPED, *run).returncode == 0
    assert convert(spot, SHIPPED, tmp_path / "rows", tmp_path / "wide", "--store", "float32").returncode == 0
    assert convert(spot, SHIPPED, tmp_path / "wide", tmp_path / "again").returncode == 0
    wide, rows = (load_file(tmp_path / name / "selector.safetensors") for name in ("wide", "rows"))
    again = load_file(tmp_path / "again" / "selector.safetensors")
    for key, tensor in wide.items():
        if not key.endswith(("query.weight", "key.weight")):
            continue
        scale = rows[key.removesuffix("weight") + "scale"]
        assert np.array_equal(tensor.numpy(), rows[key].float().numpy() * scale.numpy()[:, None])
        assert np.array_equal(again[key].numpy(), rows[key].numpy())


def test_what_cannot_be_done_is_said(spot, tmp_path):
    refused = [
        (SHIPPED, "nope", tmp_path / "a", [], 'no selector "nope"'),
        (SHIPPED, "spot", SHIPPED / "selectors" / "spot", [], "holds a selector already; name another folder"),
        (ROOT / "models" / MODELS[1], SHIPPED / "selectors" / "spot", tmp_path / "a", [], "another backbone: its arch"),
        (SHIPPED, "spot", tmp_path / "a", ["--store", "int3"], "int3"),
    ]
    for model, selector, out, more, sentence in refused:
        done = convert(spot, model, selector, out, *more)
        assert done.returncode in (1, 2) and sentence in done.stderr, done
        assert done.stderr.count("\n") == 1 and not (tmp_path / "a").exists()
