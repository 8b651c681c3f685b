"""spot quantize as a command: whole folders or nothing, what is copied, shards, what is refused, selectors on the result."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import time

import pytest
import torch
from program import ENVIRONMENT, PATIENCE, ROOT, SHIPPED, make_model
from safetensors.torch import load_file, save_file

MODELS = ["tiny-qwen3", "tiny-qwen3.5"]


def bytes_of(folder):
    """But for hidden files, such as the lock of a `spot calibrate` that a test killed."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def tensors_of(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def same(a, b):
    return set(a) == set(b) and all(
        torch.equal(x.view(torch.uint8), b[name].view(torch.uint8)) for name, x in a.items()
    )


def said_in_a_line(done):
    """After progress, on a slow machine."""
    last = done.stderr.splitlines()[-1]
    return done.returncode == 1 and last.startswith("error: ") and done.stderr.count("error:") == 1


def shard(model, folder, count):
    """The model with its tensors dealt to files, under an index."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("model.safetensors"))
    weights = load_file(model / "model.safetensors")
    places = {name: f"model-{i % count + 1:05}-of-{count:05}.safetensors" for i, name in enumerate(sorted(weights))}
    for file in set(places.values()):
        save_file({name: x for name, x in weights.items() if places[name] == file}, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": sum(x.nbytes for x in weights.values())}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A model that takes a while: 42 million numbers in six matrices."""
    folder = make_model(tmp_path_factory.mktemp("large") / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"intermediate_size": 72 << 11}
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if ".mlp." in name:
            weights[name] = tensor.repeat((1 << 11, 1) if "down" not in name else (1, 1 << 11))
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: x.half() for name, x in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_the_folder_is_whole_and_runs(spot, tmp_path, name):
    done = spot("quantize", ROOT / "models" / name, "--out", tmp_path / "new" / "fp8")
    assert done.returncode == 0 and "matrices are FP8, moved by at most" in done.stdout, done
    out, model = tmp_path / "new" / "fp8", ROOT / "models" / name
    assert list(out.parent.iterdir()) == [out]
    before, after = bytes_of(model), bytes_of(out)
    assert set(before) == set(after)
    for file in set(before) - {"config.json", "model.safetensors", "README.md"}:
        assert before[file] == after[file], file
    assert after["README.md"].startswith(before["README.md"]) and b"## Quantised to FP8" in after["README.md"]
    old, new = json.loads(before["config.json"]), json.loads(after["config.json"])
    form = new.pop("quantization_config")
    assert new == old and list(new) == list(old)
    kept = form.pop("modules_to_not_convert")
    assert form == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    assert {"lm_head", "model.embed_tokens", "model.norm", "model.layers.0.input_layernorm"} <= set(kept)
    hybrid = {f"model.layers.0.linear_attn.{part}" for part in ("conv1d", "in_proj_a", "in_proj_b", "norm")}
    assert hybrid <= set(kept) if "3.5" in name else not hybrid & set(kept)
    assert not any(
        module.endswith(("q_proj", "down_proj", "in_proj_qkv", "out_proj", "linear_attn")) for module in kept
    )
    said = re.search(r"(\d+) bytes of tensors in 1 file, before (\d+); (\d+) matrices", done.stdout)
    weights = tensors_of(out)
    assert int(said[1]) == sum(x.nbytes for x in weights.values())
    assert int(said[2]) == sum(x.nbytes for x in tensors_of(model).values())
    assert int(said[3]) == sum(key.endswith("_scale_inv") for key in weights) >= 50
    assert 0.01 < float(re.search(r"at most ([\d.]+)%", done.stdout)[1]) < 4
    run = spot("generate", "--model", out, "--prompt", "Once upon a time", "--max-new-tokens", 4)
    assert run.returncode == 0, run
    again = spot("quantize", model, "--out", tmp_path / "again")
    assert again.returncode == 0 and bytes_of(tmp_path / "again") == after


def test_shards_in_and_out(spot, tmp_path):
    """The same tensors, whatever they are dealt to; no file above the limit but of one tensor."""
    model = shard(SHIPPED, tmp_path / "model", 3)
    for source, words, name in ((SHIPPED, [], "a"), (model, [], "b"), (model, ["--shard-gb", 0.003], "c")):
        assert spot("quantize", source, "--out", tmp_path / name, *words).returncode == 0
    whole = tensors_of(tmp_path / "a")
    assert same(whole, tensors_of(tmp_path / "b")) and same(whole, tensors_of(tmp_path / "c"))
    assert [path.name for path in (tmp_path / "b").glob("model*")] == ["model.safetensors"]
    index = json.loads((tmp_path / "c" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "c").glob("*.safetensors"))
    assert len(files) >= 3 and {path.name for path in files} == set(index["weight_map"].values())
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in whole.values())
    for path in files:
        held = load_file(path)
        assert all(index["weight_map"][name] == path.name for name in held)
        assert sum(x.nbytes for x in held.values()) <= 3e6 or len(held) <= 2
        assert all(name + "_scale_inv" in held for name, x in held.items() if x.dtype == torch.float8_e4m3fn)
    run = spot("generate", "--model", tmp_path / "c", "--prompt", "Once", "--max-new-tokens", 2)
    assert run.returncode == 0, run


