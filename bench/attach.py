#!/usr/bin/env python3
"""Times decode steps under transformers' own `model.generate` at the shapes of a model (random bfloat16 weights): its sdpa
with a DynamicCache and with a StaticCache, eager and compiled as generate compiles it, against `spotattention.attach` with a
random selector, one after the other on one GPU.

    python bench/attach.py --out out/gpu/attach.json [--context 131072] [--method spot:k=4096] [--no-compiled]

No prompt is read: random keys and values (and selector keys of random hidden states) go into each cache through the
functions that a prompt's forward pass calls, and generate goes on from there. A step is the mean of --steps steps after
--warm-up ones, the device waited for at both ends only.

--device cpu --tiny runs the whole script on a small model, to see that it works; such times say nothing.
"""

import argparse
import gc
import inspect
import json
import pathlib
import sys
import time
import traceback

import spotattention
import torch
import transformers
from random_selector import random_selector
from spotattention.hf import backbone
from spotattention.projection import Rotation
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache, StoppingCriteria

ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_hidden_layers": 3,
    "layer_types": ["full_attention"] * 3,
    "vocab_size": 1024,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Clock(StoppingCriteria):
    """Called once a step; never stops."""

    def __init__(self, device: str, first: int, last: int) -> None:
        self.device, self.first, self.last, self.steps, self.marks = device, first, last, 0, []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        self.steps += 1
        if self.steps in (self.first, self.last):
            wait(self.device)
            self.marks.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        config = AutoConfig.from_pretrained(options.config)
        if options.tiny:
            for name, value in TINY.items():
                setattr(config, name, value)
        self.dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
        with torch.device(options.device), torch.no_grad():
            model = AutoModelForCausalLM.from_config(config, dtype=self.dtype, attn_implementation="sdpa").eval()
        model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
        self.model, self.config = model, config
        self.selector = random_selector(backbone.facts(model))
        shape = (1, config.num_key_value_heads, options.context, config.head_dim)
        self.keys, self.values = (
            torch.randn(shape, device=options.device, dtype=torch.float32 if options.tiny else self.dtype).to(
                self.dtype
            )
            for _ in range(2)
        )
        self.word = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    def length(self) -> int:
        return self.options.context + self.options.warm_up + self.options.steps + 2

    def dynamic_cache(self) -> DynamicCache:
        cache = DynamicCache(config=self.config)
        for layer in range(self.config.num_hidden_layers):
            cache.update(self.keys, self.values, layer)
        return cache

    def static_cache(self) -> StaticCache:
        cache = StaticCache(config=self.config, max_cache_len=self.length())
        for layer in range(self.config.num_hidden_layers):
            cache.update(self.keys, self.values, layer)
        return cache

    def spot_cache(self) -> DynamicCache:
        """As LayerAttention.begin and the attention behind it fill one, with random hidden states."""
        cache, attached, context = DynamicCache(config=self.config), self.model.spot, self.options.context
        positions = torch.arange(context, device=self.options.device)
        rotation = attached.rope.at_least(context, self.keys.device)
        for module in backbone.full_attention(self.model).values():
            layer = module._spot
            layer.projection.to(self.keys.device, self.dtype)
            paged = layer.paged_layer(cache)
            paged.begin([0], context, self.keys.device, gaps=False)
            slots = paged.slots(context)
            for part in positions.split(16384):
                hidden = torch.randn(len(part), self.config.hidden_size, device=part.device, dtype=self.dtype)
                turned = Rotation(*rotation, part)
                layer.projection.append(paged.selector_pool, slots[part[0] : part[-1] + 1], hidden, turned)
            cache.update(self.keys, self.values, layer.layer)
        return cache

    def step_ms(self, cache, **more) -> float:
        options = self.options
        ids = torch.randint(1, self.config.vocab_size, (1, options.context + 1), device=options.device)
        last = options.warm_up + options.steps
        clock = Clock(options.device, options.warm_up, last)
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=last,
            min_new_tokens=last,
            do_sample=False,
            stopping_criteria=[clock],
            **{self.word: cache},
            **more,
        )
        assert clock.steps == last, clock.steps
        begin, end = clock.marks
        return (end - begin) / options.steps * 1e3

    def measure(self, side: str) -> dict:
        if side == "dynamic":
            return {"step_ms": self.step_ms(self.dynamic_cache())}
        if side.startswith("static"):
            return {"step_ms": self.step_ms(self.static_cache(), disable_compile=side == "static")}
        spotattention.attach(self.model, self.selector, self.options.method, graphs=side == "spot")
        self.model.spot.graphs.everywhere = self.options.device == "cpu"
        try:
            with torch.no_grad():
                cache = self.spot_cache()
            attached = self.model.spot
            found = {"step_ms": self.step_ms(cache), "captured_steps": attached.graphs.captured}
            mass = attached.captured_mass
            return found | {
                "attended_share": attached.attended_share,
                "checked_layers": len(mass),
                "captured_mass": sum(mass.values()) / max(1, len(mass)),
            }
        finally:
            self.model.spot.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=pathlib.Path, default=ROOT / "bench/configs/qwen3-8b")
    parser.add_argument("--context", type=int, default=131072)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--warm-up", type=int, default=16)
    parser.add_argument("--method", default="spot:k=4096")
    parser.add_argument("--no-compiled", action="store_true", help="leave out the compiled StaticCache (minutes)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and context instead")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    if options.tiny:
        options.context, options.steps, options.warm_up = min(options.context, 1024), min(options.steps, 8), 4
        options.method = "spot:k=512"
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    begin = time.time()
    bench = Bench(options)
    report = {
        "command": " ".join(sys.argv),
        "context": options.context,
        "method": options.method,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
    }
    print(f"model made in {time.time() - begin:.1f} s", flush=True)
    sides = ["spot", "dynamic", "static", "spot without graphs"] + ([] if options.no_compiled else ["static compiled"])
    for side in sides:  # the long one last: what was found until then is written
        begin = time.time()
        try:
            report[side] = bench.measure(side)
        except Exception as error:
            traceback.print_exc()
            report[side] = {"failed": f"{type(error).__name__}: {error}"[:500]}
        report[side]["wall_s"] = round(time.time() - begin, 1)
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
        own = {s: report[s]["step_ms"] for s in sides if "step_ms" in report.get(s, {}) and not s.startswith("spot")}
        if own and "step_ms" in report["spot"]:
            best = min(own, key=own.get)
            report["best_of_transformers"], report["ratio"] = best, own[best] / report["spot"]["step_ms"]
        print(side, json.dumps(report[side]), "ratio", report.get("ratio"), flush=True)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(report, indent=1))
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
