#!/usr/bin/env python3
"""Times the linear layers of a decode step on one GPU: torch.ops.spot.linear with bfloat16 and with FP8 weights beside
torch's own product, in microseconds and in terabytes of the matrix a second.

    SPOT_OPS_LIBRARY=build/gpu/libspot_ops.so python bench/linear.py [--quick] [--json FILE]

Each time is that of a CUDA graph of many products, of matrices that take turns so that none lies in the L2 cache. Floor: the
bytes of the matrix.
"""

import argparse
import json
import os

import torch

SHAPES = {  # [out, in] of Qwen3-8B's layers
    "qkv": (6144, 4096),
    "out": (4096, 4096),
    "gate_up": (24576, 4096),
    "down": (4096, 12288),
}
BYTES = 1 << 30  # of matrices that take turns


def seconds(run, repeats: int = 5) -> float:
    """Of one call of run(): the least of `repeats` replays of a graph that holds its calls."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls = run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run()
        times = []
        for _ in range(repeats):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3 / calls)
    return min(times)


def measure(out: int, width: int, rows: int) -> dict:
    x = torch.randn(rows, width, dtype=torch.bfloat16, device="cuda")
    y = torch.empty(rows, out, dtype=torch.bfloat16, device="cuda")
    scales = torch.rand(-(-out // 128), -(-width // 128), device="cuda")
    wide = [
        torch.randn(out, width, dtype=torch.bfloat16, device="cuda") for _ in range(max(2, BYTES // (2 * out * width)))
    ]
    codes = [w.to(torch.float8_e4m3fn) for w in wide] * 2

    def library():
        for w in wide:
            torch.mm(x, w.t(), out=y)
        return len(wide)

    def ours():
        for w in wide:
            torch.ops.spot.linear(x, w, y)
        return len(wide)

    def fp8():
        for c in codes:
            torch.ops.spot.linear(x, c, y, scales)
        return len(codes)

    return {"library": seconds(library), "bf16": seconds(ours), "fp8": seconds(fp8)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="batch 1 and 4 only")
    parser.add_argument("--json", help="file for the numbers")
    options = parser.parse_args()
    torch.ops.load_library(os.environ.get("SPOT_OPS_LIBRARY", "build/gpu/libspot_ops.so"))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(
        f"{'matrix':8} {'rows':>4}  {'torch us':>8} {'TB/s':>5}  {'bf16 us':>8} {'TB/s':>5}  {'fp8 us':>8} {'TB/s':>5}"
    )

    def line(name: str, rows: int, numbers: int, times: dict) -> None:
        rates = {key: numbers * (1 if key == "fp8" else 2) / t / 1e12 for key, t in times.items()}
        print(f"{name:8} {rows:4}  " + "  ".join(f"{t * 1e6:8.2f} {rates[key]:5.2f}" for key, t in times.items()))

    results = []
    for rows in [1, 4] if options.quick else [1, 2, 4, 8, 16, 32]:
        sums = {"library": 0.0, "bf16": 0.0, "fp8": 0.0}
        for name, (out, width) in SHAPES.items():
            times = measure(out, width, rows)
            for key, t in times.items():
                sums[key] += t
            line(name, rows, out * width, times)
            results.append({"matrix": name, "rows": rows, "seconds": times})
        line("layer", rows, sum(out * width for out, width in SHAPES.values()), sums)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"device": torch.cuda.get_device_name(), "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
