"""Attached to the shipped models with their shipped selectors: the text of `spot generate`, and needles found."""

import pathlib
import subprocess
import warnings

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[3]
METHODS = ["spot:k=640", "spot:p=0.8"]


@pytest.fixture(scope="module", params=["tiny-qwen3", "tiny-qwen3.5"])
def shipped(request, transformers):
    folder = ROOT / "models" / request.param
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return folder, model, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("method", METHODS)
def test_the_text_is_the_programs(spotattention, build_folder, shipped, prose, seed, method):
    """Greedy, float32, the same ids. Where the two part, the two tokens must be about equally likely: unlike order of sums
    may turn a tie.
    """
    folder, model, tokenizer = shipped
    start = seed % 3000
    text = " ".join(prose.split()[start : start + 520])
    command = ["generate", "--model", folder, "--selector", "spot", "--attention", method, "--prompt", text]
    command += ["--max-new-tokens", 20, "--temperature", 0, "--ignore-eos"]
    done = subprocess.run([str(c) for c in [build_folder / "spot", *command]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids.shape[1] > 800
    attached = spotattention.attach(model, "spot", method, self_check=4)
    try:
        made = model.generate(
            ids, max_new_tokens=20, min_new_tokens=20, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        assert attached.attended_share < 0.95
        assert all(0.5 < mass <= 1 + 1e-6 for mass in attached.captured_mass.values())
    finally:
        attached.detach()
    tokens = made.sequences[0, ids.shape[1] :]
    mine, theirs = tokenizer.decode(tokens), done.stdout.removesuffix("\n")
    same = 0
    while same < 20 and theirs.startswith(tokenizer.decode(tokens[: same + 1])):
        same += 1
    if mine != theirs:
        best = made.logits[same][0].topk(2).values
        assert best[0] - best[1] < 1e-2, f"after {same} tokens: {mine!r}, but spot wrote {theirs!r}"


def test_a_needle_is_found(spotattention, build_folder, shipped, prose, tmp_path):
    """A number in a long text, at a quarter of the tokens; without the selector's choice, at the reserved ones, not."""
    folder, model, tokenizer = shipped
    words = prose.split()[:1700]
    words.insert(600, "The special magic number for giraffe is: 7419263.")
    question = (
        " What is the special magic number for giraffe mentioned in the text? The special magic number for giraffe is:"
    )
    ids = tokenizer(" ".join(words) + question, return_tensors="pt").input_ids
    answers = {}
    for method in ("spot:k=24%", "spot:k=384,floor=0"):
        attached = spotattention.attach(model, "spot", method)
        out = model.generate(ids, max_new_tokens=10, do_sample=False)
        answers[method] = tokenizer.decode(out[0, ids.shape[1] :])
        share = attached.attended_share
        attached.detach()
        assert share < 0.27
    assert "7419263" in answers["spot:k=24%"], answers
    assert "7419263" not in answers["spot:k=384,floor=0"], answers


@pytest.mark.parametrize("noise", [0.01, 5])
def test_other_weights_are_warned_of_and_checked(spotattention, transformers, prose, seed, noise):
    """Close ones are served; on far ones the captured mass is warned of as well. A program fingerprint is the folder's."""
    folder = ROOT / "models" / "tiny-qwen3"
    from spotattention.fingerprint import folder_fingerprint
    from spotattention.hf import backbone

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    own = spotattention.Selector.load("spot", folder).backbone["fingerprint"]
    assert folder_fingerprint(folder) == backbone.fingerprint(model) == own
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight += torch.randn(weight.shape, generator=generator) * weight.std() * noise
    ids = transformers.AutoTokenizer.from_pretrained(folder)(
        " ".join(prose.split()[:700]), return_tensors="pt"
    ).input_ids
    with pytest.warns(RuntimeWarning, match="distilled on other weights of this architecture"):
        attached = spotattention.attach(model, "spot", "spot:k=256,sinks=16,recency=32,floor=64")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.generate(ids, max_new_tokens=68, min_new_tokens=68, do_sample=False)
    low = [w for w in caught if "of the exact attention in 8 sampled steps" in str(w.message)]
    mean = sum(attached.captured_mass.values()) / 8
    attached.detach()
    assert (mean < 0.5, len(low) >= 4) == (noise == 5, noise == 5), (mean, len(low))
