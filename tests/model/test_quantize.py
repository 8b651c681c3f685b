"""spot quantize: every code and scale, what transformers reads of the folder, and logits of codes against the matrices they mean."""

import json
import os
import random
import shutil
import subprocess

import numpy as np
import pytest
import torch
from patience import SLOWER
from safetensors.torch import load_file, save_file
from test_logits_oracle import check, llama, others, qwen3, qwen3_5, random_sequences, randomise, run_tool

transformers = pytest.importorskip("transformers")

BLOCK = 128
CODES = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()  # 0 to 448, ascending
KEPT = ("in_proj_a.weight", "in_proj_b.weight")
FAMILIES = {
    "qwen3": lambda: qwen3(hidden_size=200, intermediate_size=333, tie_word_embeddings=False),
    "qwen2": lambda: others("Qwen2", hidden_size=140, intermediate_size=259),
    "llama": lambda: llama(hidden_size=132, intermediate_size=129, attention_bias=True, mlp_bias=True),
    "qwen3.5": lambda: qwen3_5(
        hidden_size=136, intermediate_size=257, linear_num_value_heads=6, linear_num_key_heads=3
    ),
}


def quantize(build_folder, *words, status=0):
    run = [build_folder / "spot", "quantize", *words]
    done = subprocess.run(
        run, capture_output=True, text=True, timeout=300 * SLOWER, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == status, done
    return done


def made(folder, config, seed, dtype=torch.float32):
    """The folder of a random model, and the model."""
    config._attn_implementation = "eager"
    model = randomise(transformers.AutoModelForCausalLM.from_config(config).eval(), seed).to(dtype)
    model.save_pretrained(folder)
    return model


def blocks(shape):
    for i in range(0, shape[0], BLOCK):
        for j in range(0, shape[1], BLOCK):
            yield i // BLOCK, j // BLOCK, (slice(i, i + BLOCK), slice(j, j + BLOCK))


def is_matrix(name):
    """A matrix of a layer, told from its name alone."""
    return name.endswith(("_proj.weight", "in_proj_qkv.weight", "in_proj_z.weight")) and not name.endswith(KEPT)


def nearest_even(x):
    """E4M3 codes of float32 numbers, by the table of all its numbers."""
    size = np.abs(x).astype(np.float64)
    low = np.clip(np.searchsorted(CODES, size, side="right") - 1, 0, len(CODES) - 1)
    high = np.minimum(low + 1, len(CODES) - 1)
    down, up = size - CODES[low], CODES[high] - size
    code = np.where((up < down) | ((up == down) & (high % 2 == 0)), high, low).astype(np.uint8)
    return code | (np.signbit(x).astype(np.uint8) << 7)


def meant(stored):
    """The tensors that a quantised folder stands for, its matrices in float32."""
    plain = {}
    for name, tensor in stored.items():
        if name.endswith("_scale_inv"):
            continue
        plain[name] = tensor
        if (scales := stored.get(name + "_scale_inv")) is not None:
            plain[name] = torch.empty(tensor.shape)
            for i, j, part in blocks(tensor.shape):
                plain[name][part] = tensor[part].float() * scales[i, j]
    return plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_block(family, dtype, build_folder, tmp_path, seed):
    made(tmp_path / "model", FAMILIES[family](), seed, dtype)
    before = load_file(tmp_path / "model" / "model.safetensors")
    first = sorted(filter(is_matrix, before))[0]
    with torch.no_grad():  # blocks of zeros, of the type's least numbers and of its largest
        before[first][:BLOCK, :BLOCK] = 0
        before[first][:BLOCK, BLOCK:] *= 2.0 ** {torch.float32: -140, torch.bfloat16: -128, torch.float16: -20}[dtype]
        second = sorted(filter(is_matrix, before))[1]
        before[second][0, 0] = -torch.finfo(dtype).max / 2
    save_file(before, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    quantize(build_folder, tmp_path / "model", "--out", tmp_path / "fp8")
    after = load_file(tmp_path / "fp8" / "model.safetensors")
    matrices = [name for name in before if is_matrix(name)]
    assert len(matrices) >= 20 and set(after) == set(before) | {name + "_scale_inv" for name in matrices}
    for name, tensor in before.items():
        if name not in matrices:
            assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name
            continue
        codes, scales = after[name], after[name + "_scale_inv"]
        assert codes.dtype == torch.float8_e4m3fn and codes.shape == tensor.shape and scales.dtype == torch.float32
        assert tuple(scales.shape) == tuple(-(-n // BLOCK) for n in tensor.shape), name
        for i, j, part in blocks(tensor.shape):
            x = tensor[part].float().numpy()
            largest = np.abs(x).max()
            scale = max(largest / np.float32(448), np.finfo(np.float32).tiny) if largest > 0 else np.float32(1)
            assert scales[i, j].item() == scale, (name, i, j)
            with np.errstate(under="ignore"):
                want = nearest_even(x / np.float32(scale))
            assert np.array_equal(codes[part].view(torch.uint8).numpy(), want), (name, i, j)


def test_transformers_own_quantiser_agrees(build_folder, tmp_path, seed):
    """Its scale is the reciprocal of 448 / max, which rounds twice, and it takes whole blocks only."""
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    made(
        tmp_path / "model",
        qwen3(hidden_size=256, intermediate_size=384, num_attention_heads=8, num_key_value_heads=4),
        seed,
    )
    quantize(build_folder, tmp_path / "model", "--out", tmp_path / "fp8")
    settings = transformers.FineGrainedFP8Config(weight_block_size=(BLOCK, BLOCK))
    quantizer = Fp8Quantize(type("Holder", (), {"quantization_config": settings})())
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "fp8"))
    compared = 0
    for name in filter(is_matrix, before):
        theirs = quantizer.convert({name: before[name]})
        compared += 1
        torch.testing.assert_close(after[name + "_scale_inv"], theirs[name + "_scale_inv"], rtol=3e-7, atol=0)
        apart = after[name].view(torch.uint8).int() - theirs[name].view(torch.uint8).int()
        assert apart.abs().max() <= 1 and (apart != 0).float().mean() < 1e-3, name
    assert compared == 21


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_meant_matrices(family, build_folder, tmp_path, seed):
    """transformers in float32 within rounding; the engine on a plain folder of the same numbers, bit for bit."""
    model = made(tmp_path / "model", FAMILIES[family](), seed)
    quantize(build_folder, tmp_path / "model", "--out", tmp_path / "fp8")
    plain = meant(load_file(tmp_path / "fp8" / "model.safetensors"))
    shutil.copytree(tmp_path / "model", tmp_path / "plain")
    save_file(plain, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    missing, unexpected = model.load_state_dict(plain, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    sequences = random_sequences(random.Random(seed), [97, 1])
    of_codes, _ = run_tool(build_folder, tmp_path / "fp8", tmp_path, random.Random(seed), sequences, most_steps=8)
    of_plain, _ = run_tool(build_folder, tmp_path / "plain", tmp_path, random.Random(seed), sequences, most_steps=8)
    assert set(of_codes) == set(of_plain) and all(torch.equal(x, of_plain[name]) for name, x in of_codes.items())
    check(of_codes, model, sequences)


@pytest.mark.parametrize("name", ["tiny-qwen3", "tiny-qwen3.5"])
def test_transformers_reads_the_folder(name, build_folder, tiny_qwen3, tmp_path, seed, monkeypatch):
    """Its FP8 loader on a CPU dequantises, and asks for accelerate without using it there."""
    from transformers.quantizers import quantizer_finegrained_fp8

    monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda: True)
    quantize(build_folder, tiny_qwen3.parent / name, "--out", tmp_path / "fp8")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "fp8", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    state = model.eval().state_dict()
    for key, tensor in meant(load_file(tmp_path / "fp8" / "model.safetensors")).items():
        assert torch.equal(state[key], tensor.float()), key
    sequences = random_sequences(random.Random(seed), [60, 1])
    outputs, _ = run_tool(build_folder, tmp_path / "fp8", tmp_path, random.Random(seed), sequences, most_steps=8)
    check(outputs, model, sequences)
    # The modules that stay are those, and only those, that transformers must not replace.
    from transformers.quantizers.quantizers_utils import should_convert_module

    stored = load_file(tmp_path / "fp8" / "model.safetensors")
    kept = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    for module, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            assert should_convert_module(module, kept) == (module + ".weight_scale_inv" in stored), module
            assert (module in kept) != (module + ".weight_scale_inv" in stored), module


@pytest.mark.parametrize("name", ["tiny-qwen3", "tiny-qwen3.5"])
def test_divergence_from_the_original(name, build_folder, tiny_qwen3, tmp_path):
    """KL of the next token's distribution on text, in nats; `pytest -s` prints it."""
    model = tiny_qwen3.parent / name
    quantize(build_folder, model, "--out", tmp_path / "fp8")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(model / "tokenizer.json"))
    text = (tiny_qwen3.parent.parent / "docs" / "method.md").read_text()
    sequences = [tokenizer.encode(text)[:1024]]
    logits = []
    for folder in (model, tmp_path / "fp8"):
        outputs, _ = run_tool(build_folder, folder, tmp_path, random.Random(1), sequences, most_steps=1)
        logits.append(outputs["prefill.0"].double().log_softmax(-1))
    divergence = (logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean().item()
    same = (logits[0].argmax(-1) == logits[1].argmax(-1)).double().mean().item()
    print(f"{name}: KL {divergence:.5f} nats, same argmax {same:.3f}, {len(sequences[0])} tokens")
    assert 0 < divergence < 0.03 and same > 0.85
