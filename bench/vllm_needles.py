#!/usr/bin/env python3
"""Answers of vLLM with the plug-in beside vLLM as it is, on the shipped tiny models: needles, the hybrid, two ranks.

    python bench/vllm_needles.py --out out/gpu/vllm_needles.json [--cases qwen3,hybrid,ranks]

Prompts and the program that asks vLLM are those of tests/vllm; on a GPU everything else is vLLM's default there: bfloat16,
its compiler, CUDA graphs; answers have ten tokens, since what follows a code captures less mass. Each side is a process; they run side by side, since the models are small. A case fails (and the
script ends with status 1) where more than one prompt that dense attention answers is lost, more than 27% of the tokens are
read at `spot:k=25%`, the self-check's captured mass is 0.76 or less, a second pass comes from elsewhere than the prefix
cache, or more than one of its answers, or of those of two ranks, are others: bfloat16 may turn one. `ranks` needs two GPUs and is left out where there is one.

--device cpu runs the same on vLLM's CPU build, eagerly.
"""

import argparse
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.vllm.environment import environment, make_site  # noqa: E402
from tests.vllm.needles import Needles  # noqa: E402

METHOD, MOST_READ, LEAST_MASS = "spot:k=25%", 0.27, 0.76
MODELS = {"qwen3": ROOT / "models/tiny-qwen3", "hybrid": ROOT / "models/tiny-qwen3.5"}


def codes(answers: list[dict]) -> list[list[str]]:
    """The first number of each answer: bfloat16 may turn a word behind it."""
    return [re.findall(r"\d+", answer["text"])[:1] for answer in answers]


class Asked:
    """A vLLM process that is asked `prompts`, and what it answered."""

    def __init__(
        self,
        name: str,
        model: pathlib.Path,
        prompts: list[str],
        options: argparse.Namespace,
        sparse: bool,
        ranks: int = 1,
    ):
        self.name, device = name, options.device
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix=f"{name.replace(' ', '-')}."))
        engine = {"model": str(model), "dtype": "bfloat16", "max_model_len": 8192, "max_num_seqs": 4}
        engine |= {"max_num_batched_tokens": 1024, "tensor_parallel_size": ranks}
        engine["kv_cache_dtype"] = options.kv_cache_dtype
        engine |= {"enforce_eager": True} if device == "cpu" else {"kv_cache_memory_bytes": 2 << 30}
        if device == "cuda" and name.startswith("hybrid"):  # Hopper's default compiles FlashInfer's kernel first
            engine["gdn_prefill_backend"] = "triton"
        if sparse:
            engine["additional_config"] = {"spot": {"selector": "spot", "method": METHOD, "check_every": 1}}
        request = {"engine": engine, "prompts": prompts, "passes": 2 if sparse else 1, "sampling": {"max_tokens": 10}}
        (self.folder / "request.json").write_text(json.dumps(request))
        (self.folder / "site").mkdir()
        build = pathlib.Path(os.environ.get("SPOT_BUILD", ROOT / "build/gpu")).resolve()
        variables = environment(make_site(self.folder / "site"), build)
        if device == "cuda":
            del variables["VLLM_TARGET_DEVICE"]
            variables["PYTHONPATH"] = os.pathsep.join((str(self.folder / "site"), str(ROOT / "python")))
        if ranks > 1:
            variables |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
        command = [sys.executable, str(ROOT / "tests/vllm/ask.py"), "request.json", "answer.json"]
        self.log = open(self.folder / "log.txt", "w")  # noqa: SIM115  kept while the process runs
        self.begin = time.time()
        self.process = subprocess.Popen(command, cwd=self.folder, env=variables, stdout=self.log, stderr=self.log)

    def answer(self) -> dict:
        status = self.process.wait()
        if status != 0:
            print((self.folder / "log.txt").read_text()[-4000:], file=sys.stderr)
            sys.exit(f"error: vLLM for {self.name} ended with status {status}; its log stands above")
        return json.loads((self.folder / "answer.json").read_text())


def judge(needles: Needles, dense: list[dict], sparse: dict) -> dict:
    """What was found, with `failures` in words."""
    first, second = sparse["passes"]
    wanted, right = needles.right(dense), needles.right(first)
    (statistics, *_) = sparse["statistics"]
    share = statistics["attended"] / max(1, statistics["visible"])
    lost = sum(a and not b for a, b in zip(wanted, right))
    mass = statistics["captured_mass"]
    failures = []
    if lost > 1:
        failures.append(f"{lost} answers of dense attention are lost")
    if not 0 < share <= MOST_READ:
        failures.append(f"{share:.1%} of the tokens were read")
    if mass is None or mass <= LEAST_MASS:
        failures.append(f"captured mass is {mass}")
    if not all(answer["cached"] > 0 for answer in second):
        failures.append("the second pass did not come from the prefix cache")
    other = sum(a != b for a, b in zip(codes(first), codes(second)))
    if other > 1:
        failures.append(f"{other} answers of the second pass are others")
    return {
        "prompts": len(wanted),
        "dense_right": sum(wanted),
        "sparse_right": sum(right),
        "share_read": share,
        "captured_mass": mass,
        "failures": failures,
    }


def gpus() -> int:
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return len(visible.split(",")) if visible else len(listed.stdout.splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="qwen3,hybrid,ranks", help="with commas")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--kv-cache-dtype", default="auto", help="of both sides: auto or fp8")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    cases = options.cases.split(",")
    if unknown := set(cases) - {"qwen3", "hybrid", "ranks"}:
        parser.error(f"--cases has no {min(unknown)}; it has qwen3, hybrid and ranks")
    report: dict = {"command": " ".join(sys.argv)}
    if "ranks" in cases and options.device == "cuda" and gpus() < 2:
        cases.remove("ranks")
        report["ranks"] = "left out: fewer than two GPUs"
    needles = Needles(random.Random(options.seed), options.prompts, 1500)
    asked: dict[str, Asked] = {}
    try:
        for name, model in MODELS.items():
            if name in cases or (name == "qwen3" and "ranks" in cases):
                asked[name] = Asked(name, model, needles.prompts, options, sparse=True)
                if name in cases:
                    asked[f"{name} dense"] = Asked(f"{name} dense", model, needles.prompts, options, False)
                if options.device == "cpu":
                    for process in asked.values():
                        process.process.wait()  # they would share the cores
        if "ranks" in cases:
            asked["ranks"] = Asked("ranks", MODELS["qwen3"], needles.prompts, options, True, ranks=2)
        answers = {name: process.answer() for name, process in asked.items()}
    finally:
        for process in asked.values():
            process.process.kill()
    for name in MODELS:
        if name in cases:
            report[name] = judge(needles, answers[f"{name} dense"]["passes"][0], answers[name])
    if "ranks" in cases:
        one, two = (codes(answers[name]["passes"][0]) for name in ("qwen3", "ranks"))
        first, second = answers["ranks"]["statistics"]
        other = sum(a != b for a, b in zip(one, two))
        failures = [f"{other} answers differ from those of one rank"] if other > 1 else []
        if first["attended"] != second["attended"]:
            failures.append("the ranks read different numbers of tokens")
        report["ranks"] = {"prompts": len(one), "same_as_one_rank": len(one) - other, "failures": failures}
    print(json.dumps(report, indent=1))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1))
    failed = [f"{name}: {f}" for name, found in report.items() if isinstance(found, dict) for f in found["failures"]]
    if failed:
        sys.exit("error: " + "; ".join(failed))


if __name__ == "__main__":
    main()
