"""vLLM's OpenAI server with the plug-in, in its own processes, asked by OpenAI's own client."""

import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.timeout(1800)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def server(environment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    metrics = folder / "metrics"
    metrics.mkdir()
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", ROOT / "models" / "tiny-qwen3"]
    command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    command += ["--max-model-len", "8192", "--max-num-seqs", "4"]
    command += ["--additional-config", '{"spot": {"selector": "spot", "method": "spot:k=25%", "check_every": 2}}']
    variables = environment(VLLM_ENABLE_V1_MULTIPROCESSING="1", PROMETHEUS_MULTIPROC_DIR=str(metrics))
    with open(folder / "log", "w") as log:
        process = subprocess.Popen([str(c) for c in command], env=variables, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 500
        while True:
            if process.poll() is not None or time.monotonic() > until:
                pytest.fail("the server did not start:\n" + (folder / "log").read_text()[-6000:])
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2).close()
                break
            except OSError:
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def test_completions_and_streams(server, needles):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)
    right = 0
    for prompt, value in zip(needles.prompts[:3], needles.answers):
        whole = client.completions.create(model="tiny", prompt=prompt, max_tokens=10, temperature=0)
        stream = client.completions.create(model="tiny", prompt=prompt, max_tokens=10, temperature=0, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
        right += value in whole.choices[0].text
    assert right >= 2


def test_the_self_check_is_among_the_metrics(server, needles):
    with urllib.request.urlopen(f"{server}/metrics", timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    values = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("spot:")}
    count, mass = values['spot:captured_mass_count{layer="0"}'], values['spot:captured_mass_sum{layer="0"}']
    assert count > 0 and 0.6 < mass / count <= 1.0
    assert 0 < values["spot:attended_tokens_total"] <= 0.27 * values["spot:visible_tokens_total"]
