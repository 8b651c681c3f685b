"""Sparse prefill's stages beside cuDNN's dense attention, one layer of Qwen3-8B's shapes, in one run on one GPU.

    bench/prefill_kernels.py build/gpu/kernels/prefill_kernels [--lengths 65536,131072] [--tile 32] [--groups 1] [--json FILE]

PROGRAM is built from bench/prefill_kernels.cu; whatever is not named here is handed to it.
"""

import argparse
import json
import statistics
import subprocess
import tempfile

import torch


def dense_ms(length: int) -> float:
    """Causal attention of 32 query and 8 KV heads of 128 by cuDNN, milliseconds, median of three."""
    query = torch.randn(1, 32, length, 128, device="cuda", dtype=torch.bfloat16)
    key, value = (torch.randn(1, 8, length, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(4):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, False, 0.0, True, False, scale=128**-0.5
        )
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("--json", help="where the rows go, one JSON object a line")
    arguments, rest = parser.parse_known_args()
    with tempfile.NamedTemporaryFile(mode="r") as file:
        subprocess.run([arguments.program, "--json", file.name, *rest], check=True)
        rows = [json.loads(line) for line in file]
    dense = {length: dense_ms(length) for length in sorted({row["length"] for row in rows})}
    print(f"\n{'tokens':>7} {'budget':>7} {'sparse ms':>10} {'dense ms':>9} {'TFLOP/s':>8} {'ratio':>6}")
    for row in rows:
        length = row["length"]
        row["dense_ms"] = dense[length]
        total = sum(row[stage] for stage in ("stage_ms", "score_ms", "select_ms", "attend_ms"))
        budget = f"{row['share']:.0%}" if row["share"] else "4096"
        rate = 2 * length**2 * 32 * 128 / dense[length] / 1e9
        print(
            f"{length:>7} {budget:>7} {total:>10.2f} {dense[length]:>9.2f} {rate:>8.0f} {dense[length] / total:>6.2f}"
        )
    if arguments.json:
        with open(arguments.json, "w") as out:
            out.writelines(json.dumps({"device": torch.cuda.get_device_name(), **row}) + "\n" for row in rows)


if __name__ == "__main__":
    main()
