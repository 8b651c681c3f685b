#!/usr/bin/env python3
"""A transformers model that answers from a long text while reading a quarter of it at each step.

    python examples/attach.py [MODEL] [--selector NAME] [--policy spot:k=24%]

MODEL: a Hugging Face folder with a selector under selectors/ (default: the shipped tiny model).
"""

import argparse
import pathlib
import time

import spotattention
import torch
import transformers

ROOT = pathlib.Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=ROOT / "models" / "tiny-qwen3", type=pathlib.Path)
    parser.add_argument("--selector", default="spot")
    parser.add_argument("--policy", default="spot:k=24%")
    parser.add_argument("--words", type=int, default=1500, help="length of the text around the needle")
    options = parser.parse_args()

    transformers.utils.logging.set_verbosity_error()
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)

    words = (ROOT / "docs" / "performance.md").read_text().split()[: options.words]
    words.insert(len(words) // 3, "The special magic number for giraffe is: 7419263.")
    question = (
        "What is the special magic number for giraffe mentioned in the text? The special magic number for giraffe is:"
    )
    inputs = tokenizer(" ".join([*words, question]), return_tensors="pt").to(model.device)

    def answer() -> str:
        begun = time.time()
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        text = tokenizer.decode(out[0, inputs.input_ids.shape[1] :])
        return f"{text!r} ({time.time() - begun:.1f} s)"

    print(f"{inputs.input_ids.shape[1]} tokens")
    print("dense: ", answer())
    attached = spotattention.attach(model, options.selector, options.policy, self_check=2)
    print("sparse:", answer())
    print(f"        read {attached.attended_share:.1%} of the tokens in {len(attached.sparse_layers)} layers")
    for layer, mass in attached.captured_mass.items():
        print(f"        layer {layer}: {mass:.3f} of the exact attention captured")
    attached.detach()


if __name__ == "__main__":
    main()
