"""The shipped selector of tiny-qwen3 through transformers, the program `spot` and vLLM: the same texts."""

import json
import subprocess

import pytest
import torch

from tests.conftest import ROOT
from tests.vllm.environment import environment, make_site

METHOD, TOKENS = "spot:k=25%", 16
PYTHON = ROOT / ".venv-vllm/bin/python"


@pytest.fixture(scope="module")
def answers(spotattention, tiny_qwen3, prose):
    """Attached transformers' texts and logits, and the prompts as text and ids."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_qwen3, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_qwen3)
    attached = spotattention.attach(model, "spot", METHOD)
    start = int(torch.randint(0, 2500, ()))
    found = []
    for words in (prose.split()[start : start + 610], prose.split()[start + 700 : start + 1190]):
        ids = tokenizer(" ".join(words), return_tensors="pt").input_ids
        made = model.generate(
            ids,
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens = made.sequences[0, ids.shape[1] :]
        found.append((" ".join(words), ids[0].tolist(), tokens, torch.cat(made.logits)))
    assert attached.attended_share < 0.6
    attached.detach()
    return tokenizer, found


def agree(tokenizer, tokens, logits, theirs: str) -> None:
    """Equal texts, up to a tie that another order of sums may turn."""
    mine, same = tokenizer.decode(tokens), 0
    while same < TOKENS and theirs.startswith(tokenizer.decode(tokens[: same + 1])):
        same += 1
    if mine != theirs:
        best = logits[same].topk(2).values
        assert best[0] - best[1] < 1e-2, f"after {same} tokens: {mine!r}, but {theirs!r}"


def test_the_program_writes_what_transformers_writes(answers, build_folder, tiny_qwen3):
    tokenizer, found = answers
    for text, _, tokens, logits in found:
        command = [
            build_folder / "spot",
            "generate",
            "--model",
            tiny_qwen3,
            "--selector",
            "spot",
            "--attention",
            METHOD,
        ]
        command += ["--prompt", text, "--max-new-tokens", TOKENS, "--temperature", 0, "--ignore-eos"]
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        agree(tokenizer, tokens, logits, done.stdout.removesuffix("\n"))


@pytest.mark.skipif(not PYTHON.exists(), reason="there is no .venv-vllm; scripts/setup_vllm.sh makes it")
@pytest.mark.timeout(600)
def test_vllm_writes_what_transformers_writes(answers, build_folder, tiny_qwen3, tmp_path):
    tokenizer, found = answers
    (tmp_path / "site").mkdir()
    request = {
        "engine": {
            "model": str(tiny_qwen3),
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 4096,
            "additional_config": {"spot": {"selector": "spot", "method": METHOD}},
        },
        "prompts": [ids for _, ids, _, _ in found],
        "passes": 1,
        "sampling": {"max_tokens": TOKENS, "ignore_eos": True},
    }
    (tmp_path / "request.json").write_text(json.dumps(request))
    command = [PYTHON, ROOT / "tests/vllm/ask.py", "request.json", "answer.json"]
    variables = environment(make_site(tmp_path / "site"), build_folder)
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-4000:]
    (answered,) = json.loads((tmp_path / "answer.json").read_text())["passes"]
    for (_, _, tokens, logits), answer in zip(found, answered, strict=True):
        agree(tokenizer, tokens, logits, answer["text"])
