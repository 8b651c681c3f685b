"""tools/convert_gguf.py on small GGUF files written here: a random Llama model goes out and comes back."""

import json
import random
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_gguf.py"
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
TEXT = "The 2025 frozen\tmodels' keys, 1234567 of them:\n\n  naïve 日本語 👩‍🚀 <|im_end|>x  "


@pytest.fixture(autouse=True)
def seeded(seed):
    torch.manual_seed(seed)
    random.seed(seed)


def make_vocabulary():
    """Special tokens, the 256 byte characters, then random merges (a real tokenizer has more, not other)."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens, merges = [*specials, *alphabet], []
    words = ["Ġ", *"abcdefghijklmnopqrstuvwxyz"]
    while len(merges) < 100:
        a, b = random.choice(words), random.choice(words)
        if a + b not in tokens:
            merges.append((a, b))
            tokens.append(a + b)
            words.append(a + b)
    kinds = [gguf.TokenType.CONTROL] * len(specials) + [gguf.TokenType.NORMAL] * (len(tokens) - len(specials))
    tokens.append("<custom tag>")
    kinds.append(gguf.TokenType.USER_DEFINED)
    return tokens, kinds, merges


def interleave_heads(weight, num_heads):
    """What llama.cpp does to query and key projections, written out: row i of a head goes to 2i in the first half
    of the head and to 2 (i - d/2) + 1 in the second."""
    head_dim = weight.shape[0] // num_heads
    out = np.empty_like(weight)
    for head in range(num_heads):
        for i in range(head_dim):
            to = 2 * i if i < head_dim // 2 else 2 * (i - head_dim // 2) + 1
            out[head * head_dim + to] = weight[head * head_dim + i]
    return out


def make_model(tied, max_position_embeddings=512, **changes):
    tokens, kinds, merges = make_vocabulary()
    config = LlamaConfig(
        vocab_size=len(tokens) + 5,
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=max_position_embeddings,
        rms_norm_eps=1e-5,
        rope_theta=30000.0,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.3,
        **changes,
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model, (tokens, kinds, merges)


def write_gguf(
    path,
    model,
    vocabulary,
    quantization=None,
    leave_out=(),
    extra_tensor=None,
    pre="smollm",
    bos=False,
    architecture="llama",
    rope_factors=None,
):
    config, (tokens, kinds, merges) = model.config, vocabulary
    tokens = tokens + [f"[PAD{i}]" for i in range(config.vocab_size - len(tokens))]
    kinds = kinds + [gguf.TokenType.UNUSED] * (len(tokens) - len(kinds))
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(30000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([f"{a} {b}" for a, b in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(bos)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    state = {k: v.float().numpy() for k, v in model.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    for name, value in state.items():
        target = names.get_name(name, (".weight",))
        if target in leave_out:
            continue
        if ".q_proj." in name:
            value = interleave_heads(value, config.num_attention_heads)
        if ".k_proj." in name:
            value = interleave_heads(value, config.num_key_value_heads)
        if quantization is not None and value.ndim == 2:
            writer.add_tensor(target, gguf.quants.quantize(value, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(target, value)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors)
    if extra_tensor:
        writer.add_tensor(extra_tensor, np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def convert(source, out, *arguments):
    return subprocess.run([sys.executable, TOOL, source, "--out", out, *arguments], capture_output=True, text=True)


def must_fail(source, out, *parts):
    result = convert(source, out)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    for part in parts:
        assert part in result.stderr, result.stderr
    assert not list(Path(out).parent.glob("*out*")), "a failed conversion left something behind"


@pytest.mark.parametrize("tied", [True, False])
def test_logits_survive_the_round_trip(tmp_path, tied):
    model, vocabulary = make_model(tied)
    write_gguf(tmp_path / "m.gguf", model, vocabulary)
    result = convert(tmp_path / "m.gguf", tmp_path / "out", "--dtype", "f32")
    assert result.returncode == 0, result.stderr
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert isinstance(back, LlamaForCausalLM)
    ids = torch.randint(0, model.config.vocab_size, (2, 67))
    with torch.no_grad():
        wanted, found = model(ids).logits, back(ids).logits
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "rms_norm_eps"):
        assert getattr(back.config, name) == getattr(model.config, name)
    assert back.generation_config.eos_token_id == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "out"]


@pytest.mark.parametrize("quantization", ["Q4_1", "Q8_0", "Q4_0", "F16", "BF16"])
def test_quantised_weights_are_dequantised_to_bfloat16(tmp_path, quantization):
    kind = gguf.GGMLQuantizationType[quantization]
    model, vocabulary = make_model(tied=True)
    write_gguf(tmp_path / "m.gguf", model, vocabulary, quantization=kind)
    result = convert(tmp_path / "m.gguf", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).state_dict()
    for name, value in model.state_dict().items():
        # Groups lie along a row, so quantising a permuted matrix equals permuting the quantised one.
        value = value.float()
        if value.ndim == 2:
            value = torch.from_numpy(np.array(gguf.quants.dequantize(gguf.quants.quantize(value.numpy(), kind), kind)))
        assert torch.equal(back[name], value.bfloat16()), name


def test_tokenizer_and_template_come_back(tmp_path):
    model, (tokens, kinds, merges) = make_model(tied=True)
    write_gguf(tmp_path / "m.gguf", model, (tokens, kinds, merges))
    assert convert(tmp_path / "m.gguf", tmp_path / "out").returncode == 0
    original = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    original.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    original.decoder = decoders.ByteLevel()
    original.add_special_tokens(tokens[:3])
    original.add_tokens([tokens[-1]])
    back = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in (TEXT, "a<custom tag>b", "".join(random.choices("abc <|im_start|>\n12é", k=500))):
        assert back(text)["input_ids"] == original.encode(text).ids
        assert back.decode(original.encode(text).ids) == text
    assert (back.bos_token_id, back.eos_token_id, back.pad_token_id) == (1, 2, 0)
    chat = back.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert chat == "<|im_start|>user\nhello<|im_end|>\n"


def test_llama3_tokenizer_adds_bos_and_its_rope_rule_is_recovered(tmp_path):
    rope = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 30000.0,
    }
    model, vocabulary = make_model(tied=True, max_position_embeddings=16384, rope_parameters=rope)
    plain = 30000.0 ** -(np.arange(0, 16, 2) / 16)
    factors = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    assert factors.max() > 7 and abs(factors.min() - 1) < 1e-6
    write_gguf(tmp_path / "m.gguf", model, vocabulary, pre="llama-bpe", bos=True, rope_factors=factors)
    result = convert(tmp_path / "m.gguf", tmp_path / "out", "--dtype", "f32")
    assert result.returncode == 0, result.stderr
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(back.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("12345")["input_ids"][0] == 1
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a12345")
    assert [piece for piece, _ in pieces] == ["a", "123", "45"]
    write_gguf(tmp_path / "bad.gguf", model, vocabulary, rope_factors=factors * np.float32(1.5))
    must_fail(tmp_path / "bad.gguf", tmp_path / "x" / "out", "rope_freqs.weight", "Llama-3")


def test_errors_name_the_file_and_the_reason(tmp_path):
    out = tmp_path / "folder" / "out"
    out.parent.mkdir()
    must_fail(tmp_path / "none.gguf", out, "none.gguf", "no such file")
    (tmp_path / "text.gguf").write_text("this is no GGUF file, though it is long enough to look like one")
    must_fail(tmp_path / "text.gguf", out, "text.gguf", "not a readable GGUF file")
    model, vocabulary = make_model(tied=True)
    cases = [
        ({"architecture": "qwen3"}, ["architecture qwen3"]),
        ({"pre": "tekken"}, ["pre-tokenizer tekken", "smollm"]),
        ({"leave_out": ["blk.1.attn_k.weight"]}, ["blk.1.attn_k.weight", "missing"]),
        ({"leave_out": ["token_embd.weight"]}, ["token_embd.weight", "missing"]),
        ({"extra_tensor": "blk.0.attn_q.bias"}, ["blk.0.attn_q.bias"]),
    ]
    for number, (changes, parts) in enumerate(cases):
        path = tmp_path / f"{number}.gguf"
        write_gguf(path, model, vocabulary, **changes)
        must_fail(path, out, path.name, *parts)
    write_gguf(tmp_path / "whole.gguf", model, vocabulary)
    whole = (tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: random.randrange(5000, len(whole) - 100)])
    must_fail(tmp_path / "cut.gguf", out, "cut.gguf", "truncated")


def test_an_existing_folder_is_replaced_only_when_asked(tmp_path):
    model, vocabulary = make_model(tied=True)
    write_gguf(tmp_path / "m.gguf", model, vocabulary)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    result = convert(tmp_path / "m.gguf", tmp_path / "out")
    assert result.returncode == 1 and "--overwrite" in result.stderr
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]
    assert convert(tmp_path / "m.gguf", tmp_path / "out", "--overwrite").returncode == 0
    assert not (tmp_path / "out" / "mine.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "out"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == model.config.vocab_size
