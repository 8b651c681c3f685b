"""A selector on other weights than it was distilled on: served with a warning and a check, whatever runs it; another
architecture is refused.
"""

import json
import re
import shutil
import urllib.request

import pytest
import torch
from patience import SLOWER
from program import ROOT, SHIPPED
from safetensors.torch import load_file, save_file

TIGHT = "spot:k=256,sinks=16,recency=32,floor=64"
WARNED = "warning: spot: the selector was distilled on other weights of this architecture"
LOW = f"warning: attention '{TIGHT}' captured 0."


def perturbed(folder, seed, noise):
    """tiny-qwen3 with its selector, noise of so many standard deviations on each matrix."""
    shutil.copytree(SHIPPED, folder)
    generator = torch.Generator().manual_seed(seed)
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if weight.dim() == 2:
            change = torch.randn(weight.shape, generator=generator) * weight.float().std() * noise
            weights[name] = (weight.float() + change).to(weight.dtype)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "prompt.txt"
    path.write_text((ROOT / "docs" / "method.md").read_text()[:6000])
    return path


def generate(spot, model, text, *more):
    words = ["--prompt-file", text, "--max-new-tokens", 40, "--ignore-eos", "--attention", TIGHT, *more]
    return spot("generate", "--model", model, "--selector", "spot", *words)


def checked(done):
    """The mean captured mass that a run reports."""
    found = re.search(r"self-check: captured mass (0\.\d+) \(least 0\.\d+, layer \d\) in (\d+) samples", done.stderr)
    assert found, done.stderr
    assert int(found[2]) == 3 * 8  # tokens 1, 17 and 33, 8 layers
    return float(found[1])


def test_the_own_weights_are_not_warned_of(spot, text):
    done = generate(spot, SHIPPED, text)
    assert done.returncode == 0 and "warning" not in done.stderr and "self-check" not in done.stderr


def test_generate_serves_close_weights_and_warns_of_far_ones(spot, text, tmp_path, seed):
    near = generate(spot, perturbed(tmp_path / "near", seed, 0.01), text)
    assert near.returncode == 0 and WARNED in near.stderr and LOW not in near.stderr, near.stderr
    far = generate(spot, perturbed(tmp_path / "far", seed, 5), text)
    assert far.returncode == 0 and WARNED in far.stderr and LOW in far.stderr, far.stderr
    assert checked(far) < 0.5 < checked(near)


def test_evaluation_says_so_too(spot, text, tmp_path, seed):
    words = ["--methods", TIGHT, "--text", text, "--length", 1024, "--sequences", 1, "--skip", 512]
    for name, noise in (("near", 0.01), ("far", 5)):
        model = perturbed(tmp_path / name, seed, noise)
        done = spot("eval", "text", "--model", model, "--selector", "spot", *words)
        assert done.returncode == 0 and WARNED in done.stderr, done.stderr
        assert (LOW in done.stderr) == (name == "far"), done.stderr


def test_a_server_warns_once(spot, text, tmp_path, seed):
    model = perturbed(tmp_path / "far", seed, 5)
    options = ["--port", 0, "--selector", "spot", "--attention", TIGHT, "--max-tokens", 4096]
    server = spot.start("serve", model, *options)
    try:
        address = re.search(r"http://\S+", server.stdout.readline())[0]
        body = {"model": "far", "prompt": text.read_text(), "max_tokens": 129, "ignore_eos": True}
        request = urllib.request.Request(
            address + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        for _ in range(2):
            assert urllib.request.urlopen(request, timeout=300 * SLOWER).status == 200
    finally:
        server.terminate()
        said = server.communicate(timeout=300 * SLOWER)[1]
    assert said.count(WARNED) == 1 and said.count("captured 0.") == 1, said


def test_another_architecture_is_refused(spot, text):
    other = ROOT / "models" / "tiny-qwen3.5" / "selectors" / "spot"
    done = spot("generate", "--model", SHIPPED, "--selector", other, "--prompt-file", text)
    assert done.returncode == 1 and done.stderr.startswith("error: ")
    assert "was distilled for another backbone: its architecture is" in done.stderr, done.stderr
