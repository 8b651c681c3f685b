"""vLLM with the plug-in from the source tree, found as an installed one is: by the entry point of pyproject.toml.

These tests run in an environment of their own (`make test-vllm`); elsewhere they are left out.
"""

import functools
import importlib.util
import json
import os
import pathlib
import random
import runpy
import subprocess
import sys

import pytest

from tests.vllm.environment import CPU_BUILD, ROOT, make_site
from tests.vllm.environment import environment as vllm_environment
from tests.vllm.needles import Needles

found = importlib.util.find_spec("vllm")
if found is None or found.origin is None:  # nothing, or this folder, which pytest puts in reach
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> pathlib.Path:
    return make_site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="session")
def environment(site, build_folder):
    """environment(**more): of a process that runs vLLM on the CPU."""
    return functools.partial(vllm_environment, site, build_folder)


@pytest.fixture(scope="session")
def ask(environment, tmp_path_factory):
    """ask(model, prompts, spot=None, passes=1, ...): the answer of ask.py; its log is shown when it fails."""

    def run(
        model,
        prompts,
        spot: dict | None = None,
        passes: int = 1,
        sampling: dict | None = None,
        variables: dict | None = None,
        **engine,
    ) -> dict:
        folder = tmp_path_factory.mktemp("ask")
        arguments = {"model": str(model), "max_model_len": 8192, "max_num_seqs": 4, "enforce_eager": True, **engine}
        if spot is not None:
            arguments["additional_config"] = {"spot": {"selector": "spot", **spot}}
        request = {
            "engine": arguments,
            "prompts": prompts,
            "passes": passes,
            "sampling": sampling or {"max_tokens": 10},
        }
        (folder / "request.json").write_text(json.dumps(request))
        command = [sys.executable, pathlib.Path(__file__).with_name("ask.py"), "request.json", "answer.json"]
        variables = environment(**(variables or {}))
        done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=850)
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
        answer = json.loads((folder / "answer.json").read_text())
        answer["log"] = done.stdout + done.stderr
        return answer

    return run


@pytest.fixture(scope="session")
def plugin_path(build_folder):
    """Makes spotattention and transformers' models importable in the test's own process."""
    os.environ.setdefault("SPOT_OPS_LIBRARY", str(build_folder / "libspot_ops.so"))
    sys.path.insert(0, str(ROOT / "python"))
    yield runpy.run_path(str(CPU_BUILD / "sitecustomize.py"))


@pytest.fixture(scope="session")
def needles() -> Needles:
    seed = int(os.environ.get("SPOT_SEED", random.SystemRandom().randrange(2**31)))
    print(f"SPOT_SEED={seed}")
    return Needles(random.Random(seed), 6, 1500)
