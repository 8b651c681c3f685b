"""Dense decode attention by torch (flash and cuDNN back ends) on the shapes of decode_kernels, and the ratios.

    python bench/dense_sdpa.py [--against kernels.json] [--json dense.json]

Every figure is the median of CUDA graph replays over rotating buffers larger than the L2. With --against, prints for
every shape that both measured how many times faster a sparse decode step is.
"""

import argparse
import json

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def time_us(step, sets):
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for i in range(sets):
            step(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(sets):
            step(i)
    times = []
    for i in range(25):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i >= 5:
            times.append(begin.elapsed_time(end) * 1000 / sets)
    return sorted(times)[len(times) // 2]


def measure(num_heads, num_kv_heads, head_dim, length, batch):
    kv_bytes = 4 * batch * num_kv_heads * length * head_dim
    sets = max(2, min(16, int(256e6 // kv_bytes) + 1))
    q = [torch.randn(batch, num_heads, 1, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(sets)]
    kv = [torch.randn(2, batch, num_kv_heads, length, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(sets)]
    result = {}
    for name, backend in BACKENDS.items():
        def step(i):
            with sdpa_kernel(backend):
                torch.nn.functional.scaled_dot_product_attention(q[i], kv[i][0], kv[i][1], enable_gqa=True)
        try:
            result[name] = time_us(step, sets)
        except RuntimeError as error:
            print(f"# {name} does not run {num_heads}/{num_kv_heads}/{head_dim}: {str(error).splitlines()[0]}")
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", help="JSON of decode_kernels")
    parser.add_argument("--json", help="write the dense figures here")
    args = parser.parse_args()
    rows = json.load(open(args.against))["rows"] if args.against else []
    key = lambda r: (r["num_heads"], r["num_kv_heads"], r["head_dim"], r["length"], r["batch"])
    shapes = list(dict.fromkeys(key(r) for r in rows)) or [(32, 8, 128, n, 1) for n in (8192, 32768, 65536, 131072)]
    dense = []
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}")
    for shape in shapes:
        torch.cuda.empty_cache()
        result = measure(*shape)
        dense.append({"shape": shape, **result})
        heads, kv_heads, dim, length, batch = shape
        text = ", ".join(f"{name} {us:.1f} us" for name, us in result.items())
        print(f"heads {heads}/{kv_heads} dim {dim} L {length} B {batch}: {text}", flush=True)
        for row in rows:
            if key(row) != shape or not row["stage"].startswith("step"):
                continue
            ratios = ", ".join(f"{us / row['us']:.2f}x {name}" for name, us in result.items())
            print(f"    {row['stage']:<44} {row['us']:8.2f} us: {ratios}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(dense, file)


if __name__ == "__main__":
    main()