def test_what_lies_beside_the_weights(spot, tmp_path):
    """A hub cache's links are followed; other forms of the weights, hidden files and training states are left."""
    repository = tmp_path / "hub" / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    shutil.copytree(SHIPPED, blobs)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    for name in ("chat_template.jinja", "merges.txt", "1_Pooling/config.json"):
        (snapshot / name).parent.mkdir(exist_ok=True)
        (snapshot / name).write_text(name)
    for name in ("pytorch_model.bin", "x.gguf", "original/consolidated.pth", ".gitattributes", "consolidated.safetensors",
                 "selectors/spot/checkpoint-5/optimizer.safetensors"):  # fmt: skip
        (snapshot / name).parent.mkdir(exist_ok=True)
        (snapshot / name).write_text("x")
    environment = ENVIRONMENT | {"HF_HUB_CACHE": str(tmp_path / "hub")}
    done = spot("quantize", "org/name", "--out", tmp_path / "out", env=environment)
    assert done.returncode == 0, done
    files = bytes_of(tmp_path / "out")
    assert set(files) == {*bytes_of(SHIPPED), "chat_template.jinja", "merges.txt", "1_Pooling/config.json"}
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    (snapshot / "merges.txt").unlink()
    (snapshot / "merges.txt").symlink_to(tmp_path / "nowhere")
    done = spot("quantize", "org/name", "--out", tmp_path / "b", env=environment)
    assert done.returncode == 1 and "merges.txt: is a link to a file that is not there" in done.stderr, done
    assert not list(tmp_path.glob("b*"))


def test_what_cannot_be_done_is_said(spot, tmp_path):
    def changed(name, change):
        shutil.copytree(SHIPPED, tmp_path / name)
        weights = load_file(tmp_path / name / "model.safetensors")
        change(weights)
        save_file(weights, tmp_path / name / "model.safetensors", {"format": "pt"})
        return tmp_path / name

    def put(key, value):
        def change(weights):
            weights[key].view(-1)[-1] = value

        return change

    down, norm = "model.layers.3.mlp.down_proj.weight", "model.layers.7.input_layernorm.weight"
    assert spot("quantize", SHIPPED, "--out", tmp_path / "fp8").returncode == 0
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    out = tmp_path / "out"
    refused = [
        (
            changed("nan", put(down, float("nan"))),
            out,
            f"model.safetensors: tensor {down} holds values that are not finite",
        ),
        (changed("inf", put(norm, float("inf"))), out, f"tensor {norm} holds values that are not finite"),
        (changed("gone", lambda w: w.pop(down)), out, f"1 of 90 tensors are missing: {down}"),
        (changed("int", lambda w: w.update({down: w[down].to(torch.int8)})), out, f"tensor {down} is of Char"),
        (tmp_path / "fp8", out, "is quantised already; give the checkpoint in bfloat16"),
        (tmp_path / "nope", out, "no such folder"),
        (SHIPPED, tmp_path / "full", "holds files already; name another folder"),
        (SHIPPED, tmp_path / "full" / "x", "is a file already; name another folder"),
        (tmp_path / "fp8", tmp_path / "fp8", "is quantised already"),
        (changed("mine", lambda w: None), tmp_path / "mine", "holds files already"),
        (tmp_path / "mine", tmp_path / "mine" / "fp8", "lies within the checkpoint"),
        (SHIPPED, "/proc/nope/out", "/proc/nope"),
    ]
    before = {path for path in tmp_path.rglob("*")} | {path for path in (ROOT / "models").rglob("*")}
    for model, folder, sentence in refused:
        done = spot("quantize", model, "--out", folder)
        assert said_in_a_line(done) and sentence in done.stderr, (sentence, done)
        assert {path for path in tmp_path.rglob("*")} | {path for path in (ROOT / "models").rglob("*")} == before, (
            sentence
        )
    done = spot("quantize", SHIPPED, "--out", out, "--shard-gb", 0)
    assert done.returncode == 2 and "--shard-gb" in done.stderr and not out.exists()
    (tmp_path / "empty").mkdir()
    assert spot("quantize", SHIPPED, "--out", tmp_path / "empty").returncode == 0


