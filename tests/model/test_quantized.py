"""Quantised checkpoints against transformers run on the matrices that their formats define (packed_weights.py)."""

import json
import random
import subprocess

import pytest
import torch
from packed_weights import awq, fp8, gptq
from patience import SLOWER
from safetensors.torch import load_file, save_file
from test_logits_oracle import check, others, qwen3, random_sequences, randomise, run_tool

transformers = pytest.importorskip("transformers")

GPTQ = {"quant_method": "gptq", "bits": 4, "sym": False}
FORMS = {
    "gptq": (gptq, 32, GPTQ | {"group_size": 32, "desc_act": False, "checkpoint_format": "gptq"}),
    "gptq-act-order": (gptq, 16, GPTQ | {"group_size": 16, "desc_act": True, "checkpoint_format": "gptq"}),
    "gptq-v2-one-group": (gptq, -1, GPTQ | {"group_size": -1, "desc_act": False, "checkpoint_format": "gptq_v2"}),
    "awq": (awq, 32, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}),
    "fp8": (fp8, (128, 128), {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}),
    "fp8-odd-blocks": (fp8, (48, 40), {"quant_method": "fp8", "weight_block_size": [48, 40]}),
}


@pytest.fixture(params=FORMS)
def quantised(request, tmp_path, seed):
    """A folder with a quantised checkpoint, and the float32 model that it means."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    make, group, settings = FORMS[request.param]
    if rng.random() < 0.5:
        config = qwen3(hidden_size=96, intermediate_size=160, tie_word_embeddings=False)
    else:  # biases beside the quantised matrices
        config = others("Qwen2", hidden_size=160, intermediate_size=96)
    config._attn_implementation = "eager"
    model = randomise(transformers.AutoModelForCausalLM.from_config(config).eval(), seed)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    kept = rng.choice(["down_proj", "o_proj", "none"])  # modules_to_not_convert
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head" or name.endswith(kept):
            continue
        parts, meant = make(name, module.weight.detach(), group, rng, settings)
        del stored[f"{name}.weight"]
        stored.update(parts)
        if make is gptq and module.bias is None:
            stored[f"{name}.bias"] = torch.zeros(module.weight.shape[0])
        with torch.no_grad():
            module.weight.copy_(meant)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    described = json.loads((folder / "config.json").read_text())
    described["quantization_config"] = settings | {"modules_to_not_convert": ["lm_head", kept]}
    (folder / "config.json").write_text(json.dumps(described))
    return folder, model


def test_logits_equal_transformers_on_the_meant_matrices(quantised, build_folder, tmp_path, seed):
    folder, model = quantised
    rng = random.Random(seed)
    sequences = random_sequences(rng, [rng.randrange(60, 120), 1])
    outputs, _ = run_tool(build_folder, folder, tmp_path, rng, sequences, most_steps=8)
    check(outputs, model, sequences)


@pytest.mark.parametrize(
    "changes",
    [
        {"quant_method": "bitsandbytes"},
        {"quant_method": "gptq", "bits": 8},
        {"quant_method": "awq", "bits": 4, "version": "gemv"},
        {"quant_method": "gptq", "bits": 4, "dynamic": {"-:.*": {}}},
        {"quant_method": "fp8"},
        {"quant_method": "fp8", "weight_block_size": [128, 0]},
        {},
    ],
    ids=lambda x: x.get("quant_method", "none") + str(len(x)),
)
def test_other_forms_are_refused(changes, build_folder, tmp_path):
    folder = tmp_path / "model"
    qwen3().save_pretrained(folder)
    described = json.loads((folder / "config.json").read_text()) | {
        "architectures": ["Qwen3ForCausalLM"],
        "quantization_config": changes,
    }
    (folder / "config.json").write_text(json.dumps(described))
    (tmp_path / "input.json").write_text(json.dumps({"sequences": [[1]], "chunks": [1], "prompts": [1]}))
    tool = build_folder / "tests" / "model" / "logits_tool"
    command = [tool, folder, tmp_path / "input.json", tmp_path / "out.safetensors", "float32"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60 * SLOWER)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "out.safetensors").exists()


def test_a_missing_or_misshapen_part_is_named(quantised, build_folder, tmp_path):
    folder, _ = quantised
    stored = load_file(folder / "model.safetensors")
    first = sorted(n for n in stored if n.endswith((".scales", ".weight_scale_inv")))[0]
    broken = {k: v for k, v in stored.items()}
    broken[first] = broken[first][:, :-1].contiguous()
    (tmp_path / "input.json").write_text(json.dumps({"sequences": [[1]], "chunks": [1], "prompts": [1]}))
    tool = build_folder / "tests" / "model" / "logits_tool"
    command = [tool, folder, tmp_path / "input.json", tmp_path / "out.safetensors", "float32"]
    save_file(broken, folder / "model.safetensors", metadata={"format": "pt"})
    done = subprocess.run(command, capture_output=True, text=True, timeout=60 * SLOWER)
    assert done.returncode == 1 and first in done.stderr, done.stderr
    if not first.endswith("weight_scale_inv"):
        del broken[first]
        save_file(broken, folder / "model.safetensors", metadata={"format": "pt"})
        done = subprocess.run(command, capture_output=True, text=True, timeout=60 * SLOWER)
        assert done.returncode == 1 and first in done.stderr, done.stderr
