"""A running server. A module of its own: where several folders' tests run, `conftest` may be another folder's."""

import contextlib
import os
import pathlib
import re
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests"))
from patience import SLOWER  # noqa: E402

CHAT_TEMPLATE = (
    "{%- if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif -%}"
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor -%}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking %}<think>\n{% endif %}{% endif -%}"
)


class Server:
    def __init__(self, build_folder, model, *options, timeout=120 * SLOWER):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [build_folder / "spot", "serve", model, "--port", "0", *options]
        self.process = subprocess.Popen(
            [str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        line = self.process.stdout.readline() if self._readable(timeout) else ""
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        if not found:
            self.process.kill()
            said = self.process.stderr.read()
            raise RuntimeError(f"the server did not start within {timeout} s: {line}{said}")
        self.port = int(found[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def _readable(self, timeout):
        return select.select([self.process.stdout], [], [], timeout)[0]

    def client(self, **options):
        import openai

        settings = {
            "base_url": self.url + "/v1",
            "api_key": "none",
            "max_retries": 0,
            "timeout": 120 * SLOWER,
            **options,
        }
        return openai.OpenAI(**settings)

    def socket(self):
        connection = socket.create_connection(("127.0.0.1", self.port))
        connection.settimeout(60 * SLOWER)
        return connection

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=60 * SLOWER) as reply:
            return reply.read().decode()

    def metrics(self):
        """Values summed over labels, and by "name{label=value}" for each label but the common ones."""
        values = {}
        for line in self.get("/metrics").splitlines():
            if line.startswith("#"):
                continue
            name, labels, value = re.fullmatch(r"([^{ ]+)(?:\{(.*)\})? (\S+)", line).groups()
            keys = {name}
            for label, text in re.findall(r'(\w+)="([^"]*)"', labels or ""):
                if label not in ("model_name", "engine"):
                    keys.add(f"{name}{{{label}={text}}}")
            for key in keys:
                values[key] = values.get(key, 0) + float(value)
        return values

    def wait_for(self, condition, seconds=60):
        """Until condition(metrics); the metrics then."""
        end = time.monotonic() + seconds * SLOWER
        while True:
            values = self.metrics()
            if condition(values):
                return values
            assert time.monotonic() < end, values
            time.sleep(0.02)

    def wait_until_idle(self):
        return self.wait_for(
            lambda m: (
                m["vllm:num_requests_running"] == 0
                and m["vllm:num_requests_waiting"] == 0
                and m["vllm:kv_cache_usage_perc"] == 0
            )
        )

    def stop(self):
        """By SIGTERM; the exit status and what stood on standard error."""
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(60 * SLOWER)
        self.process.kill()
        return self.process.wait(), self.process.stderr.read()
