"""Our safetensors reader and writer against the format's own library."""

import random
import subprocess

import torch
from patience import SLOWER
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
]  # fmt: skip


def copy(build_folder, source, target):
    tool = build_folder / "tests" / "checkpoint" / "safetensors_copy"
    assert tool.is_file(), f"{tool} is not built"
    return subprocess.run([tool, source, target], capture_output=True, text=True, timeout=60 * SLOWER)


def random_tensor(rng, dtype):
    shape = [rng.randrange(0, 5) for _ in range(rng.randrange(0, 4))]
    count = 1
    for size in shape:
        count *= size
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (count * dtype.itemsize,), dtype=torch.uint8)
    return bits.view(dtype).reshape(shape)


def same_bits(a, b):
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def test_both_directions_keep_every_bit(build_folder, tmp_path, seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    tensors = {f"{i}.ünï.{str(d).split('.')[-1]}": random_tensor(rng, d) for i, d in enumerate(DTYPES * 2)}
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt", "note": "x"})
    done = copy(build_folder, tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors")
    assert done.returncode == 0, done.stderr
    read = load_file(tmp_path / "ours.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same_bits(read[name], tensor), name
    with safe_open(tmp_path / "ours.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_agrees_with_the_library_on_broken_headers(build_folder, tmp_path, seed):
    """What the library refuses must not pass here. (Here more is refused: keys given twice, say.)"""
    rng = random.Random(seed)
    save_file({"a": torch.randn(3, 2), "b": torch.arange(5), "c": torch.zeros(0)}, tmp_path / "good.safetensors")
    good = (tmp_path / "good.safetensors").read_bytes()
    header = int.from_bytes(good[:8], "little")
    refused = 0
    for _ in range(24):
        broken = bytearray(good)
        if rng.random() < 0.2:
            broken = broken[: rng.randrange(len(broken))]
        else:
            broken[rng.randrange(8 + header)] = rng.choice(b'0123456789",:[]{} FIabc')
        path = tmp_path / "broken.safetensors"
        path.write_bytes(bytes(broken))
        done = copy(build_folder, path, tmp_path / "out.safetensors")
        assert done.returncode in (0, 1), f"crashed with {done.returncode}: {bytes(broken[: 8 + header])!r}"
        try:
            load_file(path)
        except (SafetensorError, UnicodeDecodeError, ValueError, TypeError, KeyError):
            refused += 1
            assert done.returncode == 1, f"passed: {bytes(broken[: 8 + header])!r}"
        if done.returncode == 1:
            assert done.stderr.startswith("error: ") and "broken.safetensors" in done.stderr
    assert refused > 2


def test_missing_file_is_one_sentence(build_folder, tmp_path):
    done = copy(build_folder, tmp_path / "none.safetensors", tmp_path / "out.safetensors")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "none.safetensors" in done.stderr
