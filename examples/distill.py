#!/usr/bin/env python3
"""A selector for a transformers model, distilled in Python, then attached.

    python examples/distill.py MODEL TEXT... --out FOLDER [--steps 100] [--length 2048]

MODEL: a Hugging Face folder or hub name. TEXT: files (.txt, .jsonl, .gz of both) or folders of them.
Short runs on small models want a high rate: --lr 4e-3 at hidden size 256, 2e-3 at 576.
"""

import argparse
import pathlib

import spotattention
import torch
import transformers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", nargs="+", type=pathlib.Path)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--sequences", type=int, default=4, help="a step")
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args()

    transformers.utils.logging.set_verbosity_error()
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    selector = spotattention.distill(
        model,
        options.text,
        options.out,
        tokenizer=tokenizer,
        steps=options.steps,
        sequence_length=options.length,
        sequences_per_step=options.sequences,
        peak_lr=options.lr,
        query_rows=min(512, options.length),
        held_out_every=8,
        held_out_sequences=2,
    )
    print(f"{options.out}: loss {selector.notes['loss']:.4f} after {selector.notes['steps']} steps")

    attached = spotattention.attach(model, selector, "spot:p=0.8", self_check=1)
    inputs = tokenizer(options.text[0].read_text()[:8000], return_tensors="pt").to(model.device)
    model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    masses = attached.captured_mass.values()
    if masses:
        print(
            f"captured {sum(masses) / len(masses):.3f} of the attention at {attached.attended_share:.1%} of the tokens"
        )


if __name__ == "__main__":
    main()
