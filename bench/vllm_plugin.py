#!/usr/bin/env python3
"""Times decode steps of vLLM as it is and of vLLM with the plug-in, one after the other on one GPU, at the shapes of a
model (random weights, random selector).

    python bench/vllm_plugin.py --out out/gpu/vllm_plugin.json [--fill] [--batch 1,4] [--context 131072]

Each side is a process of its own with the same engine arguments: full CUDA graphs for decode steps, vLLM's compiler, its
prefix cache. A prompt of its own for each sequence is read once; then the same prompts come from the prefix cache, and a
step is (time of N + 1 answered tokens - time of 1) / N, the least of the repeats. With --fill the prompts' attention is
left out on both sides (their keys, values and selector keys are written, their hidden states are others), which saves half a
minute a side and changes nothing in a decode step: the budget is fixed, and all weights are random anyway.

--device cpu --tiny runs the whole script on vLLM's CPU build, to see that it works; such times say nothing.
"""

import argparse
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 256,
    "intermediate_size": 512,
    "max_position_embeddings": 4096,
    "num_attention_heads": 8,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 1024,
}


def leave_out_prompts_attention() -> None:
    """Steps of more than a block of tokens write keys and values, and attend to nothing."""
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

    attend = FlashAttentionImpl.forward

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs):
        if attn_metadata is not None and attn_metadata.max_query_len > 16:
            return output.zero_()
        return attend(self, layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)

    FlashAttentionImpl.forward = forward


def settings_of(llm) -> dict:
    """What vLLM made of the arguments."""
    config = llm.llm_engine.vllm_config
    compilation, cache = config.compilation_config, config.cache_config
    layers = compilation.static_forward_context.values()
    backends = sorted({layer.get_attn_backend().get_name() for layer in layers if hasattr(layer, "get_attn_backend")})
    return {
        "compilation_mode": str(compilation.mode),
        "cudagraph_mode": str(compilation.cudagraph_mode),
        "capture_sizes": list(compilation.cudagraph_capture_sizes or []),
        "block_size": cache.block_size,
        "layout": str(getattr(cache, "kv_cache_layout", None)),
        "blocks": cache.num_gpu_blocks,
        "backends": backends,
        "runner_v2": bool(getattr(config, "use_v2_model_runner", False)),
    }


def side(options: argparse.Namespace) -> None:
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    import torch
    import vllm
    from vllm import LLM, SamplingParams

    folder = pathlib.Path(options.folder)
    # The GPU is the other side's until that has ended; imports are not.
    wanted = [folder / "selector/selector.json", *([pathlib.Path(options.after)] if options.after else [])]
    while not all(path.exists() for path in wanted):
        time.sleep(0.2)
    begin = time.time()
    batches = [int(b) for b in options.batch.split(",")]
    arguments = {
        "model": str(folder / "model"),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "kv_cache_dtype": options.kv_cache_dtype,
        "max_model_len": options.context,
        "max_num_seqs": max(batches),
        "max_num_batched_tokens": options.chunk,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
    }
    if options.device == "cuda":
        arguments |= {"gpu_memory_utilization": 0.9, "compilation_config": {"cudagraph_capture_sizes": batches}}
    else:
        arguments |= {"enforce_eager": True}
    if options.side == "spot":
        check = {} if options.check_every is None else {"check_every": options.check_every}
        spot = {"selector": str(folder / "selector"), "method": options.method, **check}
        arguments["additional_config"] = {"spot": spot}
    llm = LLM(**arguments)
    found = {"side": options.side, "vllm": vllm.__version__, "torch": torch.__version__, "start_s": time.time() - begin}
    found["settings"] = settings_of(llm)
    print(options.side, json.dumps(found), flush=True)
    if options.fill and options.device == "cuda":
        leave_out_prompts_attention()
    rng = random.Random(0)
    vocabulary = json.loads((folder / "model/config.json").read_text())["vocab_size"]
    length = (options.context - options.steps - 2) // 16 * 16  # answers end within the model's positions
    prompts = [[rng.randrange(10, vocabulary - 10) for _ in range(length)] for _ in range(max(batches))]
    found["prompt_tokens"] = length

    def run(count: int, tokens: int) -> float:
        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        made = llm.generate([{"prompt_token_ids": p} for p in prompts[:count]], sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        assert all(len(answer.outputs[0].token_ids) == tokens for answer in made)
        return seconds

    found["read_s"] = run(max(batches), 1)
    for count in batches:
        run(count, 3)
        short = min(run(count, 1) for _ in range(options.repeats))
        long = min(run(count, options.steps + 1) for _ in range(options.repeats))
        found[f"B{count}"] = {
            "step_ms": (long - short) / options.steps * 1e3,
            "tokens_per_s": count * options.steps / (long - short),
            "one_token_s": short,
            "all_tokens_s": long,
        }
        print(options.side, f"B{count}", json.dumps(found[f"B{count}"]), flush=True)
    if options.side == "spot":
        from spotattention.vllm import statistics

        found["self_check"] = statistics()
    (folder / f"{options.side}.json").write_text(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=pathlib.Path, default=ROOT / "bench/configs/qwen3-8b")
    parser.add_argument("--context", type=int, default=131072)
    parser.add_argument("--batch", default="1,4", help="numbers of sequences, with commas")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--chunk", type=int, default=8192, help="prompt tokens a step")
    parser.add_argument("--method", default="spot:k=4096")
    parser.add_argument("--check-every", type=int, help="decode steps between two self-checks (the plug-in's default)")
    parser.add_argument("--kv-cache-dtype", default="auto", help="of both sides: auto or fp8")
    parser.add_argument("--fill", action="store_true", help="leave out the prompts' attention")
    parser.add_argument("--sides", default="stock,spot")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and context instead")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--after", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiny:
        options.context, options.steps, options.chunk = min(options.context, 1024), min(options.steps, 8), 512
        options.method = "spot:k=512"
    if options.side:
        return side(options)
    config = TINY if options.tiny else json.loads((options.config / "config.json").read_text())
    sides = options.sides.split(",")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "model").mkdir()
        (folder / "model/config.json").write_text(json.dumps(config))
        environment = os.environ | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
            "HF_HUB_OFFLINE": "1",
        }
        processes, after = [], None
        for word in sides:
            command = [sys.executable, __file__, *sys.argv[1:], "--side", word, "--folder", name]
            command += ["--after", str(after)] if after else []
            processes.append(subprocess.Popen(command, env=environment))
            after = folder / f"{word}.done"
        found = {}
        try:
            from random_selector import save_selector

            save_selector(config, folder / "selector")
            for word, process in zip(sides, processes, strict=True):
                if process.wait() != 0:
                    sys.exit(f"error: the side {word} ended with status {process.returncode}")
                found[word] = json.loads((folder / f"{word}.json").read_text())
                (folder / f"{word}.done").touch()
        finally:
            for process in processes:
                process.kill()
    report = {
        "command": " ".join(sys.argv),
        "context": options.context,
        "method": options.method,
        "filled": options.fill,
        "sides": found,
    }
    if len(found) == 2:
        first, second = (found[word] for word in sides)
        report["ratio"] = {b: first[b]["step_ms"] / second[b]["step_ms"] for b in first if b.startswith("B")}
    print(json.dumps(report, indent=1))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
