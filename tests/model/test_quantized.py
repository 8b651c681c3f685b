"""Quantised checkpoints against transformers run on the matrices that their formats define, packed here one code at a time."""

import json
import random
import subprocess

import pytest
import torch
from patience import SLOWER
from safetensors.torch import load_file, save_file
from test_logits_oracle import check, others, qwen3, random_sequences, randomise, run_tool

transformers = pytest.importorskip("transformers")

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def words(codes):
    """[..., n] codes 0..15 to [..., n / 8] int32, the first in the lowest bits."""
    eights = codes.to(torch.int64).unflatten(-1, (-1, 8))
    packed = sum(eights[..., i] << (4 * i) for i in range(8))
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def quantise(weight, group, row_group):
    """4-bit codes [in, out], zero points and scales [groups, out], and the float32 matrix [out, in] that they mean."""
    x = weight.t().contiguous()
    groups = int(row_group.max()) + 1
    low = torch.stack([x[row_group == g].amin(0) for g in range(groups)]).clamp(max=0)
    high = torch.stack([x[row_group == g].amax(0) for g in range(groups)]).clamp(min=0)
    scales = ((high - low) / 15).to(torch.float16)
    # GPTQ before v2 cannot say 0 without spilling into its neighbours.
    zeros = (-low / scales.float()).round().clamp(1, 15)
    codes = (x / scales.float()[row_group] + zeros[row_group]).round().clamp(0, 15)
    return codes, zeros, scales, ((codes - zeros[row_group]) * scales.float()[row_group]).t().contiguous()


def gptq(name, weight, group, rng, settings):
    inputs = weight.shape[1]
    size = inputs if group == -1 else group
    row_group = torch.arange(inputs) // size
    if settings["desc_act"]:
        row_group = row_group[torch.randperm(inputs)]
    codes, zeros, scales, meant = quantise(weight, size, row_group)
    stored = zeros - int(settings["checkpoint_format"] == "gptq")
    parts = {
        f"{name}.qweight": words(codes.t()).t().contiguous(),
        f"{name}.qzeros": words(stored),
        f"{name}.scales": scales,
        f"{name}.g_idx": row_group.to(torch.int32),
    }
    if not settings["desc_act"] and rng.random() < 0.3:
        del parts[f"{name}.g_idx"]
    return parts, meant


def awq(name, weight, group, rng, settings):
    codes, zeros, scales, meant = quantise(weight, group, torch.arange(weight.shape[1]) // group)
    shuffled = lambda x: words(x.unflatten(-1, (-1, 8))[..., AWQ_ORDER].flatten(-2))
    return {f"{name}.qweight": shuffled(codes), f"{name}.qzeros": shuffled(zeros), f"{name}.scales": scales}, meant


def fp8(name, weight, block, rng, settings):
    rows, columns = weight.shape
    high, wide = -(-rows // block[0]), -(-columns // block[1])
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales, meant = torch.empty(high, wide), torch.empty_like(weight)
    for i in range(high):
        for j in range(wide):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scales[i, j] = weight[part].abs().max() / 448
            codes[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
            meant[part] = codes[part].float() * scales[i, j]
    return {f"{name}.weight": codes, f"{name}.weight_scale_inv": scales}, meant


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
