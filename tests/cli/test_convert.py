"""spot convert: rows hold what numpy makes of the weights, all readers take them, and nothing is overwritten."""

import fcntl
import json
import os
import shutil

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
        (SHIPPED, "spot", SHIPPED / "selectors" / "spot", [], "holds files already; name another folder"),
        (SHIPPED, "spot", SHIPPED, [], "holds files already; name another folder"),
        (SHIPPED, "spot", "", [], "--out: the value is empty"),
        (ROOT / "models" / MODELS[1], SHIPPED / "selectors" / "spot", tmp_path / "a", [], "another backbone: its arch"),
        (SHIPPED, "spot", tmp_path / "a", ["--store", "int3"], "int3"),
    ]
    for model, selector, out, more, sentence in refused:
        done = convert(spot, model, selector, out, *more)
        assert done.returncode in (1, 2) and sentence in done.stderr, done
        assert done.stderr.count("\n") == 1 and not (tmp_path / "a").exists()


def overflowing(spot, folder):
    """A selector in int4 of which one scale times its codes is beyond float32, with no checksum to tell."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    assert convert(spot, SHIPPED, "spot", folder, "--store", "int4").returncode == 0
    path = folder / "selector.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["layers.0.query.scale"][0] = 3e38
    save_file(tensors, path, metadata)
    document = json.loads((folder / "selector.json").read_text())
    for name in ("checksum", "tensors_checksum"):
        document.pop(name)
    (folder / "selector.json").write_text(json.dumps(document))
    return folder


def test_weights_beyond_float32_are_refused_before_anything_is_written(spot, tmp_path):
    damaged = overflowing(spot, tmp_path / "damaged")
    done = convert(spot, SHIPPED, damaged, tmp_path / "out", "--store", "float32")
    assert done.returncode == 1 and "damaged/selector.safetensors: tensor layers.0.query.weight" in done.stderr, done
    assert "not finite" in done.stderr and sorted(p.name for p in tmp_path.iterdir()) == ["damaged"]


def test_one_process_makes_a_folder_and_the_next_clears_what_was_killed(spot, tmp_path):
    unfinished = tmp_path / "out.unfinished"
    unfinished.mkdir()
    (unfinished / "selector.safetensors.tmp1").write_bytes(b"half")
    with open(unfinished / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = convert(spot, SHIPPED, "spot", tmp_path / "out")
        assert done.returncode == 1 and not (tmp_path / "out").exists(), done
        assert (unfinished / "selector.safetensors.tmp1").exists()
    assert convert(spot, SHIPPED, "spot", tmp_path / "out").returncode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md",
        "selector.json",
        "selector.safetensors",
    ]


@pytest.mark.parametrize("name", ["selector.json", "selector.safetensors"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(spot, tmp_path, name):
    shutil.copytree(SHIPPED / "selectors" / "spot", tmp_path / "pipe")
    (tmp_path / "pipe" / name).unlink()
    os.mkfifo(tmp_path / "pipe" / name)
    done = convert(spot, SHIPPED, tmp_path / "pipe", tmp_path / "out")
    assert done.returncode == 1 and f"{name}: is not a regular file" in done.stderr, done
