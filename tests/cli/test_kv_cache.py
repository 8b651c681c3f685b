"""--kv-cache-dtype: what it saves, that it is used, and what it refuses."""

import json
import re

import pytest
from program import SHIPPED

COMMANDS = {
    "generate": ["--prompt", "Hi", "--attention"],
    "serve": ["--port", 0, "--attention"],
    "bench": ["--context", 64, "--attention"],
    "eval text": ["--text", "LICENSE", "--length", 512, "--skip", 100, "--methods"],
    "eval needle": ["--text", "LICENSE", "--length", 600, "--methods"],
    "eval ruler": ["--tasks", "vt", "--lengths", 1024, "--methods"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_methods_that_read_keys_are_refused_before_the_weights(spot, unreadable, command):
    words = command.split() + ["--model", unreadable, *COMMANDS[command]]
    for method in ("quest:k=64", "twilight"):
        done = spot(*words, method, "--kv-cache-dtype", "fp8")
        assert done.returncode == 1 and done.stderr.splitlines()[-1] == (
            f"error: attention '{method}' reads keys as numbers, and an FP8 KV cache holds codes; leave out "
            "--kv-cache-dtype fp8, or choose one of dense, spot, streaming, oracle"
        )
    done = spot(*words, "dense", "--kv-cache-dtype", "fp8_e5m2")
    assert done.returncode != 0 and "--kv-cache-dtype" in done.stderr and "fp8_e5m2 not in {auto,fp8}" in done.stderr


def perplexities(spot, folder, *options):
    spot("eval", "text", "--model", SHIPPED, "--text", "LICENSE", "--length", 640, "--skip", 128, "--sequences", 1,
         "--methods", "oracle:k=128", "--threads", 1, "--out", folder, *options).check_returncode()  # fmt: skip
    report = json.loads((folder / "report.json").read_text())
    assert report["kv_cache_dtype"] == ("fp8" if options else "auto")
    return {run["name"]: run["nll"] for run in [report["dense"], *report["methods"]]}


def test_an_evaluation_shows_what_it_costs(spot, tmp_path):
    numbers = perplexities(spot, tmp_path / "numbers")
    codes = perplexities(spot, tmp_path / "codes", "--kv-cache-dtype", "fp8")
    for name, nll in numbers.items():
        assert 1e-6 < abs(codes[name] - nll) < 0.05, name


def test_generate_writes_from_codes(spot):
    words = ["generate", "--model", SHIPPED, "--prompt", "The licence of this program", "--max-new-tokens", 24,
             "--logprobs", 0, "--threads", 1, "--ignore-eos"]  # fmt: skip

    def logprobs(*options):
        done = spot(*words, *options)
        assert done.returncode == 0, done.stderr
        return [float(x) for x in re.findall(r"^\".*\" (-?[\d.]+)$", done.stderr, re.M)]

    numbers, codes = logprobs(), logprobs("--kv-cache-dtype", "fp8")
    assert len(numbers) == len(codes) == 24 and numbers != codes
    assert abs(numbers[0] - codes[0]) < 0.5
    # Cut into chunks and under a method that keeps everything: the same codes are read.
    for options in (["--prefill-chunk", 16], ["--attention", "oracle:k=4096"]):
        assert logprobs("--kv-cache-dtype", "fp8", *options) == pytest.approx(codes, abs=2e-3)


def test_the_cache_is_a_quarter_of_float32(spot, place):
    def bytes_needed(*options):
        """Of a cache that no machine holds."""
        done = spot("bench", "--model", SHIPPED, "--context", 30000, "--steps", 2, "--batch", 60000, *options)
        assert done.returncode == 1
        return float(re.search(r" needs ([\d.]+) (?:GiB|TiB)", done.stderr)[1])

    numbers, codes = (
        bytes_needed("--attention", "dense"),
        bytes_needed("--attention", "dense", "--kv-cache-dtype", "fp8"),
    )
    assert codes == pytest.approx(numbers / 4, rel=1e-3)
    shown = spot("inspect", SHIPPED, "--bytes", 2).stdout, spot("inspect", SHIPPED, "--kv-cache-dtype", "fp8").stdout
    two, one = (int(re.search(r"KV cache: (\d+) bytes a token", text)[1]) for text in shown)
    assert two == 2 * one and "(1 byte a number)" in shown[1]


def test_ruler_does_not_mix_caches(spot, tmp_path):
    words = ["eval", "ruler", "--model", SHIPPED, "--tasks", "vt", "--lengths", 1024, "--samples", 1, "--methods", "dense",
             "--threads", 1, "--out", tmp_path]  # fmt: skip
    assert spot(*words, "--kv-cache-dtype", "fp8").returncode == 0
    again = spot(*words, "--kv-cache-dtype", "fp8")
    assert again.returncode == 0 and "1 of 1 prompts stand in" in again.stdout
    other = spot(*words)
    assert other.returncode == 1 and "holds results of other settings (kv_cache_dtype differ)" in other.stderr
