"""vLLM's time to the first token: the shapes of a config with dummy weights, one prompt at a time, no prefix cache.

    bench/vllm_prefill.py bench/configs/qwen3-8b [--lengths 32768,131072] [--steps 8192,16384,32768] [--out FILE]
                          [--beside FILE]

Every number of tokens a step is tried at the shortest length (one run to warm up, the faster of two counts); the best one
runs the others. --beside: what `spot bench prefill --out` wrote on the same machine, to print ratios.
"""

import argparse
import json
import os
import random
import time

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # so that the scheduler can be told another step
    VLLM_ALLOW_LONG_MAX_MODEL_LEN="1",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
)


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="folder with a config.json")
    parser.add_argument("--lengths", type=numbers, default=[32768, 131072])
    parser.add_argument("--steps", type=numbers, default=[8192, 16384, 32768], help="most tokens of a step")
    parser.add_argument("--memory", type=float, default=0.9, help="share of the GPU's memory")
    parser.add_argument("--out")
    parser.add_argument("--beside", help="JSON of spot bench prefill")
    a = parser.parse_args()
    lengths = sorted(a.lengths)

    import vllm

    begin = time.monotonic()
    engine = vllm.LLM(
        model=a.config,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=lengths[-1] + 16,
        max_num_seqs=4,
        max_num_batched_tokens=max(a.steps),
        enable_prefix_caching=False,
        gpu_memory_utilization=a.memory,
    )
    start_seconds = time.monotonic() - begin
    print(f"vLLM {vllm.__version__}, started in {start_seconds:.1f} s", flush=True)
    scheduler = engine.llm_engine.engine_core.engine_core.scheduler
    if not hasattr(scheduler, "max_num_scheduled_tokens"):
        raise SystemExit("error: this vLLM's scheduler has no max_num_scheduled_tokens; give one number with --steps")
    draw = random.Random(0)
    sampling = vllm.SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)

    def first_token(length: int) -> float:
        prompt = [draw.randrange(1000, 100000) for _ in range(length)]
        begin = time.monotonic()
        engine.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        return time.monotonic() - begin

    tried = {}
    for step in a.steps:
        scheduler.max_num_scheduled_tokens = step
        first_token(lengths[0])
        tried[step] = [first_token(lengths[0]) for _ in range(2)]
        print(f"{lengths[0]} tokens, {step} a step: {tried[step][0]:.3f} and {tried[step][1]:.3f} s", flush=True)
    best = min(tried, key=lambda step: min(tried[step]))
    scheduler.max_num_scheduled_tokens = best
    seconds = {lengths[0]: tried[best]}
    for length in lengths[1:]:
        seconds[length] = [first_token(length) for _ in range(2)]
        print(f"{length} tokens, {best} a step: {seconds[length][0]:.3f} and {seconds[length][1]:.3f} s", flush=True)

    result = {"vllm": vllm.__version__, "config": a.config, "start_seconds": start_seconds, "step_tokens": best}
    result["tried"] = {str(step): times for step, times in tried.items()}
    result["first_token_seconds"] = {str(length): min(times) for length, times in seconds.items()}
    if a.out:
        with open(a.out, "w") as out:
            json.dump(result, out, indent=1)
    if a.beside:
        with open(a.beside) as file:
            ours = json.load(file)
        print(f"\n{'tokens':>7} {'prefill':>16} {'first token s':>13} {'vLLM /':>7}")
        for row in ours["lengths"]:
            if row["tokens"] not in seconds:
                continue
            peer = min(seconds[row["tokens"]])
            print(f"{row['tokens']:>7} {'vLLM':>16} {peer:>13.3f}")
            for run in row["model"]:
                mine = run["first_token_seconds"]
                print(f"{row['tokens']:>7} {run['name']:>16} {mine:>13.3f} {peer / mine:>6.2f}x")


if __name__ == "__main__":
    main()
