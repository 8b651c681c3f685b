#!/usr/bin/env python3
"""guidellm against `spot serve` on a tiny model: streams of completions and of chats, at a Poisson rate and with a fixed number of
clients. Fails when a request fails, or when guidellm and the server count other tokens. Not a part of the tests: guidellm brings
datasets and more along.

usage: python -m venv GL && GL/bin/pip install guidellm==0.8.1 torch transformers
       .venv/bin/python tests/server/run_guidellm.py GL/bin/guidellm [--build build/cpu] [--seconds 20] [--out FOLDER]
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from served import CHAT_TEMPLATE, ROOT, Server  # noqa: E402

MODEL = ROOT / "models" / "tiny-qwen3"
PROFILES = ["kind=poisson,rate=2", "kind=concurrent,streams=4", "kind=synchronous"]


def run(guidellm: str, server: Server, route: str, profile: str, seconds: float, folder: pathlib.Path) -> dict:
    """One run's report."""
    report = folder / f"{route.strip('/').replace('/', '-')}-{profile.split(',')[0].split('=')[1]}.json"
    command = [guidellm, "run", "--disable-console"]
    command += ["--backend", f"kind=openai_http,target={server.url},model=tiny-qwen3,request_format={route}"]
    command += [
        "--data",
        "kind=synthetic_text,prompt_tokens=200,prompt_tokens_stdev=60,output_tokens=24,output_tokens_stdev=8",
    ]
    command += ["--tokenizer", f"kind=huggingface_auto,model={MODEL}", "--profile", profile]
    command += ["--constraint", f"kind=max_duration,seconds={seconds}", "--output", f"kind=json,path={report}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0 or not report.is_file():
        sys.exit(f"guidellm ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    return json.loads(report.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("guidellm")
    parser.add_argument("--build", type=pathlib.Path, default=pathlib.Path("build/cpu"))
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    folder = options.out or pathlib.Path(tempfile.mkdtemp())
    template = folder / "chat.jinja"
    template.write_text(CHAT_TEMPLATE)
    server = Server(options.build, MODEL, "--selector", "spot", "--cache-gib", "0.1", "--chat-template", template)
    failed = 0
    for route in ("/v1/completions", "/v1/chat/completions"):
        for profile in PROFILES:
            before = server.metrics()
            report = run(options.guidellm, server, route, profile, options.seconds, folder)
            after = server.wait_until_idle()
            refused = after.get("spot:refused_requests_total", 0) - before.get("spot:refused_requests_total", 0)
            for benchmark in report["benchmarks"]:
                totals = benchmark["metrics"]["request_totals"]
                requests = benchmark["requests"]["successful"]
                written = sum(request["output_metrics"]["text_tokens"] or 0 for request in requests)
                first = benchmark["metrics"]["time_to_first_token_ms"]["successful"]["median"]
                between = benchmark["metrics"]["inter_token_latency_ms"]["successful"]["median"]
                print(
                    f"{route} {profile}: {totals['successful']} answered, {totals['errored']} failed, {totals['incomplete']} cut at the "
                    f"end; {written} tokens; median {first:.0f} ms to the first, {between:.1f} ms between; {refused:.0f} refused",
                    flush=True,
                )
                failed += totals["errored"] + refused + (totals["successful"] == 0)
    status, errors = server.stop()
    print(errors.strip())
    sys.exit(1 if failed or status else 0)


if __name__ == "__main__":
    main()
