"""Gated DeltaNet between a layer's projections: our kernels, our ATen form, and transformers' own functions.

    python bench/gated_delta.py [--quick] [--json results.json] [--device cpu] [--build build/bench]

Needs torch, transformers with Qwen3.5, g++, and for the kernels nvcc and a GPU of compute capability 9.0. Builds the
operators twice, with and without the kernels, as shared libraries. Shapes are Qwen3.5's: 16 key heads, 16 or 32 value
heads of 128 dims, bfloat16 (float32 on the CPU). Times are medians; on a GPU decode is replayed as a CUDA graph over
states that together exceed the L2, prefill is timed by events. `floor` is the least the device could take: states read and
written once (decode), or the larger of the products at 300 TFLOP/s of TF32 and the workspace traffic (prefill; see
kernels/gated_delta_prefill.cu), at the copy bandwidth measured first. `error` is the norm-wise relative difference from
transformers' functions in float32 on the same inputs.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

ROOT = pathlib.Path(__file__).resolve().parent.parent
KEY_HEADS, DIM, TAPS, EPSILON = 16, 128, 4, 1e-6
TF32_FLOPS = 300e12


# ---- building ----


def run(*command):
    done = subprocess.run([str(c) for c in command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")


def build(folder, kernels):
    """The operators as a shared library; rebuilt when a source is newer."""
    from torch.utils.cpp_extension import include_paths

    library = folder / f"libgated_delta_{'kernels' if kernels else 'aten'}.so"
    topic = "ops/linear_attention/gated_delta"
    sources = [f"{topic}.cpp", f"{topic}_aten.cpp", f"{topic}_check.cpp"]
    names = ("device", "gated_delta_decode", "gated_delta_prefill")
    device_sources = [f"kernels/{name}.cu" for name in names] if kernels else []
    if kernels:
        sources += [f"{topic}_cuda.cpp", "ops/cuda/call.cpp"]
    watched = [
        p for pattern in ("ops/*.h", "ops/cuda/*", "ops/linear_attention/*", "kernels/*") for p in ROOT.glob(pattern)
    ]
    if library.is_file() and library.stat().st_mtime > max(p.stat().st_mtime for p in watched):
        return library
    folder.mkdir(parents=True, exist_ok=True)
    objects = []
    for source in device_sources:
        objects.append(folder / f"{pathlib.Path(source).stem}.cu.o")
        run(
            "nvcc",
            "-std=c++20",
            "-O3",
            "-gencode=arch=compute_90a,code=sm_90a",
            '-DSPOT_BUILT_ARCHITECTURES="90a-real"',
            "-Xcompiler",
            "-fPIC",
            f"-I{ROOT}",
            "-c",
            source,
            "-o",
            objects[-1],
        )
    includes = [f"-I{ROOT}"] + [f for p in include_paths() for f in ("-isystem", p)]
    # nvcc hands .cpp files to g++ with CUDA's own include folder, wherever that is.
    compiler = ["nvcc", "-Xcompiler", "-fPIC", "-DSPOT_CUDA=1"] if kernels else ["g++", "-fPIC"]
    for source in sources:
        objects.append(folder / f"{'kernels' if kernels else 'aten'}_{source.replace('/', '_')}.o")
        run(*compiler, "-std=c++20", "-O2", "-DFMT_HEADER_ONLY=1", *includes, "-c", source, "-o", objects[-1])
    torch_lib = pathlib.Path(torch.__file__).parent / "lib"
    run(compiler[0], "-shared", "-o", library, *objects, f"-L{torch_lib}", "-ltorch", "-ltorch_cpu", "-lc10")
    return library


# ---- the layer, ours and theirs ----


class Layer:
    def __init__(self, value_heads, slots, device, dtype):
        self.value_heads, self.device, self.dtype = value_heads, device, dtype
        self.channels = DIM * (2 * KEY_HEADS + value_heads)
        draw = lambda *shape: torch.randn(*shape, device=device)
        self.conv = draw(TAPS, self.channels) * 0.5
        self.decay_rate = torch.exp(torch.rand(value_heads, device=device) * 8 - 6)
        self.dt_bias = draw(value_heads)
        self.norm, self.norm_module = 1 + 0.3 * draw(DIM), None
        self.conv_states = torch.zeros(slots, TAPS - 1, self.channels, device=device)
        self.recurrent_states = torch.zeros(slots, value_heads, DIM, DIM, device=device)

    def inputs(self, tokens):
        """Slices of one projection's output, as the backbone passes them."""
        widths = [self.channels, self.value_heads * DIM, self.value_heads, self.value_heads]
        return torch.randn(tokens, sum(widths), device=self.device).to(self.dtype).split(widths, 1)

    def ours(self, inputs, slots, lengths=None):
        arguments = [
            *inputs,
            self.conv,
            self.decay_rate,
            self.dt_bias,
            self.norm,
            EPSILON,
            self.conv_states,
            self.recurrent_states,
            slots,
        ]
        if lengths is None:
            return torch.ops.spot.gated_delta_decode(*arguments)
        return torch.ops.spot.gated_delta_prefill(*arguments, lengths)

    def theirs(self, inputs, slots, lengths=None):
        """transformers' rule and norm with the convolution around them; sequences of one length, as a batch."""
        from transformers.models.qwen3_5 import modeling_qwen3_5 as theirs

        qkv, z, b, a = inputs
        batch = len(slots)
        steps = qkv.shape[0] // batch
        qkv = qkv.reshape(batch, steps, -1)
        window = torch.cat([self.conv_states[slots].to(qkv.dtype), qkv], 1).transpose(1, 2)
        self.conv_states[slots] = window[:, :, -(TAPS - 1) :].transpose(1, 2).float()
        weight = self.conv.t().unsqueeze(1).to(qkv.dtype)
        u = F.silu(F.conv1d(window, weight, groups=self.channels)).transpose(1, 2)
        q, k, v = u.split([KEY_HEADS * DIM, KEY_HEADS * DIM, self.value_heads * DIM], -1)
        heads = lambda x: x.reshape(batch, steps, -1, DIM)
        repeat = lambda x: x.repeat_interleave(self.value_heads // KEY_HEADS, 2)
        g = -self.decay_rate * F.softplus(a.float() + self.dt_bias)
        rule = theirs.torch_recurrent_gated_delta_rule if lengths is None else theirs.torch_chunk_gated_delta_rule
        o, state = rule(
            repeat(heads(q)),
            repeat(heads(k)),
            heads(v),
            g=g.reshape(batch, steps, -1),
            beta=b.reshape(batch, steps, -1).sigmoid(),
            initial_state=self.recurrent_states[slots],
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        self.recurrent_states[slots] = state.float()
        if self.norm_module is None:
            self.norm_module = theirs.Qwen3_5RMSNormGated(DIM, eps=EPSILON).to(self.device)
            self.norm_module.weight.data.copy_(self.norm)
        return self.norm_module(o.reshape(-1, DIM), z.reshape(-1, DIM)).reshape(batch * steps, -1)


# ---- timing ----


def median_seconds(call, device, repeats, graph):
    if device == "cpu":
        call()
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        return statistics.median(times)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    replay = call
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            call()
        replay = captured.replay
    times = []
    for i in range(repeats + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        replay()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(begin.elapsed_time(end) / 1000)
    return statistics.median(times)


def copy_bandwidth(device):
    x = torch.empty(1 << (28 if device == "cpu" else 30), dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * x.numel() / median_seconds(lambda: y.copy_(x), device, 10, graph=False)


def prefill_floor(tokens, value_heads, element, bandwidth):
    """Products of `scan` and `prepare`, three TF32 products each; q | k | v in float32, T and P, states aside."""
    chunks = tokens / 64
    flops = 3 * chunks * (7.6e6 * value_heads + 1.6e6 * KEY_HEADS)
    channels, keys, values = DIM * (2 * KEY_HEADS + value_heads), 2 * DIM * KEY_HEADS, DIM * value_heads
    traffic = tokens * (channels * (element + 4) + 2 * keys * 4 + 3 * values * 4 + 2 * values * element)
    traffic += 2 * chunks * value_heads * 2 * 64 * 64 * 4
    return max(flops / TF32_FLOPS, traffic / bandwidth)


def measure(implementation, device, quick):
    """All cases of one implementation, as dictionaries."""
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    bandwidth = copy_bandwidth(device)
    on_cpu = device == "cpu"
    results = []
    run_layer = Layer.theirs if implementation == "transformers" else Layer.ours
    for value_heads in (16, 32):
        for batch in (1, 4) if quick or on_cpu else (1, 4, 16, 64):
            state_bytes = batch * value_heads * DIM * DIM * 4
            sets = 2 if on_cpu else max(2, -(-(256 << 20) // state_bytes))
            layer = Layer(value_heads, batch * sets, device, dtype)
            inputs = [layer.inputs(batch) for _ in range(sets)]
            slots = torch.arange(batch * sets, device=device).split(batch)

            def decode():
                for x, s in zip(inputs, slots):
                    run_layer(layer, x, s)

            with torch.no_grad():
                seconds = median_seconds(decode, device, 10, graph=True) / sets
            results.append(
                {
                    "case": f"decode, H_v {value_heads}, batch {batch}",
                    "seconds": seconds,
                    "floor": 2 * state_bytes / bandwidth,
                }
            )
        lengths = [[512]] if on_cpu else [[2048], [8192], [1024] * 8] + ([] if quick else [[32768]])
        for each in lengths:
            layer = Layer(value_heads, len(each), device, dtype)
            inputs, slots = layer.inputs(sum(each)), torch.arange(len(each), device=device)
            with torch.no_grad():
                seconds = median_seconds(lambda: run_layer(layer, inputs, slots, each), device, 5, graph=False)
            results.append(
                {
                    "case": f"prefill, H_v {value_heads}, {len(each)} x {each[0]}",
                    "seconds": seconds,
                    "floor": prefill_floor(sum(each), value_heads, inputs[0].element_size(), bandwidth),
                }
            )
        if implementation != "transformers":
            results.append(difference(value_heads, device))
    return {"implementation": implementation, "bandwidth": bandwidth, "results": results}


def difference(value_heads, device):
    """Prefill of 3 x 300 tokens, then a decode step, in float32, against transformers' functions."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    layer = Layer(value_heads, 3, device, torch.float32)
    slots = torch.arange(3, device=device)
    calls = [(layer.inputs(900), [300] * 3), (layer.inputs(3), None)]
    outputs = []
    with torch.no_grad():
        for run_layer in (Layer.ours, Layer.theirs):
            layer.conv_states.zero_()
            layer.recurrent_states.zero_()
            parts = [run_layer(layer, inputs, slots, each) for inputs, each in calls]
            outputs.append(torch.cat([*parts, layer.recurrent_states.reshape(3, -1).reshape(-1, parts[0].shape[1])]))
    error = ((outputs[0] - outputs[1]).norm() / outputs[1].norm()).item()
    return {"case": f"error, H_v {value_heads}", "error": error}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures here")
    parser.add_argument(
        "--build", type=pathlib.Path, default=ROOT / "build" / "bench", help="where libraries are built"
    )
    parser.add_argument("--only", choices=("kernels", "aten", "transformers"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU: run on a machine with one, or pass --device cpu (times the ATen form alone)")
    if options.only:  # one implementation a process: the libraries register the same operators
        if options.only != "transformers":
            torch.ops.load_library(str(build(options.build, options.only == "kernels")))
        print(json.dumps(measure(options.only, options.device, options.quick)))
        return

    names = ["aten", "transformers"] if options.device == "cpu" else ["kernels", "aten", "transformers"]
    reports = []
    for name in names:
        command = [sys.executable, __file__, "--only", name, "--device", options.device, "--build", str(options.build)]
        done = subprocess.run(command + ["--quick"] * options.quick, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"{name} failed")
        reports.append(json.loads(done.stdout.splitlines()[-1]))
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{device}, torch {torch.__version__}, copies at {reports[0]['bandwidth'] / 1e12:.2f} TB/s; times in us")
    print(f"{'case':34}{'floor':>10}" + "".join(f"{name:>14}" for name in names) + f"{names[0] + ' of floor':>20}")
    for i, first in enumerate(reports[0]["results"]):
        if "error" in first:
            print(f"{first['case']:44}" + "".join(f"{r['results'][i]['error']:14.1e}" for r in reports[:-1]))
            continue
        found = [next(x for x in r["results"] if x["case"] == first["case"])["seconds"] for r in reports]
        print(
            f"{first['case']:34}{first['floor'] * 1e6:10.1f}"
            + "".join(f"{s * 1e6:14.1f}" for s in found)
            + f"{100 * first['floor'] / found[0]:19.0f}%"
        )
    if options.json:
        options.json.write_text(
            json.dumps({"device": device, "torch": torch.__version__, "reports": reports}, indent=1)
        )


if __name__ == "__main__":
    main()