def begun(spot, model, out, **more):
    """A run that is stopped in its middle."""
    process = spot.start("quantize", model, "--out", out, "--shard-gb", 0.008, **more)
    end = time.monotonic() + PATIENCE
    while not list(out.parent.glob(out.name + ".unfinished/*.safetensors*")):
        assert time.monotonic() < end and process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGSTOP)
    return process


def test_interrupted_and_killed(spot, large, tmp_path):
    out = tmp_path / "deep" / "out"
    for kind in (signal.SIGINT, signal.SIGTERM):
        process = begun(spot, large, out, preexec_fn=lambda kind=kind: signal.signal(kind, signal.SIG_DFL))
        process.send_signal(kind)
        process.send_signal(signal.SIGCONT)
        _, error = process.communicate(timeout=PATIENCE)
        assert process.returncode == 130 and "interrupted; nothing was written" in error, error
        assert not list(tmp_path.iterdir())
    process = begun(spot, large, out)
    second = spot("quantize", large, "--out", out)
    assert second.returncode == 1 and "is in use by" in second.stderr and str(process.pid) in second.stderr, second
    process.kill()
    process.communicate()
    assert not out.exists() and list(out.parent.iterdir())  # under another name, which no program takes for a model
    assert spot("quantize", large, "--out", out).returncode == 0
    assert list(out.parent.iterdir()) == [out] and not (out / ".lock").exists()
    assert spot("quantize", large, "--out", tmp_path / "undisturbed").returncode == 0
    assert bytes_of(out) == bytes_of(tmp_path / "undisturbed")


def test_a_disk_that_is_full(spot, tmp_path):
    for limit in (100, 300_000, 4_000_000):  # of a file: none, the tokenizer's, the weights'
        limited = lambda most=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        done = spot("quantize", SHIPPED, "--out", tmp_path / "out", preexec_fn=limited)
        assert said_in_a_line(done) and "cannot be written" in done.stderr, done
        assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_small_file_system(spot, tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    for size, fits in (("5m", False), ("64m", True)):
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", mount], capture_output=True
        ).returncode:
            pytest.skip("mounting is not allowed here")
        try:
            done = spot("quantize", SHIPPED, "--out", mount / "out")
            assert (done.returncode == 0) == fits and done.stderr.count("error:") == (not fits), done
            assert fits or ("GB are needed" in done.stderr and not list(mount.iterdir())), done
        finally:
            subprocess.run(["umount", mount], check=True)


@pytest.mark.parametrize("name", MODELS)
def test_a_selector_stays_valid(spot, tmp_path, name):
    """It captures of the quantised model's attention what it captures of the original's, and its user is told."""
    (tmp_path / "text.txt").write_text((ROOT / "docs" / "method.md").read_text()[:9000])
    assert spot("quantize", ROOT / "models" / name, "--out", tmp_path / "fp8").returncode == 0
    words = [
        "--selector",
        "spot",
        "--methods",
        "spot:k=256,sinks=16,recency=32,floor=64",
        "--text",
        tmp_path / "text.txt",
    ]
    words += ["--length", 1024, "--sequences", 1, "--skip", 512, "--threads", 1]
    captured, perplexity = [], []
    for model, out in ((ROOT / "models" / name, "a"), (tmp_path / "fp8", "b")):
        done = spot("eval", "text", "--model", model, *words, "--out", tmp_path / out)
        assert done.returncode == 0 and ("distilled on other weights" in done.stderr) == (out == "b"), done.stderr
        report = json.loads((tmp_path / out / "report.json").read_text())
        layers = report["methods"][0]["layers"]
        captured.append([layer["captured_mass"] for layer in layers])
        perplexity.append(report["dense"]["perplexity"])
    mean = [sum(values) / len(values) for values in captured]
    assert abs(mean[0] - mean[1]) < 0.01 and max(abs(a - b) for a, b in zip(*captured)) < 0.04, captured
    assert abs(perplexity[1] / perplexity[0] - 1) < 0.05, perplexity
    if name == MODELS[0]:
        run = ["--prompt-file", tmp_path / "text.txt", "--max-new-tokens", 40, "--ignore-eos", "--attention", words[3]]
        done = spot("generate", "--model", tmp_path / "fp8", "--selector", "spot", *run)
        assert "self-check: captured mass 0." in done.stderr and done.returncode == 0, done
